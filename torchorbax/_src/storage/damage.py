"""Errors of the storage: which of them prove that files are damaged, and what is told of those of a save."""

from __future__ import annotations

import errno
import re

from torchorbax._src.storage import gcs
from torchorbax.errors import OwnershipError, StorageError

_NOT_ABOUT_DATA = (
    "ABORTED",
    "CANCELLED",
    "DEADLINE_EXCEEDED",
    "INTERNAL",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "UNAUTHENTICATED",
    "UNAVAILABLE",
    "UNKNOWN",
)
"""How messages of TensorStore begin that say nothing about the data. https://abseil.io/docs/cpp/guides/status-codes"""
_OS_ERROR = re.compile(r"OS error (\d+)")


def is_proof_of_damage(error: Exception) -> bool:
    """Does an error of reading say that the files are damaged, or that one of them is definitely missing?

    A file that is not there, or whose content cannot be decoded, is damage. An error of the operating system, of the
    network or of a server is not, nor is a lack of memory or file descriptors.
    """
    text = str(error)
    if found := _OS_ERROR.search(text):
        return int(found[1]) in (errno.ENOENT, errno.ENOTDIR)
    if isinstance(error, ValueError | NotImplementedError):
        return not text.startswith(_NOT_ABOUT_DATA)
    return isinstance(error, FileNotFoundError | NotADirectoryError | RecursionError)


def reason_of(error: Exception, *, cut: bool) -> str:
    """Why a step could not be written; cut to one line of bounded length if it comes from a server."""
    if isinstance(error, StorageError):
        return error.reason
    if isinstance(error, OwnershipError):
        return str(error)
    return gcs.error_line(error) if cut else f"{type(error).__name__}: {error}"
