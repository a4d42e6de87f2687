"""SIGTERM, which is how a machine says that it is about to go away, as a flag that the training loop can look at."""

from __future__ import annotations

import logging
import os
import signal
import threading
import weakref
from types import FrameType
from typing import Any

_logger = logging.getLogger(__name__)


class PreemptionNotice:
    """Listens for SIGTERM between `install` and `remove`, together with all others that do.

    The second SIGTERM, and any in a forked process, acts as if nobody listened. Python delivers signals to the main
    thread only; installed elsewhere it listens to nothing, and says so in the log.
    """

    def __init__(self) -> None:
        self.received = False
        self.pid = os.getpid()

    def install(self) -> None:
        """Start to listen."""
        if threading.current_thread() is not threading.main_thread():
            _logger.info("not in the main thread, so SIGTERM will not trigger a save")
            return
        if not _previous:
            _previous.append(signal.signal(signal.SIGTERM, _on_signal))
        _listening.add(self)

    def remove(self) -> None:
        """Stop to listen; the last one puts back what was there before."""
        if self in _listening and threading.current_thread() is threading.main_thread():
            _listening.discard(self)
            if not _listening:
                _restore_handler()


_listening: weakref.WeakSet[PreemptionNotice] = weakref.WeakSet()  # a run that nobody has any more does not listen
_previous: list[Any] = []  # the handler there was before, while there is one of ours


def _restore_handler() -> None:
    before = _previous.pop()
    if signal.getsignal(signal.SIGTERM) is _on_signal:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _on_signal(signum: int, frame: FrameType | None) -> None:
    mine = [notice for notice in _listening if notice.pid == os.getpid()]
    if not mine or any(notice.received for notice in mine):
        # A forked DataLoader worker, which must die when it is told to; or the second one.
        _listening.clear()
        _restore_handler()
        os.kill(os.getpid(), signum)
        return
    for notice in mine:
        notice.received = True
    _logger.warning("SIGTERM: saving the current step, then stopping")
