"""Writes saves in the background, one at a time, and keeps their errors for the caller.

Ctrl-C may come between any two lines of the caller's thread. A save is started by one assignment, so it either has been
started or has not; whatever is to follow is done by the next call, if it could not be done by this one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from torchorbax._src.arrays.jax_context import transfers_allowed
from torchorbax._src.run import at_exit
from torchorbax._src.run.slow_saves import SlowSaves
from torchorbax._src.save.save import Committed, Save, SaveRecord
from torchorbax._src.save.writer import Writer
from torchorbax._src.storage.steps import Steps
from torchorbax.errors import ProcessError, SaveError

_logger = logging.getLogger(__name__)


class _InFlight:
    """A save that has been started, and of whose end no note has been taken yet.

    Attributes:
        save: what is to be saved.
        record: its record.
        entry: `time.monotonic()` when `save` was called, and the record.
        ended: done when the thread has nothing more to do for it. Its result is None, whatever came of the save.
        started_s: `time.monotonic()` when it was started.
        handed_over: the thread has been told of it.
    """

    def __init__(self, save: Save, path: str) -> None:
        self.save = save
        self.record = SaveRecord(save.step, save.time, path=path)
        self.entry = save.started_s, self.record
        self.ended: Future[None] = Future()
        self.started_s = time.monotonic()
        self.handed_over = False
        self._claim = threading.Lock()

    def claim(self) -> bool:
        """Is this the first claim? Only who has it writes the save."""
        return self._claim.acquire(blocking=False)


class BackgroundSaver:
    """Writes one save after another on a thread of its own. One thread at a time calls its methods, but for `wait`.

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
        self._executor = ThreadPoolExecutor(1, "torchorbax-save")
        self._in_flight: _InFlight | None = None
        self._past: list[tuple[float, SaveRecord]] = []
        self._writing_thread: int | None = None
        self._slow = SlowSaves(path)
        self._unreported: SaveError | None = None
        # The last error, from when it happens until the caller is told. It is logged if the run is dropped before.
        self._unheard: list[SaveError] = []
        weakref.finalize(self, _log_unheard, self._unheard, os.getpid())
        self._committed: Committed | None = None

    @property
    def step_in_flight(self) -> int | None:
        """The step that is being written now."""
        in_flight = self._in_flight
        return None if in_flight is None or in_flight.ended.done() else in_flight.record.step

    @property
    def uncommitted_step(self) -> int | None:
        """The step that has been started last, unless it is committed by now."""
        in_flight = self._in_flight
        return None if in_flight is None or in_flight.record.commit_s is not None else in_flight.record.step

    @property
    def started(self) -> list[tuple[float, SaveRecord]]:
        """Every save that has been started, in order: `time.monotonic()` when `save` was called, and its record."""
        past, in_flight = list(self._past), self._in_flight
        if in_flight is None or in_flight.entry in past[-1:]:
            return past
        return [*past, in_flight.entry]

    @property
    def is_this_thread(self) -> bool:
        """Is the current thread writing a save?"""
        return self._writing_thread == threading.get_ident()

    def prepare(self) -> None:
        """Start the thread now, so that the first save does not wait for it."""
        self._executor.submit(int)

    def start(self, save: Save) -> SaveRecord:
        """Write a save in the background. The save before it must have been collected.

        Returns:
            Its record, which is filled in as the save goes on.
        """
        in_flight = _InFlight(save, self._path)
        info = self._steps.to_be_saved(save.step, save.started_s)
        # One line, and no call in it: Ctrl-C comes before it, or after it.
        self._steps.infos[save.step], self._in_flight = info, in_flight
        self._hand_over(in_flight)
        return in_flight.record

    def attend(self) -> None:
        """Do what the save in flight needs of the caller's thread, without waiting for it."""
        in_flight = self._in_flight
        if in_flight is None:
            return
        self._hand_over(in_flight)
        if in_flight.ended.done():
            self._take_note(in_flight)
        elif self._slow.patience_s(in_flight.record.step, in_flight.started_s) == 0:
            self._warn_of(in_flight)

    def wait(self) -> None:
        """Wait for the save in flight, if there is one. Call `attend` before; several threads may wait at once."""
        in_flight = self._in_flight
        if in_flight is None:
            return
        patience_s = self._slow.patience_s(in_flight.record.step, in_flight.started_s)
        if patience_s is not None:
            with contextlib.suppress(TimeoutError):
                in_flight.ended.result(patience_s)
                return
            self._warn_of(in_flight)
        in_flight.ended.result()

    def collect(self) -> None:
        """Wait for the save in flight, if there is one, and take note of how it ended."""
        self.attend()
        self.wait()
        self.attend()

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

    def _hand_over(self, in_flight: _InFlight) -> None:
        """Tell the thread of a save. After Ctrl-C it may be told twice, which does no harm: see `claim`."""
        if in_flight.handed_over:
            return
        try:
            self._executor.submit(self._run, in_flight)
        except RuntimeError as error:  # the machine has no thread to give, or the interpreter is about to end
            if in_flight.claim():
                reason = f"there is no thread to write it: {error}"
                in_flight.record.error = SaveError(in_flight.record.step, self._path, reason)
                in_flight.ended.set_result(None)
        in_flight.handed_over = True
        at_exit.saving(in_flight.ended, self._path)

    def _take_note(self, in_flight: _InFlight) -> None:
        """Take note of how a save ended, and be ready for the next."""
        error, unreported = in_flight.record.error, self._unreported
        if error is not None:
            if not error.committed:
                self._steps.drop(error.step)
            if unreported is not None:
                _logger.error("%s", unreported)  # the caller has not asked for it, and now gets a newer one
            if self._raises:
                unreported = error
            else:
                _logger.error("%s", error)
                self._unheard.clear()
        if in_flight.entry not in self._past[-1:]:
            self._past.append(in_flight.entry)
        self._in_flight, self._unreported = None, unreported  # one line: see `start`

    def _warn_of(self, in_flight: _InFlight) -> None:
        phase, process = in_flight.save.phase, self._writer.waiting_for
        if process is not None:
            phase += f", waiting for process {process}"
        self._slow.warn(in_flight.record.step, in_flight.started_s, phase)

    def _run(self, in_flight: _InFlight) -> None:
        """Runs on the background thread. It enters no torchax mode and runs no device collective."""
        if not in_flight.claim():
            return
        self._writing_thread = threading.get_ident()
        try:
            self._write(in_flight.save, in_flight.record)
        finally:
            self._writing_thread = None
            if in_flight.record.error is None:
                self._slow.ended(in_flight.started_s)
            in_flight.ended.set_result(None)

    def _write(self, save: Save, record: SaveRecord) -> None:
        def when_committed(committed: Committed) -> None:
            record.nbytes = committed.nbytes
            record.metrics.update(committed.manifest.metrics)
            self._committed = committed
            record.commit_s = time.monotonic() - save.started_s

        try:
            with transfers_allowed():
                self._writer.write(save, when_committed)
        except SaveError as error:
            record.error = error
        except BaseException as error:  # also SystemExit: nobody but the caller's thread may end the program
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


def _log_unheard(unheard: Sequence[SaveError], pid: int) -> None:
    """Log the error of a run that has been dropped: nobody is left to raise it to."""
    if pid == os.getpid():  # a forked process leaves it to its parent
        for error in unheard:
            _logger.error("%s", error)
