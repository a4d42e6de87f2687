"""This library and raw Orbax, with the same methods; `torch_peers` has the others."""

from __future__ import annotations

import datetime
import math
import time
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import torchorbax
from orbax.checkpoint import checkpoint_managers as policies
from torchorbax.policies import ContinuousPolicy

from benchmarks.measure import timed
from benchmarks.states import Tree, abstract

HOUR = datetime.timedelta(hours=1)


class Ours:
    """torchorbax, fingerprints on."""

    def __init__(self, folder: Path | str, tree: Tree, staging: Any = "auto", save: Any = None, **options: Any) -> None:
        self._tree = tree
        self._run = torchorbax.Checkpointer(
            str(folder), {"model": tree}, save=save, keep=1, rng=False, staging=staging, **options
        )

    def save(self, tree: Tree) -> dict[str, float]:
        """Seconds that the loop waits, until the step is committed, and until the step before is deleted, too."""
        started = time.perf_counter()
        self._run.save(self._run.next_step, {"model": tree}, force=True)
        stall_s = time.perf_counter() - started
        self._run.wait()
        deleted_s = time.perf_counter() - started
        return {"stall_s": stall_s, "commit_s": self._run.history[-1].commit_s or math.nan, "deleted_s": deleted_s}

    def check_owner(self) -> float:
        """Seconds that it takes to see that the run is still this program's."""
        return timed(self._run._main.storage.check_owned)

    def offer(self, step: int, tree: Tree) -> bool:
        """`save` as a loop calls it after every step."""
        return self._run.save(step, {"model": tree})

    def restore(self) -> dict[str, float]:
        """Into the tree given at first, on today's devices."""
        return {"restore_s": timed(self._run.restore)}

    def wait(self) -> None:
        """For the save in flight."""
        self._run.wait()

    def close(self) -> None:
        """Let go."""
        self._run.close()


class Orbax:
    """Raw `CheckpointManager` with its defaults."""

    def __init__(self, folder: Path | str, tree: Tree, continuous: Any = None) -> None:
        policy = (
            None if continuous is None else policies.ContinuousCheckpointingPolicy(minimum_interval_secs=continuous)
        )
        keep = None if continuous is None else 1  # its default is to keep all
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, save_decision_policy=policy)
        self._manager = ocp.CheckpointManager(folder, options=options)
        self._abstract = abstract(tree)
        self._step = self._manager.latest_step() or 0

    def save(self, tree: Tree) -> dict[str, float]:
        """Seconds that the loop waits, until the step is committed, and until the step before is deleted, too."""
        self._step += 1
        started = time.perf_counter()
        self._manager.save(self._step, args=ocp.args.PyTreeSave(tree), force=True)
        stall_s = time.perf_counter() - started
        self._manager.wait_until_finished()
        commit_s = time.perf_counter() - started
        if self._step > 1:
            self._manager.delete(self._step - 1)
        return {"stall_s": stall_s, "commit_s": commit_s, "deleted_s": time.perf_counter() - started}

    def offer(self, step: int, tree: Tree) -> bool:
        """`save` as a loop calls it after every step."""
        return bool(self._manager.save(step, args=ocp.args.PyTreeSave(tree)))

    def restore(self) -> dict[str, float]:
        """Onto today's devices."""
        args = ocp.args.PyTreeRestore(
            item=self._abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(self._abstract)
        )
        step = self._manager.latest_step()
        return {"restore_s": timed(lambda: jax.block_until_ready(self._manager.restore(step, args=args)))}

    def wait(self) -> None:
        """For the save in flight."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Let go."""
        self._manager.close()


def never() -> ContinuousPolicy:
    """A policy of ours that says no, after the first save, by looking at the time."""
    return ContinuousPolicy(HOUR)
