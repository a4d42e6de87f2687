"""Run every case in a process of its own, print the table, write results, plot and docs/performance.md."""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.measure import Samples

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu.json"
PAGE = ROOT / "docs" / "performance.md"

MB = 1 << 20


def run_case(case: str, folder: Path, devices: int = 8, processes: int = 1, **options: Any) -> Samples:
    """The samples of a case, measured in new processes that share so many simulated devices: those of the first."""
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices // processes}",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.cases", case, json.dumps(options), str(folder)]
    print(f"  {case} {options} on {devices} devices of {processes} processes", file=sys.stderr, flush=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    job = [[address, str(processes), str(index)] for index in range(processes)] if processes > 1 else [[]]
    started = [
        subprocess.Popen(
            [*command, *words], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
        for words in job
    ]
    with ThreadPoolExecutor(processes) as pool:
        said = list(pool.map(lambda process: process.communicate(), started))
    if any(process.returncode for process in started):
        raise RuntimeError(f"{case} failed:\n" + "\n".join(err[-4000:] for _, err in said))
    samples: Samples = json.loads(said[0][0].splitlines()[-1])
    return samples


def measure_table(folder: Path, repeats: int, scale: int) -> dict[str, Samples]:
    """All that the table of goals needs. `scale` divides sizes, for a run that only shows that it works."""
    large = {"leaves": 64, "leaf_bytes": 8 * MB // scale}
    small = {"leaves": max(2000 // scale, 10), "leaf_bytes": 4096}
    found: dict[str, Samples] = {
        "adapter": run_case("adapter", folder, repeats=repeats),
        "skipped": run_case("skipped", _fresh(folder / "skipped"), repeats=repeats),
    }
    place = _fresh(folder / "large")
    found["save"] = run_case("save", place, **large, repeats=repeats, with_torch=True)
    found["restore"] = run_case("restore", place, devices=16, **large, repeats=repeats)
    for _ in range(repeats):
        for peer in ("ours", "orbax"):
            for case, where in (("memory_save", _fresh(folder / "memory")), ("memory_restore", place)):
                once = run_case("memory", where, **large, peer=peer, restoring=case == "memory_restore")
                for name, values in once.items():
                    found.setdefault(case, {}).setdefault(name, []).extend(values)
    place = _fresh(folder / "small")
    found["save_small"] = run_case("save", place, **small, repeats=repeats)
    found["restore_small"] = run_case("restore", place, devices=16, **small, repeats=repeats)
    found |= {name: measure(folder, repeats, scale) for name, measure in MEASURED_ALONE.items()}
    found["loop"] = run_case(
        "loop",
        _fresh(folder / "loop"),
        leaves=64,
        leaf_bytes=MB // scale,
        repeats=repeats,
        step_s=0.05 / scale,
        seconds=8 / scale,
    )
    return found


def _read_back(folder: Path, repeats: int, scale: int = 1) -> Samples:
    return run_case("read_back", _fresh(folder / "read_back"), leaves=64, leaf_bytes=8 * MB // scale, repeats=repeats)


def _object_storage(folder: Path, repeats: int, scale: int = 1) -> Samples:
    place = _fresh(folder / "object_storage")
    return run_case("object_storage", place, leaves=10, leaf_bytes=MB // scale, answer_s=0.05 / scale, repeats=repeats)


def _step(folder: Path, repeats: int, scale: int = 1, devices: int = 8) -> Samples:
    return run_case("step", folder, devices=devices, repeats=repeats, parameters=max(500 // scale, 10))


def _back(folder: Path, repeats: int, scale: int = 1) -> Samples:
    return run_case("back", _fresh(folder / "back"), repeats=repeats, layers=1 if scale > 1 else 12)


MEASURED_ALONE: dict[str, Callable[..., Samples]] = {
    "read_back": _read_back,
    "object_storage": _object_storage,
    "back": _back,
    "step": _step,
    "step_alone": functools.partial(_step, devices=1),
}
"""Cases that need no other case, which `--only` takes."""


def measure_growth(folder: Path, repeats: int) -> dict[str, dict[str, dict[str, Samples]]]:
    """Save and restore by size, by number of leaves, and by number of processes."""
    axes = {
        "MB": {f"{size} MB": (64, size * MB // 64) for size in (64, 256, 1024, 4096)},
        "leaves": {f"{leaves:,} leaves of 4 KB": (leaves, 4096) for leaves in (10, 100, 1000, 10_000)},
    }
    found: dict[str, dict[str, dict[str, Samples]]] = {}
    for axis, points in axes.items():
        for label, (leaves, leaf_bytes) in points.items():
            place = _fresh(folder / "growth")
            options = {"leaves": leaves, "leaf_bytes": leaf_bytes, "repeats": repeats}
            found.setdefault(axis, {})[label] = {
                "save": run_case("save", place, **options),
                "restore": run_case("restore", place, devices=16, **options),
            }
    for processes in (1, 2, 4):
        place = _fresh(folder / "growth")
        options = {"leaves": 64, "leaf_bytes": 4 * MB, "repeats": repeats, "processes": processes}
        label = "1 process" if processes == 1 else f"{processes} processes"
        found.setdefault("processes", {})[label] = {
            case: run_case(case, place, **options) for case in ("save", "restore")
        }
    return found


def machine() -> dict[str, Any]:
    """What the numbers are measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    packages = ("torchorbax", "jax", "orbax-checkpoint", "tensorstore", "torch")
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "load": round(os.getloadavg()[0], 1),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count; medians are shown")
    parser.add_argument("--folder", type=Path, help="where to save to; a temporary folder by default")
    parser.add_argument("--growth-repeats", type=int, default=5, help="0 keeps the growth that was measured before")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="measure these cases alone; others stay as they were")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, nothing is written")
    options = parser.parse_args()
    about = machine()
    with tempfile.TemporaryDirectory(dir=options.folder, ignore_cleanup_errors=True) as place:
        repeats = 1 if options.tiny else options.repeats
        before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        if options.only:
            new = {name: MEASURED_ALONE[name](Path(place), repeats) for name in options.only}
            write({**before, "table": {**before["table"], **new}})
            return
        measured = measure_table(Path(place), repeats, scale=64 if options.tiny else 1)
        print(report.table(measured))
        if options.tiny:
            return
        growth = (
            {"repeats": options.growth_repeats, "axes": measure_growth(Path(place), options.growth_repeats)}
            if options.growth_repeats
            else before.get("growth", {"repeats": 0, "axes": {}})
        )
    content = {"machine": about, "repeats": repeats, "table": measured, "growth": growth}
    write(content)
    report.plot(content, RESULTS.with_suffix(".png"))


def write(content: dict[str, Any]) -> None:
    """Write the results and the page."""
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    PAGE.write_text(report.filled(PAGE.read_text(), report.sections(content)))


if __name__ == "__main__":
    main()
