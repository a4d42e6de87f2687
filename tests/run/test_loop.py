"""The loop around training steps: its progress bar, its body's own saves, and its end."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torchorbax
from torch import nn
from torchorbax import Checkpointer, ConfigError, policies

from tests.helpers.fake_runs import fake_run, weights
from tests.helpers.memory_storage import MemoryStorage
from tests.helpers.models import batch_of, loss_fn, objects


def test_hand_written_loop_with_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, optimizer, _ = objects("sgd")
    step = torchorbax.train_step(model, optimizer, loss_fn)
    run = torchorbax.resume(model, optimizer, "runs/a", save=2, keep=None)
    monkeypatch.chdir("/")
    started = [run.save(i, metrics={"loss": step(batch_of(i))}) for i in range(run.next_step, 5)]
    run.close()
    assert started == [True, False, True, False, True]
    assert Checkpointer(str(tmp_path / "runs" / "a"), {}, rng=False).all_steps() == [0, 2, 4]


def test_functional_loop(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    params = {name: jnp.asarray(value.detach().numpy()) for name, value in model.named_parameters()}
    tx = optax.adam(0.1)
    opt_state = tx.init(params)
    torchorbax.place_(model)

    @jax.jit
    def step(params: Any, opt_state: Any) -> Any:
        grads = jax.grad(lambda p: (p["weight"] ** 2).sum() + p["bias"].sum())(params)
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state

    path = str(tmp_path / "run")
    with torchorbax.resume(model, None, path, state={"opt": tx.init(params)}) as run:
        for i in range(3):
            params, opt_state = step(params, opt_state)
            run.save(i, {"model": params, "opt": opt_state}, force=True)
        with pytest.raises(ConfigError, match="save got state for optimiser"):
            run.save(9, {"optimiser": opt_state}, force=True)
        with pytest.raises(torchorbax.MismatchError, match="weight: shape"):
            run.save(9, {"model": {"weight": params["bias"]}}, force=True)
        with pytest.raises(torchorbax.MismatchError, match="wieght: found float32"):
            run.save(9, {"model": {"wieght": params["weight"]}}, force=True)

    fresh = nn.Linear(3, 2)
    with torchorbax.resume(fresh, None, path, state={"opt": tx.init(params)}) as run:
        assert run.step == 2
        jax.tree.map(np.testing.assert_array_equal, run.state["opt"], opt_state)
    np.testing.assert_array_equal(fresh.weight.detach().numpy(), params["weight"])


def test_progress_bar_shows_metrics_that_are_ready(storage: MemoryStorage, capsys: pytest.CaptureFixture[str]) -> None:
    with fake_run(storage) as run:
        for _ in run.steps(3, progress=True):
            run.log(loss=0.25)
    shown = capsys.readouterr().err
    assert "loss=0.25" in shown
    assert "3/3" in shown


def test_a_body_that_saves_itself_is_left_to_it(storage: MemoryStorage) -> None:
    with fake_run(storage) as run:
        for step in run.steps(3):
            if step != 1:
                run.save(step, {"w": weights(float(step))}, force=True)
                run.wait()
    assert [record.step for record in run.history] == [0, 1, 2]


def test_breaking_out_of_the_loop_saves_no_half_step(storage: MemoryStorage) -> None:
    with fake_run(storage) as run:
        for step in run.steps(10):
            run.wait()
            if step == 2:
                break
        assert run.next_step == 2
    assert storage.steps() == [0, 1]


def test_a_last_step_that_was_not_due_is_told(storage: MemoryStorage, caplog: pytest.LogCaptureFixture) -> None:
    with fake_run(storage, save=5) as run:
        assert len(list(run.steps(8, save_last=False))) == 8
        assert "the last step, 7, was not due and is not saved; the newest saved is 5" in caplog.text
        caplog.clear()
        assert list(run.steps(11, save_last=False)) == [8, 9, 10]
        assert not caplog.records


@pytest.mark.parametrize("saves_itself", [False, True])
@pytest.mark.parametrize("policy", [5, policies.SpecificStepsPolicy([0, 3]), datetime.timedelta(hours=1)], ids=repr)
def test_the_last_step_is_saved_whatever_the_policy(policy: Any, saves_itself: bool, storage: MemoryStorage) -> None:
    with fake_run(storage, save=policy, keep=None) as run:
        for step in run.steps(8):
            if saves_itself:
                run.save(step, {"w": weights(step + 1.0)}, metrics={"loss": step})
    assert storage.steps()[-1] == 7
    if saves_itself:
        assert storage.committed[7].metrics == {"loss": 7.0}
        assert float(storage.read(7, storage.manifest(7).leaves, {("w", "w"): None})["w", "w"][0]) == 8.0


def test_a_run_that_saves_nothing_by_itself_does_not_save_its_last_step(storage: MemoryStorage) -> None:
    with fake_run(storage, save=None) as run:
        assert len(list(run.steps(3))) == 3
    assert storage.steps() == []
