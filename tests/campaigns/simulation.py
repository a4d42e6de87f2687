"""Simulates training programs that save, are killed, suspended, cut off and overtaken, and checks that all holds.

    python -m tests.campaigns.simulation --schedules 100000
    python -m tests.campaigns.simulation --replay 4711

`tests/simulation` says what is simulated, and `tests/simulation/invariants.py` what must hold. A schedule is its seed;
one that fails is shrunk, and printed with the trace of its requests.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial

os.environ["JAX_PLATFORMS"] = "cpu"

from tests.simulation.schedule import Schedule, generated, shrunk
from tests.simulation.scheduler import latest
from tests.simulation.world import Report, simulate

_SEEDS_AT_ONCE = 100


def outcome_of(report: Report) -> Counter[str]:
    """What is counted of a simulation."""
    found: Counter[str] = Counter({"schedules": 1, "requests": len(report.trace), report.schedule.store: 1})
    found["failures"] = bool(report.violations)
    found["touched"] = bool(report.touched)
    found["restores"] = sum(one.step is not None for one in report.history.came)
    found.update(f"{one.outcome} saves" for one in report.history.saved)
    found.update({fault.what for fault in report.schedule.faults})
    return found


def run_seeds(seeds: Sequence[int], processes: int | None = None) -> tuple[Counter[str], list[tuple[int, str]]]:
    """Run the schedules of these seeds.

    Returns:
        What was counted, and the seeds that failed, each with the first thing that did not hold.
    """
    gc.freeze()  # JAX's hundred thousands of objects stay
    found: Counter[str] = Counter()
    failed = []
    for seed in seeds:
        report = simulate(generated(seed, processes))
        found += outcome_of(report)
        if report.violations:
            failed.append((seed, report.violations[0]))
    return found, failed


def explained(schedule: Schedule) -> str:
    """A schedule that fails, as simple as possible, and what happens in it."""
    simple = shrunk(schedule, lambda simpler: bool(simulate(simpler).violations))
    report = simulate(simple)
    return "\n".join([str(simple), latest(report.trace), *report.violations])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="the first; the others follow")
    parser.add_argument("--processes", type=int, help="of each program; otherwise as the seed says")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--replay", type=int, metavar="SEED", help="run this one, and print what happens in it")
    options = parser.parse_args()
    if options.replay is not None:
        schedule = generated(options.replay, options.processes)
        report = simulate(schedule)
        print(explained(schedule) if report.violations else "\n".join([str(schedule), *report.trace, "all holds"]))
        sys.exit(bool(report.violations))
    # In workers.
    seeds = range(options.seed, options.seed + options.schedules)
    parts = [seeds[at : at + _SEEDS_AT_ONCE] for at in range(0, len(seeds), _SEEDS_AT_ONCE)]
    began_s, found, failed = time.monotonic(), Counter[str](), []
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        for counted, failures in pool.imap_unordered(partial(run_seeds, processes=options.processes), parts):
            found += counted
            failed += failures
            for seed, why in failures:
                print(f"FAILURE --replay {seed}: {why[:300]}", flush=True)
            if found["schedules"] % 5000 == 0:
                print(f"{found['schedules']} schedules, {len(failed)} failures", flush=True)
    if failed:
        print(explained(generated(min(failed)[0], options.processes)))
    print(", ".join(f"{count} {name}" for name, count in sorted(found.items())))
    took_s = time.monotonic() - began_s
    print(f"{len(seeds)} schedules, {len(failed)} failures, {len(seeds) / took_s:.0f} schedules/s")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
