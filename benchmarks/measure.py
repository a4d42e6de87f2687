"""Timing and memory: medians of interleaved repetitions."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

Samples = dict[str, list[float]]


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def interleaved(contenders: Mapping[str, Callable[[], Mapping[str, float]]], repeats: int, warmup: int = 1) -> Samples:
    """Run all contenders in turn, so that whatever else the machine does hits them alike, each time in another order:
    what one leaves behind, such as freed memory and dirty pages, is paid for by the next.

    Args:
        contenders: each returns measures by name; they are kept as `contender/measure`.
        repeats: rounds that count.
        warmup: rounds before them that do not.
    """
    samples: Samples = {}
    names, order = list(contenders), random.Random(0)
    for round_ in range(warmup + repeats):
        order.shuffle(names)
        for name in names:
            for measure, value in contenders[name]().items():
                if round_ >= warmup:
                    samples.setdefault(f"{name}/{measure}", []).append(value)
    return samples


def median(values: list[float]) -> float:
    """The median; samples are kept beside it."""
    return statistics.median(values)


def peak_bytes(work: Callable[[], object]) -> tuple[int, int]:
    """The peak of this process's resident memory during `work`, above what it was before; and what stays afterwards.

    Linux only: the kernel's own high-water mark is reset through /proc (see proc(5), clear_refs).
    """
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    work()
    return _status_bytes("VmHWM") - before, _status_bytes("VmRSS") - before


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))
