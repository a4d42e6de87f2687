"""A thread that sees when a training loop does not come back after SIGTERM.

Python runs signal handlers on the main thread, between two of its instructions: not while that compiles, say. So the
thread learns of SIGTERM from the interpreter's wakeup descriptor, into which the number of a signal is written at once.
If the program uses that descriptor itself, the thread learns of SIGTERM when the handler has run.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
import weakref
from typing import Protocol

_LOOK_EVERY_S = 0.5
"""Seconds between two looks at what no descriptor tells: other notices than SIGTERM, and dropped runs."""

_LONGEST_JOIN_S = 5.0
"""Seconds to wait for the end of the thread, which may be kept by whatever keeps the program: a stderr that is full."""


class Watched(Protocol):
    """A notice of preemption that has been, or may be, received."""

    received: bool
    patience_s: float

    def call_overdue(self) -> None:
        """The loop has not come back within `patience_s`."""


class _Watch:
    """A notice and how long ago it was received. The notice is not kept alive."""

    def __init__(self, notice: Watched) -> None:
        self.notice = weakref.ref(notice)
        self._heard_s: float | None = None
        self._called = False

    def look(self, now_s: float, *, signalled: bool) -> None:
        notice = self.notice()
        if notice is None:
            return
        if signalled or (self._heard_s is None and notice.received):
            self._heard_s, self._called = now_s, False
        if self._heard_s is not None and not self._called and now_s - self._heard_s >= notice.patience_s:
            self._called = True
            notice.call_overdue()

    def left_s(self, now_s: float) -> float:
        """Seconds until the next look."""
        notice = self.notice()
        if notice is None or self._heard_s is None or self._called:
            return _LOOK_EVERY_S
        return min(_LOOK_EVERY_S, max(0.0, self._heard_s + notice.patience_s - now_s))


_pipe: tuple[int, int] | None = None  # it stays open: a signal may come at any time
_watched: tuple[_Watch, ...] = ()  # replaced, never changed: the thread reads it at any time
_thread: threading.Thread | None = None


def watch(notice: Watched) -> None:
    """Call `notice.call_overdue()` when it has been received for longer than its patience."""
    global _pipe, _thread, _watched
    if is_watched(notice):
        return
    if _pipe is None:
        _pipe = os.pipe()
        for end in _pipe:
            os.set_blocking(end, False)  # as the interpreter asks of its wakeup descriptor
    _watched = (*(one for one in _watched if one.notice() is not None), _Watch(notice))
    if _thread is None or not _thread.is_alive():
        # A daemon: a program that has dropped its run does not wait for the next look when it ends.
        _thread = threading.Thread(target=_look, args=_pipe[:1], name="torchorbax-preemption", daemon=True)
        _thread.start()


def is_watched(notice: Watched) -> bool:
    """Has `watch` been called for it, and not `unwatch`?"""
    return any(one.notice() is notice for one in _watched)


def unwatch(notice: Watched) -> None:
    """Forget a notice. The last one to go ends the thread."""
    global _watched
    _watched = tuple(one for one in _watched if one.notice() not in (notice, None))
    if _watched or _pipe is None or _thread is None or _thread is threading.current_thread():
        return
    with contextlib.suppress(BlockingIOError):  # full: then it looks anyway
        os.write(_pipe[1], b"\0")
    _thread.join(_LONGEST_JOIN_S)


def wake_on_signals() -> None:
    """Learn of signals at once, unless the program uses the interpreter's wakeup descriptor itself. On the main
    thread."""
    if _pipe is not None:
        before = signal.set_wakeup_fd(_pipe[1], warn_on_full_buffer=False)
        if before not in (-1, _pipe[1]):
            signal.set_wakeup_fd(before)


def wake_no_more() -> None:
    """The reverse of `wake_on_signals`."""
    before = signal.set_wakeup_fd(-1)
    if before != -1 and (_pipe is None or before != _pipe[1]):
        signal.set_wakeup_fd(before)


def _look(reads: int) -> None:
    """Look at the notices until there are none."""
    left_s = 0.0
    while True:
        ready, _, _ = select.select([reads], [], [], left_s)
        signals = os.read(reads, 4096) if ready else b""
        now_s = time.monotonic()
        watched = [one for one in _watched if one.notice() is not None]
        if not watched:
            return
        for one in watched:
            one.look(now_s, signalled=signal.SIGTERM in signals)
        left_s = min(one.left_s(now_s) for one in watched)


def _forget_parent() -> None:
    """In a forked process, which has neither the thread nor the runs, and must not write to its parent's pipe."""
    global _pipe, _thread, _watched
    if _pipe is not None:
        wake_no_more()
        for end in _pipe:
            os.close(end)
    _pipe, _thread, _watched = None, None, ()


os.register_at_fork(after_in_child=_forget_parent)
