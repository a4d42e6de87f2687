"""The names of what is in a run's folder, and whether a folder is one of a run.

A path that holds other things is refused: what is there is nobody's to change. Names prove little, so it is looked into
folders whose names are numbers.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torchorbax._src.storage import gcs
from torchorbax._src.storage.files import Entry, Files
from torchorbax.errors import ConfigError, StorageError

MANIFEST = "manifest"
"""The name of the item that holds a step's manifest."""
MANIFEST_FILE = f"{MANIFEST}/metadata"
"""The manifest's file, below a step's folder."""
BASE = "base"
"""The subfolder with the run's bases, which hold its frozen parameters."""
COMMITTED = "commit_success.txt"
"""The commit marker of a step under a URI. Orbax's name for it. It is a copy of the manifest, so that it cannot be made
when the manifest is gone: a program that has been suspended commits nothing of which another has disposed."""
MOST_MANIFEST_BYTES = 1 << 30
"""No manifest is larger: a million leaves take less than half of that."""

IDENTITY = ".torchorbax-run"
"""The file with the identity of the run."""
DAMAGED = ".torchorbax-damaged"
"""What is appended to the number of a damaged step that is set aside."""
_TEMPORARY = ".orbax-checkpoint-tmp"  # Orbax's name for what it is writing

_OF_A_STEP = ("_CHECKPOINT_METADATA", MANIFEST, COMMITTED)
_OF_AN_ITEM = ("_METADATA", "_sharding", COMMITTED, "manifest.ocdbt", "d", "metadata")
_OF_A_PROCESS = "ocdbt.process_"  # how the name of a folder within an item begins, as Orbax has it

_MAY_PASS = (
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.EBUSY, errno.EINTR, errno.EAGAIN),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM),
)
"""Errors of the system that say nothing about a path: something is broken or lacking now."""


def check_is_run(files: Files, found: Sequence[Entry], strangers: Collection[str]) -> None:
    """Raise ConfigError if a path is a file, or a folder that holds other things than a run.

    Args:
        files: the files below the path.
        found: what is in the folder.
        strangers: the folders in it that are no steps, although their names are numbers.
    """
    path = files.root
    with as_config_error(path):
        if not gcs.is_uri(path) and os.path.exists(path) and not os.path.isdir(path):
            raise ConfigError(f"{path} is a file; a run needs a folder")
        entries = [entry for entry in found if not entry.name.startswith(".")]
        links = sorted(name for name, kind in entries if is_step(name) and kind == "other")
        is_run = any(_belongs_to_run(entry.name) and entry.name not in strangers for entry in found)
    if entries and not is_run:
        names = sorted(entry.name for entry in entries)
        raise ConfigError(f"{path} holds no run but other things ({few(names)}); choose a folder that is new or empty")
    if strangers:
        raise ConfigError(
            f"{path} holds a run, but there are other things under names of steps ({few(sorted(strangers))}); "
            "move them away"
        )
    if links:
        raise ConfigError(
            f"{path} holds links under names of steps ({few(links)}), and links are never followed; put the folders "
            "themselves there, or give the links names that are no numbers"
        )


def may_be_step(files: Files, folder: str) -> bool:
    """Is a folder whose name is a number a step, whole or damaged? An empty folder may be one, too."""
    inside = files.entries(folder)
    return not inside or any(
        name in _OF_A_STEP or (kind == "folder" and _may_be_item(files, f"{folder}/{name}")) for name, kind in inside
    )


def _may_be_item(files: Files, folder: str) -> bool:
    """Is a folder in a step an item? Under a URI no folder is empty, so one that is now is being deleted."""
    inside = files.entries(folder)
    known = any(name in _OF_AN_ITEM or name.startswith(_OF_A_PROCESS) for name, _ in inside)
    return known or (gcs.is_uri(files.root) and not inside)


def _belongs_to_run(name: str) -> bool:
    """Does only a run, finished or not, have something of this name?"""
    return is_step(name) or name in (IDENTITY, BASE) or DAMAGED in name or _TEMPORARY in name


def is_step(name: str) -> bool:
    """Is it the name of a step? Digits of other scripts are none."""
    return name.isascii() and name.isdecimal() and name == str(int(name))


def few(names: Sequence[str]) -> str:
    """The first five names, for a message."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def absolute(path: str | os.PathLike[str]) -> str:
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
def as_config_error(path: str) -> Iterator[None]:
    """Errors of the storage as a ConfigError that says what to do; but not those that may pass."""
    try:
        yield
    except (StorageError, OSError) as error:
        cause = error.__cause__ if isinstance(error, StorageError) and error.__cause__ is not None else error
        if isinstance(error, StorageError) and isinstance(cause, OSError) and cause.errno in _MAY_PASS:
            raise
        if isinstance(error, StorageError) and isinstance(cause, ValueError):  # what is there is not what should be
            raise ConfigError(f"{path} cannot be used for a run: {error.reason}") from error
        if gcs.is_uri(path):
            raise gcs.refused(path, cause) from error
        refused = isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        is_there = refused and os.path.isdir(path)
        advice = "; to restore from it without writing, open it with read_only=True" if is_there else ""
        raise ConfigError(f"{path} cannot be used for a run: {type(cause).__name__}: {cause}{advice}") from error
