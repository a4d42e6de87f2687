"""One save at a time, in the background: written, committed, older steps let go, errors kept for the caller."""

from __future__ import annotations

import datetime
import functools
import logging
import os
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from torchorbax._src.format.manifest import Manifest
from torchorbax._src.run import at_exit
from torchorbax._src.save.frozen import Identities
from torchorbax._src.save.snapshot import Snapshot, Ticket, Written
from torchorbax._src.save.writer import Writer
from torchorbax._src.storage.steps import Steps
from torchorbax.errors import ProcessError, SaveError

_logger = logging.getLogger(__name__)


@dataclass
class SaveRecord:
    """One save of this process.

    Attributes:
        step: the step saved.
        time: when `save` was called, in UTC.
        stall_s: seconds that `save` kept the loop, waiting for an earlier save included.
        commit_s: seconds from the call until the step was committed; None while in flight or if it failed.
        nbytes: bytes of arrays written, each counted once; frozen parameters that a base has are not.
        metrics: the numbers given with it; complete once it is committed.
        error: why it failed, if it did.
        path: where it was saved.
    """

    step: int
    time: datetime.datetime
    stall_s: float = 0.0
    commit_s: float | None = None
    nbytes: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    error: SaveError | None = None
    path: str = ""


def _new_executor() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "torchorbax-save")


def _tell(untold: Sequence[SaveError], pid: int) -> None:
    """Log the error of a run that has been dropped, so that nobody can be told."""
    if pid == os.getpid():  # else it is the parent's
        for error in untold:
            _logger.error("%s", error)


class Saver:
    """Writes snapshots, never two at a time.

    Args:
        path: of the run, for messages.
        steps: those there are.
        writer: writes one.
        raises: errors are for the caller; else they are logged.
    """

    def __init__(self, path: str, steps: Steps, writer: Writer, *, raises: bool = True) -> None:
        self._raises = raises
        self._path = path
        self._steps = steps
        self._writer = writer
        # One thread for all saves: `submit` returns at once, while the start of a thread waits until it runs.
        self._executor = _new_executor()
        self._pid = os.getpid()
        self._work_in_flight: Future[None] | None = None
        self._record: SaveRecord | None = None
        self._unreported: SaveError | None = None
        self._untold: list[SaveError] = []  # the same, from the moment it happens on
        weakref.finalize(self, _tell, self._untold, self._pid)
        self._committed: tuple[Manifest, Identities] | None = None

    @property
    def step_in_flight(self) -> int | None:
        """The step that is being written now."""
        if self._record is None or self._work_in_flight is None or self._work_in_flight.done():
            return None
        return self._record.step

    def prepare(self) -> None:
        """Start the thread, so that the first save need not."""
        self._executor.submit(int)

    def start(
        self, record: SaveRecord, snapshot: Snapshot | Exception, metrics: Mapping[str, Any], started_s: float
    ) -> None:
        """Write `snapshot` in the background. The save before must have been collected.

        Args:
            record: filled in as the save goes on.
            snapshot: what to write, let go as soon as it is written; or why there is none, for the other processes.
            metrics: numbers or 0-d arrays, read on the background thread.
            started_s: `time.perf_counter()` at the call of `save`.
        """
        self._steps.start(record.step, record.time)
        self._record = record
        work = functools.partial(self._work, record, [snapshot], metrics, started_s)
        if self._pid != os.getpid():  # forked, and the thread has stayed behind
            self._executor, self._pid = _new_executor(), os.getpid()
        self._work_in_flight = self._executor.submit(work)
        at_exit.saving(self._work_in_flight, self._path)

    def collect(self) -> None:
        """Wait for the save in flight, if any, and take note of how it ended."""
        if self._record is None or self._work_in_flight is None:
            return
        self._work_in_flight.result()
        error, self._record, self._work_in_flight = self._record.error, None, None
        if error is not None:
            if not error.committed:
                self._steps.drop(error.step)
            if self._unreported is not None:
                _logger.error("%s", self._unreported)  # the caller never asked
            if self._raises:
                self._unreported = error
            else:
                _logger.error("%s", error)
                self._untold.clear()

    def close(self) -> None:
        """Let go of the thread. Nothing can be saved afterwards."""
        self._executor.shutdown()

    def take_unreported(self) -> SaveError | None:
        """The error of a collected save, once."""
        error, self._unreported = self._unreported, None
        self._untold.clear()
        return error

    def take_committed(self) -> tuple[Manifest, Identities] | None:
        """The step that has been committed since the last call, and which its frozen arrays are."""
        committed, self._committed = self._committed, None
        return committed

    def _work(
        self,
        record: SaveRecord,
        holder: list[Snapshot | Exception],
        metrics: Mapping[str, Any],
        started_s: float,
    ) -> None:
        """Runs on the background thread: no torchax mode, no device collective."""

        def committed(written: Written) -> None:
            record.commit_s = time.perf_counter() - started_s
            record.nbytes = written.nbytes
            record.metrics.update(written.manifest.metrics)
            self._committed = written.manifest, written.identities

        try:
            self._writer.write(Ticket(record.step, record.time, metrics), holder, committed)
        except SaveError as error:
            record.error = error
        except Exception as error:  # it is raised where the caller can see it
            reason = f"{type(error).__name__}: {error}"
            record.error = SaveError(record.step, self._path, reason, committed=record.commit_s is not None)
            record.error.__cause__ = error
        if isinstance(record.error and record.error.__cause__, ProcessError):
            _logger.error("%s", record.error)  # at once: the loop may hang where it waits for that process, too
        elif record.error is not None:
            self._untold[:] = [record.error]
