"""SIGTERM saves the current step and ends the loop, in one process and in several."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchorbax import Checkpointer, SaveError, verify
from torchorbax._src.run import preemption_watch

from tests.helpers.fake_runs import fake_run, weights
from tests.helpers.memory_storage import MemoryStorage
from tests.helpers.programs import ROOT, RunPython, start_program
from tests.helpers.several import Running, RunProcesses, alike, facts_of


def test_sigterm_that_arrives_when_save_has_already_looked(
    storage: MemoryStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_run(storage, save=None) as run:
        save = run.save

        def save_then_signal(step: int, *args: Any, **kwargs: Any) -> bool:
            saved = save(step, *args, **kwargs)
            run._preemption.received = run.preempted or step == 1
            return saved

        monkeypatch.setattr(run, "save", save_then_signal)
        assert list(run.steps(5)) == [0, 1]
    assert storage.steps() == [1]


def test_sigterm_saves_what_the_body_handed_over(storage: MemoryStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes after `save` has said that nothing is due; the live values are stale in a functional loop."""
    seen: list[float] = []
    write = storage.write
    monkeypatch.setattr(
        storage, "write", lambda s, a, fill: (seen.append(float(np.asarray(a["w", "w"])[0])), write(s, a, fill))[1]
    )
    with fake_run(storage, save=100) as run:
        for step in run.steps(9):
            run.save(step, {"w": weights(step + 1.0)}, metrics={"loss": step})
            run._preemption.received = step == 7
    assert storage.steps() == [0, 7]
    assert seen == [1.0, 8.0]
    assert storage.committed[7].metrics == {"loss": 7.0}


# ---------------------------------------------------------------------------------- a loop that does not come back


def until(happened: Callable[[], bool]) -> None:
    """Wait until something that another thread does has happened."""
    deadline_s = time.monotonic() + 30
    while not happened():
        assert time.monotonic() < deadline_s
        threading.Event().wait(0.002)


@pytest.fixture
def watched_run(storage: MemoryStorage) -> Iterator[Callable[..., Checkpointer]]:
    """Runs that are watched as after `resume`, and have no patience."""
    runs = []

    def open_run(**options: Any) -> Checkpointer:
        run = fake_run(storage, **{"save": 100, "preemption_patience_s": 0.0, **options})
        preemption_watch.watch(run._preemption)
        runs.append(run)
        return run

    yield open_run
    assert not any(run._preemption.watched for run in runs)


def test_a_loop_that_does_not_come_back_has_its_last_step_saved(
    storage: MemoryStorage, watched_run: Callable[..., Checkpointer]
) -> None:
    seen: list[float] = []
    with watched_run() as run:
        live = run.state["w"]
        for step in run.steps(10):
            if step == 5:
                run._preemption.received = True
                until(lambda: storage.steps() == [0, 4])
                seen.append(float(np.asarray(storage._arrays[4]["w", "w"])[0]))
            live["w"] = live["w"] + 1
            run.log(loss=step)
    assert seen == [5.0]
    assert storage.committed[4].metrics == {"loss": 4.0}
    # It has come back, so its own step is saved as well.
    assert storage.steps() == [0, 4, 5]
    assert float(np.asarray(storage._arrays[5]["w", "w"])[0]) == 6.0


@pytest.mark.parametrize("saved", [False, True])
def test_a_step_that_has_begun_to_change_is_saved_only_from_a_snapshot(
    storage: MemoryStorage, watched_run: Callable[..., Checkpointer], saved: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), watched_run(save_on_exception=saved) as run:
        live = run.state["w"]
        for step in run.steps(10):
            old, live["w"] = live["w"], live["w"] + 1
            old.delete()  # as a donating step does
            if step == 5:
                run._preemption.received = True
                until(lambda: "does not come back" in caplog.text)
    assert storage.steps() == ([0, 4, 5] if saved else [0, 5])
    assert ("step 4 is the last complete one, and it is not saved" in caplog.text) is not saved


def test_a_step_that_is_saved_already_is_not_saved_again(
    storage: MemoryStorage, watched_run: Callable[..., Checkpointer]
) -> None:
    with watched_run(save=1) as run:
        for step in run.steps(10):
            if step == 5:
                run._preemption.received = True
                run._save_overdue()
    assert storage.steps() == [3, 4, 5]
    assert [record.step for record in run.history] == [0, 1, 2, 3, 4, 5]


def end_at_5(run: Checkpointer, error: Exception, *, received: bool, in_body: bool = True) -> None:
    """A loop that ends with an exception in step 5, in its body or after it."""
    with run:
        for step in run.steps(10):
            if step == 5:
                run._preemption.received = received
                if in_body:
                    raise error


def test_an_exception_after_sigterm_saves_the_last_complete_step(
    storage: MemoryStorage, watched_run: Callable[..., Checkpointer]
) -> None:
    """DataLoader workers die of a signal to the group, and the loop gets their exception."""
    died = RuntimeError("DataLoader worker is killed by signal: Terminated")
    with pytest.raises(RuntimeError, match="killed by signal") as raised:
        end_at_5(watched_run(preemption_patience_s=1e3), died, received=True)
    assert storage.steps() == [0, 4]
    assert any("the last committed step is 4" in note for note in raised.value.__notes__)


def test_an_exception_of_a_signal_handler_in_save_itself_loses_nothing(
    storage: MemoryStorage, watched_run: Callable[..., Checkpointer], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = watched_run(preemption_patience_s=1e3)
    take, died = run._main.take, RuntimeError("DataLoader worker is killed by signal: Terminated")

    def take_when_a_worker_dies(*args: Any) -> Any:
        if run._preemption.received and died.__traceback__ is None:
            raise died
        return take(*args)

    monkeypatch.setattr(run._main, "take", take_when_a_worker_dies)
    # It ends the save, of which `save` tells if that is known by then; else the exception itself leaves the loop.
    with pytest.raises((RuntimeError, SaveError), match="killed by signal"):
        end_at_5(run, died, received=True, in_body=False)
    assert storage.steps() == [0, 5]


def test_an_exception_without_sigterm_saves_nothing(
    storage: MemoryStorage, watched_run: Callable[..., Checkpointer]
) -> None:
    with pytest.raises(KeyError, match="mine"):
        end_at_5(watched_run(), KeyError("mine"), received=False)
    assert storage.steps() == [0]


def test_close_after_sigterm_saves_the_last_complete_step(
    storage: MemoryStorage, watched_run: Callable[..., Checkpointer]
) -> None:
    run = watched_run(preemption_patience_s=1e3)
    for step in range(3):
        run.save(step)
    run._preemption.received = True
    run.close()
    assert storage.steps() == [0, 2]


def test_sigterm_in_close_waits_for_the_commit(
    storage: MemoryStorage, watched_run: Callable[..., Checkpointer]
) -> None:
    run = watched_run()
    run._preemption.install()
    run.save(0)
    run.wait()
    storage.gate.clear()
    storage.writing.clear()
    run.save(7, force=True)
    assert storage.writing.wait(30)

    def signal_then_go_on() -> None:
        until(lambda: run._closed)
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: run._preemption.signalled)
        storage.gate.set()

    thread = threading.Thread(target=signal_then_go_on)
    thread.start()
    run.close()
    thread.join()
    assert storage.steps() == [0, 7]
    assert run.preempted


def test_the_handler_does_nothing_but_set_a_flag(
    storage: MemoryStorage, watched_run: Callable[..., Checkpointer], caplog: pytest.LogCaptureFixture
) -> None:
    """It may run in the middle of a write to stderr, to which a log would write, too."""
    with caplog.at_level(logging.DEBUG), watched_run(preemption_patience_s=1e3) as run:
        run._preemption.install()
        for step in run.steps(10):
            if step == 2:
                signal.raise_signal(signal.SIGTERM)
                assert not [record for record in caplog.records if record.name.startswith("torchorbax")]
    assert storage.steps() == [0, 2]
    assert "SIGTERM: saving step 2, then stopping" in caplog.text


# --------------------------------------------------------------------------------------------------- real processes


SIGTERM = """
    import torch, torchorbax
    from tests.helpers.models import RULES, batch_of, loss_fn, seeded
    from tests.helpers.several_state import all_devices

    def build(name):
        model = seeded()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        step = torchorbax.train_step(model, optimizer, loss_fn)
        return step, torchorbax.resume(
            model, optimizer, f"{sys.argv[1]}/{name}", shardings=(all_devices("fsdp"), RULES), save=None,
            barrier_timeout_s=60,
        )

    step, run = build("steps")
    last = None
    with run:
        for i in run.steps(1_000_000):
            float(step(batch_of(i)))
            last = i
            if i == 10:
                tell("running")
    note(steps=[last, run.all_steps(), run.preempted])

    step, run = build("by hand")
    last = 0
    while not run.preempted:
        float(step(batch_of(last)))
        if last == 10:
            tell("running by hand")
        saved = run.save(last)
        last += 1
    run.close()
    note(by_hand=[last - 1, run.all_steps(), saved])
"""


def test_sigterm_to_one_process_stops_all_with_the_same_step_saved(folder: Path, run_processes: RunProcesses) -> None:
    path = folder / "sigterm"

    def during(running: Running) -> Sequence[int]:
        running.wait_for(1, "running")
        running.signal(1, signal.SIGTERM)
        running.wait_for(0, "running by hand")
        running.signal(0, signal.SIGTERM)
        return ()

    ended = run_processes(SIGTERM, path, devices=2, during=during)
    last, there, preempted = alike(facts_of(ended), "steps")
    assert last >= 10
    assert there == [last]
    assert preempted
    last, there, saved = alike(facts_of(ended), "by_hand")
    assert last >= 10
    assert there == [last]
    assert saved
    assert "SIGTERM: saving step" in ended[1].stderr
    assert all(f"the last committed step is {one}" in ended[0].stderr for one in verify(path / "steps"))


LOOP = """
    import sys
    sys.path.insert(0, {root!r})
    import numpy as np, torch, torchorbax
    model = torch.nn.Linear(64, 64)
    with torchorbax.resume(model, None, sys.argv[1], save=None) as run:
        for step in run.steps(1_000_000):
            with torch.no_grad():
                model.weight.fill_(step)
            print(step, flush=True)
    print("ended", run.preempted, run.all_steps(), flush=True)
"""


def test_sigterm_saves_the_current_step_and_ends_the_loop(tmp_path: Path, run_python: RunPython) -> None:
    with (tmp_path / "stderr").open("w+") as stderr:
        process = start_program(
            tmp_path, LOOP.format(root=str(ROOT)), tmp_path / "run", env=os.environ, warnings="default", stderr=stderr
        )
        assert process.stdout is not None
        with process.stdout:
            while process.stdout.readline().strip() != "20":
                assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            lines = ["20", *process.stdout.read().splitlines()]
        returncode = process.wait(60)
        stderr.seek(0)
        err = stderr.read()
    assert returncode == 0, err
    last_step = int(lines[-2])
    assert lines[-1] == f"ended True [{last_step}]"
    assert "SIGTERM: saving step" in err
    check = "import sys, torchorbax; print(float(torchorbax.load(sys.argv[1])['weight'][0, 0]))"
    assert float(run_python(check, tmp_path / "run").stdout) == last_step


def test_sigterm_in_a_hand_written_loop(tmp_path: Path, run_python: RunPython) -> None:
    code = """
        import os, signal, sys, torch, torchorbax
        before = signal.getsignal(signal.SIGTERM)
        run = torchorbax.resume(torch.nn.Linear(2, 2), None, sys.argv[1], save=None)
        started = []
        for step in range(6):
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            started.append(run.save(step))
        run.close()
        print(started, run.preempted, run.all_steps(), signal.getsignal(signal.SIGTERM) == before)
    """
    out = run_python(code, tmp_path / "run").stdout
    assert out.strip() == "[False, False, False, True, False, False] True [3] True"


def test_a_second_sigterm_ends_the_process(tmp_path: Path, run_python: RunPython) -> None:
    code = """
        import os, signal, sys, torch, torchorbax
        with torchorbax.resume(torch.nn.Linear(2, 2), None, sys.argv[1]) as run:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            print("still here")
    """
    done = run_python(code, tmp_path / "run", check=False)
    assert done.returncode == -signal.SIGTERM
    assert "still here" not in done.stdout


def test_a_forked_worker_dies_when_told_to(tmp_path: Path, run_python: RunPython) -> None:
    """A DataLoader ends its workers with SIGTERM; they inherit the handler and the open run."""
    code = """
        import os, signal, sys, time, torch, torchorbax
        with torchorbax.resume(torch.nn.Linear(2, 2), None, sys.argv[1]) as run:
            told, tell = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.write(tell, b"x")
                while True:  # a signal that comes right before a wait without an end would not be seen
                    signal.sigtimedwait([], 0.05)
            os.read(told, 1)
            os.kill(pid, signal.SIGTERM)
            _, status = os.waitpid(pid, 0)
            print(os.WTERMSIG(status) == signal.SIGTERM, run.preempted)
    """
    assert run_python(code, tmp_path / "run", warnings="ignore").stdout.strip() == "True False"


def test_sigterm_reaches_every_run_and_the_handler_of_before_comes_back(tmp_path: Path, run_python: RunPython) -> None:
    code = """
        import os, signal, sys, torch, torchorbax
        before = signal.getsignal(signal.SIGTERM)
        one, two = (torchorbax.resume(torch.nn.Linear(2, 2), None, sys.argv[1] + name, save=None) for name in "ab")
        os.kill(os.getpid(), signal.SIGTERM)
        print(one.preempted, two.preempted)
        one.close()
        print(signal.getsignal(signal.SIGTERM) == before)
        two.close()
        print(signal.getsignal(signal.SIGTERM) == before)
    """
    assert run_python(code, tmp_path / "run").stdout.split() == ["True", "True", "False", "True"]
