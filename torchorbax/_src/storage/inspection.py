"""Inspects the array data of an item before TensorStore opens it.

A checkpoint may come from anybody. TensorStore waits for a FIFO, follows links, and allocates whatever the files claim;
if it cannot, it aborts the process. So an item on a local disk is inspected first, by its index and the sizes of its
files: it consists of regular files and folders, arrays are described as `array_writer` describes them, and each chunk
has the bytes that the description of its array demands. Then an array takes no more memory than its stored bytes
account for: as much, or `MOST_RATIO` times as much if it is compressed or the disk stores it in less space.
"""

from __future__ import annotations

import functools
import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torchorbax._src.arrays.dtypes import BY_NAME, dtype_name
from torchorbax._src.format import bounded_json
from torchorbax._src.format.manifest import LeafMeta
from torchorbax._src.storage import gcs, ocdbt, zstd
from torchorbax._src.storage.ocdbt import Value
from torchorbax._src.storage.run_layout import BASE
from torchorbax._src.storage.traffic import CHUNK_BYTES
from torchorbax._src.storage.zarr import Index, dtypes_by_zarr_name, first_chunk, zarr_metadata
from torchorbax._src.storage.zstd import MOST_RATIO

_LEAST_BYTES = 64 << 20
"""What every index may take, and what every item may claim, however small its files are."""
_NODES_RATIO = 4
"""How many times the bytes of its files an index may take, unpacked. A million scalars take twice as many."""
_MOST_DESCRIPTION_BYTES = 16 << 10
"""The most bytes of a `.zarray`, which takes some 200."""
_MOST_RECENT = 2
_MOST_DIMENSIONS = 64  # numpy's limit
_MOST_BYTES = 1 << 62
_SECTOR_BYTES = 512  # of `st_blocks`
_ZARRAY = b".zarray"


def other_bytes(step: Any, manifest_bytes: int) -> int:
    """The bytes of a step's files and of the run's bases, without the manifest.

    Under a URI, where counting takes long, they are taken to be those of a million leaves.
    """
    if gcs.is_uri(str(step)):
        return 1_000_000 * bounded_json.LEAF_BYTES
    folder = str(step)
    return _bytes_below(folder) + _bytes_below(os.path.join(os.path.dirname(folder), BASE)) - manifest_bytes


def check_claim(claimed: int, seen: int, on_disk: int) -> None:
    """Raise ValueError if the values of an item claim more bytes than its files account for.

    Args:
        claimed: the lengths of all values together. Values do not overlap.
        seen: the sizes of all files together.
        on_disk: what they take on the disk. That is less if they have holes, or if the file system compresses.
    """
    for most in (_LEAST_BYTES + seen, _LEAST_BYTES + MOST_RATIO * on_disk):
        if claimed > most:
            raise ValueError(f"its values claim {claimed} bytes, but its files account for {most} at most")


@dataclass(frozen=True)
class Inspected:
    """An item that has been inspected.

    Attributes:
        folder: the item's folder.
        arrays: its arrays by name.
    """

    folder: str
    arrays: Mapping[str, _Array]

    def check(self, name: str, meta: LeafMeta) -> None:
        """Raise ValueError if an array is missing, or is not what the manifest describes."""
        array = self.arrays.get(name)
        if array is None:
            raise ValueError(f"{name} is missing from the array data")
        shape, dtype = array.layout.shape, array.layout.dtype
        if shape != meta.shape or dtype != meta.dtype:
            raise ValueError(f"{name} is {dtype}{shape}, but the manifest says {meta}")

    def check_compressed(self, name: str, index: Index) -> None:
        """Raise ValueError if chunks of a part of an array unpack to more than a chunk has.

        Args:
            name: the array; nothing is done for one that is not compressed.
            index: the part.
        """
        array = self.arrays[name]
        if not array.layout.compressed:
            return
        with _Files(self.folder) as files:
            for key, value in array.chunks.items():
                if array.touches(key, index):
                    read = functools.partial(files.read_value, value)
                    try:
                        zstd.check_frame(read, value.length, array.layout.chunk_bytes)
                    except ValueError as error:
                        raise ValueError(f"{name}: chunk {key.decode()}: {error}") from error


def inspect(folder: str) -> Inspected:
    """Inspect an item's folder on a local disk.

    The result is kept while the index and the folders with its files stay as they are, because `verify` reads an item
    in many parts.

    Raises:
        FileNotFoundError: the index, or a file to which it refers, is missing.
        ValueError: a file is not a regular file, or the data is not what `array_writer` writes.
    """
    if folder in _recent:
        inspected, stamps = _recent.pop(folder)
        if all(_stamp(path) == stamp for path, stamp in stamps.items()):
            _recent[folder] = inspected, stamps
            return inspected
    with _Files(folder) as files:
        inspected = Inspected(folder, _arrays(folder, files))
        _recent[folder] = inspected, {path: _stamp(path) for path in files.decisive()}
    while len(_recent) > _MOST_RECENT:
        _recent.pop(next(iter(_recent)), None)
    return inspected


_recent: dict[str, tuple[Inspected, dict[str, object]]] = {}
"""By folder, what has been inspected last, with the stamps of the files and folders that this depends on."""


def _stamp(path: str) -> object:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mode, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _arrays(folder: str, files: _Files) -> dict[str, _Array]:
    """The arrays of an item, all of which has been found to be as it should be."""
    size = files.size(ocdbt.MANIFEST_FILE)
    if size > ocdbt.MOST_MANIFEST_BYTES:
        raise ValueError(f"{ocdbt.MANIFEST_FILE} has {size} bytes; {ocdbt.MOST_MANIFEST_BYTES} are possible")
    manifest = files.read(ocdbt.MANIFEST_FILE, 0, size)
    budget = _LEAST_BYTES + _NODES_RATIO * _bytes_below(folder)
    arrays: dict[bytes, _Array] = {}
    claimed = 0
    for key, value in ocdbt.entries(manifest, files.read, budget):
        if value.file:
            files.check_range(value.file, value.offset, value.length)
        claimed += value.length
        name, _, last = key.rpartition(b"/")
        if last == _ZARRAY:
            arrays[name] = _described(_shown(name), files, value)
        elif name in arrays:
            arrays[name].add(_shown(name), last, value)
    # Each array is complete. No stored byte is counted twice, and no more than the disk can account for.
    for name, array in arrays.items():
        if array.count != array.layout.chunk_count:
            raise ValueError(f"{_shown(name)} has {array.count} chunks, expected {array.layout.chunk_count}")
    check_claim(claimed, files.bytes_seen, files.bytes_on_disk)
    return {name.decode(): array for name, array in arrays.items()}


class _Layout(NamedTuple):
    """An array as its `.zarray` describes it.

    Attributes:
        dtype: the name of its dtype (see `arrays.dtypes`).
        shape: its shape.
        chunk: the shape of a chunk.
        chunk_bytes: the bytes of a chunk, unpacked.
        compressed: are the chunks compressed?
        chunk_count: the number of chunks.
    """

    dtype: str
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    chunk_bytes: int
    compressed: bool
    chunk_count: int


@dataclass
class _Array:
    """An array, and the chunks of it that have been met: their number, and where they are if they are compressed."""

    layout: _Layout
    count: int = 0
    chunks: dict[bytes, Value] = field(default_factory=dict)

    def add(self, name: str, key: bytes, value: Value) -> None:
        """Count a chunk. Raises ValueError if it is not one, or has a length that no such chunk has."""
        _, shape, chunk, nbytes, compressed, expected = self.layout
        if expected == 1:
            is_chunk = key == first_chunk(len(shape)).encode()
        else:
            places = key.split(b".")
            is_chunk = len(places) == len(shape) and all(
                len(place) < 20 and place.isdigit() and place == b"%d" % int(place) and int(place) * part < size
                for place, part, size in zip(places, chunk, shape, strict=True)
            )
        if not is_chunk:
            raise ValueError(f"{name}: {_shown(key)} is no chunk of {shape} in chunks of {chunk}")
        least, most = (1, zstd.longest_stored(nbytes)) if compressed else (nbytes, nbytes)
        if not least <= value.length <= most:
            expectation = f"{nbytes} are expected" if least == most else f"{most} at most are possible"
            raise ValueError(f"{name}: chunk {_shown(key)} has {value.length} bytes; {expectation}")
        self.count += 1
        if compressed:
            self.chunks[key] = value

    def touches(self, key: bytes, index: Index) -> bool:
        """Has a part of the array elements of a chunk?"""
        places = map(int, key.split(b"."))
        for part, place, length, size in zip(index, places, self.layout.chunk, self.layout.shape, strict=False):
            start, stop, _ = part.indices(size)
            if stop <= place * length or start >= (place + 1) * length:
                return False
        return True


def _described(name: str, files: _Files, value: Value) -> _Array:
    """The array of a `.zarray`. Raises ValueError if it is not one that `array_writer` writes."""
    if value.length > _MOST_DESCRIPTION_BYTES:
        raise ValueError(f"{name}/.zarray has {value.length} bytes; {_MOST_DESCRIPTION_BYTES} are possible")
    try:
        return _Array(_layout(files.read_value(value, 0, value.length)))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{name}/.zarray describes no array: {type(error).__name__}: {str(error)[:500]}") from error


@functools.lru_cache(maxsize=1024)
def _layout(text: bytes) -> _Layout:
    """Cached, because many arrays are described alike."""
    found = json.loads(text)
    shape, chunk, compressed = tuple(found["shape"]), tuple(found["chunks"]), found["compressor"] is not None
    dtype = BY_NAME[dtypes_by_zarr_name()[found["dtype"]]]
    if (
        len(shape) > _MOST_DIMENSIONS
        or len(shape) != len(chunk)
        or not all(
            type(size) is type(part) is int and 1 <= part <= size for size, part in zip(shape, chunk, strict=True)
        )
        or math.prod(shape) * dtype.itemsize > _MOST_BYTES
        or math.prod(chunk) * dtype.itemsize > CHUNK_BYTES
    ):
        raise ValueError(f"the shape is {str(shape)[:200]}, and that of chunks {str(chunk)[:200]}")
    expected = json.loads(zarr_metadata(dtype, shape, chunk, compressed))
    if found != expected:
        others = {key: found.get(key) for key in sorted({*found, *expected}) if found.get(key) != expected.get(key)}
        raise ValueError(f"torchorbax does not write {str(others)[:200]}")
    count = math.prod(-(-size // part) for size, part in zip(shape, chunk, strict=True))
    return _Layout(dtype_name(dtype), shape, chunk, math.prod(chunk) * dtype.itemsize, compressed, count)


class _Files:
    """The files below a folder, opened as regular files only. A context manager, which closes them.

    Attributes:
        bytes_seen: the sizes of the files that have been looked at, together.
        bytes_on_disk: what they take on the disk.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._folders: set[str] = set()
        self._read: set[str] = set()
        self._sizes: dict[str, int] = {}
        self._open: dict[str, int] = {}
        self.bytes_seen = 0
        self.bytes_on_disk = 0
        _check_folder(os.path.dirname(folder))
        _check_folder(folder)

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *error: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def size(self, name: str) -> int:
        """The bytes of a file. Raises ValueError if it is not a regular file of its own."""
        if name in self._sizes:
            return self._sizes[name]
        parts = name.split("/")
        if "\0" in name or not all(part not in ("", ".", "..") for part in parts):
            raise ValueError(f"{_shown(name.encode())} is no path below {self._folder}")
        for depth in range(1, len(parts)):
            if (parent := "/".join(parts[:depth])) not in self._folders:
                _check_folder(os.path.join(self._folder, parent))
                self._folders.add(parent)
        found = os.lstat(os.path.join(self._folder, name))
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(_strange(os.path.join(self._folder, name), found, "a regular file"))
        self.bytes_seen += found.st_size
        self.bytes_on_disk += found.st_blocks * _SECTOR_BYTES
        self._sizes[name] = found.st_size
        return found.st_size

    def check_range(self, name: str, offset: int, length: int) -> None:
        """Raise ValueError if a file does not have a range."""
        if offset + length > (size := self.size(name)):
            raise ValueError(f"{name} has {size} bytes, but should have {length} at {offset}")

    def decisive(self) -> list[str]:
        """The paths of the files that have been read, and of the folders of all that have been looked at."""
        return [self._folder, *(os.path.join(self._folder, name) for name in (*self._folders, *self._read))]

    def read(self, name: str, offset: int, length: int) -> bytes:
        """A range of a file. Raises ValueError if the file does not have it."""
        self.check_range(name, offset, length)
        if name not in self._open:
            if len(self._open) >= 16:
                os.close(self._open.pop(next(iter(self._open))))
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            self._open[name] = os.open(os.path.join(self._folder, name), flags)
            self._read.add(name)
        data = os.pread(self._open[name], length, offset)
        while len(data) < length and (more := os.pread(self._open[name], length - len(data), offset + len(data))):
            data += more
        if len(data) < length:
            raise ValueError(f"{name} ends after {offset + len(data)} bytes, but should have {length} at {offset}")
        return data

    def read_value(self, value: Value, offset: int, length: int) -> bytes:
        """A range of a value that lies within it."""
        if not value.file:
            return value.inline[offset : offset + length]
        return self.read(value.file, value.offset + offset, length)


def _check_folder(path: str) -> None:
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode):
        raise ValueError(_strange(path, found, "a folder"))


def _strange(path: str, found: os.stat_result, expected: str) -> str:
    kinds = {
        stat.S_IFLNK: "a symbolic link, and links are not followed; copy what it refers to (cp -rL)",
        stat.S_IFDIR: "a folder",
        stat.S_IFREG: "a file",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
    }
    return f"{path} should be {expected}, but is {kinds.get(stat.S_IFMT(found.st_mode), 'a device')}"


def _bytes_below(folder: str) -> int:
    """The bytes of all files below a folder, as far as the disk has them: a sparse file may claim any size.

    Raises ValueError if one of them is not a regular file.
    """
    total = 0
    for where, folders, names in os.walk(folder):
        for name in (*folders, *names):
            found = os.lstat(path := os.path.join(where, name))
            if stat.S_ISREG(found.st_mode):
                total += min(found.st_size, 16 * _SECTOR_BYTES * found.st_blocks)
            elif not stat.S_ISDIR(found.st_mode):
                raise ValueError(_strange(path, found, "a regular file"))
    return total


def _shown(name: bytes) -> str:
    return repr(name[:200].decode(errors="replace"))
