"""Says when a save takes much longer than the ones before: storage that hangs raises no error."""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque

_TIMES = 10
"""How many times as long as usual a save must take to be worth a warning."""
_LEAST_S = 5.0
"""Seconds that it must take at least: small saves vary for all sorts of reasons."""
_FIRST_S = 120.0
"""Seconds after which a save is worth a warning if none has been committed before."""
_REMEMBERED = 16
"""The number of saves that say what is usual."""

_logger = logging.getLogger(__name__)


class SlowSaves:
    """Knows how long the saves of a run take, and warns once of each that takes much longer.

    No thread or timer is needed: the threads ask that call `save` meanwhile, or wait for it.

    Args:
        path: the path of the run, for messages.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._durations_s: deque[float] = deque(maxlen=_REMEMBERED)
        self._warned_of: int | None = None

    def ended(self, started_s: float) -> None:
        """Note that a save has succeeded that was handed to its thread when `time.monotonic()` was `started_s`."""
        self._durations_s.append(time.monotonic() - started_s)

    def patience_s(self, step: int, started_s: float) -> float | None:
        """Seconds from now until the save of a step is worth a warning; None if there has been one."""
        if self._warned_of == step:
            return None
        usual_s = statistics.median(self._durations_s) if self._durations_s else None
        longest_s = _FIRST_S if usual_s is None else max(_TIMES * usual_s, _LEAST_S)
        return max(0.0, started_s + longest_s - time.monotonic())

    def warn(self, step: int, started_s: float, phase: str) -> None:
        """Say that the save of a step takes long, and what it is doing now."""
        self._warned_of = step
        usual = f"the saves before took {statistics.median(self._durations_s):.1f} s" if self._durations_s else ""
        _logger.warning(
            "%s: the save of step %d has taken %.0f s so far and is still %s; %s",
            self._path,
            step,
            time.monotonic() - started_s,
            phase,
            usual or "no step has been committed before it",
        )
