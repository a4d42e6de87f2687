"""How long this process has traced and compiled training and evaluation steps."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple


class CompileTimes(NamedTuple):
    """Seconds since the process started.

    Attributes:
        trace_s: in code that was traced, and in looking for what it reads.
        compile_s: in lowering what was traced, and in compiling it or loading it from a cache.
    """

    trace_s: float = 0.0
    compile_s: float = 0.0


_lock = threading.Lock()
_total = CompileTimes()
_thread = threading.local()


def total() -> CompileTimes:
    """All that `first_call` has measured so far."""
    return _total


@contextlib.contextmanager
def first_call() -> Iterator[None]:
    """Measures a call that traces and compiles. A call that fails does not count."""
    global _total
    started = _thread.traced_at = time.monotonic()
    yield
    traced = _thread.traced_at
    with _lock:
        _total = CompileTimes(_total.trace_s + traced - started, _total.compile_s + time.monotonic() - traced)


def traced() -> None:
    """The traced function has been run through; called at its end, within a `first_call`."""
    _thread.traced_at = time.monotonic()
