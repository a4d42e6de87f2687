"""Which steps are kept, which is the best, and which are let go."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torchorbax import Checkpointer, ConfigError, StorageError, policies
from torchorbax._src.storage import steps
from torchorbax._src.training.torchax_modes import readable

from tests.helpers.fake_runs import fake_run, weights
from tests.helpers.memory_storage import MemoryStorage


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (1, [5]),
        (3, [3, 4, 5]),
        (None, [0, 1, 2, 3, 4, 5]),
        (policies.EveryNSteps(2), [0, 2, 4, 5]),
        (policies.AnyPreservationPolicy([policies.LatestN(1), policies.CustomSteps([1])]), [1, 5]),
        (policies.BestN(get_metric_fn=lambda metrics: -metrics["loss"], n=1), [2, 5]),
    ],
)
def test_preservation(storage: MemoryStorage, keep: Any, left: list[int]) -> None:
    losses = [5.0, 4.0, 1.0, 3.0, 2.0, 6.0]
    with fake_run(storage, keep=keep) as run:
        for step, loss in enumerate(losses):
            run.save(step, metrics={"loss": loss}, force=True)
        run.wait()
        assert run.all_steps() == left


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("at", range(6))
def test_a_step_whose_loss_is_nan_is_never_the_best(at: int, reverse: bool, storage: MemoryStorage) -> None:
    losses = {0: 0.9, 1: 0.2, 2: 0.5, 3: 0.1, 4: 0.4, 5: 0.7, 6: 0.8} | {at: math.nan}
    sign = 1 if reverse else -1
    keep = policies.BestN(get_metric_fn=lambda metrics: sign * metrics["loss"], reverse=reverse, n=2)
    with fake_run(storage, save=1, keep=keep) as run:
        for step, loss in losses.items():
            run.save(step, metrics={"loss": loss})
            run.wait()
        numbers = [step for step in losses if step != at]
        assert run.all_steps() == sorted({*sorted(numbers, key=losses.__getitem__)[:2], 6})


def test_a_policy_that_asks_for_no_metrics_reads_no_manifest(
    storage: MemoryStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many steps on object storage that takes long."""
    with fake_run(storage, save=1, keep=None) as run:
        list(run.steps(4))
    read: list[int] = []
    manifest = storage.manifest
    monkeypatch.setattr(storage, "manifest", lambda step: (read.append(step), manifest(step))[1])
    with fake_run(storage, save=1, keep=2) as run:
        run.save(9)
        run.wait()
        assert run.all_steps() == [3, 9]
    assert set(read) <= {3}


def test_best_step_and_metrics_of_any_kind(storage: MemoryStorage) -> None:
    with fake_run(storage, keep=None) as run:
        assert run.best_step("loss") is None
        for step, value in enumerate((3.0, torch.tensor(1.0), jnp.float32(2.0), np.float64(4.0))):
            run.save(step, metrics={"loss": value}, force=True)
        run.save(4, metrics={"other": readable(jnp.float32(0.5))}, force=True)
        run.wait()
        assert run.best_step("loss") == 1
        assert run.best_step("loss", mode="max") == 3
        assert run.best_step("other") == 4
        with pytest.raises(ConfigError, match="mode must be"):
            run.best_step("loss", mode="median")
    assert storage.committed[1].metrics == {"loss": 1.0}


class Failing:
    """A method of a storage that fails for a while.

    Attributes:
        calls: the arguments that it has been called with.
        error: what it raises; None if it works.
        fails_for: the arguments for which it fails; empty for all.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, storage: MemoryStorage, name: str, error: Exception) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.error: Exception | None = error
        self.fails_for: set[tuple[Any, ...]] = set()
        self._works = getattr(storage, name)
        monkeypatch.setattr(storage, name, self)

    def __call__(self, *args: Any) -> Any:
        self.calls.append(args)
        if self.error is not None and (not self.fails_for or args in self.fails_for):
            raise self.error
        return self._works(*args)


def save_each(run: Checkpointer, *steps: int) -> None:
    for step in steps:
        run.save(step, force=True)
        run.wait()


ERRORS = [PermissionError("not now"), StorageError("run", "a hold on the object"), ValueError("of some library")]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_a_step_that_cannot_be_deleted_is_tried_again_at_each_retention(
    storage: MemoryStorage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    with fake_run(storage, keep=None) as run:
        save_each(run, 0, 1)
    delete = Failing(monkeypatch, storage, "delete", error)
    delete.fails_for = {(0,)}
    with fake_run(storage, keep=1) as run:
        save_each(run, 2, 3)
        assert run.all_steps() == [0, 3], "it stops no other deletion"
        assert caplog.text.count("step 0 could not be deleted, trying later") == 2
        delete.error = None
        save_each(run, 4)
        assert run.all_steps() == [4]
        assert all(record.error is None for record in run.history)


def test_what_is_left_of_a_deletion_is_tried_again_though_it_is_not_listed(
    storage: MemoryStorage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A step is renamed before its files are deleted."""
    delete = storage.delete

    def half(step: int) -> None:
        delete(step)
        monkeypatch.setattr(storage, "delete", delete)
        raise OSError("an unlink failed")

    with fake_run(storage, keep=1) as run:
        save_each(run, 0)
        monkeypatch.setattr(storage, "delete", half)
        save_each(run, 1)
        assert storage.log.count("clean") == 1
        leftovers = Failing(monkeypatch, storage, "remove_leftovers", OSError("still fails"))
        save_each(run, 2, 3)
        assert len(leftovers.calls) == 4, "before and after each save"
        leftovers.error = None
        save_each(run, 4, 5)
        assert len(leftovers.calls) == 5
        assert storage.log.count("clean") == 2
        assert run.all_steps() == [5]
        assert 0 not in run._main.steps.infos
    assert "step 0 could not be deleted, trying later: OSError: an unlink failed" in caplog.text
    assert "what is left of interrupted saves could not be deleted, trying later: OSError: still fails" in caplog.text


def test_leftovers_that_cannot_be_removed_cost_no_save(
    storage: MemoryStorage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    leftovers = Failing(monkeypatch, storage, "remove_leftovers", PermissionError("somebody else's"))
    with fake_run(storage, keep=1) as run:
        save_each(run, 0)
        assert len(leftovers.calls) == 2
        leftovers.error = None
        save_each(run, 1)
    assert storage.steps() == [1]
    assert "could not be deleted, trying later: PermissionError: somebody else's" in caplog.text


def test_a_storage_that_does_not_answer_is_not_asked_for_each_deletion(
    storage: MemoryStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would take as long to fail."""
    now = [0.0]
    monkeypatch.setattr(steps, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with fake_run(storage, keep=None) as run:
        save_each(run, *range(5))
    tried: list[int] = []

    def slow(step: int) -> None:
        tried.append(step)
        now[0] += 40.0
        raise StorageError("run", "no answer")

    with fake_run(storage, keep=1) as run:
        with monkeypatch.context() as patch:
            patch.setattr(storage, "delete", slow)
            save_each(run, 5)
            assert tried == [0, 1]
            save_each(run, 6)
            assert tried == [0, 1, 0, 1]
        save_each(run, 7)
        assert run.all_steps() == [7]


def test_a_listing_that_fails_costs_no_save(
    storage: MemoryStorage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with fake_run(storage, save=None, keep=1) as run:
        save_each(run, 0)
        listing = Failing(monkeypatch, storage, "steps", StorageError("run", "no answer"))
        listing.error = None
        write = storage.write

        def write_then_lose_the_network(*args: Any) -> Any:
            manifest = write(*args)
            listing.error = StorageError("run", "no answer")
            return manifest

        monkeypatch.setattr(storage, "write", write_then_lose_the_network)
        save_each(run, 1)
        listing.error = None
    assert "no step can be deleted now: StorageError: run: the storage does not answer" in caplog.text
    assert storage.steps() == [0, 1]


def test_a_base_that_cannot_be_deleted_is_tried_again(
    storage: MemoryStorage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with fake_run(storage, keep=1) as run:
        save_each(run, 0)
        for base in (7, 8):
            storage.bases.committed[base] = storage.committed[0]
            storage.bases._arrays[base] = {}
        delete = Failing(monkeypatch, storage.bases, "delete", PermissionError("not now"))
        delete.fails_for = {(7,)}
        save_each(run, 1)
        assert storage.bases.steps() == [7]
        delete.error = None
        save_each(run, 2)
        assert storage.bases.steps() == []
    assert "base 7 could not be deleted, trying later: PermissionError: not now" in caplog.text
    assert storage.steps() == [2]


def test_the_best_of_nan_and_of_deleted_steps(storage: MemoryStorage) -> None:
    with fake_run(storage, keep=None) as run:
        for step, loss in enumerate([float("nan"), 3.0, 1.0]):
            run.save(step, metrics={"loss": loss}, force=True)
        run.wait()
        assert (run.best_step("loss"), run.best_step("loss", "max")) == (2, 1)
        del storage.committed[2]  # by somebody else
        assert run.best_step("loss") == 1


def test_a_step_that_somebody_deleted_stops_nothing(tmp_path: Path) -> None:
    with Checkpointer(str(tmp_path), {"w": weights()}, rng=False) as run:
        run.save(0, force=True)
    with Checkpointer(str(tmp_path), {"w": weights()}, rng=False) as run:
        shutil.rmtree(tmp_path / "0")
        assert run.save(1)
        assert run.best_step("loss") is None
    assert run.all_steps() == [1]
