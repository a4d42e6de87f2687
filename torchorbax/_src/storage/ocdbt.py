"""The index of an OCDBT database, read without TensorStore: which keys there are, and where their values lie.

TensorStore believes what an index says: it allocates what a key or a value claims to need, and aborts the process when
memory runs out. Here every claim is compared with the file that makes it. Only the form that Orbax writes is read: one
manifest, nodes compressed with zstd.

The format is documented at https://google.github.io/tensorstore/kvstore/ocdbt/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from torchorbax._src.storage import zstd

MANIFEST_FILE = "manifest.ocdbt"
MOST_MANIFEST_BYTES = 1 << 20
"""The most bytes of the database's manifest, unpacked: a few versions, each with the place of its root."""
MOST_NODE_BYTES = 128 << 20
"""The most bytes of one node, unpacked. Orbax has TensorStore begin a new node after 100 MB."""

_MANIFEST_MAGIC = b"\x0c\xdb\x3a\x2a"
_NODE_MAGIC = b"\x0c\xdb\x20\xde"
_ZSTD = b"\x00\x01"  # version 0 of the format, compression method 1
_MOST_ENTRIES = 1 << 20  # TensorStore's own limit
_LONGEST_NAME = 65535  # likewise, for keys and for paths of files
_NODE_COST_BYTES = 1024  # what a node counts for besides its body, so that the number of nodes is limited, too
_MOST_KEY_BYTES = 1 << 30
_LONGEST_VARINT = 10
_LARGEST = (1 << 63) - 1
_MISSING = (1 << 64) - 1  # the length of the root of an empty database

ReadFile = Callable[[str, int, int], bytes]
"""Reads from a file of the database: `read(path below the database's folder, offset, length)`."""


class Value(NamedTuple):
    """A value of the database: in the index itself, or a range of a file.

    Attributes:
        length: bytes.
        file: the file, below the database's folder; empty if the value is in the index.
        offset: where the value begins in the file.
        inline: the value itself, if it is in the index.
    """

    length: int
    file: str = ""
    offset: int = 0
    inline: bytes = b""


@dataclass(frozen=True)
class _Child:
    """A node that a manifest or another node refers to."""

    file: str
    base: str
    offset: int
    length: int
    height: int
    prefix: bytes = b""


def entries(manifest: bytes, read: ReadFile, most_bytes: int) -> Iterator[tuple[bytes, Value]]:
    """The keys of a database in their order, each with its value.

    Args:
        manifest: the content of the file `manifest.ocdbt`.
        read: reads from the other files. It raises ValueError for a range that a file does not have.
        most_bytes: the most bytes of all nodes together, unpacked.

    Raises:
        ValueError: the index is damaged, has a form that Orbax does not write, or claims more than the limits allow.
    """
    root = _root(_unpacked(manifest, _MANIFEST_MAGIC, MOST_MANIFEST_BYTES, MANIFEST_FILE))
    waiting = [root] if root is not None else []
    left = most_bytes
    while waiting:
        child = waiting.pop()
        if child.length > left:
            raise ValueError(f"{child.file}: a node of {child.length} bytes, of {left} that are left for nodes")
        data = read(child.file, child.offset, child.length)
        body = _unpacked(data, _NODE_MAGIC, min(left, MOST_NODE_BYTES), child.file)
        left -= len(body) + _NODE_COST_BYTES
        try:
            if child.height:
                waiting += reversed(_children(body, child))
            else:
                yield from _leaf_entries(body, child)
        except (IndexError, UnicodeDecodeError) as error:
            raise ValueError(f"{child.file}: a damaged node: {error}") from error


def _unpacked(data: bytes, magic: bytes, most_bytes: int, file: str) -> bytes:
    """The body of a manifest or a node, without its header and checksum."""
    if data[:4] != magic or int.from_bytes(data[4:12], "little") != len(data) or data[12:14] != _ZSTD or len(data) < 18:
        raise ValueError(f"{file}: what should begin with {magic.hex()} begins with {data[:14].hex()}")
    try:
        return zstd.decompress(data[14:-4], most_bytes)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


class _Columns:
    """Reads a body from its beginning. All of its numbers are varints, most of them in columns."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._bytes = np.frombuffer(body, np.uint8)
        self._at = 0

    def raw(self, size: int) -> bytes:
        if size > len(self._body) - self._at:
            raise IndexError(f"it ends after {len(self._body)} bytes")
        self._at += size
        return self._body[self._at - size : self._at]

    def number(self) -> int:
        return self.numbers(1)[0]

    def numbers(self, count: int, most: int = _LARGEST) -> list[int]:
        """A column. Raises ValueError if one of its numbers is larger than `most`."""
        if count > len(self._body) - self._at:
            raise IndexError(f"it ends after {len(self._body)} bytes")
        if not count:
            return []
        data = self._bytes[self._at : self._at + count * _LONGEST_VARINT]
        ends = np.flatnonzero(data < 128)[:count]
        if len(ends) < count:
            raise IndexError("a column of numbers is cut off")
        data = data[: ends[-1] + 1]
        starts = np.concatenate([[0], ends[:-1] + 1])
        lengths = ends + 1 - starts
        if lengths.max() > _LONGEST_VARINT:
            raise ValueError("a number has more than 64 bits")
        places = np.arange(len(data)) - np.repeat(starts, lengths)
        found = np.add.reduceat((data & 127).astype(np.uint64) << (7 * places).astype(np.uint64), starts)
        if (largest := int(found.max())) > most:
            raise ValueError(f"{largest} where at most {most} is possible")
        self._at += len(data)
        return found.tolist()  # type: ignore[no-any-return]

    def files(self, base: str) -> list[tuple[str, str]]:
        """A table of files: for each, its path, and the part of it that is the base of what the file refers to."""
        count = self.number()
        prefixes = [0, *self.numbers(count - 1, _LONGEST_NAME)] if count else []
        suffixes = self.numbers(count, _LONGEST_NAME)
        bases = self.numbers(count, _LONGEST_NAME)
        _check_total(prefixes, suffixes)
        found: list[tuple[str, str]] = []
        path = ""
        for prefix, suffix, length in zip(prefixes, suffixes, bases, strict=True):
            path = path[:prefix] + self.raw(suffix).decode("ascii")
            found.append((base + path, base + path[:length]))
        return found

    def keys(self, count: int, *, inner: bool) -> tuple[list[bytes], list[int]]:
        """The keys of a node; of an inner node also the length of the prefix that all keys below share."""
        prefixes = [0, *self.numbers(count - 1, _LONGEST_NAME)]
        suffixes = self.numbers(count, _LONGEST_NAME)
        shared = self.numbers(count, _LONGEST_NAME) if inner else []
        _check_total(prefixes, suffixes)
        found: list[bytes] = []
        key = b""
        for prefix, suffix in zip(prefixes, suffixes, strict=True):
            key = key[:prefix] + self.raw(suffix)
            found.append(key)
        return found, shared


def _check_total(prefixes: list[int], suffixes: list[int]) -> None:
    """Raise ValueError for names that share so much with each other that they would take any amount of memory."""
    if (total := sum(prefixes) + sum(suffixes)) > _MOST_KEY_BYTES:
        raise ValueError(f"names of {total} bytes together; {_MOST_KEY_BYTES} are possible")


def _root(body: bytes) -> _Child | None:
    """The root of the newest version; None if the database is empty."""
    try:
        columns = _Columns(body)
        columns.raw(16)  # the database's number
        if kind := columns.number():
            raise ValueError(f"a manifest of kind {kind}")
        columns.numbers(2)  # the most bytes of inline values and of nodes, when it was written
        columns.raw(1)  # how many versions a manifest lists
        if columns.number():
            columns.raw(4)  # the compression level
        files = columns.files("")
        count = columns.number()
        if not 1 <= count <= len(body):
            raise ValueError(f"a manifest of {count} versions")
        columns.numbers(count)  # the versions
        height = columns.raw(count)[-1]
        file, offset, length = (columns.numbers(count, _MISSING)[-1] for _ in range(3))
    except (IndexError, UnicodeDecodeError) as error:
        raise ValueError(f"{MANIFEST_FILE}: {error}") from error
    return None if length == _MISSING else _Child(*_of_table(files, file), offset, length, height)


def _of_table(files: list[tuple[str, str]], index: int) -> tuple[str, str]:
    if index >= len(files):
        raise ValueError(f"it refers to file {index} of {len(files)}")
    return files[index]


def _begun(body: bytes, node: _Child) -> tuple[_Columns, list[tuple[str, str]], int]:
    """A node's columns after its header, its table of files, and the number of its entries."""
    columns = _Columns(body)
    if (height := columns.raw(1)[0]) != node.height:
        raise ValueError(f"{node.file}: a node of height {height}, where {node.height} is expected")
    files = columns.files(node.base)
    count = columns.number()
    if not 1 <= count <= _MOST_ENTRIES:
        raise ValueError(f"{node.file}: a node of {count} entries")
    return columns, files, count


def _children(body: bytes, node: _Child) -> list[_Child]:
    columns, files, count = _begun(body, node)
    keys, shared = columns.keys(count, inner=True)
    indices, offsets, lengths = (columns.numbers(count) for _ in range(3))
    return [
        _Child(*_of_table(files, index), offset, length, node.height - 1, node.prefix + key[:prefix])
        for key, prefix, index, offset, length in zip(keys, shared, indices, offsets, lengths, strict=True)
    ]


def _leaf_entries(body: bytes, node: _Child) -> Iterator[tuple[bytes, Value]]:
    columns, files, count = _begun(body, node)
    keys, _ = columns.keys(count, inner=False)
    lengths = columns.numbers(count)
    is_stored = columns.raw(count)  # 0: in the index, 1: in a file
    stored = sum(map(bool, is_stored))
    indices, offsets = iter(columns.numbers(stored)), iter(columns.numbers(stored))
    for key, length, in_file in zip(keys, lengths, is_stored, strict=True):
        if in_file:
            file, _ = _of_table(files, next(indices))
            yield node.prefix + key, Value(length, file, next(offsets))
        else:
            yield node.prefix + key, Value(length, inline=columns.raw(length))
