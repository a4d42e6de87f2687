"""The path of a run: what may be one, and what to say if a run cannot be kept there."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torchorbax._src.storage import gcs
from torchorbax.errors import ConfigError, StorageError

_MAY_PASS = (
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.EBUSY, errno.EINTR, errno.EAGAIN),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM),
)
"""Errors of the system that say nothing about a path: something is broken or lacking now."""


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
    """Translate what the storage says about a path that cannot be used for a run, unless it may pass."""
    try:
        yield
    except (StorageError, OSError) as error:
        cause = error.__cause__ if isinstance(error, StorageError) and error.__cause__ is not None else error
        if isinstance(error, StorageError) and isinstance(cause, OSError) and cause.errno in _MAY_PASS:
            raise
        if gcs.is_uri(path):
            raise gcs.refused(path, cause) from error
        refused = isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
        advice = "; to restore from it without writing, open it with read_only=True" if refused else ""
        raise ConfigError(f"{path} cannot be used for a run: {type(cause).__name__}: {cause}{advice}") from error
