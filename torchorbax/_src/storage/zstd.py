"""Zstandard data from somebody unknown: how much it unpacks to, before anything of that size is allocated.

A zstd frame of a few bytes can unpack to any size: a block of 4 bytes stands for up to 128 KiB. TensorStore unpacks a
frame to its end, whatever size was expected, and aborts the process when memory runs out.
"""

from __future__ import annotations

from collections.abc import Callable

import zstandard

MOST_RATIO = 32768
"""The most bytes that a stored byte can stand for: 128 KiB in a block of 4 bytes. Arrays of zeros come close to it."""

_BLOCK_BYTES = 128 << 10
_MAGIC = b"\x28\xb5\x2f\xfd"
_LONGEST_HEADER = 18
_MOST_WINDOW_BYTES = 8 << 20  # what RFC 8878 asks of every decoder; level 1 uses 512 KiB
_PIECE_BYTES = 1 << 20
_RAW, _RUN, _COMPRESSED = range(3)

Read = Callable[[int, int], bytes]
"""Reads from a stored value: `read(offset, length)`."""


def longest_stored(nbytes: int) -> int:
    """The most bytes that a compressor makes of data with `nbytes` bytes, with room for other compressors."""
    return nbytes + nbytes // 128 + 1024


def decompress(data: bytes, most_bytes: int) -> bytes:
    """The content of one frame.

    Raises:
        ValueError: it is damaged, or has more than `most_bytes` bytes.
    """
    pieces: list[bytes] = []
    total = 0
    try:
        with zstandard.ZstdDecompressor().stream_reader(data) as reader:
            while piece := reader.read(_PIECE_BYTES):
                total += len(piece)
                if total > most_bytes:
                    raise ValueError(f"{len(data)} compressed bytes unpack to more than {most_bytes}")
                pieces.append(piece)
    except zstandard.ZstdError as error:
        raise ValueError(f"damaged zstd data: {error}") from error
    return b"".join(pieces)


def check_frame(read: Read, length: int, nbytes: int) -> None:
    """Raise ValueError if a stored value is not one frame, or unpacks to much more than `nbytes` bytes.

    Only the headers of its blocks are read, unless they leave open how much the frame unpacks to. A frame that passes
    unpacks to twice `nbytes` and 128 KiB at most.

    Args:
        read: reads from the value.
        length: the length of the value, in bytes.
        nbytes: what it should unpack to, in bytes.
    """
    position, declared, window, has_checksum = _header(read(0, min(_LONGEST_HEADER, length)))
    if declared not in (None, nbytes):
        raise ValueError(f"it says that it unpacks to {declared} bytes, expected {nbytes}")
    if window > max(nbytes, _MOST_WINDOW_BYTES):
        raise ValueError(f"it needs a window of {window} bytes, for a chunk of {nbytes}")
    most, blocks, is_last = 0, 0, False
    while not is_last:
        header = int.from_bytes(_exactly(read, position, 3, length), "little")
        is_last, kind, size = bool(header & 1), header >> 1 & 3, header >> 3
        if kind > _COMPRESSED or size > _BLOCK_BYTES:
            raise ValueError(f"damaged zstd data: block {blocks} has kind {kind} and size {size}")
        position += 3 + (1 if kind == _RUN else size)
        most += _BLOCK_BYTES if kind == _COMPRESSED else size
        blocks += 1
        if most > 2 * nbytes + _BLOCK_BYTES or blocks > nbytes // 4096 + 16:  # small blocks, or a bomb
            found = len(decompress(_exactly(read, 0, length, length), nbytes))
            if found != nbytes:
                raise ValueError(f"it unpacks to {found} bytes, expected {nbytes}")
            return
    if position + (4 if has_checksum else 0) != length:
        raise ValueError(f"its zstd frame ends at byte {position} of {length}")


def _header(data: bytes) -> tuple[int, int | None, int, bool]:
    """Of a frame: the length of its header, the declared size of its content, its window, and has it a checksum?"""
    if len(data) < 6 or data[:4] != _MAGIC:
        raise ValueError("it is not zstd data")
    flags = data[4]
    is_single, has_checksum, has_dictionary = bool(flags >> 5 & 1), bool(flags >> 2 & 1), bool(flags & 3)
    if has_dictionary or flags >> 3 & 1:
        raise ValueError("its zstd frame has a dictionary, or a flag that is reserved")
    at = 5 if is_single else 6
    width = (1 if is_single else 0, 2, 4, 8)[flags >> 6]
    if len(data) < at + width:
        raise ValueError("damaged zstd data: the header is cut off")
    declared = int.from_bytes(data[at : at + width], "little") + (256 if width == 2 else 0) if width else None
    base = 1 << 10 + (data[5] >> 3)
    window = (declared or 0) if is_single else base + (base >> 3) * (data[5] & 7)
    return at + width, declared, window, has_checksum


def _exactly(read: Read, offset: int, size: int, length: int) -> bytes:
    if offset + size > length:
        raise ValueError(f"damaged zstd data: it is cut off at byte {length}")
    return read(offset, size)
