"""Runs a schedule: machines, a storage, programs one after another or at the same time, and what goes wrong."""

from __future__ import annotations

import contextlib
import copy
import functools
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

from torchorbax._src.distributed.channel import Channel
from torchorbax._src.run.options import RunOptions
from torchorbax._src.storage.opening import open_storage
from torchorbax._src.verification.step_check import check_step
from torchorbax.errors import TorchorbaxError

from tests.simulation.bucket import Bucket
from tests.simulation.disk import STALE_S, Disk, Folder, files_below
from tests.simulation.invariants import MARKER, Watch, check_wait
from tests.simulation.programs import STORAGE_TIMEOUT_S, History, TrainingProcess
from tests.simulation.schedule import Program, Schedule, Store
from tests.simulation.scheduler import NeverEndsError, Process, Scheduler
from tests.simulation.seams import simulated
from tests.simulation.service import SimulatedService

_LATEST_ARRIVAL_S = 500.0
"""After the last program has ended, late requests arrive for so long."""
_FOREIGN_STEP = 1


@dataclass(frozen=True)
class Report:
    """What came of a simulation.

    Attributes:
        schedule: what happened.
        violations: invariants that did not hold, in words.
        trace: every request.
        history: what the processes have learned.
        touched: see `Watch`.
    """

    schedule: Schedule
    violations: tuple[str, ...]
    trace: tuple[str, ...]
    history: History
    touched: frozenset[str] = frozenset()


class _DiskView:
    """A run on a disk."""

    def __init__(self, disk: Disk, path: str) -> None:
        self._disk = disk
        self._path = path

    def files(self, folder: str) -> Mapping[str, bytes]:
        full = f"{self._path}/{folder}"
        return dict(files_below(self._disk.node(full))) if self._disk.there(full) else {}

    def is_listed(self, step: str) -> bool:
        return self._disk.there(f"{self._path}/{step}")

    def numbers(self, folder: str = "") -> list[str]:
        found = self._disk.node(f"{self._path}/{folder}") if self._disk.there(f"{self._path}/{folder}") else {}
        return [name for name in found if name.isdecimal()]


class _BucketView:
    """A run in a bucket."""

    def __init__(self, bucket: Bucket, prefix: str) -> None:
        self._bucket = bucket
        self._prefix = prefix

    def files(self, folder: str) -> Mapping[str, bytes]:
        prefix = f"{self._prefix}/{folder}/" if folder else f"{self._prefix}/"
        return {name[len(prefix) :]: self._bucket.objects[name][0] for name in self._bucket.below(prefix)}

    def is_listed(self, step: str) -> bool:
        return f"{self._prefix}/{step}/{MARKER}" in self._bucket.objects

    def numbers(self, folder: str = "") -> list[str]:
        return sorted({name.partition("/")[0] for name in self.files(folder) if name.partition("/")[0].isdecimal()})


class World:
    """Everything that a simulation consists of."""

    def __init__(self, schedule: Schedule, content: Any) -> None:
        self.schedule = schedule
        self.scheduler = Scheduler()
        self.history = History()
        self._names = random.Random(schedule.seed)
        self._pids = 100
        self._programs: list[list[Process]] = []
        # The storage.
        self.disk: Disk | None = None
        self.bucket: Bucket | None = None
        view: _DiskView | _BucketView
        if schedule.store == "gcs":
            self.path, below = "gs://bucket/run", "run/"
            self.bucket = Bucket(self.scheduler, dict(content))
            view = _BucketView(self.bucket, "run")
        else:
            self.path, below = "/shared/run", "/shared/run/"
            self.disk = Disk(self.scheduler, copy.deepcopy(content), is_shared=schedule.store == "nfs")
            view = _DiskView(self.disk, self.path)
        strangers = {path: data for path, data in view.files("").items() if not path.startswith(".torchorbax-run")}
        self.view = view
        self.watch = Watch(
            view,
            self.scheduler,
            strangers,
            in_place=schedule.store == "gcs",
            stale_s=STALE_S if schedule.store == "nfs" else 0.0,
        )

        def changed(path: str) -> None:
            if path.startswith(below):
                self.watch.changed(path.removeprefix(below))

        if self.disk is not None:
            self.disk.changed = changed
        if self.bucket is not None:
            self.bucket.changed = changed

    def run(self) -> Report:
        """Run the programs, and one more that must find everything in order."""
        try:
            with simulated(self.scheduler, self.disk, self.bucket, self._names), self._waits_measured():
                self.scheduler.run(self._all_ended)
        except NeverEndsError as error:
            self.watch.violations.append(str(error))
        self.watch.check_end(self.history)
        self.watch.violations += self.scheduler.errors
        return Report(
            self.schedule,
            tuple(self.watch.violations),
            tuple(self.scheduler.trace),
            self.history,
            frozenset(self.watch.touched),
        )

    def _all_ended(self) -> bool:
        """Start what is due next. Returns whether nothing is left to do."""
        started, programs = len(self._programs), self.schedule.programs
        if started < len(programs) and programs[started].start_s is not None and started:
            return False  # it has been put down for its time
        if started < len(programs):
            self._start(programs[started])
            return False
        if started == len(programs):
            self._start(Program(programs[-1].processes, steps=1))
            return False
        if started == len(programs) + 1:
            self._check_last()
            self._programs.append([])
            self.scheduler.at(self.scheduler.now + _LATEST_ARRIVAL_S, self._audit)
            return False
        return started > len(programs) + 2

    def _start(self, program: Program) -> None:
        number = len(self._programs)
        hosts = [self._host(program, number, index) for index in range(program.processes)]
        processes = [self._process(program, number, index, host) for index, host in enumerate(hosts)]
        self._programs.append(processes)
        service = SimulatedService(self.scheduler, processes[0]) if len(processes) > 1 else None
        options = RunOptions(
            keep=self.schedule.keep,
            rng=False,
            verify_after_save=self.schedule.verify_after_save,
            takeover=program.takeover,
            storage_timeout_s=STORAGE_TIMEOUT_S,
        )
        for process in processes:
            training = TrainingProcess(
                process,
                self.scheduler,
                service,
                self.path,
                program.processes,
                program.steps,
                options,
                frozen=self.schedule.frozen,
                history=self.history,
            )
            self.scheduler.start(process, training.run)
        after = self.schedule.programs[number + 1 : number + 2]
        if after and after[0].start_s is not None:
            self.scheduler.at(self.scheduler.now + after[0].start_s, lambda: self._start(after[0]))

    def _host(self, program: Program, number: int, index: int) -> str:
        if self.schedule.store == "local" or not program.elsewhere:
            return "here"
        return f"machine-{number}-{index}"

    def _process(self, program: Program, number: int, index: int, host: str) -> Process:
        self._pids += 1
        faults = [fault for fault in self.schedule.faults if (fault.program, fault.process) == (number, index)]
        draw = random.Random(f"{self.schedule.seed} {number} {index}")
        clock_s = 0.0 if host == "here" else program.clock_s
        process = Process(number, index, self._pids, host, clock_s, draw, faults)
        self.scheduler.add(process)
        return process

    def _check_last(self) -> None:
        """The last program, which nothing disturbed, has restored and saved."""
        number = len(self.schedule.programs)
        saved = [one for one in self.history.saved if one.program == number]
        came = [one for one in self.history.came if one.program == number]
        if self.watch.touched and any("CorruptCheckpointError" in one.error for one in came):
            return
        if len(came) != len(self._programs[number]) or any(one.error for one in came):
            self.watch.violations.append(f"the last program could not restore: {came}")
        elif not saved or any(one.outcome != "committed" for one in saved if one.step == saved[-1].step):
            self.watch.violations.append(f"the last program could not save: {saved}")

    def _audit(self) -> None:
        """Have a reader verify every step that is listed."""
        reader = self._process(Program(), len(self._programs), 0, "here")
        self._programs.append([reader])

        def verify() -> None:
            storage = open_storage(self.path)
            reader.kept.append(storage)
            for step in storage.steps():
                try:
                    check_step(storage, storage.manifest(step))
                except TorchorbaxError as error:
                    if self.watch.touched:
                        continue
                    self.watch.violations.append(f"step {step} is listed at the end, but {error}")
            self.scheduler.end(reader)

        self.scheduler.start(reader, verify)

    @contextlib.contextmanager
    def _waits_measured(self) -> Iterator[None]:
        real: Callable[..., str] = Channel._wait

        def measured(channel: Channel, key: str, process: int, phase: str, deadline: float) -> str:
            waiting = self.scheduler.running
            began, stopped_s = self.scheduler.now, waiting.stopped_s
            try:
                return real(channel, key, process, phase, deadline)
            finally:
                waited_s = self.scheduler.now - began - (waiting.stopped_s - stopped_s)
                if waiting.alive and (told := check_wait(waiting, waited_s, phase)) is not None:
                    self.history.waits.append(told)

        with mock.patch.object(Channel, "_wait", measured):
            yield


def simulate(schedule: Schedule) -> Report:
    """Run a schedule and look at whether all invariants hold."""
    return World(schedule, _content(schedule.store, foreign=schedule.foreign)).run()


@functools.cache
def _content(store: Store, *, foreign: bool) -> Any:
    """What is on the storage at the start: nothing, or a run without steps beside things of others.

    There are an archive, what another run has left behind, and a step of another run.
    """
    if not foreign:
        return {} if store == "gcs" else {"shared": {}}
    identity, strange = b"a" * 32, {"archive/notes.txt": b"keep me", ".torchorbax-left-" + "b" * 32 + "-5-x/w": b"w"}
    world = World(replace(Schedule(seed=12345), store=store), _content(store, foreign=False))
    world._names = random.Random("another run")
    report = world.run()
    if report.violations:
        raise RuntimeError(f"even a run of which nobody knows fails: {report.violations}")
    step = {f"{_FOREIGN_STEP}/{path}": data for path, data in world.view.files(str(_FOREIGN_STEP)).items()}
    files = {**strange, **step, ".torchorbax-run": identity}
    if store == "gcs":
        return {f"run/{path}": (data, number + 1) for number, (path, data) in enumerate(files.items())}
    root: Folder = {}
    disk = Disk(world.scheduler, root, is_shared=False)
    for path, data in files.items():
        disk.put(f"/shared/run/{path}", data)
    return root
