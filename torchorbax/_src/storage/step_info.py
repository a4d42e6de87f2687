"""What policies are told about a step: its number, when it was saved, and its metrics."""

from __future__ import annotations

import datetime
import functools
import logging
import time
from typing import NamedTuple

from torchorbax._src.format.manifest import Manifest
from torchorbax._src.storage.storage import Storage
from torchorbax.errors import CheckpointNotFoundError, CorruptCheckpointError

_logger = logging.getLogger(__name__)

_UNKNOWN = datetime.datetime.fromtimestamp(0, datetime.UTC)
"""The time of a step whose manifest cannot be read."""


class _Reading(NamedTuple):
    """Both clocks at one moment: the wall clock, in UTC, and `time.monotonic()`."""

    wall: datetime.datetime
    monotonic_s: float


class RunClock:
    """The time as policies see it, whatever is done to the wall clock.

    How long ago a step was saved is measured with the monotonic clock, and counted back from what the wall clock says
    now. That is possible for the steps of this life of the run, which began when this clock was made. Steps of earlier
    lives have the times in their manifests, but none counts as younger than this life. So a manifest that says 2100, or
    a clock that is set back, cannot keep a policy about time from saving.
    """

    def __init__(self) -> None:
        self._opened_s = time.monotonic()
        self._reading = _read()

    def now(self) -> datetime.datetime:
        """Read both clocks. Until the next reading, all times are counted back from this one."""
        self._reading = _read()
        return self._reading.wall

    def time_at(self, monotonic_s: float) -> datetime.datetime:
        """The time in UTC at which `time.monotonic()` was `monotonic_s` seconds."""
        reading = self._reading
        return reading.wall - datetime.timedelta(seconds=reading.monotonic_s - monotonic_s)

    def in_earlier_life(self, written: datetime.datetime) -> datetime.datetime:
        """The time of a step of an earlier life whose manifest says `written`."""
        return min(written, self.time_at(self._opened_s))


def _read() -> _Reading:
    return _Reading(datetime.datetime.now(datetime.UTC), time.monotonic())


class StepInfo:
    """What a policy can ask about a step. It is read from the manifest when a policy asks for it.

    Args:
        step: the number of the step.
        storage: where its manifest is.
        clock: the clock of the run.
        saved_s: `time.monotonic()` when `save` was called for it; None if it was saved in an earlier life.
    """

    def __init__(self, step: int, storage: Storage, clock: RunClock, saved_s: float | None = None) -> None:
        self.step = step
        self._storage = storage
        self._clock = clock
        self._saved_s = saved_s

    @functools.cached_property
    def manifest(self) -> Manifest | None:
        """The step's manifest; None if it cannot be read."""
        try:
            return self._storage.manifest(self.step)
        except (CorruptCheckpointError, CheckpointNotFoundError) as error:  # damaged, or deleted by another program
            _logger.warning("%s", error)
            return None

    @property
    def time(self) -> datetime.datetime:
        """When the step was saved, by the clock of the run; the start of 1970 if its manifest cannot be read."""
        if self._saved_s is not None:
            return self._clock.time_at(self._saved_s)
        return _UNKNOWN if self.manifest is None else self._clock.in_earlier_life(self.manifest.time)

    @functools.cached_property
    def metrics(self) -> dict[str, float] | None:
        """The metrics saved with the step; None if there are none."""
        return None if self.manifest is None else dict(self.manifest.metrics) or None
