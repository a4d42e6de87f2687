"""How a run ends, and what storage may do to it: no hang, no lost step, and a word about where it stands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from torchorbax import Checkpointer, verify
from torchorbax._src.run import at_exit
from torchorbax._src.storage.orbax_storage import OrbaxStorage

from tests.helpers.programs import RunPython, start_program
from tests.helpers.runs import save_and_wait, state

ENDINGS = {
    "raise RuntimeError('mine')": (1, "RuntimeError: mine"),
    "sys.exit(3)": (3, ""),
    "os.kill(os.getpid(), signal.SIGINT)": (-signal.SIGINT, "KeyboardInterrupt"),
    "os.kill(os.getpid(), signal.SIGTERM)": (0, "stopped by SIGTERM"),
}


@pytest.mark.parametrize("how", ["with", "open"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_every_ending_commits_and_tells_where_the_run_stands(
    ending: str, how: str, tmp_path: Path, run_python: RunPython
) -> None:
    program = f"""
        import os, signal, sys, threading, numpy as np, torch, torchorbax
        model = torch.nn.Linear(2, 2)
        def loop(run):
            for step in run.steps(10):
                run.wait()
                if step == 7:
                    {ending}
        run = torchorbax.resume(model, None, sys.argv[1], save=1)
        if {how == "with"}:
            with run:
                loop(run)
        else:
            loop(run)
    """
    code, word = ENDINGS[ending]
    done = run_python(program, tmp_path / "run", check=False, warnings="ignore")
    assert done.returncode == code, done.stderr
    assert word in done.stderr
    newest = 7 if "SIGTERM" in ending else 6
    last = f"the last committed step is {newest}; the same program goes on from step {newest + 1}"
    assert last in done.stderr.strip().splitlines()[-1]
    assert verify(str(tmp_path / "run"))[-1] == newest


@pytest.mark.parametrize("fails", [False, True])
def test_a_save_in_flight_of_a_run_that_nobody_has_any_more(fails: bool, tmp_path: Path, run_python: RunPython) -> None:
    program = """
        import gc, sys, threading, numpy as np, torchorbax
        from torchorbax._src.storage import array_writer
        if sys.argv[2] == "True":
            def write(*args, **options):
                raise OSError("no more disk")
            array_writer.write = write
        def save():
            x = {"x": {"a": np.zeros(1 << 24, np.float32)}}
            torchorbax.Checkpointer(sys.argv[1], x, rng=False).save(5)
        save()
        gc.collect()
    """
    done = run_python(program, tmp_path / "run", fails, warnings="ignore")
    assert ("step 5 was not saved: OSError: no more disk" in done.stderr) is fails
    assert (tmp_path / "run" / "5").exists() is not fails
    assert fails or verify(str(tmp_path / "run")) == [5]


def test_sigterm_ends_a_program_that_has_no_run_any_more(tmp_path: Path, run_python: RunPython) -> None:
    program = """
        import gc, os, signal, sys, torch, torchorbax
        def train():
            run = torchorbax.resume(torch.nn.Linear(2, 2), None, sys.argv[1])
            run.save(0)
            run.wait()
        train()
        gc.collect()
        os.kill(os.getpid(), signal.SIGTERM)
        print("still here")
    """
    done = run_python(program, tmp_path / "run", check=False, warnings="ignore")
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "")


def test_a_new_run_waits_for_the_save_of_one_that_was_not_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a second Ctrl-C in a notebook, which starts its cell again."""
    writing, go = threading.Event(), threading.Event()
    write = OrbaxStorage.write

    def slow(*args: Any) -> Any:
        writing.set()
        assert go.wait(60)
        return write(*args)

    monkeypatch.setattr(OrbaxStorage, "write", slow)
    Checkpointer(str(tmp_path), state(5)).save(5)
    assert writing.wait(60)
    said: list[str] = []
    monkeypatch.setattr(at_exit._logger, "warning", lambda text, *args: (said.append(text), go.set()))
    blank = state()
    try:
        with Checkpointer(str(tmp_path), blank) as run:
            assert run.restore() == 5
    finally:
        go.set()
    assert said == ["%s: waiting for a save of a run that was not closed"]
    assert blank["x"]["a"].tolist() == state(5)["x"]["a"].tolist()


def test_no_thread_is_left_when_a_run_is_closed(tmp_path: Path) -> None:
    with Checkpointer(str(tmp_path / "warm"), state()) as run:
        save_and_wait(run, 0)
    before = set(threading.enumerate())
    for index in range(3):
        with Checkpointer(str(tmp_path / str(index)), state(), save=1) as run:
            list(run.steps(3))
    assert {thread.name for thread in set(threading.enumerate()) - before} <= {"asyncio_0"}  # Orbax's, one for good


def test_forked_workers_leave_the_run_alone(tmp_path: Path, run_python: RunPython) -> None:
    """A DataLoader with workers, forked while a save is in flight."""
    program = """
        import sys, numpy as np, torch, torchorbax
        loader = torch.utils.data.DataLoader(torch.arange(64), batch_size=8, num_workers=2)
        x = {"x": {"a": np.zeros(1 << 22, np.float32)}}
        with torchorbax.Checkpointer(sys.argv[1], x, rng=False, save=1) as run:
            seen = []
            for step in run.steps(2):
                seen += [int(value) for batch in loader for value in batch]
                x["x"]["a"][:] = step
            assert seen == [*range(64)] * 2
        print(run.all_steps())
    """
    done = run_python(program, tmp_path / "run", warnings="ignore")  # that a process with threads is forked
    assert done.stdout.strip() == "[0, 1]"
    assert verify(str(tmp_path / "run")) == [0, 1]


@pytest.mark.parametrize("where", ["save", "close"])
def test_ctrl_c_while_a_save_is_waited_for(where: str, tmp_path: Path, run_python: RunPython) -> None:
    """Python takes a thread for ended whose `join` was interrupted."""
    program = f"""
        import os, signal, sys, threading, numpy as np, torchorbax
        from torchorbax._src.storage.orbax_storage import OrbaxStorage
        write, go = OrbaxStorage.write, threading.Event()
        def interrupt():
            os.kill(os.getpid(), signal.SIGINT)
            threading.Timer(0.3, go.set).start()
        def slow(*args):
            threading.Timer(0.3, interrupt).start()
            go.wait(60)
            return write(*args)
        OrbaxStorage.write = slow
        with torchorbax.Checkpointer(sys.argv[1], {{"x": {{"a": np.ones(8)}}}}, rng=False, save=None) as run:
            run.save(0, force=True)
            if {where == "save"}:
                run.save(1, force=True)
    """
    done = run_python(program, tmp_path / "run", check=False)
    assert done.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in done.stderr
    assert verify(str(tmp_path / "run")) == [0]
    assert "the last committed step is 0" in done.stderr


@pytest.mark.parametrize("ending", ["pass", "sys.exit(3)", "raise RuntimeError('mine')"])
def test_a_program_that_ends_without_close_commits_the_save_in_flight(
    ending: str, tmp_path: Path, run_python: RunPython
) -> None:
    code = f"""
        import sys, numpy as np, torchorbax
        run = torchorbax.Checkpointer(sys.argv[1], {{"x": {{"a": np.ones(1 << 24, np.float32)}}}})
        run.save(0)
        print(run.all_steps())
        {ending}
    """
    done = run_python(code, tmp_path / "run", check=False)
    assert done.returncode == {"pass": 0, "sys.exit(3)": 3}.get(ending, 1), done.stderr
    check = "import sys, torchorbax; print(torchorbax.load(sys.argv[1], item='x')['a'].sum())"
    assert float(run_python(check, tmp_path / "run").stdout) == 1 << 24


def test_a_failed_save_is_told_at_exit(tmp_path: Path, run_python: RunPython) -> None:
    code = """
        import pathlib, shutil, sys, numpy as np, torchorbax
        run = torchorbax.Checkpointer(sys.argv[1], {"x": {"a": np.ones(8, np.float32)}})
        shutil.rmtree(sys.argv[1])
        pathlib.Path(sys.argv[1]).write_text("in the way")
        run.save(0)
    """
    done = run_python(code, tmp_path / "run", check=False)
    assert "step 0 was not saved" in done.stderr


def test_sigkill_in_mid_save_loses_nothing_that_was_committed(tmp_path: Path, run_python: RunPython) -> None:
    code = """
        import sys, numpy as np, torchorbax
        state = {"x": {"a": np.zeros(1 << 22, np.float32)}}
        with torchorbax.Checkpointer(sys.argv[1], state) as run:
            print(run.restore(), float(state["x"]["a"].max()), flush=True)
            for step in run.steps(100_000):
                state["x"]["a"][:] = step
                print(step, run.all_steps()[-1:], flush=True)
    """
    newest = -1
    for _ in range(3):
        process = start_program(
            tmp_path, code, tmp_path / "run", env=os.environ, warnings="default", stderr=subprocess.DEVNULL
        )
        assert process.stdout is not None
        restored, value = process.stdout.readline().split()
        assert restored == "None" if newest < 0 else (int(restored) >= newest and float(value) == int(restored))
        for line in process.stdout:
            step, listed = line.split(maxsplit=1)
            newest = max([newest, *json.loads(listed)])
            if newest > -1 and int(step) % 500 == 499:
                break
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
        process.stdout.close()
    check = """
        import sys, torchorbax
        value = torchorbax.load(sys.argv[1], item="x")["a"]
        print(int(value.min()), int(value.max()), torchorbax.Checkpointer(sys.argv[1], {}, rng=False).all_steps()[-1])
    """
    low, high, step = map(int, run_python(check, tmp_path / "run").stdout.split())
    assert low == high == step >= newest >= 0
