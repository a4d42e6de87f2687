"""What a run on gs:// does when the storage fails: every fault below, at every place where it can hit.

`python -m tests.campaigns.fault_matrix first FOLDER` runs the cells in several processes, each with a server of its
own, and notes what came of them; `python -m tests.campaigns.fault_matrix second FOLDER` is one more, which looks at
what they have left.
`python -m tests.campaigns.fault_matrix write` does both for all and writes the table in docs/reliability.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torchorbax
from etils import epath
from torchorbax import SaveError, StorageError
from torchorbax.policies import PreservationPolicy

from tests.helpers.gcs_server import ServerProcess, environment

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
SLACK_S = 30.0
"""How much later than `storage_timeout_s` an error may come, on a machine that has other things to do."""


@dataclass(frozen=True)
class Place:
    """Requests that a fault can hit, while a step is saved or restored.

    Attributes:
        name: what the docs call it.
        when: `save` or `restore`.
        words: of a rule for the test server; `{step}` is the step saved or restored, `{old}` the one to be deleted.
    """

    name: str
    when: str
    words: str


@dataclass(frozen=True)
class Fault:
    """What goes wrong.

    Attributes:
        name: what the docs call it.
        effect: of a rule for the test server.
        times: so many requests are hit; None: all, until it is lifted.
    """

    name: str
    effect: str
    times: int | None = None


PLACES = [
    Place("array data", "save", "kind=data-write name=/{step}/[^/]+/d/"),
    Place("index of the array data", "save", "kind=metadata-write name=/{step}/[^/]+/manifest.ocdbt"),
    Place("metadata", "save", "kind=metadata-write name=/{step}/.*(_METADATA|metadata)$"),
    Place("shardings", "save", "kind=metadata-write name=/{step}/.*_sharding$"),
    Place("commit marker", "save", "kind=copy name=/{step}/commit_success"),
    Place("listing", "save", "kind=list,stat"),
    Place("deletion of a commit marker", "save", "kind=delete,batch name=/{old}/commit_success"),
    Place("deletion, half done", "save", "kind=batch"),
    Place("listing", "restore", "kind=list,stat"),
    Place("manifest", "restore", "kind=read name=/{step}/manifest/metadata"),
    Place("array data", "restore", "kind=read name=/{step}/[^/]+/(d/|ocdbt|manifest.ocdbt)"),
]
FAULTS = [
    Fault("503, twice", "503", 2),
    Fault("429, once", "429", 1),
    Fault("connection cut before the request is acted on", "cut-before", 1),
    Fault("connection cut after it, so that the answer is lost", "cut-after", 1),
    Fault("answer cut short", "truncate:20", 1),
    Fault("answers late", "delay:0.7", 4),
    Fault("answers dripping", "drip:{rate}", 3),
    Fault("403, until it is lifted", "403"),
    Fault("503 until it is lifted", "503"),
    Fault("silence until it is lifted", "hang-before"),
    Fault("server gone, until it is back", "exit-before"),
]
SHARES = [FAULTS[0:1], FAULTS[1:4], FAULTS[4:7], FAULTS[7:9], FAULTS[9:10], FAULTS[10:]]
"""By the process that runs them. All of a process have one `storage_timeout_s`."""

VERDICTS = ("survived", "reported")

AFTERWARDS = 1_000_000
"""A step that the next life saves."""


def timeout_s(faults: Sequence[Fault]) -> float:
    """For all faults of a process: longer than it takes to try again after a few, shorter than anybody's patience."""
    return 12.0 if all(fault.times is not None for fault in faults) else 3.0


def key(fault: Fault, place: Place) -> str:
    return f"{fault.name} | {place.when}: {place.name}"


# ---------------------------------------------------------------------------------------------------------- the state

WORDS = 1 << 19  # 2 MiB


def values(step: int) -> dict[str, np.ndarray]:
    """The state after a step: one leaf that is written in chunks, and some that are gathered."""
    large = np.arange(WORDS, dtype=np.uint32) * np.uint32(2654435761) + np.uint32(step)
    return {"large": large, **{f"small{one}": np.full(7, step * 100 + one, np.int32) for one in range(5)}}


def live(step: int) -> dict[str, jax.Array]:
    return {name: jax.device_put(array) for name, array in values(step).items()}


def same(arrays: Mapping[str, Any], step: int) -> bool:
    """Bit for bit."""
    expected = values(step)
    return arrays.keys() == expected.keys() and all(
        np.asarray(arrays[name]).tobytes() == array.tobytes() for name, array in expected.items()
    )


class Doomed(PreservationPolicy):  # type: ignore[misc]  # Orbax is untyped
    """Lets go what is in `steps`."""

    def __init__(self) -> None:
        self.steps: set[int] = set()

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        return [one.step not in self.steps for one in checkpoints]


# -------------------------------------------------------------------------------------------------------- first process


class Wrong(Exception):
    """What a run must not do; the message becomes the verdict."""


def check(good: bool, what: str) -> None:
    if not good:
        raise Wrong(what)


@dataclass
class Cell:
    """What came of a cell.

    Attributes:
        verdict: one of `VERDICTS`, or what is wrong.
        elapsed_s: until the save or restore had ended.
        laps: how many training steps were made meanwhile; None for a restore.
        stall_s: the longest of them.
        error: what was reported.
    """

    verdict: str
    elapsed_s: float = 0.0
    laps: int | None = None
    stall_s: float = 0.0
    error: str = ""


class First:
    """Runs cells, one after the other, on one run."""

    def __init__(self, folder: Path, share: int) -> None:
        self.faults = SHARES[share]
        self.timeout_s = timeout_s(self.faults)
        self.server = ServerProcess(folder, buckets=[f"share{share}"])
        self.path = f"gs://share{share}/runs/matrix"
        self.committed: set[int] = set()
        self.next_step = 0

    def all(self) -> dict[str, Any]:
        """By cell what came of it, and which steps there are at the end."""
        with self.server:
            os.environ.update(environment(self.server.port, "first"))
            self.keep = Doomed()
            self.state: dict[str, Any] = {"weights": live(0)}
            self.run = torchorbax.Checkpointer(
                self.path, self.state, save=None, keep=self.keep, storage_timeout_s=self.timeout_s
            )
            self.saved()
            cells = {key(fault, place): self.cell(fault, place) for fault in self.faults for place in PLACES}
            self.saved()
            self.run.close()
        return {
            "cells": {name: dataclasses.asdict(cell) for name, cell in cells.items()},
            "committed": sorted(self.committed),
        }

    def cell(self, fault: Fault, place: Place) -> Cell:
        """Run one."""
        cell = Cell("")
        try:
            work = self.save if place.when == "save" else self.restore
            cell.verdict = work(fault, place, cell)
        except Wrong as error:
            cell.verdict = str(error)
        except Exception as error:  # of any kind: that is what is wrong
            cell.verdict = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        finally:
            self.lift()
            with contextlib.suppress(SaveError):
                self.run.wait()
            if cell.verdict not in VERDICTS:
                self.committed = set(self.run.all_steps())  # so that the cells after it have their own verdicts
        return cell

    def save(self, fault: Fault, place: Place, cell: Cell) -> str:
        old = self.saved() if place.name.startswith("deletion") else None
        step = self.next_step
        self.keep.steps = {old}
        self.hit(fault, place, step, old)
        started_s = time.monotonic()
        error = self.attempt(step, cell)
        cell.elapsed_s = time.monotonic() - started_s
        check(self.lift() > 0, "the fault hit nothing")
        found = set(self.run.all_steps())
        new = {step} if error is None or error.committed else set()
        check(found - {old} == self.committed - {old} | new, f"listed are {sorted(found)}")
        self.committed = found
        if error is not None:
            cell.error = str(error)
            check(cell.elapsed_s < self.timeout_s + SLACK_S, f"reported only after {cell.elapsed_s:.0f} s")
        if old in found:
            self.check_good(old)
        self.check_good(step if error is None else self.saved())  # the storage is back
        if old in found:
            self.saved()
            check(old not in self.run.all_steps(), "what was to be let go stays")
            self.committed.discard(old)
        return "survived" if error is None else "reported"

    def restore(self, fault: Fault, place: Place, cell: Cell) -> str:
        step = max(self.committed)
        self.set_live(100_000)
        self.hit(fault, place, step, None)
        started_s = time.monotonic()
        error: StorageError | None = None
        try:
            found = self.run.restore()
            check(found == step, f"step {found} was restored, not {step}")
        except StorageError as failure:
            error = failure
            cell.error = str(error)
        cell.elapsed_s = time.monotonic() - started_s
        check(self.lift() > 0, "the fault hit nothing")
        check(same(self.state_now(), step if error is None else 100_000), "the live state is not what it should be")
        if error is None:
            return "survived"
        check(cell.elapsed_s < self.timeout_s + SLACK_S, f"reported only after {cell.elapsed_s:.0f} s")
        check(self.run.restore() == step, "the newest step is not restored when the storage is back")
        check(same(self.state_now(), step), "what is restored is not what was saved")
        return "reported"

    def attempt(self, step: int, cell: Cell) -> SaveError | None:
        """Save, and train on until it is known how that ended."""
        self.set_live(step)
        self.next_step = step + 1
        weights = np.zeros(1000)
        try:
            self.run.save(step, force=True)
            record, cell.laps = self.run.history[-1], 0
            while record.commit_s is None:
                started_s = time.perf_counter()
                weights = weights * 0.9 + 1
                time.sleep(0.002)
                self.run.save(step)  # not due: it only tells of errors
                cell.stall_s = max(cell.stall_s, time.perf_counter() - started_s)
                cell.laps += 1
            self.run.wait()
        except SaveError as error:
            return error
        return None

    def saved(self) -> int:
        """Save the next step, which must succeed."""
        step = self.next_step
        error = self.attempt(step, Cell(""))
        check(error is None, f"and then the next save failed, too: {error}")
        self.committed.add(step)
        return step

    def check_good(self, step: int) -> None:
        check(torchorbax.verify(self.path, step) == [step], "it does not verify")

    def hit(self, fault: Fault, place: Place, step: int, old: int | None) -> None:
        rate = 2_000_000 if "read" in place.words and place.name != "manifest" else 3000
        effect = fault.effect.format(rate=rate)
        words = place.words.format(step=step, old=old)
        self.server.add_faults(f"{effect} {words}" + (f" times={fault.times}" if fault.times else ""))

    def lift(self) -> int:
        """End the fault; returns how many requests it has hit."""
        assert self.server.process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.server.process.wait(0.05)
            self.server.start()
            return 1
        matches = sum(self.server.fault_matches().values())
        self.server.clear_faults()
        return matches

    def set_live(self, step: int) -> None:
        self.run.state["weights"].update(live(step))

    def state_now(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.run.state["weights"]
        return found


# ------------------------------------------------------------------------------------------------------- second process


def found_by_another(path: str) -> dict[str, Any]:
    """What is left of a run, and of interrupted saves when the next life has saved a step."""
    listed = torchorbax.verify(path)
    bad = [step for step in listed if not same(torchorbax.load(path, step, "weights"), step)]
    # A request that was given up may have arrived after the last save of the life before.
    with torchorbax.Checkpointer(path, {"weights": live(AFTERWARDS)}, save=None, keep=None) as run:
        run.save(AFTERWARDS, force=True)
    names = {entry.name for entry in epath.Path(path).iterdir() if not entry.name.startswith(".")}
    return {"listed": listed, "bad": bad, "left": sorted(names - {str(step) for step in (*listed, AFTERWARDS)})}


# ------------------------------------------------------------------------------------------------------------ all of it


def first(folder: Path) -> None:
    """All shares at the same time, each in a process that has everything imported already."""
    children = []
    for share in range(len(SHARES)):
        if (child := os.fork()) == 0:
            status = 1
            try:
                data = folder / f"data-{share}"
                data.mkdir()
                (folder / f"first-{share}.json").write_text(json.dumps(First(data, share).all()))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    failed = [share for share, child in enumerate(children) if os.waitpid(child, 0)[1] != 0]
    if failed:
        sys.exit(f"shares {failed} failed")


def second(folder: Path) -> None:
    """The data of all shares, behind one server."""
    data = folder / "data"
    data.mkdir()
    for share in range(len(SHARES)):
        (folder / f"data-{share}" / f"share{share}").rename(data / f"share{share}")
    with ServerProcess(data) as server:
        os.environ.update(environment(server.port, "second"))
        found = [found_by_another(f"gs://share{share}/runs/matrix") for share in range(len(SHARES))]
    (folder / "second.json").write_text(json.dumps(found))


def both_parts(folder: Path) -> dict[str, Cell]:
    """What came of all cells."""
    for part in ("first", "second"):
        command = [sys.executable, "-m", "tests.campaigns.fault_matrix", part, str(folder)]
        done = subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=500)
        if done.returncode != 0:
            raise RuntimeError(f"the {part} part ended with exit code {done.returncode}\n{done.stderr[-5000:]}")
    cells: dict[str, Cell] = {}
    for share, then in enumerate(json.loads((folder / "second.json").read_text())):
        before = json.loads((folder / f"first-{share}.json").read_text())
        wrong = ""
        if then["listed"] != before["committed"]:
            wrong = f"another process lists {then['listed']}, committed are {before['committed']}"
        elif then["bad"]:
            wrong = f"another process restores other values of {then['bad']}"
        elif then["left"]:
            wrong = f"left behind: {then['left']}"
        cells |= {name: Cell(**{**cell, "verdict": wrong or cell["verdict"]}) for name, cell in before["cells"].items()}
    return cells


# ------------------------------------------------------------------------------------------------------------- the page

START, END = "<!-- faults: written by python -m tests.campaigns.fault_matrix write -->\n", "<!-- end of faults -->"


def table(verdicts: Mapping[str, str]) -> str:
    """The table in the docs."""
    head = ["fault", *(f"{place.when}: {place.name}" for place in PLACES)]
    rows = [[fault.name, *(verdicts[key(fault, place)] for place in PLACES)] for fault in FAULTS]
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/')[:160] for cell in row)} |\n" for row in lines)


def table_in_docs() -> str:
    found = re.search(f"{re.escape(START)}(.*?){re.escape(END)}", PAGE.read_text(), re.DOTALL)
    return found[1] if found else ""


def write_table(verdicts: Mapping[str, str]) -> None:
    page = PAGE.read_text()
    PAGE.write_text(page.replace(START + table_in_docs() + END, START + table(verdicts) + END))


def main() -> None:
    if sys.argv[1] != "write":
        jax.config.update("jax_platforms", "cpu")
        {"first": first, "second": second}[sys.argv[1]](Path(sys.argv[2]))
        return
    with tempfile.TemporaryDirectory() as folder:
        cells = both_parts(Path(folder))
    for name, cell in cells.items():
        laps = "" if cell.laps is None else f", {cell.laps} training steps, longest {cell.stall_s:.3f} s"
        print(f"{name}: {cell.verdict} ({cell.elapsed_s:.1f} s{laps}) {cell.error[:200]}")
    write_table({name: cell.verdict for name, cell in cells.items()})


if __name__ == "__main__":
    main()
