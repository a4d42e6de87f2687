"""SIGTERM, by which a machine announces that it is about to go away, as a flag for the training loop."""

from __future__ import annotations

import logging
import os
import signal
import threading
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

from torchorbax._src.run import preemption_watch
from torchorbax._src.run.maintenance import Poll

_logger = logging.getLogger(__name__)


class PreemptionNotice:
    """Listens for SIGTERM between `install` and `remove`, and asks a callable whether the machine is about to go away.

    Several notices may listen at the same time. A second SIGTERM, and any in a forked process, acts as if none were
    listening. Python delivers signals to the main thread only: installed from another thread, a notice hears no SIGTERM
    and says so in the log.

    Args:
        patience_s: how long the loop may take, after the notice, until `overdue` is called.
        overdue: what to do when the loop does not come back in time. It is called on another thread, and its owner is
            not kept alive.
        ask: asked every few seconds whether the machine is about to go away; None for SIGTERM alone.

    Attributes:
        received: the machine is about to go away.
        signalled: SIGTERM has arrived while this was listening.
        pid: the process that this belongs to.
        patience_s: as above.
    """

    def __init__(
        self,
        patience_s: float = 0.0,
        overdue: Callable[[], None] | None = None,
        ask: Callable[[], bool] | None = None,
    ) -> None:
        self.received = False
        self.signalled = False
        self.pid = os.getpid()
        self.patience_s = patience_s
        self._overdue = None if overdue is None else weakref.WeakMethod(overdue)
        self._poll = None if ask is None else Poll(ask, weakref.WeakMethod(self._announce))

    @property
    def reason(self) -> str:
        """Why the run stops."""
        return "the preemption notice" if self.received and not self.signalled else "SIGTERM"

    @property
    def watched(self) -> bool:
        """Will `overdue` be called when the loop does not come back?"""
        return preemption_watch.is_watched(self)

    def start(self) -> None:
        """Start to ask the callable, if there is one."""
        if self._poll is not None:
            self._poll.start()
            preemption_watch.watch(self)

    def install(self) -> None:
        """Start to listen for SIGTERM."""
        if threading.current_thread() is not threading.main_thread():
            _logger.info("not in the main thread, so SIGTERM will not trigger a save")
            return
        if not _previous:
            _previous.append(signal.signal(signal.SIGTERM, _on_signal))
        _listening.add(self)
        preemption_watch.watch(self)
        preemption_watch.wake_on_signals()

    def remove(self) -> None:
        """Stop listening and asking. The last notice to do so puts the previous handler back.

        Only the main thread can do that. If another one has removed the last notice, the next signal does it.
        """
        if self._poll is not None:
            self._poll.stop()
        preemption_watch.unwatch(self)
        _listening.discard(self)
        if _previous and not _listening and threading.current_thread() is threading.main_thread():
            _restore_handler()

    def call_overdue(self) -> None:
        """The loop has not come back within `patience_s`. Called on the watching thread."""
        overdue = None if self._overdue is None else self._overdue()
        if overdue is not None:
            overdue()

    def _announce(self) -> None:
        self.received = True


_listening: weakref.WeakSet[PreemptionNotice] = weakref.WeakSet()  # weak: a run that has been dropped does not listen
_previous: list[Any] = []  # the handler that ours has replaced; empty while ours is not installed


def _restore_handler() -> None:
    preemption_watch.wake_no_more()
    before = _previous.pop()
    if signal.getsignal(signal.SIGTERM) is _on_signal:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _on_signal(signum: int, frame: FrameType | None) -> None:
    """Sets a flag. The program may be anywhere, in the middle of a write to stderr, say, so this must not even log."""
    mine = [notice for notice in _listening if notice.pid == os.getpid()]
    if not mine or any(notice.signalled for notice in mine):
        # In a forked process, such as a DataLoader worker, or for the second time: act as the previous handler would.
        _listening.clear()
        _restore_handler()
        os.kill(os.getpid(), signum)
        return
    for notice in mine:
        notice.received = notice.signalled = True
