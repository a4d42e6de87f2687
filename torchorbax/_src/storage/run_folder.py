"""One run's folder, on a local disk or under a URI: its steps, found, flushed, renamed and deleted as wholes.

On a local disk, a rename makes a step appear and disappear at once. Under a URI, a marker does, which is written last
and deleted first.
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
"""The item in which a step says what it is."""
BASE = "base"
"""Where a run has its frozen parameters, as steps with numbers of their own."""
COMMITTED = "commit_success.txt"
"""The marker of a step under a URI."""

_NAMES = orbax_steps.standard_name_format()
_IDENTITY = ".torchorbax-run"
_DAMAGED = ".torchorbax-damaged"
_DELETED = ".torchorbax-deleted"
_TEMPORARY = ".orbax-checkpoint-tmp"

_logger = logging.getLogger(__name__)

Method = TypeVar("Method", bound=Callable[..., Any])


def answered(method: Method) -> Method:
    """The method, which raises StorageError if the storage does not answer."""

    @functools.wraps(method)
    def asked(self: RunFolder, *args: Any, **kwargs: Any) -> Any:
        with gcs.answering(self.path):
            return method(self, *args, **kwargs)

    return asked  # type: ignore[return-value]


class RunFolder:
    """A run's folder.

    Args:
        path: relative paths are taken from the current folder, now.
        timeout_s: how long to wait for a URI's storage.

    Raises:
        ConfigError: the path is none, or its file system needs an extra.

    Attributes:
        path: absolute.
        is_uri: is it no path on a local disk?
    """

    def __init__(self, path: str | os.PathLike[str], timeout_s: float) -> None:
        self.path = _absolute(path)
        self.is_uri = gcs.is_uri(self.path)
        self._timeout_s = timeout_s
        self._root = epath.Path(self.path)
        self._unremoved: set[int] = set()  # what may be half written or half deleted, as the storage did not answer
        if self.is_uri:
            gcs.prepare(self.path, timeout_s)

    def check(self) -> None:
        """Raise ConfigError if the path is a file or holds something that is no run."""
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
        """Make the folder and see that it can be written to.

        Raises:
            ConfigError: it cannot, or it is a file or holds something that is no run.
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
        """What tells this run from any other, whatever its path; made when it is first asked for."""
        file = self._root / _IDENTITY
        if not file.exists():
            file.write_text(uuid.uuid4().hex)
        return str(file.read_text())

    def check_visible(self) -> None:
        """Raise ConfigError if the folder, which process 0 has made, is not there."""
        with _as_config_error(self.path):
            if not self.is_uri and not self._root.is_dir():
                raise ConfigError(
                    f"{self.path} was made by another process of this run and cannot be seen here; several processes "
                    "need a folder that all of them share, or gs://"
                )

    @answered
    def steps(self) -> list[int]:
        """The committed steps, in ascending order. A folder with a number for a name counts even if it is damaged.

        Orbax's own way starts threads, takes names in other digits as well, and under a URI asks for the bucket, which
        needs a permission of its own, and waits for that for ever.
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

    @answered
    def existing_steps(self) -> list[int]:
        """`steps`, of which there must be some.

        Raises:
            CheckpointNotFoundError: there is none.
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

    @answered
    def set_aside(self, step: int) -> None:
        """Rename a damaged step, so that another can take its place and nothing is lost that might be repaired."""
        folder = self._folder(step)
        count = 1
        while (aside := self._root / f"{folder.name}{_DAMAGED}{'' if count == 1 else f'-{count}'}").exists():
            count += 1
        folder.rename(aside)
        _logger.warning("%s: damaged step %d is now %s", self.path, step, aside.name)

    @answered
    def has_set_aside(self) -> bool:
        """Is there a damaged step that was renamed?"""
        return any(_DAMAGED in entry.name for entry in self._root.iterdir())

    @answered
    def delete(self, step: int) -> None:
        """Delete a step so that it is never listed half deleted."""
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
        """There is no atomic rename: take the commit marker away first."""
        (folder / COMMITTED).unlink(missing_ok=True)
        folder.rmtree(missing_ok=True)  # and what was deleted without an acknowledgement is missing

    @answered
    def remove_leftovers(self) -> None:
        """Delete what interrupted saves and deletions left behind. Call it before the first save."""
        if not self._root.exists():
            return
        for entry in self._root.iterdir():
            if _TEMPORARY in entry.name or entry.name.startswith(_DELETED) or self._is_half_written(entry):
                _logger.info("removing %s, left behind by an interrupted run", entry)
                entry.rmtree(missing_ok=True)

    def _is_half_written(self, entry: Any) -> bool:
        """Without an atomic rename, a step that is being written or deleted lies where a committed one would."""
        return self.is_uri and entry.name.isdecimal() and not (entry / COMMITTED).exists()

    def _remove_rest(self, step: int) -> None:
        """Have what may be left of a step under a URI out of the way of a save of the same number."""
        if step in self._unremoved:
            self._delete_from_uri(self._folder(step))
            self._unremoved.remove(step)

    def _remove_failed(self, step: int, error: Exception) -> None:
        """Give back the space of a save that has failed, which may have failed for want of space.

        Of a storage that does not answer it is not asked now, which would take as long again.
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

        A step whose commit was acknowledged too late is whole, and stays. What is deleted is looked for again the next
        time: a write that nobody waits for any more may arrive later.
        """
        for step in sorted(self._unremoved):
            folder = self._folder(step)
            try:
                if folder.exists() and self._is_half_written(folder):
                    self._delete_from_uri(folder)
                else:
                    self._unremoved.remove(step)
            except Exception as error:  # of gcsfs, which has its own; the next process removes it
                _logger.warning(
                    "%s: what is left of step %d could not be removed: %s", self.path, step, gcs.told(error)
                )

    def _make_durable(self, folder: Any) -> None:
        """Flush a step and its name to the disk, since older ones may be deleted next.

        TensorStore flushes its own files; Orbax does not flush its metadata, nor anybody the folders. Object storage
        needs none of it.
        """
        if self.is_uri:
            return
        for place, _, files in os.walk(folder):
            for path in (*(os.path.join(place, file) for file in files), place):
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
    """The first of them, for people."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _absolute(path: str | os.PathLike[str]) -> str:
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
    except Exception as error:  # gcsfs and google-auth have errors of their own
        if gcs.is_uri(path):
            raise gcs.refused(path, error) from error
        if not isinstance(error, OSError):
            raise
        raise ConfigError(f"{path} cannot be used for a run: {type(error).__name__}: {error}") from error


def _belongs_to_run(entry: Any) -> bool:
    if _TEMPORARY in entry.name:
        return True
    if entry.name == BASE and entry.is_dir():
        return any(_belongs_to_run(one) for one in entry.iterdir())
    return entry.name.isdigit() and entry.is_dir() and (_is_checkpoint(entry) or not any(entry.iterdir()))


def _is_checkpoint(folder: Any) -> bool:
    return any((folder / name).exists() for name in ("_CHECKPOINT_METADATA", MANIFEST, COMMITTED))
