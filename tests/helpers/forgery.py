"""Files of a run as somebody would make them who means harm: whatever they claim, their checksums are right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorstore as ts
import zstandard
from torchorbax._src.format.manifest import digest

MANIFEST_MAGIC = b"\x0c\xdb\x3a\x2a"
NODE_MAGIC = b"\x0c\xdb\x20\xde"


def manifest_file(run: Path) -> Path:
    return run / "0" / "manifest" / "metadata"


def rewrite(run: Path, change: Callable[[Any], Any]) -> None:
    """Change a manifest and sign it again, as whoever means harm would."""
    content = json.loads(manifest_file(run).read_text())
    change(content)
    content.pop("sha256", None)
    manifest_file(run).write_text(json.dumps({**content, "sha256": digest(content)}))


def database(item: Path) -> ts.KvStore:
    """The array data of an item, as a database to write to."""
    return ts.KvStore.open({"driver": "ocdbt", "base": f"file://{item}/"}).result()


def bomb(nbytes: int, declared: int | None = None) -> bytes:
    """A zstd frame that unpacks to so many zeros, and perhaps says something else about it."""
    whole, rest = divmod(nbytes, 128 << 10)
    blocks = ((128 << 10) << 3 | 1 << 1).to_bytes(3, "little") + b"\0"
    last = (rest << 3 | 1 << 1 | 1).to_bytes(3, "little") + b"\0"
    size = b"" if declared is None else declared.to_bytes(8, "little")
    return b"\x28\xb5\x2f\xfd" + bytes([0 if declared is None else 0xC0, 72]) + size + blocks * whole + last


def varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def crc32c(data: bytes) -> bytes:
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return (value ^ 0xFFFFFFFF).to_bytes(4, "little")


def packed(magic: bytes, body: bytes) -> bytes:
    """A manifest or a node with a header and a checksum that are right."""
    content = b"\0\1" + zstandard.ZstdCompressor().compress(body)
    head = magic + (12 + len(content) + 4).to_bytes(8, "little") + content
    return head + crc32c(head)


def body_of(data: bytes) -> bytes:
    return zstandard.ZstdDecompressor().decompressobj().decompress(data[14:-4])
