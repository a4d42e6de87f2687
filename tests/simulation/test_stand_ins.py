"""The simulated storage and service answer as the real ones do."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchorbax._src.distributed.channel import Channel
from torchorbax._src.distributed.processes import Processes
from torchorbax._src.storage.files import Files
from torchorbax._src.storage.local_files import LocalFiles

from tests.helpers.coordination import FakeService
from tests.simulation.disk import Disk, SimulatedFiles
from tests.simulation.scheduler import NeverEndsError, Process, Scheduler
from tests.simulation.service import SimulatedService

FOLDERS = ("a", "b", "a/c")
PATHS = tuple(f"{folder}/x" for folder in FOLDERS)
CONTENT = st.sampled_from([b"", b"one", b"other"])

REQUESTS = st.one_of(
    st.tuples(st.just("write"), st.sampled_from(PATHS), CONTENT),
    st.tuples(st.just("create"), st.sampled_from(PATHS), CONTENT),
    st.tuples(st.just("read"), st.sampled_from(PATHS), st.just(100)),
    st.tuples(st.just("exists"), st.sampled_from((*FOLDERS, *PATHS))),
    st.tuples(st.sampled_from(["entries", "sizes", "delete_folder"]), st.sampled_from(FOLDERS)),
    st.tuples(st.just("delete_file"), st.sampled_from(PATHS)),
    st.tuples(st.just("digests"), st.sampled_from(FOLDERS), st.sampled_from([("x",), ("x", "y")])),
    st.tuples(st.just("move"), st.just("a/c"), st.sampled_from(["a/d", "b", "e"])),
    st.tuples(st.just("flush"), st.just("a")),
)


def answers(files: Files, requests: list[tuple[Any, ...]]) -> list[Any]:
    """What files answer to some requests; errors by their type."""
    found: list[Any] = []
    for name, *args in requests:
        try:
            answer = getattr(files, name)(*args)
            found.append(sorted(answer) if name == "entries" else answer)
        except (OSError, ValueError) as error:
            found.append(type(error).__name__)
    return found


def run(*bodies: Callable[[Scheduler], object], scheduler: Scheduler | None = None) -> None:
    """Run some code, each in a process of its own."""
    scheduler = scheduler or Scheduler()
    for index, body in enumerate(bodies):
        process = Process(0, index, index + 1, "here", 0.0, random.Random(index), [])
        scheduler.add(process)

        def begin(body: Callable[[Scheduler], object] = body, process: Process = process) -> None:
            body(scheduler)
            scheduler.end(process)

        scheduler.start(process, begin)
    scheduler.run(lambda: True)
    assert not scheduler.errors


@given(requests=st.lists(REQUESTS, min_size=10, max_size=30))
def test_a_simulated_disk_answers_as_a_disk(requests: list[tuple[Any, ...]], tmp_path: Path) -> None:
    root = tmp_path / "files"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    found: list[Any] = []

    def ask(scheduler: Scheduler) -> None:
        found.extend(answers(SimulatedFiles("/files", Disk(scheduler, {"files": {}}, is_shared=False)), requests))

    run(ask)
    assert found == answers(LocalFiles(str(root)), requests)


def test_a_simulated_service_answers_as_a_service() -> None:
    def asked(service: Any) -> list[Any]:
        found: list[Any] = []
        for action in (
            lambda: service.key_value_dir_get("run"),
            lambda: service.key_value_set("run/a", "1"),
            lambda: service.key_value_set("run/a", "2"),
            lambda: service.key_value_set("run/a", "3", allow_overwrite=True),
            lambda: service.key_value_set("running", "another"),
            lambda: service.key_value_set("run/b/c", "deep"),
            lambda: sorted(service.key_value_dir_get("run")),
            lambda: service.blocking_key_value_get("run/a", 10),
            lambda: service.blocking_key_value_get("nothing", 1),
            lambda: service.key_value_delete("run"),
            lambda: service.blocking_key_value_get("run/a", 1),
            lambda: service.blocking_key_value_get("running", 10),
        ):
            try:
                found.append(action())
            except jax.errors.JaxRuntimeError as error:
                found.append(str(error).partition(":")[0])
        return found

    found: list[Any] = []
    scheduler = Scheduler()
    host = Process(0, 0, 9, "here", 0.0, random.Random(), [])
    run(lambda _: found.extend(asked(SimulatedService(scheduler, host))), scheduler=scheduler)
    assert found == asked(FakeService())


def test_processes_agree_through_a_simulated_service() -> None:
    scheduler = Scheduler()
    host = Process(0, 0, 9, "here", 0.0, random.Random(), [])
    service, agreed = SimulatedService(scheduler, host), []

    def agree(index: int) -> None:
        agreed.append(Channel(Processes(50.0, service, index, 3, name="run"), "run").everyone("phase", index))

    run(*(lambda _, index=index: agree(index) for index in range(3)), scheduler=scheduler)
    assert agreed == [[0, 1, 2]] * 3


def test_who_waits_for_ever_is_named() -> None:
    def wait(scheduler: Scheduler) -> None:
        scheduler.wait(lambda wake: None, None)

    with pytest.raises(NeverEndsError, match=r"these processes wait for ever: 0\.1"):
        run(lambda scheduler: scheduler.sleep(1.0), wait)
