"""What happens in one simulation: the programs, their processes, and what goes wrong. A seed stands for a schedule."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

Store = Literal["local", "nfs", "gcs"]
What = Literal[
    "kill",  # the process ends before the request is acted on
    "kill after",  # it ends after it, and before it learns the answer
    "kill all",  # all processes of the program end before it
    "suspend",  # the process stops before the request is sent, and goes on later
    "suspend after",  # it stops before it learns the answer
    "slow",  # the request is on its way for so long
    "drop",  # the request is lost, and nothing comes through for so long
    "lose",  # the request is acted on, but the answer is lost, and nothing comes through for so long
    "late",  # the client takes the request for lost, but it arrives so much later
]
WHATS: tuple[What, ...] = (
    *("kill", "kill after", "kill all", "suspend", "suspend after", "slow", "drop", "lose", "late"),
)
OF_STORAGE = (
    *("create", "fill", "copy", "move", "unlink", "put", "replace"),
    *("read", "list", "exists", "flush", "digests"),
    *("look ", "swap "),  # at the owner's record, and to change it
)
REQUESTS = (*OF_STORAGE, "set ", "get ", "dir ")
"""What faults are aimed at: parts of the labels of requests. The last three are of the coordination service."""
_SECONDS = (0.0, 0.5, 3.0, 15.0, 45.0, 100.0, 400.0)


@dataclass(frozen=True)
class Fault:
    """Something goes wrong at one request.

    Attributes:
        program: the number of the program.
        process: the number of the process in it.
        at: a part of the request's label.
        nth: which of the process's requests with that, counted from 0.
        what: what happens.
        seconds: for how long.
    """

    program: int
    process: int
    at: str
    nth: int
    what: What
    seconds: float = 0.0


@dataclass(frozen=True)
class Program:
    """One start of the training program.

    Attributes:
        processes: how many it has.
        steps: how many steps it runs, each of which it saves.
        start_s: seconds after the program before it started; None when all earlier ones have ended.
        takeover: see `Checkpointer`.
        elsewhere: on machines of its own, where a store may be on several machines.
        clock_s: how far its wall clock is ahead.
    """

    processes: int = 1
    steps: int = 2
    start_s: float | None = None
    takeover: bool = False
    elsewhere: bool = True
    clock_s: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """A simulation. After its programs, one more opens the run, undisturbed, restores and saves a step.

    Attributes:
        seed: of the latencies.
        store: where the run is kept: a local disk, a disk that several machines share over NFS, or Cloud Storage.
        programs: in the order of their starts.
        faults: what goes wrong.
        keep: see `Checkpointer`.
        verify_after_save: see `Checkpointer`.
        frozen: has the state frozen parameters?
        foreign: is there a step of another run in the folder? Its state has no frozen parameters.
    """

    seed: int = 0
    store: Store = "local"
    programs: tuple[Program, ...] = (Program(),)
    faults: tuple[Fault, ...] = ()
    keep: int = 2
    verify_after_save: Literal["first"] | bool = "first"
    frozen: bool = False
    foreign: bool = False

    def __str__(self) -> str:
        return repr(self).replace("Program(", "\n    Program(").replace("Fault(", "\n    Fault(")


def generated(seed: int, processes: int | None = None) -> Schedule:
    """The schedule of a seed.

    Args:
        seed: any number.
        processes: how many the programs have; None leaves that to the seed.
    """
    draw = random.Random(seed)
    if draw.random() < 0.2 and processes in (None, 1):
        return two_owners(seed)
    store: Store = draw.choice(("local", "nfs", "gcs", "gcs"))
    programs = tuple(_program(draw, processes, is_first=number == 0) for number in range(draw.choice((1, 1, 2, 2, 3))))
    special = draw.choice((None, None, None, "frozen", "foreign"))
    faults = tuple(_fault(draw, programs) for _ in range(draw.choice((0, 1, 1, 2, 2, 3, 4))))
    return Schedule(
        seed,
        store,
        programs,
        faults,
        keep=draw.choice((1, 1, 2, 3)),
        verify_after_save=draw.choice(("first", "first", True, False)),
        frozen=special == "frozen",
        foreign=special == "foreign",
    )


def two_owners(seed: int) -> Schedule:
    """A schedule in which the owner stops in the midst of something, and goes on when another has taken over."""
    draw = random.Random(f"two owners {seed}")
    stops = Fault(
        program=0,
        process=0,
        at=draw.choice(OF_STORAGE),
        nth=draw.choice((0, 0, 1, 1, 2, 3, 4, 6)),
        what=draw.choice(("suspend", "suspend after", "slow", "late")),
        seconds=draw.choice((45.0, 100.0, 400.0)),
    )
    second = Program(
        steps=draw.choice((1, 2)),
        start_s=draw.choice((4.0, 8.0, 35.0, 70.0)),
        takeover=draw.random() < 0.5,
        clock_s=draw.choice((0.0, 20.0)),
    )
    return Schedule(
        seed,
        draw.choice(("local", "nfs", "gcs", "gcs")),
        (Program(steps=draw.choice((2, 3))), second),
        (stops,),
        keep=draw.choice((1, 2)),
        verify_after_save=draw.choice(("first", False)),
        frozen=draw.random() < 0.2,
    )


def _program(draw: random.Random, processes: int | None, *, is_first: bool) -> Program:
    several = draw.choices((1, 2, 3, draw.randint(4, 8), draw.randint(9, 64)), weights=(50, 37, 10, 2.7, 0.3))[0]
    start_s = None if is_first or draw.random() < 0.4 else draw.choice((0.0, 0.3, 2.0, 8.0, 35.0, 70.0, 120.0))
    return Program(
        several if processes is None else processes,
        draw.choice((1, 1, 2, 2, 3)),
        start_s,
        takeover=draw.random() < 0.35,
        elsewhere=draw.random() < 0.7,
        clock_s=draw.choice((0.0, 0.0, -20.0, 20.0)),
    )


def _fault(draw: random.Random, programs: tuple[Program, ...]) -> Fault:
    program = draw.randrange(len(programs))
    process = draw.choice((0, 0, draw.randrange(programs[program].processes)))
    nth = draw.choice((0, 0, 1, 1, 2, 3, 4, 6, 9, 14))
    return Fault(program, process, draw.choice(REQUESTS), nth, draw.choice(WHATS), draw.choice(_SECONDS))


def shrunk(schedule: Schedule, fails: Callable[[Schedule], bool], most: int = 400) -> Schedule:
    """A simpler schedule that fails, too.

    Args:
        schedule: one that fails.
        fails: does a schedule fail?
        most: how many schedules to try.
    """
    tried = 0
    progress = True
    while progress:
        progress = False
        for simpler in _simpler(schedule):
            tried += 1
            if tried > most:
                return schedule
            if fails(simpler):
                schedule, progress = simpler, True
                break
    return schedule


def _simpler(schedule: Schedule) -> Iterator[Schedule]:
    """Schedules with less in them, those with the least first."""
    faults, programs = schedule.faults, schedule.programs
    for half in (faults[: len(faults) // 2], faults[len(faults) // 2 :]) if len(faults) > 2 else ():
        yield replace(schedule, faults=half)
    for at in range(len(faults)):
        yield replace(schedule, faults=(*faults[:at], *faults[at + 1 :]))
    for at in range(len(programs) if len(programs) > 1 else 0):
        left = [replace(fault, program=fault.program - (fault.program > at)) for fault in faults if fault.program != at]
        yield replace(schedule, programs=(*programs[:at], *programs[at + 1 :]), faults=tuple(left))
    for at, program in enumerate(programs):
        needed = max((fault.process for fault in faults if fault.program == at), default=0)
        for change in (
            {"processes": max(1, needed + 1)},
            {"processes": program.processes - 1},
            {"steps": 1},
            {"steps": program.steps - 1},
            {"clock_s": 0.0},
            {"takeover": False},
            {"start_s": None},
            {"elsewhere": True},
        ):
            simpler = replace(program, **change)
            if simpler != program and simpler.processes >= 1 and simpler.steps >= 1:
                yield replace(schedule, programs=(*programs[:at], simpler, *programs[at + 1 :]))
    for plain in ({"foreign": False}, {"frozen": False}, {"verify_after_save": False}, {"keep": 1}, {"seed": 0}):
        simpler_one = replace(schedule, **plain)
        if simpler_one != schedule:
            yield simpler_one
