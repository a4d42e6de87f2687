"""What must hold in every simulation, whatever went wrong. Looked at from outside, with none of torchorbax's code.

- At most one outcome a step: all processes of a program that learn how a save ended learn the same.
- Every listed step is whole, at every moment: its files are those of its manifest.
- Nobody waits for other processes longer than the limit.
- A step that was acknowledged is restored by the next program, or a newer one; all its processes restore the same one.
- Nothing is deleted that is not the run's own.
- Whoever has been ousted commits and deletes nothing more, but for one request that was on its way.

Under gs:// a step is written in its place, and docs/reliability.md names what that leaves open: a program that is
ousted while it writes a step may go on, until it looks at the record again, and a request that its client has given up
may still arrive. If that changes a step of the same number that somebody else has saved, the step is *touched*. It may
then be damaged, but that is noticed: it is never restored with other values, and an older step is restored instead.

Over NFS, where there are no locks, two programs that open a run at the same moment may both believe for a while that
they own it. The one that does not may restore what was listed some seconds ago; its first save tells it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Protocol

from tests.simulation.disk import digest_of
from tests.simulation.programs import BARRIER_TIMEOUT_S, Came, History
from tests.simulation.scheduler import Process, Scheduler

OWNER = ".torchorbax-owner"
MARKER = "commit_success.txt"
_OPENING_S = 400.0
"""No program waits longer for an owner and for its own processes, when it opens a run."""
_SLACK_S = 12.0
"""What a wait may take beyond its limit: polls, and requests of a service that does not answer."""


class View(Protocol):
    """The files of a run, by path below it, without a request."""

    def files(self, folder: str) -> Mapping[str, bytes]:
        """The files below a folder, by path below it."""

    def is_listed(self, step: str) -> bool:
        """Does the folder of this name count as a step, or a base?"""

    def numbers(self, folder: str = "") -> list[str]:
        """The names of folders that are numbers."""


class Watch:
    """Watches the files of a run, and notes what must not be.

    Args:
        view: the files.
        scheduler: runs everything.
        strangers: files that do not belong to the run, by path.
        in_place: are steps written in their places?
        stale_s: how old a listing may be.

    Attributes:
        violations: what must not be, in words.
        touched: the folders of steps and bases in which an ousted program or a late request has changed something.
    """

    def __init__(
        self, view: View, scheduler: Scheduler, strangers: Mapping[str, bytes], *, in_place: bool, stale_s: float
    ) -> None:
        self._in_place = in_place
        self._stale_s = stale_s
        self._owners: list[tuple[float, int]] = []  # since when, and the number of the process
        self.violations: list[str] = []
        self._view = view
        self._scheduler = scheduler
        self._strangers = dict(strangers)
        self._listed = {name for name in view.numbers() if view.is_listed(name)}
        self.touched: set[str] = set()
        self._owner: int | None = None
        self._ousted: dict[int, float] = {}  # when a process lost the run, by number

    def changed(self, path: str) -> None:
        """Look at what a change of a file or folder has done; the path is one below the run's."""
        top = path.partition("/")[0]
        if path == OWNER:
            self._note_owner()
        elif top == "base":
            if self._scheduler.process is None:  # of an ousted program, no base has the number of another's
                self._note_touch("/".join(path.split("/")[:2]))
            for name in sorted(self._listed):
                self._check_whole(name)
        elif top.isdecimal():
            if path != f"{top}/{MARKER}":  # whoever has been ousted cannot commit, and that is not excused
                self._note_touch(top)
            is_listed = self._view.is_listed(top)
            if is_listed != (top in self._listed):
                self._note_act(f"{'commits' if is_listed else 'deletes'} step {top}")
                (self._listed.add if is_listed else self._listed.discard)(top)
            if is_listed:
                self._check_whole(top)

    def check_end(self, history: History) -> None:
        """Look at the whole simulation, once it is over."""
        self._check_strangers()
        self._check_outcomes(history)
        self._check_restores(history)
        self.violations += history.waits
        for process, seconds in history.opened.items():
            if seconds > _OPENING_S:
                self.violations.append(f"process {process} took {seconds:.0f} s to open the run")

    def _note_owner(self) -> None:
        try:
            owner = json.loads(self._view.files("")[OWNER])["pid"]
        except (KeyError, ValueError):
            return
        if owner != self._owner:
            if self._owner is not None:
                self._ousted[self._owner] = self._scheduler.now
            self._ousted.pop(owner, None)
            self._owner = owner
            self._owners.append((self._scheduler.now, owner))

    def _note_act(self, what: str) -> None:
        acting = self._scheduler.acting
        if acting is None:
            return
        process, before = acting
        if before > self._ousted.get(process.pid, float("inf")):
            self.violations.append(f"process {process} {what} although it could know that it has been ousted")

    def _note_touch(self, folder: str) -> None:
        """Note that a program that has been ousted, or a late request, changes something in the place of a step."""
        acting = self._scheduler.acting
        is_late = self._scheduler.process is None
        if self._in_place and acting is not None and (is_late or acting[0].pid in self._ousted):
            self.touched.add(folder)

    def _check_whole(self, step: str) -> None:
        if step not in self.touched and (problem := self._problem(step)) is not None:
            self.violations.append(f"step {step} is listed, but {problem}")

    def _problem(self, step: str) -> str | None:
        files = self._view.files(step)
        try:
            manifest = json.loads(files["manifest/metadata"])
        except (KeyError, ValueError):
            return f"has no manifest: {sorted(files)}"
        for path, digest in manifest["files"].items():
            if path not in files:
                return f"{path} is missing"
            if digest_of(files[path]) != tuple(digest):
                return f"{path} is not what was written"
        bases = {leaf.get("base") for item in manifest["items"].values() for leaf in item["leaves"].values()}
        for base in bases - {None}:
            folder = f"base/{base}"
            if folder in self.touched:
                continue
            if not self._view.is_listed(folder):
                return f"its {folder} is not there"
            if (problem := self._problem(folder)) is not None:
                return f"of its {folder}, {problem}"
        return None

    def _check_strangers(self) -> None:
        for path, content in self._strangers.items():
            folder, _, name = path.rpartition("/")
            if self._view.files(folder).get(name) != content:
                self.violations.append(f"{path}, which is not the run's own, has been deleted or changed")

    def _check_outcomes(self, history: History) -> None:
        known: dict[tuple[int, int], dict[str, str]] = {}
        for saved in history.saved:
            if saved.outcome != "unknown":
                known.setdefault((saved.program, saved.step), {}).setdefault(
                    saved.outcome, f"process {saved.process}: {saved.outcome} {saved.why}"
                )
        for (program, step), outcomes in known.items():
            if len(outcomes) > 1:
                self.violations.append(f"program {program}, step {step} has two outcomes: {outcomes}")

    def _owns(self, came: Came) -> bool:
        """Did a process's program own the run when it restored?"""
        owner = [pid for since, pid in self._owners if since <= came.began][-1:]
        return any(process.pid in owner and process.program == came.program for process in self._scheduler.processes)

    def _check_restores(self, history: History) -> None:
        by_program: dict[int, set[tuple[int, ...] | None]] = {}
        for came in history.came:
            seen = came.began if self._owns(came) else came.began - self._stale_s
            acknowledged = [one.step for one in history.saved if one.outcome == "committed" and one.at <= seen]
            newest = max((step for step in acknowledged if str(step) not in self.touched), default=-1)
            who = f"process {came.program}.{came.process}"
            if "CorruptCheckpointError" in came.error and not self.touched:
                self.violations.append(f"{who} finds no good step: {came.error}")
            elif not came.error and (-1 if came.step is None else came.step) < newest:
                self.violations.append(f"{who} restores step {came.step}, but step {newest} was acknowledged")
            if came.values is not None:
                if came.values[1] != came.step or came.values[2] not in (came.process, 0):
                    self.violations.append(f"{who} restores step {came.step}, but finds the state of {came.values}")
                by_program.setdefault(came.program, set()).add(came.values[:2])
            elif not came.error:
                by_program.setdefault(came.program, set()).add(None)
        for program, found in by_program.items():
            if len(found) > 1:
                self.violations.append(f"the processes of program {program} restore different steps: {found}")


def check_wait(process: Process, waited_s: float, phase: str) -> str | None:
    """What is to be said of a wait of one process for others, in one phase."""
    if waited_s <= BARRIER_TIMEOUT_S + _SLACK_S:
        return None
    return f"process {process} waited {waited_s:.0f} s in phase {phase}"
