"""Which steps are kept, which is the best, and which are let go."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torchorbax import Checkpointer, ConfigError, policies
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


def test_a_step_that_cannot_be_deleted_is_tried_again(storage: MemoryStorage, caplog: pytest.LogCaptureFixture) -> None:
    delete = storage.delete

    def failing(step: int) -> None:
        storage.delete = delete  # type: ignore[method-assign]
        raise PermissionError("not now")

    storage.delete = failing  # type: ignore[method-assign]
    with fake_run(storage, keep=1) as run:
        for step in range(3):
            run.save(step, force=True)
        run.wait()
        assert run.all_steps() == [2]
    assert "step 0 could not be deleted" in caplog.text


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
