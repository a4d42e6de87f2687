"""Two tiers: frequent saves to a fast folder of each host, rarer ones to the path, and where a restore takes a step."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from torchorbax import Checkpointer, ConfigError, SaveError, load, verify

from tests.helpers.tiers import host, opened, train, tree, value_of


def test_each_tier_has_policies_of_its_own(tmp_path: Path) -> None:
    with opened(tmp_path, keep=None) as run:
        train(run, 0, 11)
        assert run.all_steps() == [0, 4, 8]
        assert verify(host(tmp_path)) == [9, 10]
        assert sorted((record.step, Path(record.path).name) for record in run.history) == sorted(
            [(step, "process_0") for step in range(11)] + [(step, "rare") for step in (0, 4, 8)]
        )
        assert all(record.commit_s is not None for record in run.history)
    assert verify(str(tmp_path / "rare")) == [0, 4, 8]


def test_a_restore_takes_the_newest_step_of_either(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        train(run, 0, 11)
    with opened(tmp_path) as run:
        assert run.restore() == 10
        assert value_of(run) == 10
        assert run.next_step == 11
        train(run, 11, 12)
    shutil.rmtree(tmp_path / "fast")  # the machine was another one
    with opened(tmp_path) as run:
        assert run.restore() == 8
        assert value_of(run) == 8
        train(run, 9, 10)
        assert verify(host(tmp_path)) == [9]


def test_a_step_asked_for_comes_from_where_it_is(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        train(run, 0, 11)
        assert (run.restore(9), value_of(run)) == (9, 9)
        assert (run.restore(4), value_of(run)) == (4, 4)
        with pytest.raises(FileNotFoundError, match="no step 5"):
            run.restore(5)


def test_the_fast_tier_goes_on_while_the_slow_one_is_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path, save=100) as run:
        go, write = threading.Event(), run._main.storage.write

        def slow(*args: Any) -> Any:
            assert go.wait(60)
            return write(*args)

        monkeypatch.setattr(run._main.storage, "write", slow)
        for step in range(6):
            run.save(step, {"state": tree(step)})
        run._local.saver.collect()  # type: ignore[union-attr]
        assert run.all_steps() == []
        assert verify(host(tmp_path)) == [4, 5]
        go.set()
        run.wait()
        assert run.all_steps() == [0]
    assert float(load(str(tmp_path / "rare"), item="state")["w"][0, 0]) == 0


def test_both_tiers_saving_at_once_over_and_over(tmp_path: Path) -> None:
    """Orbax numbers its operations per process."""
    with opened(tmp_path, save=1, keep=None, local_keep=None) as run:
        train(run, 0, 30)
        assert run.all_steps() == list(range(30))
    assert verify(host(tmp_path)) == verify(str(tmp_path / "rare")) == list(range(30))


def test_forced_saves_go_to_the_path(tmp_path: Path) -> None:
    with opened(tmp_path, save=None, local_save=None) as run:
        assert run.save(3, {"state": tree(3)}, force=True)
        run.wait()
        assert run.all_steps() == [3]
    assert not Path(host(tmp_path), "3").exists()


def test_an_error_of_the_fast_tier_is_told_and_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path, save=1) as run:

        def full(*args: Any) -> Any:
            raise OSError("No space left on device")

        monkeypatch.setattr(run._local.storage, "write", full)  # type: ignore[union-attr]
        run.save(0, {"state": tree(0)})
        with pytest.raises(SaveError, match="process_0: step 0 was not saved: OSError: No space left"):
            run.wait()
        monkeypatch.undo()
        assert run.all_steps() == [0]
        run.save(1, {"state": tree(1)})
        run.wait()
        assert verify(host(tmp_path)) == [1]


def test_a_step_that_the_fast_tier_has_can_still_be_forced(tmp_path: Path) -> None:
    with opened(tmp_path, save=None) as run:
        assert run.save(3, {"state": tree(3)})
        assert run.save(3, {"state": tree(3)}, force=True)
        run.wait()
        assert run.all_steps() == verify(host(tmp_path)) == [3]


def test_restoring_an_older_step_leaves_the_newer_ones_alone(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        train(run, 0, 11)
        assert run.restore(8) == 8
        assert (run.restore(), value_of(run)) == (10, 10)


def test_errors_of_both_tiers_are_told_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = opened(tmp_path, save=1)

    def full(*args: Any) -> Any:
        raise OSError("No space left on device")

    for tier in run._tiers:
        monkeypatch.setattr(tier.storage, "write", full)
    run.save(0, {"state": tree(0)})
    with pytest.raises(SaveError, match="rare: step 0 was not saved") as caught:
        run.close()
    assert "process_0: step 0 was not saved" in "".join(caught.value.__notes__)


def test_a_local_tier_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="local must be a folder on each host, not gs://bucket/run"):
        Checkpointer(tmp_path / "run", {"state": tree(0)}, local="gs://bucket/run")
