"""The protocol of the files below a run's path, on a local disk or under gs://.

Paths are relative to the root, with `/` between their parts. There are three kinds of outcomes: an answer; a
`FileNotFoundError`, which means that something is definitely not there; and a `StorageError`, which says nothing about
the files.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, NamedTuple, Protocol

from torchorbax._src.format.manifest import FileDigest

Kind = Literal["file", "folder", "other"]


class Entry(NamedTuple):
    """What is in a folder.

    Attributes:
        name: its name in the folder.
        kind: `other` is what a run never writes: a link, a device, a pipe.
    """

    name: str
    kind: Kind


class Files(Protocol):
    """The files and folders below a root.

    Every method raises StorageError if the storage cannot be reached, refuses, or lacks something.

    Attributes:
        root: the absolute path or URI of the root.
    """

    root: str

    def entries(self, folder: str = "") -> list[Entry]:
        """What is in a folder, in any order; empty if there is no such folder."""

    def exists(self, path: str) -> bool:
        """Is there a file or a folder?"""

    def is_file(self, path: str) -> bool:
        """Is there a regular file?"""

    def sizes(self, folder: str) -> dict[str, int]:
        """The sizes in bytes of all files below a folder, by path below the folder; empty if there is no such folder.

        Raises:
            NotAFileError: there is something else than files and folders in it.
        """

    def digests(self, folder: str, paths: Collection[str] | None = None) -> dict[str, FileDigest]:
        """The sizes and the CRC-32C of files below a folder, of all or of those asked for, by path below the folder.

        Raises:
            FileNotFoundError: one of them is not there.
            NotAFileError: one of them is something else.
            ValueError: one of them claims to be far larger than what is stored of it.
        """

    def read(self, path: str, most_bytes: int) -> bytes:
        """The content of a file.

        Raises:
            FileNotFoundError: there is no such file.
            NotAFileError: it is no regular file, or is reached through a link.
            ValueError: it has more than `most_bytes`.
        """

    def write(self, path: str, content: bytes) -> None:
        """Write a file, whether or not there is one. Its folder is made if necessary."""

    def create(self, path: str, content: bytes) -> None:
        """Write a file that does not exist.

        Raises:
            FileExistsError: it exists.
        """

    def move(self, folder: str, to: str) -> None:
        """Rename a folder.

        Raises:
            FileExistsError: there is something of the new name.
            FileNotFoundError: there is no such folder.
        """

    def delete_file(self, path: str) -> None:
        """Delete a file. It need not be there."""

    def delete_folder(self, folder: str) -> None:
        """Delete a folder with all that is in it. It need not be there. A link is deleted, not what it leads to."""

    def flush(self, folder: str) -> None:
        """Make a folder and all that is below it survive a loss of power."""

    def flush_names(self) -> None:
        """Make the names in the root survive a loss of power."""


class NotAFileError(ValueError):
    """Where a file is expected, there is a link, a device, a pipe or a folder."""
