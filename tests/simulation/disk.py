"""A simulated disk: that of one machine, or one that several machines share over NFS.

Each method of `SimulatedFiles` makes the calls of the system, one after another, that `LocalFiles` makes, so a process
can be killed, suspended or overtaken between any two. What is atomic on a disk is atomic here: to make a file that does
not exist, to replace one, to rename a folder.

Over NFS, a machine may see what a folder had in it, or that a name was missing, as of some seconds ago (the content of
files is that of the moment, as close-to-open consistency promises), there are no locks, and a request whose answer is
lost is made again.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeVar

import google_crc32c
from torchorbax._src.format.manifest import FileDigest
from torchorbax._src.storage.files import Entry, NotAFileError
from torchorbax._src.storage.owner_records import LOCK_PATIENCE_S, LocalRecord
from torchorbax.errors import StorageError

from tests.simulation.scheduler import NoAnswerError, Process, Scheduler

T = TypeVar("T")
Folder = dict[str, Any]
"""Files, as bytes, and folders, by name."""

STALE_S = 20.0
"""For how long a machine believes over NFS what it has seen of a folder."""


class Disk:
    """The files of a disk, below its root.

    Attributes:
        root: everything that is there.
        is_shared: do several machines share it over NFS?
        changed: called with the path of what has been changed.
        locks: the processes that hold locks, by path.
    """

    def __init__(self, scheduler: Scheduler, root: Folder, *, is_shared: bool) -> None:
        self.scheduler = scheduler
        self.root = root
        self.is_shared = is_shared
        self.changed: Callable[[str], None] = lambda path: None
        self.locks: dict[str, Process] = {}
        self._seen: dict[tuple[str, str], tuple[float, Any]] = {}  # by machine and what was asked

    def asked(self, label: str, act: Callable[[], T], *changes: str) -> T:
        """Make a request that changes these paths."""

        def act_and_tell() -> T:
            answer = act()
            for path in changes:
                self.changed(path)
            return answer

        while True:
            try:
                answer = self.scheduler.request("disk", label, act_and_tell)
                break
            except NoAnswerError as error:
                if not self.is_shared:
                    raise OSError(errno.EIO, f"{error}: {label}") from None
                # Over NFS the client makes it again, and does not give up.
        if changes:
            host = self.scheduler.running.host
            self._seen = {key: seen for key, seen in self._seen.items() if key[0] != host}
        return answer

    def asked_of_cache(self, label: str, act: Callable[[], T], believed: Callable[[T], bool]) -> T:
        """Make a request that a machine answers itself if it has asked lately, and the answer may be believed."""
        key = (self.scheduler.running.host, label)
        at, answer = self._seen.get(key, (-STALE_S, None))
        if self.is_shared and self.scheduler.now - at < STALE_S:
            return answer  # type: ignore[no-any-return]  # what `act` has returned
        began, found = self.scheduler.now, self.asked(label, act)
        if believed(found):
            self._seen[key] = began, found
        return found

    # What is there now, without a request.

    def node(self, path: str) -> Any:
        """A folder or the content of a file. Raises FileNotFoundError."""
        found: Any = self.root
        for part in path.strip("/").split("/") if path.strip("/") else ():
            if not isinstance(found, dict) or part not in found:
                raise FileNotFoundError(errno.ENOENT, "no such file or directory", path)
            found = found[part]
        return found

    def there(self, path: str) -> bool:
        """Is there something?"""
        try:
            self.node(path)
        except FileNotFoundError:
            return False
        return True

    def folder(self, path: str) -> Folder:
        """A folder, which is made if necessary."""
        found = self.root
        for part in path.strip("/").split("/") if path.strip("/") else ():
            found = found.setdefault(part, {})
            if not isinstance(found, dict):
                raise NotADirectoryError(errno.ENOTDIR, "not a directory", path)
        return found

    def put(self, path: str, content: bytes) -> None:
        """Replace a file, at once."""
        above, _, name = path.rpartition("/")
        self.folder(above)[name] = content

    def remove(self, path: str) -> None:
        """Delete a file or an empty folder, at once. Raises FileNotFoundError."""
        above, _, name = path.rpartition("/")
        if self.node(path) == {} or isinstance(self.node(path), bytes):
            del self.node(above)[name]
        else:
            raise OSError(errno.ENOTEMPTY, "directory not empty", path)


class SimulatedFiles:
    """What is below a folder of a simulated disk; a `Files`."""

    def __init__(self, root: str, disk: Disk) -> None:
        self.root = root
        self.disk = disk

    def entries(self, folder: str = "") -> list[Entry]:
        def act() -> list[Entry]:
            try:
                found = self.disk.node(self._path(folder))
            except FileNotFoundError:
                return []
            return [Entry(name, "folder" if isinstance(node, dict) else "file") for name, node in found.items()]

        with self._translated():
            return self.disk.asked_of_cache(f"list {self._path(folder)}", act, believed=bool)

    def exists(self, path: str) -> bool:
        full = self._path(path)
        with self._translated():
            return self.disk.asked_of_cache(
                f"exists {full}", lambda: self.disk.there(full), believed=lambda found: not found
            )

    def sizes(self, folder: str) -> dict[str, int]:
        with self._translated():
            return self.disk.asked(
                f"sizes {self._path(folder)}", lambda: {path: len(at) for path, at in self._below(folder)}
            )

    def is_file(self, path: str) -> bool:
        full = self._path(path)
        with self._translated():
            return self.disk.asked(
                f"exists {full}", lambda: self.disk.there(full) and isinstance(self.disk.node(full), bytes)
            )

    def digests(self, folder: str, paths: Collection[str] | None = None) -> dict[str, FileDigest]:
        def act() -> dict[str, FileDigest]:
            wanted = [path for path, _ in self._below(folder)] if paths is None else paths
            return {path: digest_of(self.disk.node(self._path(f"{folder}/{path}".lstrip("/")))) for path in wanted}

        with self._translated():
            return self.disk.asked(f"digests {self._path(folder)}", act)

    def read(self, path: str, most_bytes: int) -> bytes:
        full = self._path(path)
        label = "look" if "torchorbax-owner" in path else "read"
        with self._translated():
            found = self.disk.asked(f"{label} {full}", lambda: self.disk.node(full))
        if not isinstance(found, bytes):
            raise NotAFileError(f"{path} should be a regular file, but is a folder")
        return found

    def write(self, path: str, content: bytes) -> None:
        full = self._path(path)
        partial = f"{full}.{self.disk.scheduler.running.pid}.partial"
        label = "swap" if "torchorbax-owner" in path else "replace"
        with self._translated():
            for is_last in (False, True):
                self.disk.asked(f"put {partial}", lambda: self.disk.put(partial, content), partial)
                try:
                    self.disk.asked(f"{label} {full}", lambda: self._replace(partial, full), full)
                    return
                except FileNotFoundError:
                    if is_last:
                        raise

    def create(self, path: str, content: bytes) -> None:
        full = self._path(path)

        def act() -> None:
            if self.disk.there(full):
                raise FileExistsError(errno.EEXIST, "file exists", full)
            self.disk.put(full, b"")

        with self._translated():
            self.disk.asked(f"create {full}", act, full)
            self.disk.asked(f"fill {full}", lambda: self._fill(full, content), full)

    def move(self, folder: str, to: str) -> None:
        source, target = self._path(folder), self._path(to)

        def act() -> None:
            node = self.disk.node(source)
            if self.disk.there(target) and self.disk.node(target) != {}:
                raise FileExistsError(errno.ENOTEMPTY, f"{to} is in the way")
            above, _, name = source.rpartition("/")
            del self.disk.node(above)[name]
            above, _, name = target.rpartition("/")
            self.disk.folder(above)[name] = node

        with self._translated():
            self.disk.asked(f"move {source} {target}", act, source, target)

    def delete_file(self, path: str) -> None:
        full = self._path(path)
        with self._translated(), contextlib.suppress(FileNotFoundError):
            self.disk.asked(f"unlink {full}", lambda: self.disk.remove(full), full)

    def delete_folder(self, folder: str) -> None:
        full = self._path(folder)
        with self._translated(), contextlib.suppress(FileNotFoundError):
            self._delete(full)

    def _delete(self, full: str) -> None:
        node = self.disk.asked(f"scan {full}", lambda: self.disk.node(full))
        if isinstance(node, dict):
            for name in sorted(node):
                self._delete(f"{full}/{name}")
        self.disk.asked(f"unlink {full}", lambda: self.disk.remove(full), full)

    def flush(self, folder: str) -> None:
        with self._translated():
            self.disk.asked(f"flush {self._path(folder)}", lambda: self.disk.node(self._path(folder)))

    def flush_names(self) -> None:
        with self._translated():
            self.disk.asked(f"flush {self.root}", lambda: None)

    def _path(self, path: str) -> str:
        return f"{self.root}/{path}" if path else self.root

    def _replace(self, partial: str, full: str) -> None:
        content = self.disk.node(partial)
        self.disk.remove(partial)
        self.disk.put(full, content)

    def _fill(self, full: str, content: bytes) -> None:
        if self.disk.there(full):  # else somebody has deleted it, and the open file is filled out of sight
            self.disk.put(full, content)

    def _below(self, folder: str) -> list[tuple[str, bytes]]:
        try:
            return list(files_below(self.disk.node(self._path(folder))))
        except FileNotFoundError:
            return []

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, FileExistsError, StorageError):
            raise
        except NotADirectoryError as error:
            raise FileNotFoundError(*error.args) from error
        except OSError as error:
            raise StorageError(self.root, f"{type(error).__name__}: {error}") from error


class SimulatedRecord(LocalRecord):
    """The owner's record on a simulated disk: the real one, with the locks of the simulated kernel."""

    def __init__(self, files: SimulatedFiles) -> None:
        super().__init__(files)  # type: ignore[arg-type]  # files of the same protocol
        self._disk = files.disk
        self._lock = f"{files.root}/.torchorbax-lock"

    def lock(self) -> bool | None:
        if self._disk.is_shared:
            return None
        holder = self._disk.locks.get(self._lock)
        if holder is not None and holder.alive and holder is not self._disk.scheduler.process:
            return False
        self._disk.locks[self._lock] = self._disk.scheduler.running
        return True

    def unlock(self) -> None:
        if self._disk.locks.get(self._lock) is self._disk.scheduler.process:
            del self._disk.locks[self._lock]

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        folder, scheduler = self._lock.rpartition("/")[0], self._disk.scheduler
        if self._disk.is_shared:
            yield
            return
        deadline = scheduler.now + LOCK_PATIENCE_S
        while (holder := self._disk.locks.get(folder)) is not None and holder.alive:
            if scheduler.now > deadline:
                raise StorageError(folder, "another program holds the lock")
            scheduler.sleep(0.1)
        self._disk.locks[folder] = scheduler.running
        try:
            yield
        finally:
            self._disk.locks.pop(folder, None)


def digest_of(content: bytes) -> FileDigest:
    """The size and the CRC-32C of a file's content."""
    return len(content), f"{google_crc32c.value(content):08x}"


def files_below(folder: Folder, prefix: str = "") -> Iterator[tuple[str, bytes]]:
    """All files below a folder, by path."""
    for name, node in folder.items():
        if isinstance(node, dict):
            yield from files_below(node, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", node
