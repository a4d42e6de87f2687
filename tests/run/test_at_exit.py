"""How a run ends, and what storage may do to it: no hang, no lost step, and a word about where it stands."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torchorbax
from torchorbax import Checkpointer, SaveError, verify
from torchorbax._src.run import at_exit
from torchorbax._src.storage import run_folder as _orbax_folder
from torchorbax._src.storage.orbax_storage import OrbaxStorage

from tests.helpers.programs import RunPython


def state(value: float = 0.0) -> dict[str, Any]:
    """100 kB that do not compress."""
    return {"x": {"a": np.random.default_rng(0).standard_normal(25_000).astype(np.float32) + np.float32(value)}}


def value_of(path: Path, step: int | None = None) -> float:
    return float(np.asarray(torchorbax.load(str(path), step, item="x")["a"])[0] - state()["x"]["a"][0])


def save_and_wait(run: Checkpointer, step: int) -> None:
    run.save(step, state(step), force=True)
    run.wait()


# ------------------------------------------------------------------------------------------------ faults while saving


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a file system here: {mounted.stderr}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path) -> Path:
    """Leave no space that a step would fit into."""
    free = shutil.disk_usage(folder).free
    filler = folder / "filler"
    filler.write_bytes(bytes(free - 50_000))
    return filler


def test_a_full_disk(small_disk: Path) -> None:
    with Checkpointer(str(small_disk / "run"), state(), rng=False, keep=2) as run:
        save_and_wait(run, 0)
        save_and_wait(run, 1)
        filler = fill(small_disk)
        free = shutil.disk_usage(small_disk).free
        for step in (2, 3):
            with pytest.raises(SaveError, match=rf"step {step} was not saved: .*No space left on device") as caught:
                save_and_wait(run, step)
            assert (caught.value.step, run.all_steps()) == (step, [0, 1])
        assert shutil.disk_usage(small_disk).free == free, "what was written of the failed steps is given back"
        assert verify(run.path) == [0, 1]
        filler.unlink()
        save_and_wait(run, 4)
        assert run.all_steps() == [1, 4]
    assert value_of(small_disk / "run") == pytest.approx(4, abs=1e-5)


def test_a_disk_that_turns_read_only(small_disk: Path) -> None:
    with Checkpointer(str(small_disk / "run"), state(), rng=False, keep=1) as run:
        save_and_wait(run, 0)
        subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
        with pytest.raises(SaveError, match=r"step 1 was not saved: .*Read-only file system"):
            save_and_wait(run, 1)
        assert verify(run.path) == [0]
        subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
        save_and_wait(run, 2)
        assert run.all_steps() == [2]


def test_a_disk_that_is_read_only_from_the_start(small_disk: Path) -> None:
    (small_disk / "run").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(torchorbax.ConfigError, match=r"cannot be used for a run: OSError: .*Read-only"):
        Checkpointer(str(small_disk / "run"), state())


def test_permission_that_is_lost(tmp_path: Path, run_python: RunPython) -> None:
    """As an ordinary user, since permissions do not bind root."""
    program = """
        import os, sys, numpy as np, torchorbax
        path = sys.argv[1]
        with torchorbax.Checkpointer(path, {"x": {"a": np.arange(8, dtype=np.float32)}}, rng=False, keep=1) as run:
            run.save(0, force=True)
            run.wait()
            if os.geteuid() == 0:
                for folder, _, files in os.walk(path):
                    for name in (".", *files):
                        os.chown(os.path.join(folder, name), 65534, 65534)
                os.seteuid(65534)
            os.chmod(path, 0o555)
            run.save(1, force=True)
            try:
                run.wait()
            except torchorbax.SaveError as error:
                print(error.step, "Permission denied" in str(error), run.all_steps())
            os.chmod(path, 0o755)
            run.save(2, force=True)
            run.wait()
            print(run.all_steps(), torchorbax.verify(path))
    """
    for folder in tmp_path.parents:
        if folder.stat().st_uid == os.geteuid() == 0 and folder != Path("/"):
            folder.chmod(folder.stat().st_mode | 0o011)
    tmp_path.chmod(0o755)
    done = run_python(program, tmp_path / "run")
    assert done.stdout.splitlines() == ["1 True [0]", "[2] [2]"], done.stderr


def test_the_folder_is_deleted_under_the_run(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with Checkpointer(str(path), state(), rng=False) as run:
        save_and_wait(run, 0)
        shutil.rmtree(path)
        save_and_wait(run, 1)
        assert run.all_steps() == [1]
        shutil.rmtree(path)
        path.write_text("in the way")
        with pytest.raises(SaveError, match="step 2 was not saved"):
            save_and_wait(run, 2)
        path.unlink()
        save_and_wait(run, 3)
        assert run.all_steps() == verify(run.path) == [3]


@pytest.mark.parametrize("failing", ["metadata", "folder"])
def test_a_flush_that_fails(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step might not survive a loss of power, so it is not counted, and the one before stays."""
    real, broken = os.fsync, threading.Event()

    def fsync(descriptor: int) -> None:
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if broken.is_set() and (name.endswith("_METADATA") if failing == "metadata" else name == str(tmp_path / "run")):
            raise OSError(errno.EIO, "Input/output error", name)
        real(descriptor)

    monkeypatch.setattr(_orbax_folder.os, "fsync", fsync)
    with Checkpointer(str(tmp_path / "run"), {"x": {"a": jnp.ones(8)}}, rng=False, keep=1) as run:
        run.save(0, force=True)
        run.wait()
        broken.set()
        run.save(1, force=True)
        with pytest.raises(SaveError, match=r"step 1 was not saved: OSError: .*Input/output error"):
            run.wait()
        assert run.all_steps() == [0]
        broken.clear()
        run.save(1, force=True)
        run.wait()
        assert run.all_steps() == verify(run.path) == [1]


def test_everything_is_flushed_before_an_older_step_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, flushed, deleted_after = os.fsync, set[str](), []
    run = Checkpointer(str(tmp_path / "run"), state(), rng=False, keep=1)
    delete = run._main.storage.delete

    def fsync(descriptor: int) -> None:
        flushed.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    def note_and_delete(step: int) -> None:
        deleted_after.append(set(flushed))
        delete(step)

    monkeypatch.setattr(_orbax_folder.os, "fsync", fsync)
    monkeypatch.setattr(run._main.storage, "delete", note_and_delete)
    with run:
        save_and_wait(run, 0)
        save_and_wait(run, 1)
    everything = {
        str(path) for path in [tmp_path / "run", tmp_path / "run" / "1", *(tmp_path / "run" / "1").rglob("*")]
    }
    assert len(deleted_after) == 1
    assert everything <= deleted_after[0]


# ------------------------------------------------------------------------------------------------------- ends of life


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
            def write(*args):
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


def test_a_forked_process_saves_with_a_thread_of_its_own(tmp_path: Path, run_python: RunPython) -> None:
    program = """
        import os, sys, warnings, numpy as np, torchorbax
        from torchorbax._src.run import checkpointer
        warnings.simplefilter("ignore")  # that jax has threads; but nothing of it has been used
        run = torchorbax.Checkpointer(sys.argv[1], {"x": {"n": np.ones(70000)}}, rng=False, save=1)
        checkpointer.get_ready(run)
        if pid := os.fork():
            sys.exit(os.waitpid(pid, 0)[1])
        run.save(7)
        run.close()
        os._exit(run.all_steps() != [7])
    """
    assert run_python(program, tmp_path / "run").returncode == 0


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


# -------------------------------------------------------------------------------------------------- save_on_exception


def train_and_fail(run: Checkpointer, live: dict[str, Any], at: int, error: BaseException) -> None:
    with run:
        for step in run.steps(10):
            live["x"]["a"][:] = state(step)["x"]["a"]
            if step == at:
                raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_the_last_complete_step_is_saved_on_an_exception(error: type[BaseException], tmp_path: Path) -> None:
    """Not the state that the failing body had half changed."""
    live = state()
    run = Checkpointer(str(tmp_path), live, rng=False, save=100, save_on_exception=True)
    with pytest.raises(error):
        train_and_fail(run, live, 7, error())
    assert run.all_steps() == [0, 6]
    assert value_of(tmp_path, 6) == pytest.approx(6, abs=1e-5)


def test_no_exception_no_further_save(tmp_path: Path) -> None:
    with Checkpointer(str(tmp_path), state(), rng=False, save=4, save_on_exception=True) as run:
        list(run.steps(6))
    assert run.all_steps() == [0, 4]


def test_a_step_that_was_saved_is_not_saved_again(tmp_path: Path) -> None:
    live = state()
    run = Checkpointer(str(tmp_path), live, rng=False, save=1, save_on_exception=True)
    with pytest.raises(RuntimeError, match="mine") as caught:
        train_and_fail(run, live, 3, RuntimeError("mine"))
    assert run.all_steps() == [0, 1, 2]
    last = f"{tmp_path}: the last committed step is 2; the same program goes on from step 3"
    assert caught.value.__notes__ == [last]


@pytest.mark.parametrize("where", ["save", "close"])
def test_ctrl_c_while_a_save_is_waited_for(where: str, tmp_path: Path, run_python: RunPython) -> None:
    """Python takes a thread for ended whose `join` was interrupted."""
    program = f"""
        import os, signal, sys, threading, numpy as np, torchorbax
        from torchorbax._src.storage.orbax_storage import OrbaxStorage
        write, go = OrbaxStorage.write, threading.Event()
        def slow(*args):
            threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
            go.wait(3)
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


def test_what_was_rolled_back_is_not_saved(tmp_path: Path) -> None:
    live = state()
    run = Checkpointer(str(tmp_path), live, rng=False, save=100, save_on_exception=True)

    def train() -> None:
        with run:
            for step in range(3):
                run.save(step, force=step == 1)
            run.restore(1)
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        train()
    assert run.all_steps() == [0, 1]


def test_a_save_that_is_refused_leaves_the_last_complete_step(tmp_path: Path) -> None:
    run = Checkpointer(str(tmp_path), state(), rng=False, save=100, save_on_exception=True)

    def train() -> None:
        with run:
            for step in range(3):
                run.save(step)
            run.save(3, metrics={"loss": "x"})

    with pytest.raises(torchorbax.ConfigError, match="metric loss must be"):
        train()
    assert run.all_steps() == [0, 2]
