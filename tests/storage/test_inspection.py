"""Array data is inspected before it is opened: what is not as it was written is refused, and costs nothing."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from torchorbax import CorruptCheckpointError
from torchorbax._src.format import per_process
from torchorbax._src.storage import inspection
from torchorbax._src.storage.storage import Storage
from torchorbax._src.storage.traffic import Traffic

from tests.helpers.forgery import bomb, database, rewrite
from tests.helpers.steps import random, read, write
from tests.helpers.tensors import bits

ARRAYS: dict[str, Any] = {
    "large": random((256, 128)),
    "small": random((4, 4)),
    "a/b": random((2,)),
    "scalar": random(()),
}


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return write(tmp_path, dict(ARRAYS))


@pytest.fixture
def packed(tmp_path: Path) -> Storage:
    return write(tmp_path, dict(ARRAYS), Traffic(compressed=True))


def refused(storage: Storage, reason: str) -> None:
    """Reading is refused, for a reason, at once, and without memory for more than the files."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CorruptCheckpointError, match=reason) as caught:
        read(storage, dict.fromkeys(ARRAYS))
    assert len(str(caught.value)) < 2000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB


@given(
    shape=st.lists(st.integers(1, 40), max_size=3).map(tuple),
    dtype=st.sampled_from([np.float32, np.bool_, np.complex64, np.int8]),
    compressed=st.booleans(),
    constant=st.booleans(),
)
def test_whatever_is_written_passes(
    shape: tuple[int, ...],
    dtype: Any,
    compressed: bool,
    constant: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    array = np.zeros(shape, dtype) if constant else random(shape, dtype)
    large = np.tile(array.reshape(-1), 70_000 // array.nbytes + 1)
    arrays = {"x": array, "large": large}
    storage = write(tmp_path_factory.mktemp("run"), dict(arrays), Traffic(compressed=compressed))
    found = read(storage, dict.fromkeys(arrays))
    assert {name: bits(value) for name, value in found.items()} == {name: bits(value) for name, value in arrays.items()}


# ------------------------------------------------------------------------------------------------------ kinds of files


def fifo(path: Path) -> None:
    os.mkfifo(path)


def link_to_zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


KINDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a FIFO": (fifo, "should be a regular file, but is a FIFO"),
    "a link to zeros": (link_to_zeros, "should be a regular file, but is a symbolic link.*cp -rL"),
    "a link to itself": (link_to_itself, "should be a regular file, but is a symbolic link"),
    "a folder": (Path.mkdir, "should be a regular file, but is a folder"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["manifest/metadata", "state/manifest.ocdbt", "state/d/*"])
def test_a_file_of_another_kind_is_not_opened(where: str, kind: str, storage: Storage, tmp_path: Path) -> None:
    make, reason = KINDS[kind]
    for file in list((tmp_path / "0").glob(where)):
        file.unlink()
        make(file)
    refused(storage, reason)


@pytest.mark.parametrize("where", ["", "manifest", "state", "state/d"])
def test_folders_are_not_reached_by_links(where: str, storage: Storage, tmp_path: Path) -> None:
    folder = tmp_path / "0" / where
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    refused(storage, "should be (a folder|a regular file|below folders), but .*is a symbolic link")


def test_state_of_a_process_is_a_regular_file(storage: Storage, tmp_path: Path) -> None:
    rewrite(tmp_path, lambda content: content.update(processes=2, own={"1": per_process.digest_of("{}")}))
    (tmp_path / "0" / "manifest" / "process_1").symlink_to("/dev/zero")
    with pytest.raises(CorruptCheckpointError, match="process_1 should be a regular file, but is a symbolic link"):
        storage.as_seen_by(storage.manifest(0), 1)


def test_a_hole_at_the_end_of_a_file_changes_nothing(storage: Storage, tmp_path: Path) -> None:
    for file in (tmp_path / "0/state/d").iterdir():
        os.truncate(file, 1 << 40)
    assert bits(read(storage, {"large": None})["large"]) == bits(ARRAYS["large"])


# ---------------------------------------------------------------------------------------------------- what arrays claim


def described(tmp_path: Path, name: str, **changes: Any) -> None:
    data = database(tmp_path / "0" / "state")
    data[f"{name}/.zarray"] = json.dumps({**json.loads(data[f"{name}/.zarray"]), **changes})


DESCRIPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "a huge shape": ({"shape": [2**40, 128]}, r"'large' has 1 chunks, expected 4294967296"),
    "a huge shape, and chunks": ({"shape": [2**40, 128], "chunks": [2**40, 128]}, "the shape is .*and that of chunks"),
    "huge chunks": ({"chunks": [2**20, 2**20]}, "the shape is .*and that of chunks"),
    "many chunks": ({"chunks": [1, 1]}, "chunk '0.0' has 131072 bytes; 4 are expected"),
    "chunks of nothing": ({"chunks": [0, 0]}, "and that of chunks"),
    "more dimensions": ({"shape": [1] * 100, "chunks": [1] * 100}, "and that of chunks"),
    "a shape of text": ({"shape": "ab", "chunks": "ab"}, "and that of chunks"),
    "a shape of none": ({"shape": None}, "TypeError"),
    "another dtype": ({"dtype": "<f8"}, "chunk '0.0' has 131072 bytes; 262144 are expected"),
    "another dtype of the size": ({"dtype": "<i4"}, r"large is int32\(256, 128\), but the manifest says float32"),
    "an unknown dtype": ({"dtype": "|O"}, "KeyError"),
    "fields": ({"dtype": [["a", "<f4"]]}, "TypeError"),
    "another compressor": ({"compressor": {"id": "blosc"}}, "torchorbax does not write {'compressor'"),
    "another level": ({"compressor": {"id": "zstd", "level": 22}}, "torchorbax does not write {'compressor'"),
    "filters": ({"filters": [{"id": "delta"}]}, "torchorbax does not write {'filters'"),
    "a value to fill in": ({"fill_value": 1.5}, "torchorbax does not write {'fill_value'"),
    "another order": ({"order": "F"}, "torchorbax does not write {'order'"),
    "another separator": ({"dimension_separator": "/"}, "torchorbax does not write {'dimension_separator'"),
    "more than there is": ({"more": "x"}, "torchorbax does not write {'more'"),
    "a long text": ({"more": "x" * 20_000}, r"'large'/.zarray has 20\d\d\d bytes; 16384 are possible"),
}


@pytest.mark.parametrize("description", DESCRIPTIONS)
def test_descriptions_that_are_not_written(description: str, storage: Storage, tmp_path: Path) -> None:
    changes, reason = DESCRIPTIONS[description]
    described(tmp_path, "large", **changes)
    refused(storage, reason)


@pytest.mark.parametrize("text", ["", "null", "7", "[" * 10_000, "{}", "\xff", '{"shape": 1e999}'])
def test_texts_that_describe_nothing(text: str, storage: Storage, tmp_path: Path) -> None:
    database(tmp_path / "0" / "state")["small/.zarray"] = text
    refused(storage, "'small'/.zarray describes no array")


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("large/0.0", b"", "chunk '0.0' has 0 bytes; 131072 are expected"),
        ("large/0.0", bytes(131_073), "chunk '0.0' has 131073 bytes; 131072 are expected"),
        ("large/1.0", bytes(131_072), "'1.0' is no chunk"),
        ("large/00", b"x", "'00' is no chunk"),
        ("large/" + "9" * 5000, b"x", "is no chunk"),
        ("small/0", b"x", "'0' is no chunk"),
        ("scalar/0.0", b"x", "'0.0' is no chunk"),
        ("a/b/0", b"x" * 30_000_000, "chunk '0' has 30000000 bytes; 8 are expected"),
    ],
)
def test_chunks_that_are_not_written(key: str, value: bytes, reason: str, storage: Storage, tmp_path: Path) -> None:
    database(tmp_path / "0" / "state")[key] = value
    refused(storage, reason)


def test_chunks_that_are_missing(storage: Storage, tmp_path: Path) -> None:
    data = database(tmp_path / "0" / "state")
    del data["small/0.0"]
    refused(storage, "'small' has 0 chunks, expected 1")


def test_what_one_byte_accounts_for_is_limited() -> None:
    ratio = inspection.MOST_RATIO
    inspection.check_claim(1 << 40, 1 << 40, (1 << 40) // ratio)
    with pytest.raises(ValueError, match="its values claim 1099511627776 bytes, but its files account for 1098"):
        inspection.check_claim(1 << 40, (1 << 40) - (1 << 30), 1 << 40)
    with pytest.raises(ValueError, match="its values claim"):
        inspection.check_claim(1 << 40, 1 << 40, (1 << 40) // ratio - (1 << 20))


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (bomb(1 << 32), "unpack to more than 131072"),
        (bomb(1 << 32, 131_072), "unpack to more than 131072|damaged"),
        (bomb(131_072, 1 << 60), "says that it unpacks to"),
        (bytes(140_000), "chunk '0.0' has 140000 bytes; 133120 at most are possible"),
        (b"", "chunk '0.0' has 0 bytes"),
        (zstandard.compress(bytes(131_072)) * 2, "ends at byte"),
    ],
)
def test_compressed_chunks_that_are_bombs(frame: bytes, reason: str, packed: Storage, tmp_path: Path) -> None:
    database(tmp_path / "0" / "state")["large/0.0"] = frame
    refused(packed, reason)


def test_an_honest_chunk_that_another_compressor_made_is_read(packed: Storage, tmp_path: Path) -> None:
    frame = zstandard.ZstdCompressor(level=19).compress(ARRAYS["large"].tobytes())
    database(tmp_path / "0" / "state")["large/0.0"] = frame
    assert bits(read(packed, {"large": None})["large"]) == bits(ARRAYS["large"])


# --------------------------------------------------------------------------------------------------- what is remembered


def test_an_inspection_is_kept_until_something_changes(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = str(tmp_path / "0" / "state")
    first = inspection.inspect(item)
    assert inspection.inspect(item) is first
    described(tmp_path, "large", order="F")
    with pytest.raises(ValueError, match="'order'"):
        inspection.inspect(item)


def test_a_file_that_becomes_a_fifo_is_noticed(storage: Storage, tmp_path: Path) -> None:
    read(storage, dict.fromkeys(ARRAYS))
    file = sorted((tmp_path / "0/state/d").iterdir())[0]
    file.unlink()
    os.mkfifo(file)
    refused(storage, "is a FIFO")
