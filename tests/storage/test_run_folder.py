"""One run's folder: paths of any name, leftovers, and what storage may do to it while a save is under way."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torchorbax
from torch import nn
from torchorbax import Checkpointer, ConfigError, SaveError, verify
from torchorbax._src.storage import local_files

from tests.helpers.fake_runs import weights
from tests.helpers.programs import RunPython
from tests.helpers.runs import save_and_wait, state, value_of


def test_bad_paths(tmp_path: Path) -> None:
    a_file = tmp_path / "file"
    a_file.write_text("not a run")
    other = tmp_path / "other"
    (other / "photos").mkdir(parents=True)
    classes = tmp_path / "classes"
    (classes / "3").mkdir(parents=True)
    (classes / "3" / "image.png").write_text("")
    for path, message in [
        (a_file, "is a file"),
        (a_file / "below", "cannot be used for a run"),
        (other, r"holds no run but other things \(photos\)"),
        (classes, "holds no run but other things"),
        (Path("/proc/none/run"), "cannot be used for a run"),
        ("s3://bucket/run", "only local folders and gs:// are supported"),
    ]:
        with pytest.raises(ConfigError, match=message):
            torchorbax.resume(nn.Linear(1, 1), None, str(path))


def test_who_only_reads_wants_a_checkpoint(tmp_path: Path) -> None:
    with (
        Checkpointer(str(tmp_path / "typo"), state(), read_only=True) as run,
        pytest.raises(torchorbax.CheckpointNotFoundError, match="no checkpoint found"),
    ):
        run.restore()


def test_steps_of_another_run_are_named_and_stay(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("one", "other"):
        with Checkpointer(str(tmp_path / name), state(), keep=1) as run:
            save_and_wait(run, 0 if name == "one" else 5)
    shutil.copytree(tmp_path / "other" / "5", tmp_path / "one" / "5")
    with Checkpointer(str(tmp_path / "one"), state(), keep=1) as run:
        save_and_wait(run, 6)
        save_and_wait(run, 7)
        assert run.all_steps() == [5, 7]
    assert caplog.text.count("steps 5 were saved by another run, so they are never deleted") == 1


def test_a_link_under_the_name_of_a_step_is_refused(tmp_path: Path) -> None:
    """To skip it would be to go back to an older step."""
    path = tmp_path / "run"
    with Checkpointer(path, state(), save=None, keep=None, rng=False) as run:
        save_and_wait(run, 0)
        save_and_wait(run, 1)
    (path / "1").rename(tmp_path / "elsewhere")
    (path / "1").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"links under names of steps \(1\), and links are never followed"):
        Checkpointer(path, state(), save=None, rng=False)
    (path / "1").unlink()
    (tmp_path / "elsewhere").rename(path / "1")  # as the message advises
    with Checkpointer(path, state(), save=None, rng=False) as run:
        assert run.restore() == 1


def test_an_owner_that_is_no_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / ".torchorbax-owner").mkdir()
    with pytest.raises(ConfigError, match=r"\.torchorbax-owner .*move it away, if no program writes to this run"):
        Checkpointer(tmp_path, state(), save=None, rng=False)
    (tmp_path / ".torchorbax-owner").rmdir()
    Checkpointer(tmp_path, state(), save=None, rng=False).close()


def test_an_identity_that_is_lost_is_found_in_the_steps(tmp_path: Path) -> None:
    file = tmp_path / ".torchorbax-run"
    with Checkpointer(str(tmp_path), state(), keep=1) as run:
        save_and_wait(run, 0)
    identity = file.read_text()
    for step, spoil in enumerate((file.unlink, lambda: file.write_text("")), start=1):
        spoil()
        with Checkpointer(str(tmp_path), state(), keep=1) as run:
            save_and_wait(run, step)
            assert run.all_steps() == [step]
        assert file.read_text() == identity
    file.write_bytes(b"\xd7 not an identity")
    with pytest.raises(ConfigError, match="is not the identity of a run; delete it, and the steps will say"):
        Checkpointer(str(tmp_path), state())


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE])
def test_what_may_pass_is_no_fault_of_the_path(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str) -> Any:
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(local_files.os, "scandir", fail)
    with pytest.raises(torchorbax.StorageError, match=os.strerror(number)):
        Checkpointer(str(tmp_path), {})


def test_only_leftovers_of_this_run_are_removed_before_the_next_save(tmp_path: Path) -> None:
    root = tmp_path / "run"
    with Checkpointer(str(root), {"w": weights()}) as run:
        run.save(0)
    identity = (root / ".torchorbax-run").read_text()
    mine = f".torchorbax-left-{identity}-1-0123abcd"
    others = [".torchorbax-left-another-2-0123abcd", "3.orbax-checkpoint-tmp", "notes"]
    for leftover in (mine, *others):
        (root / leftover).mkdir()
        (root / leftover / "data").write_text("x")
    with Checkpointer(str(root), {"w": weights()}) as run:
        assert run.all_steps() == [0]
        assert (root / mine).exists()
        run.save(1)
    names = {entry.name for entry in root.iterdir()}
    assert names == {"0", "1", ".torchorbax-run", ".torchorbax-owner", ".torchorbax-lock", *others}


@pytest.mark.parametrize(
    "name", ["lr=[0.1,0.2]", "a*b", "what?", "{x}", "50%", "a b", "über/日本", "a,b;c", "[", "$HOME"]
)
def test_a_path_may_have_any_name(name: str, tmp_path: Path) -> None:
    state = {"x": {"small": jnp.ones(3), "large": jnp.arange(1 << 17), "frozen": np.arange(4)}}
    with Checkpointer(str(tmp_path / name), state) as run:
        run.save(0, force=True)
    blank = jax.tree.map(lambda leaf: leaf * 0, state)
    with Checkpointer(str(tmp_path / name), blank) as run:
        assert run.restore() == 0
    assert jax.tree.all(jax.tree.map(lambda one, other: bool((one == other).all()), state, blank))
    assert torchorbax.verify(str(tmp_path / name)) == [0]


def test_a_path_with_a_backslash_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a path with a backslash in it; choose another"):
        Checkpointer(str(tmp_path / "a\\b"), {})


def test_a_path_beside_the_run_gives_a_hint(trained_run: str) -> None:
    above, name = os.path.split(trained_run)
    with pytest.raises(
        torchorbax.CheckpointNotFoundError, match=rf"no checkpoint found; there are runs below it: .*{name}"
    ):
        torchorbax.load(above)
    step = Checkpointer(trained_run, {}, rng=False).all_steps()[-1]
    with pytest.raises(torchorbax.CheckpointNotFoundError, match=rf"it is step {step} of the run {trained_run}"):
        torchorbax.verify(f"{trained_run}/{step}")


@pytest.mark.parametrize(
    "path", [None, 123, True, b"abc", ["x"], "", "a\0b", "gs:/bucket/x", "~nosuchuser/x"], ids=repr
)
def test_what_is_no_path(path: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"a path must be|a URI has two slashes: gs://|nosuchuser"):
        Checkpointer(path, {"w": weights()})
    assert not list(tmp_path.iterdir())


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


def test_the_folder_is_deleted_under_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "run"
    with Checkpointer(str(path), state(), rng=False) as run:
        save_and_wait(run, 0)
        shutil.rmtree(path)
        save_and_wait(run, 1)
        assert run.all_steps() == [1]
        assert f"{path} has been moved or deleted while it was open; it is made anew" in caplog.text
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

    monkeypatch.setattr(local_files.os, "fsync", fsync)
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
    real, flushed, deleted_after = os.fsync, set[int](), []
    run = Checkpointer(str(tmp_path / "run"), state(), rng=False, keep=1)
    delete = run._main.storage.delete

    def fsync(descriptor: int) -> None:
        flushed.add(os.fstat(descriptor).st_ino)
        real(descriptor)

    def note_and_delete(step: int) -> None:
        deleted_after.append(set(flushed))
        delete(step)

    monkeypatch.setattr(local_files.os, "fsync", fsync)
    monkeypatch.setattr(run._main.storage, "delete", note_and_delete)
    with run:
        save_and_wait(run, 0)
        save_and_wait(run, 1)
    everything = {
        path.stat().st_ino for path in [tmp_path / "run", tmp_path / "run" / "1", *(tmp_path / "run" / "1").rglob("*")]
    }
    assert len(deleted_after) == 1
    assert everything <= deleted_after[0]
