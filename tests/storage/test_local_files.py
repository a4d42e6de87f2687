"""Files on a local disk: what is there, what is not, and what cannot be known."""

from __future__ import annotations

import errno
import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
from torchorbax import StorageError
from torchorbax._src.storage import local_files
from torchorbax._src.storage.files import NotAFileError
from torchorbax._src.storage.local_files import LocalFiles

from tests.helpers.programs import RunPython

CALLS: dict[str, Callable[[LocalFiles], Any]] = {
    "entries": lambda files: files.entries("folder"),
    "exists": lambda files: files.exists("folder/file"),
    "sizes": lambda files: files.sizes("folder"),
    "digests": lambda files: files.digests("folder", ["file"]),
    "read": lambda files: files.read("folder/file", 100),
    "write": lambda files: files.write("folder/file", b"new"),
    "create": lambda files: files.create("folder/new", b"new"),
    "move": lambda files: files.move("folder", "moved"),
    "delete_file": lambda files: files.delete_file("folder/file"),
    "delete_folder": lambda files: files.delete_folder("folder"),
    "flush": lambda files: files.flush("folder"),
}
OF_THE_SYSTEM = ("open", "lstat", "scandir", "rename", "replace", "unlink")


@pytest.fixture
def files(tmp_path: Path) -> LocalFiles:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"content")
    return LocalFiles(str(tmp_path))


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENOMEM])
@pytest.mark.parametrize("call", CALLS)
def test_only_what_is_known_not_to_be_there_is_not_there(
    call: str, number: int, files: LocalFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number))

    for name in OF_THE_SYSTEM:
        monkeypatch.setattr(local_files.os, name, fail)
    with pytest.raises(StorageError, match=os.strerror(number)):
        CALLS[call](files)
    monkeypatch.undo()
    assert files.read("folder/file", 100) == b"content", "nothing has changed"


def test_what_is_not_there(files: LocalFiles) -> None:
    for path in ("nothing", "nothing/below", "folder/file/below"):
        assert files.entries(path) == []
        assert files.sizes(path) == {}
        assert not files.exists(path)
        files.delete_file(path)
        files.delete_folder(path)
        with pytest.raises(FileNotFoundError):
            files.read(path, 100)


def test_only_regular_files_are_read(files: LocalFiles, tmp_path: Path) -> None:
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (outside / "file").write_text("secret")
    os.symlink(outside / "file", tmp_path / "link")
    os.symlink(outside, tmp_path / "linked")
    os.symlink("loop", tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        for path in ("link", "linked/file", "loop", "pipe", "socket", "folder"):
            with pytest.raises(NotAFileError):
                files.read(path, 100)
    with pytest.raises(NotAFileError, match="but is a symbolic link, and links are not followed"):
        files.sizes("")


def test_a_folder_that_is_a_link_goes_without_what_it_leads_to(files: LocalFiles, tmp_path: Path) -> None:
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (outside / "file").write_text("mine")
    os.symlink(outside, tmp_path / "linked")
    files.delete_folder("linked")
    assert (outside / "file").read_text() == "mine"
    assert not files.exists("linked")


def test_no_more_is_read_than_is_allowed(files: LocalFiles, tmp_path: Path) -> None:
    assert files.read("folder/file", 7) == b"content"
    with pytest.raises(ValueError, match="folder/file has 7 bytes; it can have 6 at most"):
        files.read("folder/file", 6)
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="it can have 100 at most"):
        files.read("sparse", 100)
    with pytest.raises(ValueError, match="sparse claims to have 1099511627776 bytes, of which 0 are on the disk"):
        files.digests(".", ["sparse"])


def test_sizes_and_digests(files: LocalFiles, tmp_path: Path) -> None:
    large = os.urandom((1 << 20) + 3)
    (tmp_path / "folder" / "below").mkdir()
    (tmp_path / "folder" / "below" / "large").write_bytes(large)
    (tmp_path / "folder" / "empty").write_bytes(b"")
    assert files.sizes("folder") == {"file": 7, "below/large": len(large), "empty": 0}
    assert files.digests("folder", list(files.sizes("folder"))) == {
        "file": (7, f"{google_crc32c.value(b'content'):08x}"),
        "below/large": (len(large), f"{google_crc32c.value(large):08x}"),
        "empty": (0, "00000000"),
    }


def test_nothing_is_replaced_that_is_there(files: LocalFiles, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError):
        files.create("folder/file", b"new")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("other")
    with pytest.raises(FileExistsError, match="other is in the way"):
        files.move("folder", "other")
    (tmp_path / "a file").write_text("")
    with pytest.raises(FileExistsError, match="a file is in the way"):
        files.move("folder", "a file")
    assert files.read("folder/file", 100) == b"content"


def test_a_file_whose_beginnings_are_removed_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The owner of a run may take it for a leftover while another program opens the run."""
    files, replace, removed = LocalFiles(str(tmp_path)), os.replace, []

    def remove_and_replace(partial: str, path: str) -> None:
        if len(removed) < times:
            removed.append(partial)
            os.unlink(partial)
        replace(partial, path)

    monkeypatch.setattr(local_files.os, "replace", remove_and_replace)
    times = 1
    files.write("probe", b"content")
    assert files.read("probe", 100) == b"content"
    times = 3
    with pytest.raises(FileNotFoundError, match="partial"):
        files.write("probe", b"other")
    assert len(removed) == 3


def test_a_user_without_a_name_saves_and_restores(run_python: RunPython) -> None:
    """A container may run as a user that /etc/passwd does not know."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    program = """
        import os, pwd, sys, warnings
        import numpy as np, torchorbax

        with torchorbax.Checkpointer(os.path.join(sys.argv[1], "imports"), {"x": {"a": np.arange(8)}}) as run:
            run.save(0, force=True)  # whatever is imported later, another user might not be permitted to read
        os.chown(sys.argv[1], 54321, 54321)
        os.setgroups([])
        os.setgid(54321)
        os.setuid(54321)
        try:
            pwd.getpwuid(os.getuid())
        except KeyError:
            print("no name")
        warnings.simplefilter("error")
        path = os.path.join(sys.argv[1], "run")
        with torchorbax.Checkpointer(path, {"x": {"a": np.arange(8)}}, keep=2) as run:
            for step in range(3):
                run.save(step, force=True)
        with torchorbax.Checkpointer(path, {"x": {"a": np.zeros(8, int)}}) as run:
            print(run.restore(), run.state["x"]["a"].tolist(), run.all_steps())
        print(torchorbax.verify(path), sorted(torchorbax.load(path, item="x")))
    """
    # Not below pytest's folder, which every session of pytest that starts closes to others.
    with tempfile.TemporaryDirectory() as folder:
        done = run_python(program, folder)
    assert done.stdout.splitlines() == [
        "no name",
        "2 [0, 1, 2, 3, 4, 5, 6, 7] [1, 2]",
        "[1, 2] ['a']",
    ], done.stderr
