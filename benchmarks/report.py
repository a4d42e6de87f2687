"""From samples to the table of goals, its Markdown, and plots of growth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import Samples, median

Results = Mapping[str, Samples]
"""Samples by case."""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        measure: what is compared.
        case: where its samples are.
        ours: key of our samples.
        peer: what with, for people.
        theirs: key of the peer's samples; None for a measure that has no peer.
        goal: of the ratio ours / theirs, or of ours alone.
        unit: how to show ours and theirs.
        at_least: is more better?
    """

    measure: str
    case: str
    ours: str
    peer: str
    theirs: str | None
    goal: float
    unit: str = "ms"
    at_least: bool = False

    def ratio(self, results: Results) -> float:
        """Ours to theirs, of medians; NaN if it was not measured."""
        samples = results.get(self.case, {})
        if self.ours not in samples or (self.theirs is not None and self.theirs not in samples):
            return math.nan
        ours = median(samples[self.ours])
        return ours if self.theirs is None else ours / max(median(samples[self.theirs]), 1e-12)

    def is_met(self, results: Results) -> bool:
        """Is the goal reached?"""
        ratio = self.ratio(results)
        return ratio >= self.goal if self.at_least else ratio <= self.goal


_LARGE = "512 MB in 64 arrays over 8 devices"
_SMALL = "2,000 sharded leaves of 4 KB"
_ORBAX = "raw Orbax, defaults"
_STEP = "500 parameters with AdamW"
_HAND = "a loop by hand, `jax.jit`"
ROWS = [
    Row(f"stall per save, {_LARGE}", "save", "auto/stall_s", _ORBAX, "orbax/stall_s", 0.10),
    Row("– `staging='reference'`", "save", "reference/stall_s", _ORBAX, "orbax/stall_s", 0.10),
    Row("– `staging='device'`, always a copy", "save", "device/stall_s", _ORBAX, "orbax/stall_s", 0.10),
    Row("the same", "save", "auto/stall_s", "DCP `async_save`", "dcp/stall_s", 0.01),
    Row("– `staging='reference'`", "save", "reference/stall_s", "DCP `async_save`", "dcp/stall_s", 0.01),
    Row("save until committed", "save", "auto/commit_s", _ORBAX, "orbax/commit_s", 0.40),
    Row("– and the step before deleted", "save", "auto/deleted_s", "raw Orbax", "orbax/deleted_s", 0.40),
    Row("save until committed", "save", "auto/commit_s", "`torch.save` and fsync", "torch.save/commit_s", 1.1),
    Row("restore, resharded 8 → 16", "restore", "auto/restore_s", _ORBAX, "orbax/restore_s", 0.5),
    Row(f"stall, {_SMALL}, `staging='reference'`", "save_small", "reference/stall_s", _ORBAX, "orbax/stall_s", 0.02),
    Row("– `staging='auto'`, a copy", "save_small", "auto/stall_s", _ORBAX, "orbax/stall_s", 0.02),
    Row("commit of the same", "save_small", "auto/commit_s", _ORBAX, "orbax/commit_s", 0.2),
    Row("restore of the same, 8 → 16", "restore_small", "auto/restore_s", _ORBAX, "orbax/restore_s", 0.2),
    Row("read back and compared, until the step before is deleted", "read_back", "all/deleted_s", "not read back", "no/deleted_s", 2.0),
    Row("a check of the owner, of which a save makes three", "read_back", "no/check_s", "–", None, 1e-3),
    Row("commit under gs://, 10 MB, 50 ms an answer", "object_storage", "ours/commit_s", _ORBAX, "orbax/commit_s", 0.25),
    Row("– requests of that save, with the deletion", "object_storage", "ours/save_requests", _ORBAX, "orbax/save_requests", 0.5, ""),
    Row("restore of it", "object_storage", "ours/restore_s", _ORBAX, "orbax/restore_s", 0.4),
    Row("a step without a save", "skipped", "ours/skip_s", "raw Orbax, continuous", "orbax/skip_s", 0.2, "µs"),
    Row("steps per second, saves back to back", "loop", "ours/steps_per_s", "raw Orbax", "orbax/steps_per_s", 1.2, "/s", True),
    Row("– an interval of ten commits", "loop", "rare/steps_per_s", "no saves", "none/steps_per_s", 0.95, "/s", True),
    Row("peak extra host memory of a save", "memory_save", "ours/peak_bytes", _ORBAX, "orbax/peak_bytes", 0.5, "MiB"),
    Row("– of a restore, beside the state", "memory_restore", "ours/peak_bytes", _ORBAX, "orbax/peak_bytes", 0.5, "MiB"),
    Row(f"call of a step, {_STEP} on 8 devices", "step", "torch/thread_s", _HAND, "hand/thread_s", 1.2),
    Row("– `OptaxOptimizer`", "step", "optax/thread_s", _HAND, "hand/thread_s", 1.2),
    Row("– the same, alone", "step", "optax/thread_s", "–", None, 5e-3),
    Row("– on one device", "step_alone", "torch/thread_s", _HAND, "hand/thread_s", 1.0),
    Row("– on one device, `OptaxOptimizer`", "step_alone", "optax/thread_s", _HAND, "hand/thread_s", 1.0),
    Row("first new step after `kill -9`, 12 layers", "back", "back/resumed_s", "a fresh start", "back/cold_s", 0.4),
    Row("`to_jax`, per tensor", "adapter", "to_jax/tensor_s", "–", None, 2e-6, "µs"),
]  # fmt: skip

_SCALES = {"ms": (1e3, 1), "µs": (1e6, 2), "/s": (1.0, 2), "MiB": (2.0**-20, 0), "": (1.0, 0)}


def _shown(value: float, unit: str = "ms") -> str:
    scale, digits = _SCALES[unit]
    return f"{value * scale:,.{digits}f} {unit}".rstrip()


def table(results: Results) -> str:
    """The table of goals in Markdown; rows that were not measured are left out."""
    lines = ["| measure | ours | peer | theirs | ratio | goal | |", "|---|---|---|---|---|---|---|"]
    for row in ROWS:
        ratio = row.ratio(results)
        if math.isnan(ratio):
            continue
        samples = results[row.case]
        ours = _shown(median(samples[row.ours]), row.unit)
        theirs = "" if row.theirs is None else _shown(median(samples[row.theirs]), row.unit)
        sign = "≥" if row.at_least else "≤"
        goal = f"{sign} {_shown(row.goal, row.unit)}" if row.theirs is None else f"{sign} {row.goal:g}"
        shown = "" if row.theirs is None else f"{ratio:.3g}"
        met = "met" if row.is_met(results) else "**missed**"
        lines.append(f"| {row.measure} | {ours} | {row.peer} | {theirs} | {shown} | {goal} | {met} |")
    return "\n".join(lines)


def shares(results: Results) -> str:
    """What the time goes into, in Markdown: fingerprints, the disk, the memory."""
    lines = ["| | ours | fingerprints alone | the disk alone | one copy in memory |", "|---|---|---|---|---|"]
    for title, case, key in (
        ("save of 512 MB", "save", "auto/commit_s"),
        ("restore of 512 MB", "restore", "auto/restore_s"),
        ("save of 2,000 small leaves", "save_small", "auto/commit_s"),
        ("restore of 2,000 small leaves", "restore_small", "auto/restore_s"),
    ):
        samples = results.get(case, {})
        measure = key.split("/")[1]
        columns = [key, f"fingerprint/{measure}", f"disk/{measure}", f"memory/{measure}"]
        if key in samples:
            cells = [_shown(median(samples[name])) if name in samples else "" for name in columns]
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


_GROWING = (("save", "stall_s"), ("save", "commit_s"), ("restore", "restore_s"))


def growth_table(growth: Mapping[str, Results]) -> str:
    """Medians by label, in Markdown."""
    lines = [
        "| | stall: ours | Orbax | commit: ours | Orbax | restore: ours | Orbax |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, results in growth.items():
        cells = [
            _shown(median(results[case][f"{who}/{measure}"])) for case, measure in _GROWING for who in ("auto", "orbax")
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def sections(content: Mapping[str, Any]) -> dict[str, str]:
    """All that docs/performance.md shows of a results file."""
    about = content["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    found = {
        "machine": f"{about['cpu']}, {about['cores']} cores, {about['memory_gib']} GiB, load before the run "
        f"{about['load']}; {versions}; medians of {content['repeats']}.",
        "table": table(content["table"]),
        "shares": shares(content["table"]),
    }
    for axis, growth in content["growth"]["axes"].items():
        found[f"growth-{axis}"] = f"Medians of {content['growth']['repeats']}.\n\n{growth_table(growth)}"
    return found


def filled(page: str, texts: Mapping[str, str]) -> str:
    """A Markdown page with what stands between `<!-- name -->` and `<!-- /name -->` replaced.

    Raises:
        ValueError: the page has no such marks.
    """
    for name, text in texts.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, found, rest = page.partition(start)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"no marks for {name}")
        page = f"{before}{start}{text}\n{end}{after}"
    return page


def plot(content: Mapping[str, Any], file: Path) -> None:
    """Growth along each axis, log-log.

    Raises:
        ImportError: matplotlib is missing: `pip install '.[bench]'`.
    """
    from matplotlib.figure import Figure

    axes_of: Mapping[str, Mapping[str, Results]] = content["growth"]["axes"]
    figure = Figure(figsize=(11, 3.2 * len(axes_of)), layout="constrained")
    grid: Any = figure.subplots(len(axes_of), len(_GROWING), squeeze=False)
    for line, (axis, growth) in zip(grid, axes_of.items(), strict=True):
        for plane, (case, measure) in zip(line, _GROWING, strict=True):
            for who, label, style in (("auto", "torchorbax", "o-"), ("orbax", "raw Orbax", "s--")):
                sizes = [float(point.split()[0].replace(",", "")) for point in growth]
                medians = [median(results[case][f"{who}/{measure}"]) for results in growth.values()]
                plane.plot(sizes, medians, style, label=label)
            plane.set(xscale="log", yscale="log", xlabel=axis, ylabel=f"{measure.removesuffix('_s')} [s]")
            plane.grid(visible=True, alpha=0.3)
    grid[0][0].legend()
    figure.savefig(file, dpi=110)
