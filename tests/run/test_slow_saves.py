"""A save that takes much longer than the ones before is said once, with what it is doing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from torchorbax import Checkpointer
from torchorbax._src.distributed.channel import Channel
from torchorbax._src.distributed.processes import Processes
from torchorbax._src.run import background_save, slow_saves

from tests.helpers.coordination import LONG_S, FakeService
from tests.helpers.fake_runs import fake_run
from tests.helpers.memory_storage import MemoryStorage


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, to be set."""
    now = [100.0]
    for module in (background_save, slow_saves):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


class Blocked:
    """A method of the storage that blocks at its next call until `go` is set."""

    def __init__(self, patch: pytest.MonkeyPatch, storage: MemoryStorage, name: str) -> None:
        self.here, self.go = threading.Event(), threading.Event()
        works = getattr(storage, name)

        def blocked(*args: Any, **options: Any) -> Any:
            self.here.set()
            assert self.go.wait(60)
            return works(*args, **options)

        patch.setattr(storage, name, blocked)

    def wait(self) -> None:
        assert self.here.wait(60)


@pytest.fixture
def block(storage: MemoryStorage) -> Iterator[Callable[[str], Blocked]]:
    blocked: list[Blocked] = []
    with pytest.MonkeyPatch.context() as patch:

        def block(name: str) -> Blocked:
            blocked.append(Blocked(patch, storage, name))
            return blocked[-1]

        yield block
        for one in blocked:
            one.go.set()


def save_in(run: Checkpointer, now: list[float], storage: MemoryStorage, step: int, seconds: float) -> None:
    """Save a step, which takes so many seconds."""
    storage.gate.clear()
    storage.writing.clear()
    run.save(step, force=True)
    assert storage.writing.wait(60)
    now[0] += seconds
    storage.gate.set()
    run.wait()


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelname == "WARNING"]


PHASES = {
    "remove_leftovers": "removing what is in its way",
    "write": "making its folders",
    "write_arrays": "writing arrays",
    "delete": "deleting older steps",
}


@pytest.mark.parametrize("method", PHASES)
def test_the_first_save_that_takes_minutes(
    storage: MemoryStorage,
    now: list[float],
    caplog: pytest.LogCaptureFixture,
    block: Callable[[str], Blocked],
    method: str,
) -> None:
    with fake_run(storage, save=None, keep=None) as run:
        run.save(0, force=True)
    with fake_run(storage, keep=1) as run:
        blocked = block(method)
        run.save(1)
        blocked.wait()
        for minutes in (1, 2, 4, 60, 600):
            now[0] = 100.0 + 60 * minutes
            run.save(1 + minutes)
        assert warned(caplog) == [
            f"run: the save of step 1 has taken 120 s so far and is still {PHASES[method]}; no step has been committed "
            "before it"
        ]
        blocked.go.set()
    assert storage.steps() == [1]


def test_flushing_is_a_phase_of_its_own(
    storage: MemoryStorage, now: list[float], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes after the arrays have been written, within the storage."""
    here, go = threading.Event(), threading.Event()
    write = storage.write

    def flush(step: int, arrays: Any, fill: Any) -> Any:
        def filled(folders: Any) -> Any:
            manifest = fill(folders)
            here.set()
            assert go.wait(60)
            return manifest

        return write(step, arrays, filled)

    monkeypatch.setattr(storage, "write", flush)
    with fake_run(storage) as run:
        run.save(0)
        assert here.wait(60)
        now[0] += 1000.0
        run.save(1)
        go.set()
    assert "has taken 1000 s so far and is still committing and flushing" in caplog.text


def test_ten_times_as_long_as_the_ones_before(
    storage: MemoryStorage, now: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    with fake_run(storage, save=None) as run:
        for step in range(8):
            save_in(run, now, storage, step, 100.0 if step == 3 else 2.0)
        caplog.clear()
        storage.gate.clear()
        storage.writing.clear()
        run.save(8, force=True)
        assert storage.writing.wait(60)
        start = now[0]
        for after_s, said in ((19.0, 0), (20.0, 1), (1000.0, 1)):
            now[0] = start + after_s
            run.save(9)
            assert len(warned(caplog)) == said
        storage.gate.set()
    assert "step 8 has taken 20 s so far and is still making its folders; the saves before took 2.0 s" in caplog.text


def test_small_saves_may_vary(storage: MemoryStorage, now: list[float], caplog: pytest.LogCaptureFixture) -> None:
    with fake_run(storage, save=None) as run:
        for step in range(4):
            save_in(run, now, storage, step, 0.01)
        storage.gate.clear()
        run.save(4, force=True)
        now[0] += 4.9
        run.save(5)
        assert warned(caplog) == []
        now[0] += 0.1
        run.save(6)
        assert len(warned(caplog)) == 1
        storage.gate.set()


@pytest.mark.parametrize("how", ["wait", "close", "save"])
def test_who_waits_for_a_save_hears_of_it(
    storage: MemoryStorage, now: list[float], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The loop does not call `save` meanwhile."""
    said: list[int] = []

    def warning(text: str, path: str, step: int, *args: object) -> None:
        said.append(step)
        storage.gate.set()  # only now does the save go on

    monkeypatch.setattr(slow_saves._logger, "warning", warning)
    storage.gate.clear()
    run = fake_run(storage, save=None)
    run.save(0, force=True)
    now[0] += 200.0
    calls = {"wait": run.wait, "close": run.close, "save": lambda: run.save(1, force=True)}
    calls[how]()
    run.close()
    assert said == [0]


def test_a_save_that_failed_says_nothing_about_what_is_usual(
    storage: MemoryStorage, now: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    storage.failures[0] = OSError("full")
    run = fake_run(storage, save=None)
    run.save(0, force=True)
    run._main.saver.wait()
    storage.gate.clear()
    with pytest.raises(Exception, match="step 0 was not saved"):
        run.save(1, force=True)
    now[0] += 100.0
    run.save(2)
    assert warned(caplog) == []
    storage.gate.set()
    run.close()


def test_the_process_that_is_waited_for_is_named(service: FakeService) -> None:
    processes = [Processes(LONG_S, service, index, 2, "run") for index in range(2)]
    channel = Channel(processes[0], "save")
    seen: list[int | None] = []
    get = service.blocking_key_value_get

    def getting(key: str, timeout_in_ms: int) -> str:
        seen.append(channel.waiting_for)
        Channel(processes[1], "save").gather("start", "mine")
        return get(key, timeout_in_ms)

    service.blocking_key_value_get = getting  # type: ignore[method-assign]  # a fake of one call
    assert channel.gather("start", "own") == ["own", "mine"]
    assert seen == [1]
    assert channel.waiting_for is None
