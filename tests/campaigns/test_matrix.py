"""Every loop, optimizer and kind of state is the same run after a resume in another process; the docs say which."""

from __future__ import annotations

import pytest

from tests.campaigns.matrix import DOES_NOT_TRAIN, PAGE, Combination, both_parts, combinations, page


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[Combination, str]:
    return both_parts(tmp_path_factory.mktemp("matrix"))


@pytest.mark.timeout(600)  # the first one to ask waits for all
@pytest.mark.parametrize("one", combinations(), ids=str)
def test_a_resumed_run_is_the_same_run(one: Combination, verdicts: dict[Combination, str]) -> None:
    verdict = verdicts[one]
    if verdict.startswith("does not train: "):  # torchax or the optimizer cannot, before any checkpoint
        assert one.optimizer in DOES_NOT_TRAIN
    else:
        assert verdict == "bitwise"


def test_the_page_in_the_docs_is_what_the_matrix_says(verdicts: dict[Combination, str]) -> None:
    assert PAGE.read_text() == page(verdicts), "python -m tests.campaigns.matrix write"
