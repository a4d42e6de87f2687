"""Where the simulation takes the place of the system: clocks, threads, process numbers, files, requests, arrays.

Everything else is torchorbax's own code. What is replaced are names of its modules, all of them here.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import logging
import os
import random
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import numpy as np
from torchorbax._src.arrays import fingerprint
from torchorbax._src.distributed import channel, processes
from torchorbax._src.run import background_save, save_decision, slow_saves, step_choice, tier
from torchorbax._src.storage import (
    files_at,
    gcs,
    gcs_files,
    inspection,
    orbax_storage,
    owner,
    ownership,
    run_folder,
    run_layout,
    step_info,
    step_reader,
    steps,
)

from tests.simulation.arrays import Blobs, SimulatedArrays
from tests.simulation.bucket import Bucket, Sequential, SimulatedGcs
from tests.simulation.disk import Disk, SimulatedFiles, SimulatedRecord
from tests.simulation.scheduler import Scheduler, SimulatedThreads

_EPOCH_S = 1.75e9
"""The wall clock when a simulation begins, in seconds since 1970."""


class DiskBlobs:
    """Whole files of a disk."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk

    def put(self, path: str, content: bytes) -> None:
        self._disk.asked(f"put {path}", lambda: self._disk.put(path, content), path)

    def get(self, path: str) -> bytes:
        found: bytes = self._disk.asked(f"read {path}", lambda: self._disk.node(path))
        return found


class BucketBlobs:
    """Whole objects of a bucket, by way of a client that makes lost requests again."""

    def __init__(self, bucket: Bucket, timeout_s: float) -> None:
        self._gcs = SimulatedGcs(bucket, timeout_s)
        self._bucket = bucket

    def put(self, path: str, content: bytes) -> None:
        self._gcs.pipe_file(path.removeprefix("gs://"), content)

    def get(self, path: str) -> bytes:
        content: bytes = self._gcs.call("GET", "", "", self._name(path), alt="media")[1]
        return content

    def _name(self, path: str) -> str:
        return path.removeprefix("gs://").partition("/")[2]


class _Clock:
    """What is used of `time`."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.sleep = scheduler.sleep

    def monotonic(self) -> float:
        return self._scheduler.now

    def time(self) -> float:
        return _EPOCH_S + self._scheduler.now + self._scheduler.running.clock_s


class _System:
    """What is used of `os`, as the processes of a simulation see it."""

    PathLike = os.PathLike

    def __init__(self, scheduler: Scheduler, disk: Disk | None) -> None:
        self._scheduler = scheduler
        self._disk = disk
        self.path = types.SimpleNamespace(exists=self._is_there, isdir=self._is_there, join=os.path.join)

    def getpid(self) -> int:
        process = self._scheduler.process
        return 0 if process is None else process.pid

    def kill(self, pid: int, number: int) -> None:
        if not any(process.pid == pid and process.alive for process in self._scheduler.processes):
            raise ProcessLookupError(pid)

    def makedirs(self, path: str, exist_ok: bool) -> None:
        if self._disk is not None:
            self._disk.folder(path)

    def _is_there(self, path: str) -> bool:
        return self._disk is not None and self._disk.there(path)


_start = fingerprint._start_on_host


def _sums(part: np.ndarray, first: tuple[int, ...], shape: tuple[int, ...]) -> Callable[[], fingerprint.Sums]:
    """The sums of an array, which are computed once for each content: there are few."""
    return lambda: _computed(part.tobytes(), part.dtype, part.shape, first, shape)


@functools.lru_cache(maxsize=10_000)
def _computed(
    data: bytes, dtype: np.dtype, of_part: tuple[int, ...], first: tuple[int, ...], shape: tuple[int, ...]
) -> fingerprint.Sums:
    return _start(np.frombuffer(data, dtype).reshape(of_part), first, shape)()


class _AtOnce(ThreadPoolExecutor):
    """Runs what is submitted on the caller's own thread: a simulated program waits for each save."""

    def __init__(self, most: int, name: str) -> None:
        super().__init__(most, name)

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        function(*args, **kwargs)


@contextlib.contextmanager
def simulated(scheduler: Scheduler, disk: Disk | None, bucket: Bucket | None, names: random.Random) -> Iterator[None]:
    """Have torchorbax's code run on simulated machines, as long as the `with` block lasts.

    Args:
        scheduler: runs the processes.
        disk: where the run is kept; or None, if that is a bucket.
        bucket: where the run is kept; or None.
        names: where names come from that must be unique.
    """
    with contextlib.ExitStack() as stack:
        for patch in (*_of_storage(disk, bucket), *_of_system(scheduler, disk, names)):
            stack.enter_context(patch)
        before = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        stack.callback(logging.disable, before)
        yield


def _of_storage(disk: Disk | None, bucket: Bucket | None) -> list[Any]:
    """What takes the place of files, requests and arrays."""
    blobs: Blobs
    replaced: list[Any] = []
    if bucket is not None:
        blobs = BucketBlobs(bucket, 20.0)
        replaced += [
            mock.patch.object(gcs, "prepare", lambda root, timeout_s: SimulatedGcs(bucket, timeout_s)),
            mock.patch.object(gcs, "check_access"),
            mock.patch.object(gcs, "check_supported"),
            mock.patch.multiple(gcs_files, asyncio=Sequential, fsspec=Sequential),
        ]
    else:
        assert disk is not None
        blobs = DiskBlobs(disk)

        def files(root: str) -> SimulatedFiles:
            return SimulatedFiles(root, disk)

        replaced += [
            mock.patch.multiple(run_folder, LocalFiles=files, LocalRecord=SimulatedRecord),
            mock.patch.object(files_at, "LocalFiles", files),
        ]
    replaced.append(mock.patch.object(fingerprint, "_start_on_host", _sums))
    arrays = SimulatedArrays(blobs)
    replaced.append(mock.patch.object(orbax_storage, "array_writer", arrays))
    replaced.append(mock.patch.object(step_reader, "array_reader", arrays))
    replaced.append(mock.patch.object(inspection, "other_bytes", return_value=0))
    return replaced


def _of_system(scheduler: Scheduler, disk: Disk | None, names: random.Random) -> list[Any]:
    """What takes the place of clocks, threads, numbers of processes and unique names."""
    clock, threads, system = _Clock(scheduler), SimulatedThreads(scheduler), _System(scheduler, disk)
    unique = types.SimpleNamespace(uuid4=lambda: types.SimpleNamespace(hex=f"{names.getrandbits(128):032x}"))
    timed = (
        *(channel, processes, ownership, orbax_storage, run_folder, steps, step_info),
        *(tier, background_save, slow_saves, save_decision),
    )

    def both_clocks() -> step_info._Reading:
        return step_info._Reading(datetime.datetime.fromtimestamp(clock.time(), datetime.UTC), scheduler.now)

    def host() -> str:
        return f"{scheduler.running.host}/1"

    def in_any_order(actions: Sequence[Callable[[], Any]]) -> list[Any]:
        """What `at_once` does at the same time, one after another in an order that nobody can rely on."""
        outcomes: dict[int, Any] = {}
        failures: dict[int, Exception] = {}
        for index in names.sample(range(len(actions)), len(actions)):
            try:
                outcomes[index] = actions[index]()
            except Exception as error:
                failures[index] = error
        if failures:
            raise failures[min(failures)]
        return [outcomes[index] for index in range(len(actions))]

    real = ownership.Ownership
    return [
        *(mock.patch.object(module, "time", clock) for module in timed),
        mock.patch.object(step_info, "_read", both_clocks),
        mock.patch.object(channel, "_POLL_S", 5.0),  # less often, for speed
        mock.patch.object(run_folder, "Ownership", functools.partial(real, now=clock.time, wait=scheduler.sleep)),
        # A process keeps its run to its end, and then nothing of it runs any more.
        mock.patch.object(run_folder, "weakref", types.SimpleNamespace(finalize=lambda *_: types.SimpleNamespace())),
        mock.patch.multiple(run_folder, os=system, uuid=unique),
        mock.patch.multiple(
            ownership,
            os=system,
            uuid=unique,
            threading=threads,
            socket=types.SimpleNamespace(gethostname=lambda: scheduler.running.host),
            system_name=host,
            started_at=str,
        ),
        mock.patch.multiple(owner, os=system, system_name=host, started_at=str),
        mock.patch.object(run_layout, "os", system),
        *(mock.patch.object(module, "at_once", in_any_order) for module in (gcs_files, orbax_storage, run_folder)),
        mock.patch.object(background_save, "ThreadPoolExecutor", _AtOnce),
        # JAX's settings belong to threads of the system, of which there is one here.
        mock.patch.object(background_save, "transfers_allowed", contextlib.nullcontext),
        mock.patch.object(step_choice, "transfers_allowed", contextlib.nullcontext),
        mock.patch.object(step_reader, "context_here", return_value=contextlib.nullcontext),
        mock.patch.object(step_choice, "warnings", types.SimpleNamespace(warn=lambda *args, **kwargs: None)),
    ]
