"""How long it takes a run to come back, part by part."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

from torchorbax._src.arrays import compile_times

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Timings:
    """Seconds from the call of `resume` to the end of the first step. None for what has not happened (yet).

    Attributes:
        open_s: opening the folder or bucket, and becoming its owner.
        find_s: finding the newest step.
        read_s: comparing it with the live objects, reading and checking it; also steps that are damaged.
        place_s: writing it into the live objects, and moving what was not restored to the devices.
        trace_s: tracing training and evaluation steps, until the first step was complete.
        compile_s: compiling them, or loading them from the cache of programs.
        first_step_s: from the end of `resume` to the first call of `save`, which includes tracing and compiling.
    """

    open_s: float | None = None
    find_s: float | None = None
    read_s: float | None = None
    place_s: float | None = None
    trace_s: float | None = None
    compile_s: float | None = None
    first_step_s: float | None = None


class Stopwatch:
    """Measures the parts of `Timings` for one run."""

    def __init__(self) -> None:
        self.timings = Timings()
        self._ready_at: float | None = None
        self._compiled = compile_times.total()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens inside counts as the part `name`, beside what did already."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.add(name, time.monotonic() - started)

    def add(self, name: str, seconds: float) -> None:
        """Add to a part, unless the first step is complete: what is restored later is no coming back."""
        if self.timings.first_step_s is None:
            before: float | None = getattr(self.timings, name)
            self.timings = dataclasses.replace(self.timings, **{name: (before or 0.0) + seconds})

    def ready(self) -> None:
        """The loop may begin."""
        self._ready_at = time.monotonic()
        self._compiled = compile_times.total()

    def step_done(self, path: str, step: int) -> bool:
        """A step is complete: the first one is logged with all parts. Is it the first?"""
        if self._ready_at is None or self.timings.first_step_s is not None:
            return False
        now = compile_times.total()
        self.timings = dataclasses.replace(
            self.timings,
            trace_s=now.trace_s - self._compiled.trace_s,
            compile_s=now.compile_s - self._compiled.compile_s,
            first_step_s=time.monotonic() - self._ready_at,
        )
        known = {name: seconds for name, seconds in vars(self.timings).items() if seconds is not None}
        parts = [f"{name.removesuffix('_s').replace('_', ' ')} {seconds:.2f} s" for name, seconds in known.items()]
        _logger.info("%s: step %d is the first of this start: %s", path, step, ", ".join(parts))
        return True
