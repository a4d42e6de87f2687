"""Steps that are read back after their commit: a machine that writes wrong bytes loses no good step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torchorbax import Checkpointer, ConfigError, SaveError, StorageError, verify
from torchorbax._src.save import read_back
from torchorbax._src.storage import array_writer
from torchorbax._src.verification import step_check

from tests.helpers.runs import save_and_wait, state, visible


@pytest.fixture
def sick(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """While its only element is true, one bit of the array data changes on its way to the disk."""
    write, on = array_writer.write, [False]

    def flipping(folders: Mapping[str, str], *args: Any, **kwargs: Any) -> Any:
        sums = write(folders, *args, **kwargs)
        if on[0]:
            files = (path for folder in folders.values() for path in Path(folder).rglob("d/*"))
            file = max(files, key=lambda path: path.stat().st_size)
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 4
            file.write_bytes(content)
        return sums

    monkeypatch.setattr(array_writer, "write", flipping)
    return on


def test_a_good_step_never_goes_for_one_that_is_not_what_was_saved(tmp_path: Path, sick: list[bool]) -> None:
    with Checkpointer(tmp_path, state(), save=None, rng=False, keep=1) as run:
        save_and_wait(run, 0)
        sick[0] = True
        for step in (1, 2):
            with pytest.raises(SaveError, match=rf"step {step} was not saved: what is read back is not what was saved"):
                save_and_wait(run, step)
            assert run.all_steps() == [0]
        sick[0] = False
        save_and_wait(run, 3)
        assert run.all_steps() == verify(run.path) == [3]
        assert [record.error is None for record in run.history] == [True, False, False, True]
    # Damaged steps stay under other names, to be looked at.
    assert visible(tmp_path) == ["1.torchorbax-damaged", "2.torchorbax-damaged", "3"]


def test_the_first_step_of_a_life_is_read_back(tmp_path: Path, sick: list[bool]) -> None:
    sick[0] = True
    with Checkpointer(tmp_path, state(), save=None, rng=False, keep=None) as run, pytest.raises(SaveError):
        save_and_wait(run, 0)


@pytest.mark.parametrize(
    ("which", "keep", "expected"),
    [
        ("first", None, [0, 10, 20]),
        ("first", 3, [0, 3, 6, 9, 12, 15, 18, 21, 24]),  # before the last step that was read back would go
        (True, 3, list(range(25))),
        (False, 1, []),
    ],
)
def test_which_steps_are_read_back(
    which: Any, keep: int | None, expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[int] = []
    check = step_check.check_step

    def noting(storage: Any, manifest: Any, **options: Any) -> None:
        checked.append(manifest.step)
        check(storage, manifest, **options)

    monkeypatch.setattr("torchorbax._src.save.read_back.check_step", noting)
    with Checkpointer(tmp_path, state(), save=1, rng=False, keep=keep, verify_after_save=which) as run:
        for step in range(25):
            save_and_wait(run, step)
    assert checked == expected


def test_a_step_that_was_restored_need_not_be_read_back_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Checkpointer(tmp_path, state(), save=None, rng=False, verify_after_save=False) as run:
        save_and_wait(run, 0)
    with Checkpointer(tmp_path, state(), save=None, rng=False) as run:
        run.restore()
        assert run._main.steps.proved == {0}


def test_old_steps_are_read_again_one_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpointer(tmp_path, state(), save=None, rng=False, keep=None) as run:
        for step in range(3):
            save_and_wait(run, step)
        monkeypatch.setattr(read_back, "SCRUB_AFTER_S", 0.0)
        file = max((tmp_path / "1").rglob("d/*"), key=lambda path: path.stat().st_size)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
        for step in range(3, 6):
            save_and_wait(run, step)
        assert run.all_steps() == [0, 2, 3, 4, 5]
    assert "step 1: the data of x: a is not what was saved" in caplog.text
    assert caplog.text.count("is not what was saved") == 1


def test_a_scrub_that_cannot_read_costs_no_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpointer(tmp_path, state(), save=None, rng=False, keep=None) as run:
        save_and_wait(run, 0)
        monkeypatch.setattr(read_back, "SCRUB_AFTER_S", 0.0)

        def fail(*args: Any, **kwargs: Any) -> None:
            raise StorageError(run.path, "no answer")

        monkeypatch.setattr(read_back, "check_step", fail)
        save_and_wait(run, 1)
        assert run.all_steps() == [0, 1]
    assert "old step 0 could not be read again" in caplog.text


def test_other_values_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="verify_after_save must be 'first', True or False, not 'last'"):
        Checkpointer(tmp_path, {}, verify_after_save="last")  # type: ignore[arg-type]  # refused
