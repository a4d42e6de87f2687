"""One run in several threads, in forked processes, and in code that is called from inside it."""

from __future__ import annotations

import itertools
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from torchorbax import Checkpointer, ConfigError, MismatchError, verify
from torchorbax._src.run.checkpointer import listen_for_preemption

from tests.helpers.fake_runs import fake_run
from tests.helpers.memory_storage import MemoryStorage
from tests.helpers.programs import RunPython

CALLS: dict[str, Callable[[Checkpointer, int], object]] = {
    "save": lambda run, step: run.save(step, force=True),
    "wait": lambda run, step: run.wait(),
    "restore": lambda run, step: run.restore(),
    "close": lambda run, step: run.close(),
}


# Several threads.


def test_calls_of_several_threads(storage: MemoryStorage) -> None:
    """Each thread gets an answer or an error that it can understand, and what is listed is what was saved."""
    errors: list[Exception] = []
    start = threading.Barrier(6)

    def calls(index: int) -> None:
        start.wait()
        for step in range(index, 120, 3):
            try:
                if index < 3:
                    run.save(step, force=step % 2 == 0)
                run.wait()
                if step % 17 == 0:
                    run.restore()
                assert run.best_step("loss") is None
                assert {one.step for one in run.history} >= set(run.all_steps())
            except Exception as error:
                errors.append(error)

    with fake_run(storage, save=1, keep=None) as run:
        threads = [threading.Thread(target=calls, args=(index,)) for index in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not any(thread.is_alive() for thread in threads)
    assert {type(error) for error in errors} <= {ConfigError}
    assert all("is already saved" in str(error) or "is below the newest step" in str(error) for error in errors)
    assert [record.step for record in run.history if record.error is None] == storage.steps()
    assert storage.steps()[-1] == 119


def test_a_thread_that_waits_does_not_hold_up_the_loop(storage: MemoryStorage) -> None:
    with fake_run(storage) as run:
        storage.gate.clear()
        run.save(0)
        waiting = [threading.Thread(target=run.wait) for _ in range(2)]
        for thread in waiting:
            thread.start()
        assert [run.save(step) for step in (1, 2)] == [False, False]
        assert run.history[0].step == 0
        storage.gate.set()
        for thread in waiting:
            thread.join(30)
        assert run.save(3)
    assert storage.steps() == [0, 3]


def test_closed_by_another_thread_while_the_loop_goes_on(storage: MemoryStorage) -> None:
    run = fake_run(storage, save=1)
    run.save(0)
    closing = threading.Thread(target=run.close)
    closing.start()

    def loop() -> None:
        for step in itertools.count(1):
            run.save(step)

    with pytest.raises(ConfigError, match="closed"):
        loop()
    closing.join(30)
    assert storage.steps() == [record.step for record in run.history][-3:]


@pytest.mark.parametrize("another_run", [False, True])
def test_a_run_that_another_thread_has_closed_does_not_listen_for_sigterm(
    storage: MemoryStorage, another_run: bool
) -> None:
    """The program's own handler is called again; that of a run which is still open comes first."""
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda signum, frame: heard.append(signum))
    try:
        run, other = fake_run(storage), fake_run(storage)
        listen_for_preemption(run)
        if another_run:
            listen_for_preemption(other)
        closing = threading.Thread(target=run.close)
        closing.start()
        closing.join(30)
        signal.raise_signal(signal.SIGTERM)
        assert not run.preempted
        assert other.preempted is another_run
        assert heard == ([] if another_run else [signal.SIGTERM])
        other.close()
        signal.raise_signal(signal.SIGTERM)
        assert heard == [signal.SIGTERM] * (1 if another_run else 2)
    finally:
        signal.signal(signal.SIGTERM, before)


# From inside a call.


class Inside:
    """An object whose `state_dict` calls the run that is saving it."""

    def __init__(self) -> None:
        self.calls: Callable[[], object] | None = None

    def state_dict(self) -> dict[str, Any]:
        if self.calls is not None:
            self.calls()
        return {"a": 1}

    def load_state_dict(self, state: Any) -> None:
        self.state_dict()


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("outer", ["save", "restore"])
def test_a_hook_cannot_call_the_run(storage: MemoryStorage, call: str, outer: str) -> None:
    inside = Inside()
    with Checkpointer("run", {"inside": inside}, rng=False, save=1) as run:
        run.save(0)
        inside.calls = lambda: CALLS[call](run, 2)
        kind = ConfigError if outer == "save" else MismatchError  # which names the object that refuses its state
        with pytest.raises(kind, match=f"{call} was called while this run is busy.*A policy, hook or signal handler"):
            CALLS[outer](run, 1)
        inside.calls = None
        run.save(1)
        assert run.restore() == 1
    assert storage.steps() == [0, 1]


@pytest.mark.parametrize("call", CALLS)
def test_a_signal_handler_cannot_call_the_run_while_it_is_busy(storage: MemoryStorage, call: str) -> None:
    inside = Inside()
    with Checkpointer("run", {"inside": inside}, rng=False, save=1) as run:
        before = signal.signal(signal.SIGUSR1, lambda *args: CALLS[call](run, 2))
        try:
            inside.calls = lambda: signal.raise_signal(signal.SIGUSR1)
            with pytest.raises(ConfigError, match=f"{call} was called while this run is busy"):
                run.save(0)
            inside.calls = None
            signal.signal(signal.SIGUSR1, lambda *args: run.save(3))
            signal.raise_signal(signal.SIGUSR1)  # the run is not busy
        finally:
            signal.signal(signal.SIGUSR1, before)
    assert storage.steps() == [3]


class Calling:
    """A policy of saving and of keeping that calls the run."""

    def __init__(self) -> None:
        self.calls: Callable[[], object] = int

    def should_save(self, step: Any, previous_steps: Any, *, context: Any) -> bool:
        self.calls()
        return True

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        self.calls()
        return [False] * len(checkpoints)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("role", ["save", "keep"])
def test_a_policy_cannot_call_the_run(
    storage: MemoryStorage, caplog: pytest.LogCaptureFixture, call: str, role: str
) -> None:
    """Nor must it hang: the saving thread would wait for itself."""
    policy = Calling()
    options: dict[str, Any] = {"save": 1, "keep": None} | {role: policy}
    with fake_run(storage, **options) as run:
        policy.calls = lambda: CALLS[call](run, 9)
        for step in range(3):
            assert run.save(step)
            run.wait()
        assert f"{role}=Calling does not say" in caplog.text
        assert f"ConfigError: run: {call} was called while this run is busy" in caplog.text
        policy.calls = int
    assert storage.steps() == [0, 1, 2]
    assert all(record.error is None for record in run.history)


def test_a_policy_may_look_at_the_run(storage: MemoryStorage) -> None:
    policy = Calling()
    with fake_run(storage, save=policy, keep=policy) as run:
        policy.calls = lambda: (run.all_steps(), run.best_step("loss"), run.history, run.preempted)
        for step in range(3):
            run.save(step)
            run.wait()
    assert storage.steps() == [2]


# Forked processes.

FORKED = """
    import os, signal, sys, threading, warnings, numpy as np, torchorbax
    warnings.simplefilter("ignore")  # that a process with threads is forked
    busy = sys.argv[2] == "True"
    inside, go, saving = threading.Event(), threading.Event(), None

    class Slow:
        def state_dict(self):
            if saving:
                inside.set()
                go.wait(60)
            return {}
        def load_state_dict(self, state): ...

    def in_child(action):
        # Exits with 0 if the run says that it is not the child's.
        if pid := os.fork():
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        signal.alarm(60)  # it must not hang
        try:
            action()
        except torchorbax.ConfigError as error:
            os._exit(not (f"forked from process {os.getppid()}" in str(error) and "'spawn'" in str(error)))
        except KeyError:
            os._exit(8)
        os._exit(9)

    def leave(how):
        with run:
            how()

    def raise_something():
        raise KeyError

    run = torchorbax.Checkpointer(sys.argv[1], {"x": {"n": np.ones(70000)}, "slow": Slow()}, rng=False, save=1)
    run.save(0)
    if busy:
        saving = threading.Thread(target=run.save, args=(1,))
        saving.start()
        inside.wait(60)
    calls = [lambda: run.save(1), lambda: run.save(1, force=True), run.wait, run.restore]
    assert [in_child(call) for call in calls] == [0, 0, 0, 0]
    assert [in_child(run.close), in_child(lambda: leave(int)), in_child(lambda: leave(raise_something))] == [9, 9, 8]
    if busy:
        go.set()
        saving.join()
    else:
        run.save(1)
    run.close()
"""


@pytest.mark.parametrize("busy", [False, True])
def test_a_forked_process_leaves_the_run_to_its_parent(tmp_path: Path, run_python: RunPython, busy: bool) -> None:
    """Also if it was forked while another thread of the parent was in the middle of a call."""
    run_python(FORKED, tmp_path / "run", busy, warnings="ignore")
    assert verify(str(tmp_path / "run")) == [0, 1]


def test_a_forked_process_that_ends_by_itself_leaves_the_run_alone(tmp_path: Path, run_python: RunPython) -> None:
    program = """
        import os, sys, threading, warnings, numpy as np, torchorbax
        warnings.simplefilter("ignore")  # that a process with threads is forked
        run = torchorbax.Checkpointer(sys.argv[1], {"x": {"n": np.ones(1 << 22)}}, rng=False, save=1)
        run.save(0)
        if (pid := os.fork()) == 0:
            threading._shutdown()  # as at the end of a program, but without XLA's, which hangs in a forked process
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        run.close()
    """
    done = run_python(program, tmp_path / "run", warnings="ignore")
    assert "without close()" not in done.stderr
    assert verify(str(tmp_path / "run")) == [0]
