"""Compressed data never unpacks to more than was expected, and what compressors make is never refused."""

from __future__ import annotations

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from torchorbax._src.storage.zstd import check_frame, decompress, longest_stored

from tests.helpers.forgery import bomb


def check(frame: bytes, nbytes: int) -> None:
    check_frame(lambda offset, length: frame[offset : offset + length], len(frame), nbytes)


contents = st.one_of(
    st.binary(max_size=2000),
    st.builds(lambda piece, times: piece * times, st.binary(min_size=1, max_size=50), st.integers(1, 20_000)),
)


@given(content=contents, level=st.integers(-5, 19), declared=st.booleans(), checksum=st.booleans())
def test_what_a_compressor_makes_is_good(content: bytes, level: int, declared: bool, checksum: bool) -> None:
    compressor = zstandard.ZstdCompressor(level=level, write_content_size=declared, write_checksum=checksum)
    frame = compressor.compress(content)
    check(frame, len(content))
    assert decompress(frame, len(content)) == content
    assert len(frame) <= longest_stored(len(content))


@given(content=contents, pieces=st.integers(1, 30))
def test_small_blocks_are_good(content: bytes, pieces: int) -> None:
    compressor = zstandard.ZstdCompressor(level=1).compressobj()
    size = len(content) // pieces + 1
    frame = b"".join(
        compressor.compress(content[at : at + size]) + compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
        for at in range(0, len(content), size)
    )
    frame += compressor.flush()
    check(frame, len(content))


@given(content=contents, data=st.data())
def test_damaged_frames_raise_no_other_error(content: bytes, data: st.DataObject) -> None:
    frame = bytearray(zstandard.ZstdCompressor(level=1).compress(content))
    for _ in range(data.draw(st.integers(1, 3))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    try:
        check(bytes(frame[: data.draw(st.integers(0, len(frame)))]), len(content))
    except ValueError:
        return


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (bomb(1 << 34), "unpack to more than 400"),
        (bomb(1 << 34, 400), "unpack to more than 400|damaged"),
        (bomb(400, 1 << 62), f"says that it unpacks to {1 << 62} bytes, expected 400"),
        (bomb(400) + bomb(1 << 34), "ends at byte 10 of"),
        (bomb(400)[:-3], "cut off"),
        (b"\x28\xb5\x2f\xfd\x00\xf8" + bomb(400)[6:], "a window of"),
        (b"\x28\xb5\x2f\xfd\x03\x48" + bomb(400)[6:], "dictionary"),
        (b"no zstd at all", "not zstd"),
        (b"\x28\xb5\x2f\xfd\x00\x48" + bytes(3) * 100_000, "unpacks to 0 bytes, expected 400"),
    ],
    ids=["bomb", "lying bomb", "size", "second frame", "cut", "window", "dictionary", "other data", "empty blocks"],
)
def test_bombs_are_refused(frame: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check(frame, 400)


def test_unpacking_stops_at_the_limit() -> None:
    with pytest.raises(ValueError, match="more than 1000"):
        decompress(bomb(1 << 40), 1000)
