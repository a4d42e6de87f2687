"""Kills a training run half-way, resumes it on twice as many chips, and checks that this changed nothing.

python examples/demo.py
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

TIMEOUT_S = 240  # of one training run; it takes about 25 s
MARKER = ".torchorbax-demo"

# Sixteen chips sum in another order than eight do, so their losses differ by rounding. Measured: 2e-7 (the last bit of
# a float32) in the first ten losses after the resume, growing slowly as training feeds it back, to 3e-6 in 140 steps.
# What a resume could lose is far above that: one bias's first moment, Adam's counters, the learning rate or the random
# key each change a loss by at least 2e-2 within two steps. The tolerances leave room of 30 times to the one side and
# 200 times to the other.
FIRST_LOSSES = 10
FIRST_TOLERANCE, LATER_TOLERANCE = 1e-5, 1e-4


class DemoError(Exception):
    """Something did not go as it should; the message is for the user."""


@dataclass(frozen=True)
class Run:
    """One start of `train_digits.py`, and what it leaves in the demo's folder."""

    name: str
    devices: int
    checkpoints: Path
    steps: int
    optimizer: str

    @property
    def losses_file(self) -> Path:
        return self.checkpoints.parent / f"{self.name}.losses.jsonl"

    @property
    def summary_file(self) -> Path:
        return self.checkpoints.parent / f"{self.name}.summary.json"

    @property
    def output_file(self) -> Path:
        return self.checkpoints.parent / f"{self.name}.log"

    @property
    def losses(self) -> dict[int, float]:
        if not self.losses_file.exists():
            return {}
        *lines, _ = self.losses_file.read_text().split("\n")  # what follows the last line break is not a whole line yet
        return {entry["step"]: entry["loss"] for entry in map(json.loads, lines)}

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What it wrote when it was through; None of it for a run that was killed."""
        summary: dict[str, Any] = json.loads(self.summary_file.read_text())
        return summary

    def committed_steps(self) -> list[int]:
        # Asked of the disk and not of torchorbax, which is on trial. A step is committed by renaming it to its number.
        if not self.checkpoints.exists():
            return []
        return sorted(int(entry.name) for entry in self.checkpoints.iterdir() if entry.name.isdigit())

    @contextmanager
    def started(self) -> Iterator[subprocess.Popen[bytes]]:
        """The process; it does not outlive the block."""
        options = {
            "--devices": self.devices,
            "--path": self.checkpoints,
            "--steps": self.steps,
            "--optimizer": self.optimizer,
            "--log-losses": self.losses_file,
            "--summary": self.summary_file,
        }
        script = Path(__file__).with_name("train_digits.py")
        command = [sys.executable, str(script), *(str(word) for option in options.items() for word in option)]
        with self.output_file.open("wb") as output:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
            try:
                yield process
            finally:
                process.kill()
                process.wait()

    def complete(self) -> None:
        with self.started() as process:
            try:
                status = process.wait(TIMEOUT_S)
            except subprocess.TimeoutExpired:
                raise DemoError(f"{self.name}: not through after {TIMEOUT_S} s; see {self.output_file}") from None
        if status != 0:
            raise DemoError(f"{self.name}: exit status {status}\n{self.output_file.read_text()[-2000:]}")

    def kill_half_way(self) -> None:
        """Train until half of the steps are done and two are committed; then SIGKILL, which nothing can prepare for."""
        deadline_s = time.monotonic() + TIMEOUT_S
        with self.started() as process:
            while max(self.losses, default=-1) < self.steps // 2 or len(self.committed_steps()) < 2:
                if process.poll() is not None:
                    raise DemoError(
                        f"{self.name}: ended before it could be killed\n{self.output_file.read_text()[-2000:]}"
                    )
                if time.monotonic() > deadline_s:
                    raise DemoError(f"{self.name}: not half through after {TIMEOUT_S} s; see {self.output_file}")
                time.sleep(0.05)
            process.kill()
        if self.committed_steps()[-1] == self.steps - 1:
            raise DemoError(f"{self.name}: was through before it could be killed; it takes more --steps")


# -------------------------------------------------------------------------------------------------------------- checks


def same_machine_repeats_itself(killed: Run, uninterrupted: Run) -> str:
    """What all other checks build on: without any checkpoint, equal seeds give equal bits."""
    different = differing_steps(killed.losses, uninterrupted.losses)
    if different:
        raise DemoError(
            f"two fresh runs on {killed.devices} devices differ from step {different[0]} on, before any resume"
        )
    return f"two fresh runs on {killed.devices} devices: {len(killed.losses)} losses equal, bit for bit"


def newest_committed_step_was_resumed(committed: list[int], resumed: Run) -> str:
    start = resumed.summary["resumed_from"]
    if start != committed[-1]:
        raise DemoError(
            f"{resumed.name}: resumed from step {start}, but step {committed[-1]} was committed at the kill"
        )
    if list(resumed.losses) != list(range(start + 1, resumed.steps)):
        raise DemoError(f"{resumed.name}: resumed from step {start}, but then ran the steps {list(resumed.losses)}")
    return f"{resumed.name}: from step {start}, the newest that was committed, to the end without a gap"


def equal_bit_for_bit(resumed: Run, uninterrupted: Run) -> str:
    if different := differing_steps(resumed.losses, uninterrupted.losses):
        raise DemoError(
            f"{resumed.name}: {len(different)} losses differ from the uninterrupted run, from step {different[0]} on"
        )
    if resumed.summary["digest"] != uninterrupted.summary["digest"]:
        raise DemoError(
            f"{resumed.name}: all losses are equal, but the final parameters differ from the uninterrupted run"
        )
    return f"{resumed.name}: {len(resumed.losses)} losses and the final parameters as uninterrupted, bit for bit"


def equal_up_to_rounding(resumed: Run, uninterrupted: Run) -> str:
    drift = [abs(loss / uninterrupted.losses[step] - 1) for step, loss in resumed.losses.items()]
    first, later = max(drift[:FIRST_LOSSES]), max(drift)
    measured = f"relative drift {first:.1e} in the first {FIRST_LOSSES} losses, {later:.1e} in all {len(drift)}"
    if not (first <= FIRST_TOLERANCE and later <= LATER_TOLERANCE):  # so that nan fails
        raise DemoError(
            f"{resumed.name}: {measured}; more than rounding ({FIRST_TOLERANCE:.0e}, {LATER_TOLERANCE:.0e})"
        )
    return f"{resumed.name}: {measured}"


def differing_steps(losses: dict[int, float], reference: dict[int, float]) -> list[int]:
    return [step for step, loss in losses.items() if reference.get(step) != loss]


# ---------------------------------------------------------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", type=Path, default=Path("runs/demo"), help="its folder, emptied first")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--optimizer", choices=["adamw", "optax"], default="adamw")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # as an exception, so that children end too
    try:
        demonstrate(options.path, options.steps, options.optimizer)
    except DemoError as error:
        sys.exit(f"FAILED: {error}")


def demonstrate(folder: Path, steps: int, optimizer: str) -> None:
    make_empty(folder)
    started_s = time.monotonic()

    def announce(text: str) -> None:
        print(f"[{time.monotonic() - started_s:5.1f} s] {text}", flush=True)

    def run(name: str, devices: int, checkpoints: str) -> Run:
        return Run(name, devices, folder / checkpoints, steps, optimizer)

    killed = run("killed", 8, "run")
    on_16 = run("resumed on 16", 16, "run")
    on_8 = run("resumed on 8", 8, "copy")
    uninterrupted = run("uninterrupted", 8, "uninterrupted")

    announce(f"training on 8 simulated chips, to be killed half-way; {folder}/ has everything")
    killed.kill_half_way()
    committed = killed.committed_steps()
    shutil.copytree(killed.checkpoints, on_8.checkpoints)
    announce(f"killed after step {max(killed.losses)}; the same command again, on 16 chips")
    on_16.complete()
    announce("to judge it: a copy of what the kill left, resumed on 8 chips")
    on_8.complete()
    announce("and 8 chips without any interruption")
    uninterrupted.complete()
    announce("through\n")

    print_table(killed, [on_16, on_8, uninterrupted])
    check_all(killed, committed, on_16, on_8, uninterrupted)


def make_empty(folder: Path) -> None:
    if folder.exists():
        if not (folder / MARKER).exists() and any(folder.iterdir()):
            raise DemoError(f"{folder} holds things that are not this demo's; choose another --path")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARKER).touch()


def print_table(killed: Run, resumed_or_not: list[Run]) -> None:
    rows = [["", "devices", "steps", "saves", "median stall", "test accuracy"]]
    rows.append([killed.name, str(killed.devices), f"0-{max(killed.losses)}", "", "", ""])
    for run in resumed_or_not:
        summary = run.summary
        rows.append(
            [
                run.name,
                str(summary["devices"]),
                f"{min(run.losses)}-{max(run.losses)}",
                str(summary["saves"]),
                f"{statistics.median(summary['stalls_ms']):.1f} ms",
                f"{summary['accuracy']:.1%}",
            ]
        )
    for name, *numbers in rows:
        print(f"{name:16}" + "".join(f"{number:>15}" for number in numbers))
    ran, restored = max(killed.losses), resumed_or_not[0].summary["resumed_from"]
    print(f"\nkilled after step {ran}, resumed from step {restored}: {ran - restored} steps lost, and run again\n")


def check_all(killed: Run, committed: list[int], on_16: Run, on_8: Run, uninterrupted: Run) -> None:
    checks = [
        partial(same_machine_repeats_itself, killed, uninterrupted),
        partial(newest_committed_step_was_resumed, committed, on_16),
        partial(newest_committed_step_was_resumed, committed, on_8),
        partial(equal_bit_for_bit, on_8, uninterrupted),
        partial(equal_up_to_rounding, on_16, uninterrupted),
    ]
    failures = []
    for check in checks:
        try:
            print("ok    ", check())
        except DemoError as error:
            failures.append(str(error))
    if failures:
        raise DemoError("\n        ".join(failures))


if __name__ == "__main__":
    main()
