"""Kills a run on gs:// and its storage server together, at every request of a save, and checks what is left.

python scripts/gcskills.py --trials 400

A trial is one life of a run: it verifies all steps that are listed, resumes, and saves the next step, which also lets
an old one go. The server ends with the k-th request of that save, before or after it has acted on it, and the process
is killed with SIGKILL right then. Then the server starts again on the same data. Every trial checks that
- the newest step that was committed before (asked of the server's objects and not of torchorbax) is the one resumed,
- what is restored of it is what was saved, bit for bit, and all steps listed pass `torchorbax.verify`,
- no committed step is lost but to retention,
- what a life left behind is gone when the next one has saved.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
import traceback
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torchorbax

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.helpers.gcs_server import ServerProcess, environment

RUN = "gs://bucket/runs/killed"
KEEP = 2
TIMEOUT_S = 120.0
RESTART = 60
"""After so many trials the run starts anew."""


def values(step: int) -> dict[str, np.ndarray]:
    """The state after a step: one leaf that is written in chunks, and one that is gathered."""
    large = np.arange(1 << 17, dtype=np.uint32) * np.uint32(2654435761) + np.uint32(step)
    return {"large": large, "small": np.full(7, step, np.int32)}


# -------------------------------------------------------------------------------------------------------------- a life


def live(ready: int, go: int, told: Path) -> None:
    """Verify, resume, tell what was found, wait until the parent says so, and save the next step."""
    jax.config.update("jax_platforms", "cpu")
    state = {name: jax.device_put(np.zeros_like(array)) for name, array in values(0).items()}
    with torchorbax.Checkpointer(RUN, {"weights": state}, save=None, keep=KEEP, storage_timeout_s=60) as run:
        listed = run.all_steps()
        if listed:
            torchorbax.verify(RUN)
        step = run.restore()
        found = {name: np.asarray(array).tobytes() for name, array in run.state["weights"].items()}
        same = step is None or found == {name: array.tobytes() for name, array in values(step).items()}
        told.write_text(json.dumps({"listed": listed, "step": step, "same": same}))
        os.write(ready, b"r")
        os.read(go, 1)
        run.state["weights"].update({name: jax.device_put(array) for name, array in values(run.next_step).items()})
        run.save(run.next_step, force=True)


class Failure(Exception):
    """Something was lost or wrong; the message says what."""


class Campaign:
    """Trials on one run after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.outcomes: Counter[str] = Counter()
        self.runs = 0
        self.requests = 0
        self.begin()

    def begin(self) -> None:
        """A new run, on a new server, with two steps."""
        self.runs += 1  # an empty server for each
        data = self.folder / f"data-{self.runs}"
        data.mkdir()
        self.server = ServerProcess(data)
        self.server.start()
        os.environ.update(environment(self.server.port))
        for _ in range(KEEP + 1):
            self.life(None)
        self.requests = self.life(None)

    def objects(self) -> list[str]:
        """The names below the run, asked of the server."""
        url = f"http://127.0.0.1:{self.server.port}/storage/v1/b/bucket/o?prefix=runs/killed/&maxResults=1000"
        with urllib.request.urlopen(url, timeout=30) as answer:
            return [item["name"].removeprefix("runs/killed/") for item in json.load(answer).get("items", [])]

    def committed(self) -> list[int]:
        return sorted(int(name.split("/")[0]) for name in self.objects() if name.count("/") == 1 and "commit_" in name)

    def life(self, rule: str | None) -> int:
        """One process, killed as soon as the server has ended; returns how many requests its save made."""
        before = self.committed()
        told, output = self.folder / "told", self.folder / "output"
        told.unlink(missing_ok=True)
        ready, tell_ready = os.pipe()
        wait_go, go = os.pipe()
        sys.stdout.flush()
        if (child := os.fork()) == 0:  # with everything imported, and JAX not started yet
            status = 1
            try:
                with output.open("w") as file:
                    os.dup2(file.fileno(), 1)
                    os.dup2(file.fileno(), 2)
                    live(tell_ready, wait_go, told)
                    status = 0
            except BaseException:
                with output.open("a") as file:
                    traceback.print_exc(file=file)
            finally:
                os._exit(status)
        os.close(tell_ready)
        os.close(wait_go)
        try:
            if not os.read(ready, 1):
                raise Failure(f"a life ended before it was ready\n{output.read_text()[-3000:]}")
            self.check_start(json.loads(told.read_text()), before)
            self.server.clear_log()
            if rule is not None:
                self.server.add_faults(rule)
            os.write(go, b"g")
            return self.end(child, rule, before)
        finally:
            os.close(ready)
            os.close(go)
            try:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            except (ProcessLookupError, ChildProcessError):
                pass

    def end(self, child: int, rule: str | None, before: list[int]) -> int:
        """Wait for one of both to end, kill the other, and look at what is there."""
        deadline_s = time.monotonic() + TIMEOUT_S
        status: int | None = None
        assert self.server.process is not None
        while status is None and self.server.process.poll() is None:
            if time.monotonic() > deadline_s:
                raise Failure(f"a life did not end within {TIMEOUT_S} s, with {rule}")
            done, raw = os.waitpid(child, os.WNOHANG)
            status = os.waitstatus_to_exitcode(raw) if done else None
            time.sleep(0.0005)
        if status is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            self.server.start()
        elif status != 0:
            raise Failure(f"a life ended with {status}\n{(self.folder / 'output').read_text()[-3000:]}")
        self.server.clear_faults()
        requests = len(self.server.log())
        after = self.committed()
        if before and (not after or after[-1] < before[-1]):
            raise Failure(f"steps {before} were committed, and now {after}")
        if lost := [step for step in before[-KEEP + 1 :] if step not in after]:
            raise Failure(f"step {lost} is lost: {before} were committed, and now {after}")
        if status == 0:
            self.check_end(after)
            return requests
        return 0

    def check_start(self, told: dict[str, Any], before: list[int]) -> None:
        if told["listed"] != before:
            raise Failure(f"{told['listed']} are listed, {before} are committed")
        if told["step"] != (before[-1] if before else None):
            raise Failure(f"resumed from {told['step']}, but {before} are committed")
        if not told["same"]:
            raise Failure(f"what was restored of step {told['step']} is not what was saved")

    def check_end(self, after: list[int]) -> None:
        if len(after) > KEEP:
            raise Failure(f"{KEEP} steps were to be kept, there are {after}")
        seen = {name.split("/")[0] for name in self.objects() if not name.startswith(".")}
        if left := seen - set(map(str, after)):
            raise Failure(f"left behind: {sorted(left)}")

    def trial(self, number: int, at: int) -> str:
        """One life that is killed with a request of its save, and each tenth one that is not; returns which."""
        if number % RESTART == RESTART - 1:
            self.life(None)
            self.server.kill()
            self.begin()
        if number % 10 == 9:
            self.life(None)
        before = self.committed()
        effect = f"exit-{('before', 'after')[(number + number // self.requests) % 2]}"
        self.life(f"{effect} after={at} times=1")
        after = self.committed()
        part = "committed" if after[-1] > before[-1] else "not committed"
        return f"{part}, {'an old step gone' if set(before) - set(after) else 'no old step gone'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=400)
    options = parser.parse_args()
    started_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="torchorbax-gcskills-") as folder:
        campaign = Campaign(Path(folder))
        print(f"a save makes {campaign.requests} requests")
        try:
            for number in range(options.trials):
                # spread over the save; each request in turn if there are enough trials
                at = number * max(campaign.requests, options.trials) // options.trials % campaign.requests
                try:
                    campaign.outcomes[campaign.trial(number, at)] += 1
                except Failure as failure:
                    sys.exit(f"trial {number}, killed at request {at}: {failure}")
                if sys.stdout.isatty() or number % 100 == 99:
                    print(f"{number + 1} trials, 0 failures, {time.monotonic() - started_s:.0f} s", flush=True)
            campaign.life(None)
        finally:
            campaign.server.kill()
    for outcome, count in sorted(campaign.outcomes.items()):
        print(f"{count:5}  {outcome}")
    print(f"{options.trials} trials, 0 failures")


if __name__ == "__main__":
    main()
