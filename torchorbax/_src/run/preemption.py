"""SIGTERM, by which a machine announces that it is about to go away, as a flag for the training loop."""

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
    """Listens for SIGTERM between `install` and `remove`. Several notices may listen at the same time.

    A second SIGTERM, and any in a forked process, acts as if none were listening. Python delivers signals to the main
    thread only: installed from another thread, a notice hears nothing and says so in the log.

    Attributes:
        received: SIGTERM has arrived while this was listening.
        pid: the process that this belongs to.
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
        """Stop listening. The last notice to do so puts the previous handler back.

        Only the main thread can do that. If another one has removed the last notice, the next signal does it.
        """
        _listening.discard(self)
        if _previous and not _listening and threading.current_thread() is threading.main_thread():
            _restore_handler()


_listening: weakref.WeakSet[PreemptionNotice] = weakref.WeakSet()  # weak: a run that has been dropped does not listen
_previous: list[Any] = []  # the handler that ours has replaced; empty while ours is not installed


def _restore_handler() -> None:
    before = _previous.pop()
    if signal.getsignal(signal.SIGTERM) is _on_signal:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _on_signal(signum: int, frame: FrameType | None) -> None:
    mine = [notice for notice in _listening if notice.pid == os.getpid()]
    if not mine or any(notice.received for notice in mine):
        # In a forked process, such as a DataLoader worker, or for the second time: act as the previous handler would.
        _listening.clear()
        _restore_handler()
        os.kill(os.getpid(), signum)
        return
    for notice in mine:
        notice.received = True
    _logger.warning("SIGTERM: saving the current step, then stopping")
