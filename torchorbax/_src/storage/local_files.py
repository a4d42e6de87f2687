"""The files below a run's path on a local disk, by the functions of `os` alone.

Path libraries look up the owner of a file, who need not have a name, and take errors of many kinds for "not there".
Here only ENOENT and ENOTDIR mean that.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress

import google_crc32c

from torchorbax._src.format.manifest import FileDigest
from torchorbax._src.storage.files import Entry, NotAFileError
from torchorbax.errors import StorageError

_LINK = "a symbolic link, and links are not followed; copy what it refers to (cp -rL)"
_NOT_THERE = (FileNotFoundError, NotADirectoryError)
_SECTOR_BYTES = 512  # of `st_blocks`
_LEAST_CLAIM_BYTES = 64 << 20  # a file of this size is read however little of it is stored
_MOST_RATIO = 32_768  # more than any file system compresses: a larger file consists of holes
_CRC_BYTES = 1 << 20  # small enough to stay in the processor's cache


class LocalFiles:
    """The files and folders below a folder.

    Args:
        root: the absolute path of the folder. It may be a link; below it, no link is followed.
    """

    def __init__(self, root: str) -> None:
        self.root = root

    def entries(self, folder: str = "") -> list[Entry]:
        """See `Files.entries`."""
        with self._translated(folder):
            try:
                with os.scandir(self._path(folder)) as found:
                    return [_entry(entry) for entry in found]
            except _NOT_THERE:
                return []

    def exists(self, path: str) -> bool:
        """See `Files.exists`."""
        with self._translated(path):
            try:
                os.lstat(self._path(path))
            except _NOT_THERE:
                return False
            return True

    def is_file(self, path: str) -> bool:
        """See `Files.is_file`."""
        with self._translated(path):
            try:
                return stat.S_ISREG(os.lstat(self._path(path)).st_mode)
            except _NOT_THERE:
                return False

    def sizes(self, folder: str) -> dict[str, int]:
        """See `Files.sizes`."""
        found: dict[str, int] = {}
        top = self._path(folder)
        with self._translated(folder):
            try:
                for subfolder, folders, files in _walk(top):
                    for name in (*folders, *files):
                        path = os.path.join(subfolder, name)
                        status = os.lstat(path)
                        if stat.S_ISREG(status.st_mode):
                            found[os.path.relpath(path, top)] = status.st_size
                        elif not stat.S_ISDIR(status.st_mode):
                            found_there = f"{os.path.relpath(path, top)} should be a regular file or a folder, but is"
                            raise NotAFileError(f"{found_there} {_kind_of(status.st_mode)}")
            except _NOT_THERE:
                return {}
        return found

    def digests(self, folder: str, paths: Collection[str] | None = None) -> dict[str, FileDigest]:
        """See `Files.digests`. Every file is read."""
        paths = self.sizes(folder) if paths is None else paths
        return {path: self._digest(os.path.join(folder, path)) for path in paths}

    def read(self, path: str, most_bytes: int) -> bytes:
        """See `Files.read`."""
        with self._translated(path), self._opened(path) as descriptor:
            size = os.fstat(descriptor).st_size
            if size > most_bytes:
                raise ValueError(f"{path} has {size} bytes; it can have {most_bytes} at most")
            parts = []
            while part := os.read(descriptor, most_bytes + 1):
                parts.append(part)
                if sum(map(len, parts)) > most_bytes:
                    raise ValueError(f"{path} has more than {most_bytes} bytes")
            return b"".join(parts)

    def _digest(self, path: str) -> FileDigest:
        total = nbytes = 0
        with self._translated(path), self._opened(path) as descriptor:
            status = os.fstat(descriptor)
            on_disk = status.st_blocks * _SECTOR_BYTES
            if status.st_size > _LEAST_CLAIM_BYTES + _MOST_RATIO * on_disk:
                raise ValueError(f"{path} claims to have {status.st_size} bytes, of which {on_disk} are on the disk")
            while part := os.read(descriptor, _CRC_BYTES):
                total = google_crc32c.extend(total, part)
                nbytes += len(part)
        return nbytes, f"{total:08x}"

    def write(self, path: str, content: bytes) -> None:
        """See `Files.write`. The file is replaced as a whole."""
        partial = f"{path}.{os.getpid()}.partial"
        with self._translated(path):
            for is_last in (False, True):
                self._make_folder_of(path)
                self._fill(
                    os.open(self._path(partial), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666), content
                )
                try:
                    os.replace(self._path(partial), self._path(path))
                    return
                except FileNotFoundError:
                    # The owner of the run has taken it for a leftover; or NFS has made the request twice.
                    if is_last:
                        raise

    def create(self, path: str, content: bytes) -> None:
        """See `Files.create`."""
        with self._translated(path):
            self._make_folder_of(path)
            self._fill(os.open(self._path(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666), content)

    def move(self, folder: str, to: str) -> None:
        """See `Files.move`. An empty folder of the new name is replaced."""
        with self._translated(folder):
            try:
                os.rename(self._path(folder), self._path(to))
            except NotADirectoryError as error:
                raise FileExistsError(error.errno, f"{to} is in the way") from error
            except OSError as error:
                if error.errno == errno.ENOTEMPTY:
                    raise FileExistsError(error.errno, f"{to} is in the way") from error
                raise

    def delete_file(self, path: str) -> None:
        """See `Files.delete_file`."""
        with self._translated(path), suppress(*_NOT_THERE):
            os.unlink(self._path(path))

    def delete_folder(self, folder: str) -> None:
        """See `Files.delete_folder`."""
        with self._translated(folder):
            try:
                if stat.S_ISDIR(os.lstat(self._path(folder)).st_mode):
                    shutil.rmtree(self._path(folder))
                else:
                    os.unlink(self._path(folder))
            except _NOT_THERE:
                return

    def flush(self, folder: str) -> None:
        """See `Files.flush`.

        TensorStore flushes the files that it writes, but not their folders.
        """
        with self._translated(folder):
            for subfolder, _, files in _walk(self._path(folder)):
                for path in (*(os.path.join(subfolder, file) for file in files), subfolder):
                    _flush(path)

    def flush_names(self) -> None:
        """Make the names in the root survive a loss of power."""
        with self._translated(""):
            _flush(self.root)

    def _path(self, path: str) -> str:
        return os.path.join(self.root, path) if path else self.root

    @contextmanager
    def _opened(self, path: str) -> Iterator[int]:
        """A descriptor of a regular file, opened part by part, so that no link is followed."""
        folder = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            *folders, name = path.split("/")
            for part in folders:
                try:
                    below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
                except NotADirectoryError:
                    if _is_link(part, folder):
                        raise NotAFileError(f"{path} should be below folders, but {part} is {_LINK}") from None
                    raise
                os.close(folder)
                folder = below
            # O_NONBLOCK: to open a pipe would otherwise be to wait for somebody who writes to it.
            try:
                descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.ENXIO):  # a link; a socket
                    mode = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
                    raise NotAFileError(f"{path} should be a regular file, but is {_kind_of(mode)}") from None
                raise
        finally:
            os.close(folder)
        try:
            mode = os.fstat(descriptor).st_mode
            if not stat.S_ISREG(mode):
                raise NotAFileError(f"{path} should be a regular file, but is {_kind_of(mode)}")
            yield descriptor
        finally:
            os.close(descriptor)

    def _make_folder_of(self, path: str) -> None:
        try:
            os.makedirs(os.path.dirname(self._path(path)), exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise StorageError(self.root, f"{type(error).__name__}: {error}, and it is no folder") from error

    @staticmethod
    def _fill(descriptor: int, content: bytes) -> None:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(descriptor)

    @contextmanager
    def _translated(self, path: str) -> Iterator[None]:
        """Translate all errors but those that say that something is, or is not, there."""
        try:
            yield
        except (FileNotFoundError, FileExistsError, StorageError):
            raise
        except NotADirectoryError as error:
            raise FileNotFoundError(error.errno, error.strerror, self._path(path)) from error
        except OSError as error:
            where = "" if error.filename else f": {self._path(path)}"
            raise StorageError(self.root, f"{type(error).__name__}: {error}{where}") from error


def _entry(entry: os.DirEntry[str]) -> Entry:
    if entry.is_dir(follow_symlinks=False):
        return Entry(entry.name, "folder")
    return Entry(entry.name, "file" if entry.is_file(follow_symlinks=False) else "other")


def _walk(folder: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` from the top, which raises what it cannot read instead of leaving it out."""

    def raise_it(error: OSError) -> None:
        raise error

    return os.walk(folder, onerror=raise_it)


def _is_link(name: str, folder: int) -> bool:
    with suppress(FileNotFoundError):
        return stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    return False


def _kind_of(mode: int) -> str:
    kinds = {
        stat.S_IFLNK: _LINK,
        stat.S_IFDIR: "a folder",
        stat.S_IFREG: "a file",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
    }
    return kinds.get(stat.S_IFMT(mode), "a device")


def _flush(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
