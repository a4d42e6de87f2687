"""The folder of a run, on a local disk or under a URI: finds, flushes, renames and deletes whole steps.

A step must appear and disappear as a whole. On a local disk, a rename does that. Under a URI, a commit marker does,
which is written last and deleted first.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from etils import epath
from orbax.checkpoint.path import step as orbax_steps

from torchorbax._src.storage import gcs
from torchorbax.errors import CheckpointNotFoundError, ConfigError

MANIFEST = "manifest"
"""The name of the item that holds a step's manifest."""
BASE = "base"
"""The subfolder with the run's bases, which hold its frozen parameters."""
COMMITTED = "commit_success.txt"
"""The commit marker of a step under a URI. Orbax's name for it."""

_NAMES = orbax_steps.standard_name_format()
_IDENTITY = ".torchorbax-run"
_DAMAGED = ".torchorbax-damaged"
_DELETED = ".torchorbax-deleted"
_TEMPORARY = ".orbax-checkpoint-tmp"

_logger = logging.getLogger(__name__)

Method = TypeVar("Method", bound=Callable[..., Any])


def with_storage_errors(method: Method) -> Method:
    """A decorator for methods of `RunFolder`: they raise StorageError if the storage does not answer."""

    @functools.wraps(method)
    def translated(self: RunFolder, *args: Any, **kwargs: Any) -> Any:
        with gcs.as_storage_error(self.path):
            return method(self, *args, **kwargs)

    return translated  # type: ignore[return-value]


class RunFolder:
    """The folder of a run.

    Args:
        path: a folder or a `gs://` URI. A relative path is resolved now, against the current folder.
        timeout_s: how long to wait for the storage under a URI.

    Raises:
        ConfigError: the path cannot name a run, or its file system needs an extra of torchorbax.

    Attributes:
        path: the absolute path or URI.
        is_uri: is the folder under a URI, and not on a local disk?
    """

    def __init__(self, path: str | os.PathLike[str], timeout_s: float) -> None:
        self.path = _absolute(path)
        self.is_uri = gcs.is_uri(self.path)
        self._timeout_s = timeout_s
        self._root = epath.Path(self.path)
        self._unremoved: set[int] = set()  # steps that may be half written or half deleted under a URI
        if self.is_uri:
            gcs.prepare(self.path, timeout_s)

    def check(self) -> None:
        """Raise ConfigError if the path is a file, or a folder that holds other things than a run."""
        with _as_config_error(self.path):
            if not self._root.exists():
                return
            if not self._root.is_dir():
                raise ConfigError(f"{self.path} is a file; a run needs a folder")
            entries = [entry for entry in self._root.iterdir() if not entry.name.startswith(".")]
        if entries and not any(_belongs_to_run(entry) for entry in entries):
            names = sorted(entry.name for entry in entries)
            raise ConfigError(
                f"{self.path} holds no run but other things ({few(names)}); choose a folder that is new or empty"
            )

    def create(self) -> None:
        """Create the folder and check that it can be written to.

        Raises:
            ConfigError: it cannot be written to, is a file, or holds other things than a run.
        """
        self.check()
        with _as_config_error(self.path):
            self._root.mkdir(parents=True, exist_ok=True)
            probe = self._root / gcs.PROBE
            probe.write_text("")
            probe.unlink()
        if self.is_uri:
            gcs.check_access(self.path, self._timeout_s)

    def identity(self) -> str:
        """A unique name of this run, the same whatever its path. It is made the first time that it is asked for."""
        file = self._root / _IDENTITY
        if not file.exists():
            file.write_text(uuid.uuid4().hex)
        return str(file.read_text())

    def check_visible(self) -> None:
        """Raise ConfigError if this process cannot see the folder that process 0 has created."""
        with _as_config_error(self.path):
            if not self.is_uri and not self._root.is_dir():
                raise ConfigError(
                    f"{self.path} was made by another process of this run and cannot be seen here; several processes "
                    "need a folder that all of them share, or gs://"
                )

    @with_storage_errors
    def steps(self) -> list[int]:
        """The committed steps, in ascending order. Damaged steps are among them: only names and markers are looked at.

        Orbax's own function is not used. It starts threads and accepts names in non-ASCII digits; and under a URI it
        requests the bucket's metadata, which needs a further permission, without a time limit.
        """
        try:
            names = [entry.name for entry in self._root.iterdir()]
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(
            int(name) for name in names if name.isdecimal() and name == str(int(name)) and self._is_committed(name)
        )

    def _is_committed(self, name: str) -> bool:
        return bool((self._root / name / COMMITTED).exists() if self.is_uri else (self._root / name).is_dir())

    @with_storage_errors
    def existing_steps(self) -> list[int]:
        """The committed steps in ascending order, at least one.

        Raises:
            CheckpointNotFoundError: there is no step. The message says if there are runs below the path, or if the path
                is that of a step.
        """
        if found := self.steps():
            return found
        hint = ""
        if self._root.exists() and self._root.is_dir():
            runs = sorted(
                entry.name for entry in self._root.iterdir() if RunFolder(str(entry), self._timeout_s).steps()
            )
            hint = f"; there are runs below it: {few(runs)}" if runs else ""
        if not hint and self._root.name.isdecimal() and self.path.removesuffix(f"/{self._root.name}") != self.path:
            parent = self.path.removesuffix(f"/{self._root.name}")
            if int(self._root.name) in RunFolder(parent, self._timeout_s).steps():
                hint = f"; it is step {self._root.name} of the run {parent}"
        raise CheckpointNotFoundError(self.path, hint=hint)

    @with_storage_errors
    def set_aside(self, step: int) -> None:
        """Rename a damaged step, so that its number is free again and it can still be repaired."""
        folder = self._folder(step)
        count = 1
        while (aside := self._root / f"{folder.name}{_DAMAGED}{'' if count == 1 else f'-{count}'}").exists():
            count += 1
        folder.rename(aside)
        _logger.warning("%s: damaged step %d is now %s", self.path, step, aside.name)

    @with_storage_errors
    def has_set_aside(self) -> bool:
        """Is there a damaged step that `set_aside` has renamed?"""
        return any(_DAMAGED in entry.name for entry in self._root.iterdir())

    @with_storage_errors
    def delete(self, step: int) -> None:
        """Delete a step. It is never listed half deleted."""
        folder = self._folder(step)
        if self.is_uri:
            self._unremoved.add(step)
            self._delete_from_uri(folder)
            self._unremoved.remove(step)
        else:
            hidden = self._root / f"{_DELETED}-{step}"
            folder.rename(hidden)
            hidden.rmtree()

    def _delete_from_uri(self, folder: Any) -> None:
        """Delete a step under a URI. There is no atomic rename, so the commit marker is deleted first."""
        (folder / COMMITTED).unlink(missing_ok=True)
        folder.rmtree(missing_ok=True)  # an earlier deletion may have succeeded although its answer was lost

    @with_storage_errors
    def remove_leftovers(self) -> None:
        """Delete what interrupted saves and deletions have left behind. Call it before the first save."""
        if not self._root.exists():
            return
        for entry in self._root.iterdir():
            if _TEMPORARY in entry.name or entry.name.startswith(_DELETED) or self._is_half_written(entry):
                _logger.info("removing %s, left behind by an interrupted run", entry)
                entry.rmtree(missing_ok=True)

    def _is_half_written(self, entry: Any) -> bool:
        """Is the entry a step under a URI without its commit marker?"""
        return self.is_uri and entry.name.isdecimal() and not (entry / COMMITTED).exists()

    def _remove_remains(self, step: int) -> None:
        """Delete what may be left of a step under a URI, before a step of the same number is saved."""
        if step in self._unremoved:
            self._delete_from_uri(self._folder(step))
            self._unremoved.remove(step)

    def _remove_failed(self, step: int, error: Exception) -> None:
        """Delete what a failed save has written; it may have failed because there was no space left.

        If it failed because the storage under a URI does not answer, the deletion waits until the next good save: now
        it would take as long as the save did.
        """
        if self.is_uri:
            self._unremoved.add(step)
            if not gcs.is_unanswered(error):
                self._remove_unremoved()
            return
        try:
            for entry in self._root.iterdir():
                if entry.name == _NAMES.build_name(step) or entry.name.startswith(f"{step}{_TEMPORARY}"):
                    entry.rmtree()
        except OSError as failure:
            _logger.warning("%s: what was written of step %d could not be removed: %s", self.path, step, failure)

    def _remove_unremoved(self) -> None:
        """Delete what failed saves and deletions have left behind under a URI.

        A step that was committed, although the answer came too late, stays. A step that is deleted here is looked at
        again the next time, because a write that has been given up may still arrive.
        """
        for step in sorted(self._unremoved):
            folder = self._folder(step)
            try:
                if folder.exists() and self._is_half_written(folder):
                    self._delete_from_uri(folder)
                else:
                    self._unremoved.remove(step)
            except Exception as error:  # gcsfs raises errors of its own types; `remove_leftovers` tries again later
                _logger.warning(
                    "%s: what is left of step %d could not be removed: %s", self.path, step, gcs.error_line(error)
                )

    def _make_durable(self, folder: Any) -> None:
        """Flush a step's files and folders to the disk. Older steps may be deleted next, so it must survive a power
        loss.

        TensorStore flushes its own files, but Orbax does not flush its metadata, and neither flushes the folders.
        Object storage needs no flush.
        """
        if self.is_uri:
            return
        for subfolder, _, files in os.walk(folder):
            for path in (*(os.path.join(subfolder, file) for file in files), subfolder):
                _flush(path)
        _flush(self.path)

    def _folder(self, step: int) -> Any:
        return self._root / _NAMES.build_name(step)


def _flush(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def few(names: Sequence[str]) -> str:
    """The first five names, for a message."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _absolute(path: str | os.PathLike[str]) -> str:
    """The absolute path or the URI. Raises ConfigError if it cannot name a run."""
    if not isinstance(path, str | os.PathLike) or not str(path) or "\0" in str(path):
        raise ConfigError(f"a path must be a string or a Path, not {path!r}")
    path = str(path)
    if "\\" in path:
        raise ConfigError(f"{path}: Orbax loses files below a path with a backslash in it; choose another")
    if not gcs.is_uri(path):
        if re.match(r"[a-z0-9]+:/", path):
            raise ConfigError(f"{path}: a URI has two slashes: {path.replace(':/', '://', 1)}")
        try:
            return str(Path(path).expanduser().absolute())
        except RuntimeError as error:
            raise ConfigError(f"{path}: {error}") from error
    gcs.check_supported(path)
    return path.rstrip("/")


@contextmanager
def _as_config_error(path: str) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # gcsfs and google-auth raise errors of their own types
        if gcs.is_uri(path):
            raise gcs.refused(path, error) from error
        if not isinstance(error, OSError):
            raise
        raise ConfigError(f"{path} cannot be used for a run: {type(error).__name__}: {error}") from error


def _belongs_to_run(entry: Any) -> bool:
    """Is a file or folder part of a run: a step, an unfinished step, or the bases?"""
    if _TEMPORARY in entry.name:
        return True
    if entry.name == BASE and entry.is_dir():
        return any(_belongs_to_run(base) for base in entry.iterdir())
    return entry.name.isdigit() and entry.is_dir() and (_is_checkpoint(entry) or not any(entry.iterdir()))


def _is_checkpoint(folder: Any) -> bool:
    return any((folder / name).exists() for name in ("_CHECKPOINT_METADATA", MANIFEST, COMMITTED))
