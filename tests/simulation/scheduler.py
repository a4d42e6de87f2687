"""Simulated processes on simulated machines, under a clock that jumps from one event to the next.

Each thread of a process is a greenlet, and one of them runs at a time, until it makes a request, sleeps or waits. So
what happens depends on the schedule alone, and no real time passes.
"""

from __future__ import annotations

import heapq
import itertools
import random
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import greenlet

from tests.simulation.schedule import Fault

T = TypeVar("T")
Domain = Literal["disk", "objects", "service"]

_CLIENT_PATIENCE_S = 1.0
"""How long a client waits for an answer that does not come before it takes the request for lost."""
_LONGEST_S = 6 * 3600.0
"""Virtual seconds after which a simulation counts as one that never ends."""


class Killed(BaseException):
    """The process has been killed. Nothing that its code still does on the way out has an effect."""


class NoAnswerError(Exception):
    """A request got no answer in time. It may have been acted on."""


class NeverEndsError(Exception):
    """Some processes wait for ever."""


@dataclass(eq=False)
class Process:
    """A process of a program.

    Attributes:
        program: the number of its program.
        index: its number in the program.
        pid: its number on its machine, unique in the whole simulation.
        host: its machine.
        clock_s: how far its wall clock is ahead.
        draw: where the latencies of its requests come from.
        faults: those that are still to come.
        alive: it has neither ended nor been killed.
        stopped_until: it is suspended until then.
        cut_until: by domain, it reaches nothing until then.
        stopped_s: seconds that it was suspended or cut off, so far.
    """

    program: int
    index: int
    pid: int
    host: str
    clock_s: float
    draw: random.Random
    faults: list[Fault]
    alive: bool = True
    stopped_until: float = 0.0
    cut_until: dict[Domain, float] = field(default_factory=dict)
    stopped_s: float = 0.0
    kept: list[object] = field(default_factory=list)  # what would be collected while others run
    _counts: Counter[int] = field(default_factory=Counter)

    def __str__(self) -> str:
        return f"{self.program}.{self.index}"

    def fault_at(self, label: str) -> Fault | None:
        """The fault of a request, if it has one. Call it once for each request."""
        found = None
        for number, fault in enumerate(self.faults):
            if fault.at in label:
                self._counts[number] += 1
                if self._counts[number] == fault.nth + 1 and found is None:
                    found = fault
        return found


class _Task:
    """A thread of a process."""

    def __init__(self, process: Process, body: Callable[[], object], hub: Any) -> None:
        self.process = process
        self.ticket = 0  # what is due for an older ticket no longer concerns it
        self.woken = False
        self.acted_at = 0.0
        self.greenlet = greenlet.greenlet(body, parent=hub)


class Scheduler:
    """Runs the threads of all processes, one at a time.

    Attributes:
        now: the virtual time in seconds.
        trace: every request in the order in which it was acted on, for people.
        errors: exceptions that no process should raise.
        acting: while a request is acted on: who made it, and when the request before of the same thread was acted on.
    """

    def __init__(self) -> None:
        self.now = 1000.0
        self.trace: list[str] = []
        self.errors: list[str] = []
        self.acting: tuple[Process, float] | None = None
        self._due: list[tuple[float, int, Callable[[], object]]] = []
        self._order = itertools.count()
        self._tasks: list[_Task] = []
        self._current: _Task | None = None
        self._hub: Any = greenlet.getcurrent()
        self.processes: list[Process] = []
        self.alive: set[Process] = set()

    # For the code of processes.

    @property
    def process(self) -> Process | None:
        """The process whose code runs now; None outside of all."""
        return None if self._current is None else self._current.process

    @property
    def running(self) -> Process:
        """The process whose code runs now."""
        if self._current is None:
            raise RuntimeError("no process is running")
        return self._current.process

    def sleep(self, seconds: float) -> None:
        """Let others run for some seconds."""
        task = self._running_task()
        task.ticket += 1
        self._resume_at(self.now + max(0.0, seconds), task, task.ticket)
        self._switch(task)

    def wait(self, register: Callable[[Callable[[], None]], None], timeout: float | None) -> bool:
        """Wait until somebody calls the function that `register` gets. Returns False after the time limit."""
        task = self._running_task()
        task.ticket += 1
        ticket, task.woken = task.ticket, False

        def wake() -> None:
            if task.ticket == ticket:
                task.woken = True
                self._resume_at(self.now, task, ticket)

        register(wake)
        if timeout is not None:
            self._resume_at(self.now + max(0.0, timeout), task, ticket)
        self._switch(task)
        return task.woken

    def request(self, domain: Domain, label: str, act: Callable[[], T], *, wait_s: float = 0.0) -> T:
        """Make a request of a storage or service.

        Args:
            domain: what is asked.
            label: what is asked for, for faults and the trace.
            act: acts on it, at once.
            wait_s: how long a client waits that is cut off. A disk is waited for as long as it takes.

        Raises:
            NoAnswerError: it got no answer; it may have been acted on.
        """
        task = self._running_task()
        process, before = task.process, task.acted_at
        fault = process.fault_at(label)
        what, seconds = (fault.what, fault.seconds) if fault is not None else ("", 0.0)
        if what == "late" and domain == "disk":  # the client of a disk gives up nothing
            what = "slow"
        if fault is not None:
            self.trace.append(f"{self.now:9.3f} {process} {fault.what} {fault.seconds:g} at {label}")
        # On the way there.
        if what == "kill":
            self.kill(process)
        if what == "kill all":
            self.kill(*(one for one in self.processes if one.program == process.program))
        if what == "suspend":
            self._suspend(process, seconds)
        if what in ("drop", "lose", "late"):
            process.cut_until[domain] = self.now + (seconds if what != "late" else 0.0)
        latency = process.draw.random() ** 4 * 0.15
        self.sleep(latency + (seconds if what == "slow" else 0.0))
        process.stopped_s += seconds if what == "slow" else 0.0
        if what not in ("drop", "lose", "late"):
            self._wait_for_connection(process, domain, wait_s)
        if what == "late":
            self._at(self.now + seconds, lambda: self._acted(process, f"late: {label}", act, before))
        if what in ("drop", "late"):
            self._lost(process, domain)
        # Acted on.
        task.acted_at = self.now
        answer = self._acted(process, label, act, before)
        # On the way back.
        if what == "kill after":
            self.kill(process)
        if what == "suspend after":
            self._suspend(process, seconds)
        if what == "lose":
            self._lost(process, domain)
        if isinstance(answer, Exception):
            raise answer
        return answer

    # For the simulation.

    def add(self, process: Process) -> None:
        """Take a new process in."""
        self.processes.append(process)
        self.alive.add(process)

    def start(self, process: Process, body: Callable[[], object]) -> None:
        """Start a thread of a process."""

        def guarded() -> None:
            try:
                body()
            except Killed:
                pass
            except Exception:  # no code of a process should raise anything
                self.errors.append(f"process {process} raised {traceback.format_exc()}")

        task = _Task(process, guarded, self._hub)
        self._tasks.append(task)
        self._resume_at(self.now, task, task.ticket)

    def kill(self, *processes: Process) -> None:
        """End processes at once. If the running one is among them, this does not return."""
        for process in processes:
            self.end(process)
        if self._current is not None and self._current.process in processes:
            raise Killed

    def end(self, process: Process) -> None:
        """Note that a process has ended."""
        self.alive.discard(process)
        process.alive = False

    def at(self, seconds: float, action: Callable[[], object]) -> None:
        """Do something outside of all processes, at this time or as soon as possible."""
        self._at(max(self.now, seconds), action)

    def run(self, ended: Callable[[], bool]) -> None:
        """Run until it is ended.

        Raises:
            NeverEndsError: it does not end.
        """
        try:
            while self.alive or not ended():
                if not self._due or self._due[0][0] > _LONGEST_S:
                    waiting = sorted({str(process) for process in self.processes if process.alive})
                    raise NeverEndsError(f"these processes wait for ever: {', '.join(waiting)}")
                when, _, action = heapq.heappop(self._due)
                self.now = max(self.now, when)
                action()
        finally:
            self._end()

    def _end(self) -> None:
        for process in self.processes:
            self.end(process)
        for task in self._tasks:
            if not task.greenlet.dead:
                self._current = task
                task.greenlet.throw(Killed if task.greenlet else greenlet.GreenletExit)  # true once it has begun
                self._current = None

    def _running_task(self) -> _Task:
        task = self._current
        if task is None:
            raise RuntimeError("no process is running")
        if not task.process.alive:
            raise Killed
        return task

    def _at(self, when: float, action: Callable[[], object]) -> None:
        heapq.heappush(self._due, (when, next(self._order), action))

    def _resume_at(self, when: float, task: _Task, ticket: int) -> None:
        self._at(when, lambda: self._resume(task, ticket))

    def _resume(self, task: _Task, ticket: int) -> None:
        process = task.process
        if task.ticket != ticket or not process.alive:
            return
        if process.stopped_until > self.now:
            self._resume_at(process.stopped_until, task, ticket)
            return
        task.ticket += 1
        self._current = task
        try:
            task.greenlet.switch()
        finally:
            self._current = None

    def _switch(self, task: _Task) -> None:
        self._hub.switch()
        if not task.process.alive:
            raise Killed

    def _acted(self, process: Process, label: str, act: Callable[[], T], before: float) -> T | Exception:
        self.trace.append(f"{self.now:9.3f} {process} {label}")
        self.acting = process, before
        try:
            return act()
        except Exception as error:  # an answer like any other: it has to travel back
            return error
        finally:
            self.acting = None

    def _lost(self, process: Process, domain: Domain) -> None:
        self.sleep(_CLIENT_PATIENCE_S)
        raise NoAnswerError(f"no answer from {domain}")

    def _suspend(self, process: Process, seconds: float) -> None:
        process.stopped_until = max(process.stopped_until, self.now + seconds)
        process.stopped_s += seconds
        self.sleep(0.0)

    def _wait_for_connection(self, process: Process, domain: Domain, wait_s: float) -> None:
        """While a process is cut off, a disk is waited for; others give no answer after a while."""
        left = process.cut_until.get(domain, 0.0) - self.now
        if left <= 0:
            return
        if domain == "disk":
            process.stopped_s += left
            self.sleep(left)
        elif wait_s < left:
            self.sleep(wait_s)
            raise NoAnswerError(f"{domain} cannot be reached")
        else:
            self.sleep(left)


class SimulatedThreads:
    """What `threading` has, as far as it is used, for the threads of simulated processes."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def Thread(self, target: Callable[[], object], name: str, daemon: bool) -> SimulatedThread:
        return SimulatedThread(self._scheduler, target)

    def RLock(self) -> SimulatedLock:
        return SimulatedLock(self._scheduler)

    def Event(self) -> SimulatedEvent:
        return SimulatedEvent(self._scheduler)


class SimulatedThread:
    """A thread of the process that starts it."""

    def __init__(self, scheduler: Scheduler, target: Callable[[], object]) -> None:
        self._scheduler = scheduler
        self._target = target

    def start(self) -> None:
        self._scheduler.start(self._scheduler.running, self._target)


class SimulatedLock:
    """A lock that its holder may take again."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._holder: object = None
        self._depth = 0
        self._waiting: list[Callable[[], None]] = []

    def __enter__(self) -> bool:
        me = greenlet.getcurrent()
        while self._holder not in (None, me):
            self._scheduler.wait(self._waiting.append, None)
        self._holder = me
        self._depth += 1
        return True

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._holder = None
            waiting, self._waiting = self._waiting, []
            for wake in waiting:
                wake()


class SimulatedEvent:
    """An event that is set once."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._is_set = False
        self._waiting: list[Callable[[], None]] = []

    def set(self) -> None:
        self._is_set = True
        for wake in self._waiting:
            wake()

    def wait(self, timeout: float) -> bool:
        if not self._is_set:
            self._scheduler.wait(self._waiting.append, timeout)
        return self._is_set


def latest(trace: Sequence[str], count: int = 60) -> str:
    """The last lines of a trace."""
    return "\n".join(trace[-count:])
