"""The simulated training program: it opens the run, restores, saves its steps one after another, and closes the run."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import numpy as np
from torchorbax import (
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    OwnershipError,
    ProcessError,
    SaveError,
    StorageError,
)
from torchorbax._src.distributed.channel import Channel
from torchorbax._src.distributed.processes import Processes, Service
from torchorbax._src.run.options import RunOptions
from torchorbax._src.run.preemption import PreemptionNotice
from torchorbax._src.run.step_choice import Restorer
from torchorbax._src.run.tier import Tier, open_tiers
from torchorbax._src.run.timings import Stopwatch
from torchorbax._src.save.save import Save, SaveRecord
from torchorbax._src.state.capture import capture_all
from torchorbax._src.state.item import Captured, Item
from torchorbax._src.state.pytrees import PytreeItem
from torchorbax._src.state.request import Request

from tests.simulation.scheduler import Process, Scheduler

BARRIER_TIMEOUT_S = 90.0
"""Longer than it takes to wait for an owner that is gone."""
STORAGE_TIMEOUT_S = 20.0
_SHUTDOWN_S = 60.0
Outcome = Literal["committed", "failed", "unknown"]


@dataclass(frozen=True)
class Saved:
    """What a process learned of a save."""

    program: int
    process: int
    step: int
    outcome: Outcome
    at: float
    why: str


@dataclass(frozen=True)
class Came:
    """What a process restored, or why it could not.

    Attributes:
        began: when the process had opened the run.
        step: None for a fresh start.
        values: what it found in its state: program, step and process that had saved it; None if it has none.
        error: the error, if there was one.
    """

    program: int
    process: int
    began: float
    step: int | None
    values: tuple[int, ...] | None
    error: str = ""


@dataclass
class History:
    """What the processes of a simulation have learned.

    Attributes:
        saved: the outcomes of saves.
        came: the restores.
        opened: seconds that opening took, by process.
        waits: waits for other processes that took longer than they may.
    """

    saved: list[Saved] = field(default_factory=list)
    came: list[Came] = field(default_factory=list)
    opened: dict[str, float] = field(default_factory=dict)
    waits: list[str] = field(default_factory=list)


class _Notice(PreemptionNotice):
    """SIGTERM never comes."""

    def __init__(self) -> None:
        pass


class _WithFrozen:
    """An item with one frozen leaf, `frozen`."""

    kind = PytreeItem.kind

    def __init__(self, item: PytreeItem) -> None:
        self._item = item
        self.plan = item.plan
        self.apply = item.apply

    def capture(self, handed: Any = None) -> Captured:
        return dataclasses.replace(self._item.capture(handed), frozen=frozenset({"frozen"}))


def _weights(program: int, step: int, process: int) -> dict[str, np.ndarray]:
    return {"w": np.array([program, step, process], np.int32)}


class TrainingProcess:
    """One process of a program.

    Args:
        process: where it runs.
        scheduler: runs it.
        service: the program's coordination service.
        path: of the run.
        processes: how many the program has.
        steps: how many it runs.
        options: of the run.
        frozen: has its state frozen parameters?
        history: what it learns.
    """

    def __init__(
        self,
        process: Process,
        scheduler: Scheduler,
        service: Service | None,
        path: str,
        processes: int,
        steps: int,
        options: RunOptions,
        *,
        frozen: bool,
        history: History,
    ) -> None:
        self._process = process
        self._scheduler = scheduler
        self._service = service
        self._path = path
        self._count = processes
        self._steps = steps
        self._options = options
        self._history = history
        self._state: dict[str, Any] = {"model": self._values(-1), "loader": {"at": np.array(-1, np.int64)}}
        self._items: dict[str, Item] = {name: PytreeItem(name, self._state, name) for name in self._state}
        if frozen:
            self._state["base"] = {"frozen": jax.numpy.arange(3.0)}
            self._items["base"] = _WithFrozen(PytreeItem("base", self._state, "base"))

    def run(self) -> None:
        """Run to the end, whatever comes."""
        try:
            self._run()
        except (OwnershipError, ProcessError, StorageError, CorruptCheckpointError, CheckpointNotFoundError):
            pass  # a program ends with it
        except ConfigError as error:  # a step is there already
            if "newest step" not in str(error) and "already saved" not in str(error):
                raise
        finally:
            self._scheduler.end(self._process)

    def _run(self) -> None:
        index, began = self._process.index, self._scheduler.now - self._process.stopped_s
        processes = Processes(BARRIER_TIMEOUT_S, self._service, index, self._count, name="run")
        channel = Channel(processes, "run")
        # Open.
        try:
            tier, _ = open_tiers(self._path, self._items, self._options, channel, _Notice())
        except ConfigError as error:
            self._check_refusal(error)
            return
        finally:
            took_s = self._scheduler.now - self._process.stopped_s - began
            self._note(lambda: self._history.opened.update({str(self._process): took_s}))
        self._process.kept.append(tier)
        # Restore.
        next_step = self._restored(tier, channel)
        # Train and save.
        for step in range(next_step, next_step + self._steps):
            self._state["model"].update(self._values(step))
            self._state["loader"]["at"] = np.array(step, np.int64)
            self._scheduler.sleep(self._process.draw.random() * 2.0)
            self._save(tier, step)
        # Close. As `jax.distributed.shutdown` does, process 0 waits for the others, which need its service.
        tier.storage.release()
        processes.close()
        others = [one for one in self._scheduler.processes if one.program == self._process.program and one.index]
        until = self._scheduler.now + _SHUTDOWN_S
        while index == 0 and any(one.alive for one in others) and self._scheduler.now < until:
            self._scheduler.sleep(1.0)

    def _values(self, step: int) -> dict[str, np.ndarray]:
        return _weights(self._process.program, step, self._process.index)

    def _restored(self, tier: Tier, channel: Channel) -> int:
        """Restore, and return the next step."""
        began = self._scheduler.now
        restorer = Restorer(self._items, None, tier, None, channel, Stopwatch(), verify=True)
        program, index = self._process.program, self._process.index
        try:
            found = restorer.restore(tier.storage, None, Request())
        except Exception as error:
            came = Came(program, index, began, None, None, f"{type(error).__name__}: {error}")
            self._note(lambda: self._history.came.append(came))
            raise
        step = None if found is None else found.manifest.step
        values = None if found is None else tuple(map(int, self._state["model"]["w"]))
        came = Came(program, index, began, step, values)
        self._note(lambda: self._history.came.append(came))
        if found is not None and int(self._state["loader"]["at"]) != step:
            raise RuntimeError(f"step {step} was restored with another loader: {self._state['loader']}")
        return 0 if step is None else step + 1

    def _save(self, tier: Tier, step: int) -> None:
        tier.check_step(step)
        snapshot = tier.take(capture_all(self._items, {}), "reference")
        time = datetime.datetime.fromtimestamp(1.75e9 + self._scheduler.now, datetime.UTC)
        record = tier.start(Save(step, time, {}, self._scheduler.now, snapshot))
        tier.saver.collect()
        tier.saver.take_unreported()
        saved = Saved(
            self._process.program,
            self._process.index,
            step,
            _outcome(record),
            self._scheduler.now,
            "" if record.error is None else str(record.error),
        )
        self._note(lambda: self._history.saved.append(saved))

    def _note(self, note: Callable[[], object]) -> None:
        """Note what this process learns, unless it has been killed."""
        if self._process.alive:
            note()

    def _check_refusal(self, error: ConfigError) -> None:
        """A run may be refused because the storage does not answer, and for no other reason."""
        unanswered = "cannot be used for a run" in str(error) or "cannot be seen here" in str(error)
        if not unanswered or "FileNotFoundError" in str(error):
            raise error


def _outcome(record: SaveRecord) -> Outcome:
    error: SaveError | None = record.error
    if error is None or error.committed or record.commit_s is not None:
        return "committed"
    return "unknown" if "does not say how the save ended" in error.reason else "failed"
