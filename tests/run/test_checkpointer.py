"""A run as a whole: what it holds, what it leaves behind, and several of them side by side."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import torchorbax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from torch import nn
from torchorbax import Checkpointer, ConfigError, resume

from tests.helpers.fake_runs import fake_run, weights
from tests.helpers.memory_storage import MemoryStorage
from tests.helpers.runs import state, value_of


def test_a_closed_checkpointer_says_so(storage: MemoryStorage) -> None:
    run = fake_run(storage)
    run.close()
    run.close()
    with pytest.raises(ConfigError, match="closed"):
        run.save(0)


def test_nothing_grows_over_many_saves(mesh: Mesh, tmp_path: Path) -> None:
    sharding = NamedSharding(mesh, P("fsdp"))
    change = jax.jit(lambda tree: jax.tree.map(lambda array: array + 1, tree), donate_argnums=0)
    tree = {str(index): jax.device_put(jnp.ones((64, 1 << (6 + index % 6))), sharding) for index in range(100)}
    counts = []
    with Checkpointer(str(tmp_path / "run"), {"tree": tree}, save=None, keep=2, rng=False) as run:
        for step in range(8):
            tree = jax.block_until_ready(change(tree))
            for offset in range(50):
                assert not run.save(100 * step + offset, {"tree": tree})  # nothing to do
            assert run.save(100 * step + 99, {"tree": tree}, force=True)
            run.wait()
            gc.collect()
            files = len([path for path in tmp_path.rglob("*") if path.is_file()])
            counts.append((threading.active_count(), len(jax.live_arrays()), len(os.listdir("/proc/self/fd")), files))
    for what in range(3):
        assert max(count[what] for count in counts[3:]) <= max(count[what] for count in counts[:3]), counts
    assert counts[-1][3] < 2 * counts[1][3], counts  # so many files has OCDBT, give or take some


def test_several_runs_in_one_process(tmp_path: Path) -> None:
    runs = [Checkpointer(str(tmp_path / str(index)), {"w": weights(index)}, keep=None) for index in range(3)]
    for step in range(4):
        for run in runs:
            run.save(step, force=True)
    for index, run in enumerate(runs):
        run.close()
        assert run.all_steps() == torchorbax.verify(run.path) == [0, 1, 2, 3]
        assert torchorbax.load(run.path, item="w")["w"][0] == index


def train_and_fail(run: Checkpointer, live: dict[str, Any], at: int, error: BaseException) -> None:
    with run:
        for step in run.steps(10):
            live["x"]["a"][:] = state(step)["x"]["a"]
            if step == at:
                raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_the_last_complete_step_is_saved_on_an_exception(error: type[BaseException], tmp_path: Path) -> None:
    """Not the state that the failing body had half changed."""
    live = state()
    run = Checkpointer(str(tmp_path), live, rng=False, save=100, save_on_exception=True)
    with pytest.raises(error):
        train_and_fail(run, live, 7, error())
    assert run.all_steps() == [0, 6]
    assert value_of(tmp_path, 6) == pytest.approx(6, abs=1e-5)


def test_no_exception_no_further_save(tmp_path: Path) -> None:
    with Checkpointer(str(tmp_path), state(), rng=False, save=4, save_on_exception=True) as run:
        list(run.steps(6, save_last=False))
    assert run.all_steps() == [0, 4]


def test_a_step_that_was_saved_is_not_saved_again(tmp_path: Path) -> None:
    live = state()
    run = Checkpointer(str(tmp_path), live, rng=False, save=1, save_on_exception=True)
    with pytest.raises(RuntimeError, match="mine") as caught:
        train_and_fail(run, live, 3, RuntimeError("mine"))
    assert run.all_steps() == [0, 1, 2]
    last = f"{tmp_path}: the last committed step is 2; the same program goes on from step 3"
    assert caught.value.__notes__ == [last]


def test_what_was_rolled_back_is_not_saved(tmp_path: Path) -> None:
    live = state()
    run = Checkpointer(str(tmp_path), live, rng=False, save=100, save_on_exception=True)

    def train() -> None:
        with run:
            for step in range(3):
                run.save(step, force=step == 1)
            run.restore(1)
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        train()
    assert run.all_steps() == [0, 1]


def test_a_save_that_is_refused_leaves_the_last_complete_step(tmp_path: Path) -> None:
    run = Checkpointer(str(tmp_path), state(), rng=False, save=100, save_on_exception=True)

    def train() -> None:
        with run:
            for step in range(3):
                run.save(step)
            run.save(3, {"other": 1})

    with pytest.raises(torchorbax.ConfigError, match="save got state for other"):
        train()
    assert run.all_steps() == [0, 2]


def test_what_changes_in_the_users_own_mapping_is_saved_and_comes_back(tmp_path: Path) -> None:
    state: dict[str, Any] = {"epoch": 0, "best": None, "log": ()}
    with resume(nn.Linear(1, 1), None, tmp_path, state=state, save=None) as run:
        state["epoch"] += 1
        run.state["epoch"] += 1
        state["log"] += (0.5,)
        state["best"] = [1.0]
        run.save(0, force=True)
    again: dict[str, Any] = {"epoch": 0, "best": None, "log": ()}
    with resume(nn.Linear(1, 1), None, tmp_path, state=again, save=None) as run:
        assert again == {"epoch": 2, "best": [1.0], "log": (0.5,)}
        assert {name: run.state[name] for name in again} == again
        assert set(run.state) == {"model", "epoch", "best", "log"}


def test_the_mapping_of_a_checkpointer_is_its_state(tmp_path: Path) -> None:
    state: dict[str, Any] = {"epoch": 0}
    with Checkpointer(tmp_path, state, save=None) as run:
        assert run.state is state
        state["epoch"] = 3
        run.save(0, force=True)
        state["epoch"] = 4
        run.restore()
    assert state == {"epoch": 3}


@pytest.mark.parametrize("change", [{"more": 1}, {"model": nn.Linear(2, 2)}], ids=["an entry more", "another model"])
def test_entries_that_are_new_in_the_users_own_mapping_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    state: dict[str, Any] = {"epoch": 0}
    with resume(nn.Linear(1, 1), None, tmp_path, state=state, save=None) as run:
        state |= change
        with pytest.raises(ConfigError, match="has got other entries since the run was opened"):
            run.save(0, force=True)


def test_a_mapping_that_cannot_be_written_to_is_read_once(tmp_path: Path) -> None:
    state = MappingProxyType({"epoch": 0})
    for step in range(2):
        with resume(nn.Linear(1, 1), None, tmp_path, state=state, save=None) as run:
            assert run.state["epoch"] == step
            run.state["epoch"] += 1
            run.save(step, force=True)
    assert state == {"epoch": 0}
