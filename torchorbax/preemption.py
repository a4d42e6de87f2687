"""SIGTERM, which is how a machine says that it is about to go away, as a flag that the training loop can look at."""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import FrameType
from typing import Any

_logger = logging.getLogger(__name__)


class PreemptionNotice:
    """Listens for SIGTERM between `install` and `remove`. The second one, and any in a forked process, acts as if
    nobody did.

    Python delivers signals to the main thread only; installed elsewhere it listens to nothing, and says so in the log.
    """

    def __init__(self) -> None:
        self.received = False
        self._pid = os.getpid()
        self._previous: Any = None
        self._installed = False

    def install(self) -> None:
        """Start to listen."""
        if threading.current_thread() is not threading.main_thread():
            _logger.info("not in the main thread, so SIGTERM will not trigger a save")
            return
        self._previous = signal.signal(signal.SIGTERM, self._on_signal)
        self._installed = True

    def remove(self) -> None:
        """Stop to listen, and put back what was there before."""
        if self._installed and threading.current_thread() is threading.main_thread():
            self._installed = False
            if signal.getsignal(signal.SIGTERM) == self._on_signal:
                signal.signal(signal.SIGTERM, self._previous if self._previous is not None else signal.SIG_DFL)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self.received or os.getpid() != self._pid:  # a forked DataLoader worker, which must die when it is told to
            self.remove()
            os.kill(os.getpid(), signum)
            return
        self.received = True
        _logger.warning("SIGTERM: saving the current step, then stopping")
