"""Every fault of gs://, wherever it hits, is survived or reported; the docs say which."""

from __future__ import annotations

import pytest

from tests.campaigns.fault_matrix import (
    FAULTS,
    PLACES,
    VERDICTS,
    Cell,
    Fault,
    Place,
    both_parts,
    key,
    table,
    table_in_docs,
)


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Cell]:
    return both_parts(tmp_path_factory.mktemp("faults"))


@pytest.mark.timeout(600)  # the first one to ask waits for all
@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place.when}-{place.name}")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_survived_or_reported(fault: Fault, place: Place, cells: dict[str, Cell]) -> None:
    assert cells[key(fault, place)].verdict in (VERDICTS if fault.times is None else ("survived",))


@pytest.mark.timeout(600)
def test_the_table_in_the_docs_is_what_the_matrix_says(cells: dict[str, Cell]) -> None:
    assert table_in_docs() == table({name: cell.verdict for name, cell in cells.items()}), (
        "python -m tests.campaigns.fault_matrix write"
    )
