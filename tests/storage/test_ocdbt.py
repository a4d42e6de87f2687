"""The index of a database is read as TensorStore reads it, and one that claims too much is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import tensorstore as ts
from hypothesis import given
from hypothesis import strategies as st
from torchorbax._src.storage import ocdbt

from tests.helpers.forgery import MANIFEST_MAGIC, NODE_MAGIC, body_of, packed, varint

MOST = 1 << 28


def read_all(folder: Path, most_bytes: int = MOST) -> dict[bytes, bytes]:
    def read(file: str, offset: int, length: int) -> bytes:
        return (folder / file).read_bytes()[offset : offset + length]

    found = {}
    for key, value in ocdbt.entries((folder / ocdbt.MANIFEST_FILE).read_bytes(), read, most_bytes):
        found[key] = read(value.file, value.offset, value.length) if value.file else value.inline
        assert len(found[key]) == value.length
    return found


keys = st.text("ab/.0é", min_size=1, max_size=9)
batches = st.lists(st.dictionaries(keys, st.binary(max_size=150), min_size=1, max_size=40), max_size=5)


@given(batches=batches, node_bytes=st.sampled_from([200, 10_000]), inline=st.sampled_from([0, 100]))
def test_the_index_is_what_tensorstore_reads(
    batches: list[dict[str, bytes]], node_bytes: int, inline: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("database")
    config = {"max_decoded_node_bytes": node_bytes, "max_inline_value_bytes": inline}
    database = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{folder}/", "config": config}).result()
    expected: dict[bytes, bytes] = {}
    for batch in batches:
        with ts.Transaction() as transaction:
            for key, value in batch.items():
                database.with_transaction(transaction)[key] = value
        expected |= {key.encode(): value for key, value in batch.items()}
    database.delete_range(ts.KvStore.KeyRange("a", "a0")).result()
    expected = {key: value for key, value in expected.items() if not b"a" <= key < b"a0"}
    found = read_all(folder)
    assert found == expected
    assert list(found) == sorted(expected)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A database of one node."""
    database = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{tmp_path}/"}).result()
    database["key"] = b"value"
    return tmp_path


def replace_node(folder: Path, body: bytes) -> None:
    """Give the database another node, with a checksum that is right."""
    (node,) = (folder / "d").iterdir()
    manifest = folder / ocdbt.MANIFEST_FILE
    old, new = node.read_bytes(), packed(NODE_MAGIC, body)
    node.write_bytes(new)
    whole = body_of(manifest.read_bytes()).replace(varint(len(old)), varint(len(new)))
    manifest.write_bytes(packed(MANIFEST_MAGIC, whole))


def test_a_forged_index_is_read_by_tensorstore_too(folder: Path) -> None:
    """Otherwise, the tests below would say nothing about what TensorStore is kept from."""
    (node,) = (folder / "d").iterdir()
    replace_node(folder, body_of(node.read_bytes()).replace(b"value", b"other"))
    assert ts.KvStore.open({"driver": "ocdbt", "base": f"file://{folder}/"}).result()["key"] == b"other"
    assert read_all(folder) == {b"key": b"other"}


MANY = 1 << 19
SHARED = varint(65534) * (MANY - 1) + varint(65535) + b"\1" * (MANY - 1) + b"a" * 65535 + b"b" * MANY
NODES = {
    "keys that share most of 64 KiB": (b"\0\0" + varint(MANY) + SHARED, "names of 34.* bytes together"),
    "files without end": (b"\0" + varint(1 << 40) + bytes(1000), "ends after"),
    "entries without end": (b"\0\0" + varint(1 << 31), "a node of 2147483648 entries"),
    "no entries": (b"\0\0\0", "a node of 0 entries"),
    "zeros": (bytes(200 << 20), "unpack to more than 134217728"),
    "another height": (b"\1\0\1", "a node of height 1, where 0 is expected"),
    "a file that is not in the table": (b"\0\0\1\1a\1\1\7\0", "file 7 of 0"),
    "a number of 70 bits": (b"\0" + b"\xff" * 12 + b"\0", "a column of numbers is cut off"),
    "nothing": (b"", "ends after"),
}


@pytest.mark.parametrize("claim", NODES)
def test_claims_of_a_node_are_refused(claim: str, folder: Path) -> None:
    body, reason = NODES[claim]
    replace_node(folder, body)
    with pytest.raises(ValueError, match=reason):
        read_all(folder)


def test_nodes_together_are_limited(folder: Path) -> None:
    replace_node(folder, b"\0\0" + bytes(1 << 20))
    with pytest.raises(ValueError, match="unpack to more than 1000"):
        read_all(folder, most_bytes=1000)


@pytest.mark.parametrize(
    ("manifest", "reason"),
    [
        (b"", "begins with"),
        (packed(NODE_MAGIC, b"x"), "should begin with 0cdb3a2a"),
        (packed(MANIFEST_MAGIC, bytes(2 << 20)), "unpack to more than 1048576"),
        (packed(MANIFEST_MAGIC, bytes(16) + b"\1"), "a manifest of kind 1"),
        (packed(MANIFEST_MAGIC, bytes(16)), "ends after"),
        (packed(MANIFEST_MAGIC, bytes(16) + b"\0\1\1\4\0" + b"\0" + varint(1 << 40)), "a manifest of 1099511627776 v"),
    ],
    ids=["empty", "a node", "a bomb", "numbered", "cut", "versions"],
)
def test_other_manifests_are_refused(manifest: bytes, reason: str, folder: Path) -> None:
    (folder / ocdbt.MANIFEST_FILE).write_bytes(manifest)
    with pytest.raises(ValueError, match=reason):
        read_all(folder)


@given(data=st.data())
def test_a_damaged_index_raises_no_other_error(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("database")
    database = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{folder}/"}).result()
    database["key"] = b"value"
    database["key2"] = bytes(3000)
    manifest = folder / ocdbt.MANIFEST_FILE
    whole = bytearray(body_of(manifest.read_bytes()))
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, 10_000)) % len(whole)] = data.draw(st.integers(0, 255))
    manifest.write_bytes(packed(MANIFEST_MAGIC, bytes(whole)))
    try:
        read_all(folder)
    except (ValueError, OSError):
        return
