"""SIGTERM at every kind of moment of a training program, at random times, and what the next start finds.

python -m tests.campaigns.sigterm --trials 200

A trial is one life of a run. It trains some steps, comes to its moment, gets SIGTERM at a random time after that, and
has 30 seconds, as on a machine that goes away; then it gets SIGKILL. Where the program would never come back from its
moment, it gets SIGKILL as soon as the step is committed. Every trial checks that
- the last complete step is committed by then: the last one after which the program wrote down what its state was,
- the next start resumes this step, and all of its state, random numbers and data position included, is bit for bit what
  the program wrote down,
- a program that comes back ends by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.crashtest import Failure, noted

from tests.helpers.programs import ROOT, Forked, start_program

PROGRAM = Path(__file__).with_name("sigterm_training.py")
GRACE_S = 30.0
START_S = 120.0


@dataclass(frozen=True)
class Moment:
    """Where the program is when SIGTERM comes.

    Attributes:
        name: what the program calls it.
        says: what the docs call it.
        within_s: SIGTERM comes up to so much later than the program has come there.
        returns: the program comes back from there by itself.
        steps: the most steps before it.
    """

    name: str
    says: str
    within_s: float
    returns: bool = True
    steps: int = 12


MOMENTS = [
    Moment("training", "anywhere in a loop of short steps", 1.0),
    Moment("first compilation", "in the first step of a start, which compiles", 1.5, steps=0),
    Moment("compilation", "in a compilation of seconds, later on", 2.0),
    Moment("evaluation", "in an evaluation without end, before the update", 0.5, returns=False),
    Moment(
        "evaluation after the update",
        "in an evaluation without end, after the update, with `save_on_exception=True`",
        0.5,
        returns=False,
    ),
    Moment("loader", "while a loader does not answer", 0.5, returns=False),
    Moment("stderr", "while stderr is full", 0.5, returns=False),
    Moment("workers", "to the group: DataLoader workers die, too", 1.0),
    Moment("wait", "in `wait()`", 0.8),
    Moment("close", "in `close()`", 0.8),
    Moment("restore", "in `resume`, while it reads", 0.8, steps=0),
]


@dataclass
class Campaign:
    """Trials on one run.

    Attributes:
        folder: where it is.
        chance: the random numbers.
        outcomes: the trials that went well, by moment.
    """

    folder: Path
    chance: random.Random
    outcomes: Counter[str] = field(default_factory=Counter)

    def trial(self, number: int, moment: Moment) -> None:
        """One life, and the start after it.

        Raises:
            Failure: a step was lost or is wrong.
        """
        before = self.committed()
        steps = min(moment.steps, 1 + self.chance.randrange(12)) if before is not None else 2
        program = self.start(moment.name, steps, number)
        try:
            self.arrived(program, number, moment)
            time.sleep(self.chance.uniform(0.0, moment.within_s))  # the signal comes at a random time within the moment
            self.signal(program, moment)
            complete = self.complete(number, before) if not moment.returns else None
            status = self.end(program, complete)
        finally:
            program.kill()
            program.wait()
            if program.stderr is not None:
                program.stderr.close()
        expected = self.complete(number, before)
        if self.committed() != expected:
            self.fail(moment, f"step {expected} was complete, and {self.committed()} is committed (status {status})")
        if moment.returns and status not in (0, 1 if moment.name == "workers" else 0, self.killed(moment)):
            self.fail(moment, f"the program ended with {status}")
        self.outcomes[moment.name] += 1

    def killed(self, moment: Moment) -> int:
        """The status if SIGTERM ends the program at once, which is right while it only reads."""
        return -signal.SIGTERM if moment.name == "restore" else 0

    def start(self, moment: str, steps: int, number: int) -> Forked | subprocess.Popen[str]:
        self.folder.mkdir(exist_ok=True)
        with (self.folder / "output").open("a") as output:
            return start_program(
                self.folder,
                PROGRAM,
                self.folder,
                moment,
                steps,
                number,
                env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "TQDM_DISABLE": "1"},
                warnings="ignore",
                stdout=output,
                stderr=subprocess.PIPE if moment == "stderr" else output,
            )

    def arrived(self, program: Forked | subprocess.Popen[str], number: int, moment: Moment) -> None:
        """Wait until the program has come to its moment, and check what it has restored."""
        deadline_s = time.monotonic() + START_S
        while not any(entry["trial"] == number for entry in noted(self.folder / "arrivals")):
            if program.poll() is not None or time.monotonic() > deadline_s:
                self.fail(moment, "the program has not come there")
            time.sleep(0.01)  # looks again; another process writes
        self.check_start(number, moment)

    def check_start(self, number: int, moment: Moment) -> None:
        """All of the state of a start is that after the newest complete step."""
        started = [entry for entry in noted(self.folder / "starts") if entry["trial"] == number]
        last = self.last_noted(number)
        if not started or last is None:
            return  # it is the first, or has not restored yet; a later trial looks at the same step
        if (started[0]["step"], started[0]["digest"]) != (last["step"], last["digest"]):
            self.fail(moment, f"resumed {started[0]}, and the state before was {last}")

    def signal(self, program: Forked | subprocess.Popen[str], moment: Moment) -> None:
        if program.poll() is None:
            if moment.name == "workers":
                os.killpg(program.pid, signal.SIGTERM)
            else:
                program.send_signal(signal.SIGTERM)

    def end(self, program: Forked | subprocess.Popen[str], complete: int | None) -> int | None:
        """Wait until the program ends or has committed a step."""
        deadline_s = time.monotonic() + GRACE_S
        while time.monotonic() < deadline_s:
            if (status := program.poll()) is not None:
                return status
            if complete is not None and self.committed() == complete:
                return None
            time.sleep(0.01)  # looks again; another process commits
        return None

    def committed(self) -> int | None:
        """The newest committed step, by the names on disk."""
        names = [entry.name for entry in (self.folder / "run").glob("*") if entry.name.isdigit()]
        return max(map(int, names), default=None)

    def last_noted(self, before: int) -> dict[str, Any] | None:
        """What the program wrote down last, before this trial."""
        return next((entry for entry in reversed(noted(self.folder / "steps")) if entry["trial"] < before), None)

    def complete(self, number: int, before: int | None) -> int | None:
        """The last complete step."""
        last = self.last_noted(number + 1)
        return before if last is None else last["step"]

    def fail(self, moment: Moment, reason: str) -> None:
        output = (self.folder / "output").read_text()[-3000:]
        raise Failure(f"SIGTERM {moment.says}: {reason}\n{output}")

    def last_start(self, number: int) -> None:
        """One more start, which only shows what the last trial has left."""
        moment = next(moment for moment in MOMENTS if moment.name == "wait")
        program = self.start(moment.name, 0, number)
        try:
            self.arrived(program, number, moment)
        finally:
            program.kill()
            program.wait()


def run_trials(folder: Path, moments: Sequence[Moment], trials: int, seed: int) -> Campaign:
    """Trials at these moments in turn.

    Raises:
        Failure: a step was lost or is wrong.
    """
    campaign = Campaign(folder, random.Random(seed))
    for number in range(trials):
        campaign.trial(number, moments[number % len(moments)])
        if sys.stdout.isatty() or number % 20 == 19:
            print(f"{number + 1} trials, 0 failures", flush=True)
    campaign.last_start(trials)
    return campaign


def table(outcomes: Counter[str]) -> str:
    """How the trials went, for the docs."""
    rows = [f"| {moment.says} | {outcomes[moment.name]} | {outcomes[moment.name]} |" for moment in MOMENTS]
    return "\n".join(
        ["| SIGTERM comes | trials | the last complete step was there, bit for bit |", "|---|---|---|", *rows]
    )


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="torchorbax-sigterm-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with scratch() as folder:
        try:
            campaign = run_trials(folder, MOMENTS, options.trials, options.seed)
        except Failure as failure:
            sys.exit(f"seed {options.seed}: {failure}")
    print(table(campaign.outcomes))
    print(f"{options.trials} trials, 0 failures")


if __name__ == "__main__":
    main()
