"""Has an independent crash tester, ckpt-chaos, kill training runs at their file events, and collects what it reports.

python -m scripts.chaos --points 320 --report docs/chaos.md

ckpt-chaos records every file that a whole run opens, renames and removes. It then kills a new run at each of these
events: before it, with the file cut to half its size, or by SIGTERM. It starts each run again, which must end with the
result of the whole one. The run itself (chaos_program.py) ends with an error if it does not go on from the newest
committed step. The exit code is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.programs import fork_server

SCRIPTS = Path(__file__).parent
MODES = ("before", "torn", "term")
FAILURES = "HARD_FAIL,SILENT_DIVERGENCE,LOST_WORK,CONTROL_FAIL"
LIFE_TIMEOUT_S = 120
MARKER = "<!-- chaos: written by python -m scripts.chaos -->\n"


@dataclass(frozen=True)
class Kind:
    """Runs that are killed alike.

    Attributes:
        share: of all points.
        tiers: the argument of chaos_program.py.
        processes: of a run.
        killed: which of them.
    """

    share: float
    tiers: str
    processes: int = 1
    killed: int = 0


KINDS = {
    "one process": Kind(0.5, "plain"),
    "local tier": Kind(0.35, "local"),
    "two processes, of which process 0 is killed": Kind(0.1, "plain", processes=2),
    "two processes, of which process 1 is killed": Kind(0.05, "plain", processes=2, killed=1),
}


@dataclass(frozen=True)
class Outcome:
    """What ckpt-chaos has found for one kind.

    Attributes:
        failed: it has said so, or it has killed nothing.
        points: how many runs it has killed, by how.
        missed: how many runs it has meant to kill came to their end.
        report: its own Markdown.
    """

    failed: bool
    points: Counter[str]
    missed: int
    report: str


def campaign(kind: Kind, points: int, jobs: int, folder: Path, server: str) -> Outcome:
    summary = folder.with_suffix(".md")
    # Version 0.1.8 of ckpt-chaos does not tell the process that --crash-rank names, unless it is the first.
    environment = {**os.environ, "CKPT_CHAOS_CRASH_RANK": str(kind.killed)}
    verdicts = ["--step-regex", r"resumed from step (\d+)", "--result-file", "{out}/result.txt", "--fail-on", FAILURES]
    points_of = ["--modes", ",".join(MODES), "--max-points", str(points), "--jobs", str(jobs)]
    processes = ["--ranks", str(kind.processes), "--crash-rank", str(kind.killed), "--timeout", str(LIFE_TIMEOUT_S)]
    places = ["--work", str(folder), "--summary", str(summary)]
    life = [sys.executable, "-S", str(SCRIPTS / "chaos_life.py"), server]
    program = [str(SCRIPTS / "chaos_program.py"), kind.tiers, "--out", "{out}"]
    ended = subprocess.run(
        [sys.executable, "-m", "ckpt_chaos", "run", *verdicts, *points_of, *processes, *places, "--", *life, *program],
        env=environment,
        check=False,
    )
    if not summary.exists():
        raise SystemExit(f"ckpt-chaos has ended with {ended.returncode}, without a report")
    killed: Counter[str] = Counter()
    missed = 0
    for file in folder.glob("pt_*/result.json"):
        result = json.loads(file.read_text())
        if "point" in result:
            killed[result["point"][1]] += result["crashed"]
            missed += not result["crashed"]
    return Outcome(ended.returncode != 0 or not killed.total(), killed, missed, summary.read_text())


def section(name: str, outcome: Outcome) -> str:
    """The tool's own report; of its last part, the command, only a temporary socket would be new."""
    how = ", ".join(f"{outcome.points[mode]} {mode}" for mode in MODES)
    report, _, _ = outcome.report.partition("\nReproduce locally")
    report = re.sub(r"^## ", "", report).strip()
    missed = f"; {outcome.missed} more came to their end all the same" if outcome.missed else ""
    return f"## {name[0].upper()}{name[1:]}\n\nKilled: {how}{missed}.\n\n{report}\n"


def write_report(page: Path, outcomes: dict[str, Outcome]) -> None:
    """Replace what follows the marker in a page."""
    head, marker, _ = page.read_text().partition(MARKER)
    if not marker:
        raise SystemExit(f"{page} has no line {MARKER.strip()!r}, after which the report could stand")
    page.write_text(f"{head}{marker}\n" + "\n".join(section(name, outcome) for name, outcome in outcomes.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=320, help="how many runs are killed in all, at most")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument("--only", choices=KINDS, action="append", help="these kinds of runs; all if not given")
    parser.add_argument("--report", type=Path, help="the Markdown file whose part after the marker is written anew")
    parser.add_argument("--folder", type=Path, help="kept for a look afterwards; a temporary one if not given")
    options = parser.parse_args()
    kinds = {name: kind for name, kind in KINDS.items() if options.only is None or name in options.only}
    whole = sum(kind.share for kind in kinds.values())
    os.environ.pop("XLA_FLAGS", None)
    outcomes: dict[str, Outcome] = {}
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="torchorbax-chaos-")))
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
        server = fork_server()
        for number, (name, kind) in enumerate(kinds.items()):
            print(f"--- {name}", flush=True)
            points = max(len(MODES), round(options.points * kind.share / whole))
            outcomes[name] = campaign(kind, points, options.jobs, folder / f"kind_{number}", server)
            if options.report is not None:
                write_report(options.report, outcomes)
    killed = sum((outcome.points for outcome in outcomes.values()), Counter[str]())
    how = ", ".join(f"{killed[mode]} {mode}" for mode in MODES)
    failed = [name for name, outcome in outcomes.items() if outcome.failed]
    print(f"{killed.total()} killed ({how}), failed: {', '.join(failed) or 'none'}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
