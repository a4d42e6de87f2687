"""On one accelerator: the stall of a save beside raw Orbax's blocking copy from the device, and what a loop loses.

`python -m benchmarks.accelerator --gb 1 2 5 10 20` writes benchmarks/results/<platform>.json. It runs on the CPU as
well, where it shows only that it runs.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from benchmarks import peers, states
from benchmarks.__main__ import RESULTS, machine
from benchmarks.measure import Samples, interleaved, median

GB = 1 << 30
LEAVES = 64


def measure(folder: Path, nbytes: int, repeats: int, seconds: float) -> Samples:
    """Stalls and commits of a state of so many bytes, and steps per second while it is saved continuously."""
    tree, change = states.state(LEAVES, nbytes // LEAVES), states.step()

    def saved(peer: Any) -> dict[str, float]:
        nonlocal tree
        tree = change(tree)
        found: dict[str, float] = peer.save(tree)
        return found

    def rate(peer: Any) -> dict[str, float]:
        nonlocal tree
        started, steps = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            tree = change(tree)
            if peer is not None:
                peer.offer(next(numbers), tree)
            steps += 1
        found = {"steps_per_s": steps / (time.perf_counter() - started)}
        if peer is not None:
            peer.wait()
        return found

    numbers = iter(range(1, 1 << 40))
    samples: Samples = {}
    makers: dict[str, Callable[[bool], Any]] = {
        "ours": lambda loop: peers.Ours(folder / "ours", tree, save="continuous" if loop else None),
        "orbax": lambda loop: peers.Orbax(folder / "orbax", tree, continuous=0 if loop else None),
    }
    for loop in (False, True):
        made = {name: make(loop) for name, make in makers.items()}
        contenders = {name: functools.partial(rate if loop else saved, peer) for name, peer in made.items()}
        if loop:
            contenders["none"] = lambda: rate(None)
        samples |= interleaved(contenders, repeats)
        for name, peer in made.items():
            peer.close()
            shutil.rmtree(folder / name)
    return samples


def table(results: dict[str, Samples]) -> str:
    """Markdown."""
    lines = [
        "| state | stall: ours | Orbax | ratio (goal ≤ 0.02) | commit: ours | Orbax | steps/s: ours | Orbax | none |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for size, samples in results.items():
        mid = {name: median(values) for name, values in samples.items()}
        lines.append(
            f"| {size} | {mid['ours/stall_s'] * 1e3:.2f} ms | {mid['orbax/stall_s'] * 1e3:.1f} ms "
            f"| {mid['ours/stall_s'] / mid['orbax/stall_s']:.4f} | {mid['ours/commit_s']:.2f} s "
            f"| {mid['orbax/commit_s']:.2f} s | {mid['ours/steps_per_s']:.2f} | {mid['orbax/steps_per_s']:.2f} "
            f"| {mid['none/steps_per_s']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accelerator", description=__doc__)
    parser.add_argument("--gb", type=float, nargs="+", default=[1.0, 2.0, 5.0, 10.0, 20.0], help="sizes of the state")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="length of a training loop")
    parser.add_argument("--folder", type=Path, help="where to save to; a temporary folder by default")
    parser.add_argument("--out", type=Path, help="the results file")
    options = parser.parse_args()
    device = jax.devices()[0]
    results: dict[str, Samples] = {}
    for size in options.gb:
        with tempfile.TemporaryDirectory(dir=options.folder, ignore_cleanup_errors=True) as folder:
            results[f"{size:g} GB"] = measure(Path(folder), int(size * GB), options.repeats, options.seconds)
    print(table(results))
    out = options.out or RESULTS.with_name(f"{device.platform}-accelerator.json")
    content = {"machine": machine() | {"device": device.device_kind}, "repeats": options.repeats, "results": results}
    out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
