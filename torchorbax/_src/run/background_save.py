"""Writes saves in the background, one at a time, and keeps their errors for the caller."""

from __future__ import annotations

import functools
import logging
import os
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from torchorbax._src.arrays.jax_context import transfers_allowed
from torchorbax._src.run import at_exit
from torchorbax._src.save.save import Committed, Save, SaveRecord
from torchorbax._src.save.writer import Writer
from torchorbax._src.storage.steps import Steps
from torchorbax.errors import ProcessError, SaveError

_logger = logging.getLogger(__name__)


class BackgroundSaver:
    """Writes one save after another on a thread of its own.

    Args:
        path: the path of the run, for messages.
        steps: the steps of the run.
        writer: writes a save.
        raises: keep errors for the caller; otherwise they are only logged.
    """

    def __init__(self, path: str, steps: Steps, writer: Writer, *, raises: bool = True) -> None:
        self._raises = raises
        self._path = path
        self._steps = steps
        self._writer = writer
        # One thread for all saves: `submit` returns at once, whereas to start a thread is to wait until it runs.
        self._executor = _new_executor()
        self._pid = os.getpid()
        self._in_flight: tuple[SaveRecord, Future[None]] | None = None
        self._unreported: SaveError | None = None
        # The last error, from when it happens until the caller is told. It is logged if the run is dropped before.
        self._unheard: list[SaveError] = []
        weakref.finalize(self, _log_unheard, self._unheard, self._pid)
        self._committed: Committed | None = None

    @property
    def step_in_flight(self) -> int | None:
        """The step that is being written now."""
        if self._in_flight is None or self._in_flight[1].done():
            return None
        return self._in_flight[0].step

    def prepare(self) -> None:
        """Start the thread now, so that the first save does not wait for it."""
        self._executor.submit(int)

    def start(self, save: Save) -> SaveRecord:
        """Write a save in the background. The save before it must have been collected.

        Returns:
            Its record, which is filled in as the save goes on.
        """
        record = SaveRecord(save.step, save.time, path=self._path)
        self._steps.start(save.step, save.time)
        if self._pid != os.getpid():  # a forked process does not have its parent's thread
            self._executor, self._pid = _new_executor(), os.getpid()
        future = self._executor.submit(functools.partial(self._run, save, record))
        self._in_flight = record, future
        at_exit.saving(future, self._path)
        return record

    def collect(self) -> None:
        """Wait for the save in flight, if there is one, and take note of how it ended."""
        if self._in_flight is None:
            return
        record, future = self._in_flight
        future.result()
        error, self._in_flight = record.error, None
        if error is None:
            return
        if not error.committed:
            self._steps.drop(error.step)
        if self._unreported is not None:
            _logger.error("%s", self._unreported)  # the caller has not asked for it, and now gets a newer one
        if self._raises:
            self._unreported = error
        else:
            _logger.error("%s", error)
            self._unheard.clear()

    def close(self) -> None:
        """End the thread. Nothing can be saved afterwards."""
        self._executor.shutdown()

    def take_unreported(self) -> SaveError | None:
        """The error of a save that has been collected. It is returned once."""
        error, self._unreported = self._unreported, None
        self._unheard.clear()
        return error

    def take_committed(self) -> Committed | None:
        """The save that has been committed since the last call, if there is one."""
        committed, self._committed = self._committed, None
        return committed

    def _run(self, save: Save, record: SaveRecord) -> None:
        """Runs on the background thread. It enters no torchax mode and runs no device collective."""

        def when_committed(committed: Committed) -> None:
            record.commit_s = time.perf_counter() - save.started_s
            record.nbytes = committed.nbytes
            record.metrics.update(committed.manifest.metrics)
            self._committed = committed

        try:
            with transfers_allowed():
                self._writer.write(save, when_committed)
        except SaveError as error:
            record.error = error
        except Exception as error:  # the caller's thread raises it later
            reason = f"{type(error).__name__}: {error}"
            record.error = SaveError(record.step, self._path, reason, committed=record.commit_s is not None)
            record.error.__cause__ = error
        if record.error is None:
            return
        if isinstance(record.error.__cause__, ProcessError):
            # Logged at once: the loop may hang because it waits for the same process.
            _logger.error("%s", record.error)
        else:
            self._unheard[:] = [record.error]


def _new_executor() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "torchorbax-save")


def _log_unheard(unheard: Sequence[SaveError], pid: int) -> None:
    """Log the error of a run that has been dropped: nobody is left to raise it to."""
    if pid == os.getpid():  # a forked process leaves it to its parent
        for error in unheard:
            _logger.error("%s", error)
