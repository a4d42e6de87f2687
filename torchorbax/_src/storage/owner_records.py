"""Where the owner of a run is written down: a file with a lock on a local disk, or an object under gs://."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator
from typing import Any

from torchorbax._src.storage.gcs_files import GcsFiles
from torchorbax._src.storage.local_files import LocalFiles
from torchorbax._src.storage.ownership import RecordChangedError
from torchorbax.errors import StorageError

_logger = logging.getLogger(__name__)

OWNER = ".torchorbax-owner"
LOCK = ".torchorbax-lock"
LOCK_PATIENCE_S = 10.0
"""Seconds to wait for the lock on the folder. It is held for one change of the record, but for as long as its holder is
suspended meanwhile."""
_POLL_S = 0.02
_MOST_BYTES = 1 << 20
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)
"""Errors which mean that the file system has no locks, or, as NFS, none for a file that is open for reading only. A
file that is open for writing would keep its disk from being made read-only."""


class LocalRecord:
    """A file, and a lock on another file beside it."""

    def __init__(self, files: LocalFiles) -> None:
        self._files = files
        self._descriptor: int | None = None  # of the lock file, while the lock is held

    def read(self) -> tuple[bytes | None, Any]:
        """See `Record.read`. The version is the content itself."""
        try:
            content = self._files.read(OWNER, _MOST_BYTES)
        except FileNotFoundError:
            return None, None
        except ValueError as error:
            raise StorageError(self._files.root, f"{error}; move it away, if no program writes to this run") from error
        return content, content

    def swap(self, content: bytes, version: Any) -> Any:
        """See `Record.swap`."""
        with self._changing():
            if self.read()[1] != version:
                raise RecordChangedError(OWNER)
            self._files.write(OWNER, content)
        if self._descriptor is not None and not self._files.exists(LOCK):  # the folder has been moved, with the lock
            self.unlock()
            if self.lock() is False:
                raise RecordChangedError(LOCK)
        return content

    def lock(self) -> bool | None:
        """See `Record.lock`."""
        path = os.path.join(self._files.root, LOCK)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BaseException:
                os.close(descriptor)
                raise
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return None
            raise StorageError(self._files.root, f"{LOCK}: {error}") from error
        self._descriptor = descriptor
        return True

    def unlock(self) -> None:
        """See `Record.unlock`."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Keep all others from changing the record, by a lock on the folder itself.

        Raises:
            StorageError: another program does not let the lock go.
        """
        try:
            descriptor = os.open(self._files.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:  # so there is no record to change either
            _logger.warning(
                "%s has been moved or deleted while it was open; it is made anew, without the older steps",
                self._files.root,
            )
            yield
            return
        except OSError as error:
            raise StorageError(self._files.root, f"{type(error).__name__}: {error}") from error
        try:
            if not _locked_in_time(descriptor):
                raise StorageError(
                    self._files.root,
                    f"for {LOCK_PATIENCE_S:g} s another program has held the lock under which {OWNER} is changed; it "
                    "is suspended, or the disk hangs: let it go on, or end it",
                )
            yield
        finally:
            os.close(descriptor)


def _locked_in_time(descriptor: int) -> bool:
    """Wait for the lock on a folder. True also without locks: then two programs that start at once are seen later."""
    deadline = time.monotonic() + LOCK_PATIENCE_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL_S)
        except OSError:
            return True


class GcsRecord:
    """An object that is changed only under a precondition on its generation."""

    def __init__(self, files: GcsFiles) -> None:
        self._files = files

    def read(self) -> tuple[bytes | None, Any]:
        """See `Record.read`. The version is the object's generation."""
        try:
            return self._files.read_generation(OWNER)
        except FileNotFoundError:
            return None, "0"

    def swap(self, content: bytes, version: Any) -> Any:
        """See `Record.swap`."""
        try:
            return self._files.write_generation(OWNER, content, version)
        except FileExistsError as error:
            raise RecordChangedError(OWNER) from error

    def lock(self) -> bool | None:
        """See `Record.lock`. Object storage has no locks."""
        return None

    def unlock(self) -> None:
        """See `Record.unlock`."""
