"""The clients that Orbax uses, and Orbax itself, at the test server for gs://."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.gcs_server import Server, ServerProcess, environment
from tests.helpers.gcs_server_faults import Rule
from tests.helpers.gcs_server_store import CHUNK
from tests.helpers.programs import RunPython

# Clients
GCSFS = """
    import fsspec

    files = fsspec.filesystem("gcs")
    big = bytes(range(256)) * 24 * 1024  # 6 MiB
    with files.open("bucket/a/small", "wb") as file:
        file.write(b"data")
    with files.open("bucket/a/big", "wb", block_size=2**20) as file:
        for start in range(0, len(big), 1_000_000):
            file.write(big[start : start + 1_000_000])
    with files.open("bucket/a/empty", "wb"):
        pass
    files.pipe("bucket/a/piped", b"\\r\\n--==0==\\n")
    assert files.cat("bucket/a/big") == big
    assert files.cat("bucket/a/piped") == b"\\r\\n--==0==\\n"
    assert files.cat("bucket/a/empty") == b""
    assert files.cat_file("bucket/a/big", 1000, 2000) == big[1000:2000]
    with files.open("bucket/a/big", "rb") as file:
        file.seek(5_000_000)
        assert file.read(100) == big[5_000_000:5_000_100]
    try:
        files.pipe("bucket/a/small", b"again", mode="create")
        raise AssertionError("overwritten")
    except FileExistsError:
        pass
    assert files.ls("bucket/a", detail=False) == [f"bucket/a/{name}" for name in ("big", "empty", "piped", "small")]
    assert files.isdir("bucket/a") and not files.isdir("bucket/a/small") and not files.exists("bucket/b")
    files.mv("bucket/a", "bucket/b", recursive=True)
    assert files.find("bucket") == [f"bucket/b/{name}" for name in ("big", "empty", "piped", "small")]
    files.cp("bucket/b/big", "bucket/c/big")
    files.merge("bucket/c/merged", ["bucket/b/small", "bucket/b/small"])
    assert files.cat("bucket/c/merged") == b"datadata"
    files.rm("bucket/b", recursive=True)
    assert files.find("bucket") == ["bucket/c/big", "bucket/c/merged"]
    assert files.info("bucket/c/big")["size"] == len(big)
    files.mkdir("new")
    assert sorted(files.ls("")) == ["bucket/", "new/"]
"""

STORAGE = """
    import io
    from google.cloud import storage

    client = storage.Client()
    bucket = client.get_bucket("bucket")
    big = bytes(range(256)) * 4 * 1024  # 1 MiB
    blob = bucket.blob("a/big", chunk_size=256 * 1024)
    blob.upload_from_file(io.BytesIO(big[:-10]), if_generation_match=0)
    assert blob.download_as_bytes(checksum="crc32c") == big[:-10]
    for name in ("a/1", "a/2", "a/b/3"):
        bucket.blob(name).upload_from_string(b"data", checksum="md5")
    assert [one.name for one in client.list_blobs("bucket", page_size=2)] == ["a/1", "a/2", "a/b/3", "a/big"]
    found = client.list_blobs("bucket", prefix="a/", delimiter="/", page_size=1)
    assert ([one.name for one in found], found.prefixes) == (["a/1", "a/2", "a/big"], {"a/b/"})
    blob.metadata = {"key": "value"}
    blob.patch(if_metageneration_match=1)
    assert bucket.get_blob("a/big").metadata == {"key": "value"}
    bucket.copy_blob(bucket.blob("a/1"), bucket, "copy")
    bucket.rename_blob(bucket.blob("a/2"), "renamed")
    bucket.blob("rewritten").rewrite(bucket.blob("copy"))
    bucket.blob("composed").compose([bucket.blob("copy"), bucket.blob("renamed")])
    assert bucket.blob("composed").download_as_bytes() == b"datadata"
    with client.batch():
        bucket.delete_blobs([bucket.blob(name) for name in ("copy", "renamed", "rewritten")])
    assert [one.name for one in client.list_blobs("bucket")] == ["a/1", "a/b/3", "a/big", "composed"]
    assert client.lookup_bucket("missing") is None
"""

TENSORSTORE = """
    import threading
    import tensorstore as ts

    def kvstore():
        return ts.KvStore.open({"driver": "gcs", "bucket": "bucket", "path": "ts/"}, context=ts.Context()).result()

    store = kvstore()
    data = bytes(range(256)) * 8 * 1024  # 2 MiB
    first = store.write("a/key", data).result()
    assert store.read("a/key").result().value == data
    assert store.read("a/key", byte_range=slice(1000, 2000)).result().value == data[1000:2000]
    assert store.read("a/key", if_not_equal=first.generation).result().state == "unspecified"
    assert store.read("missing").result().state == "missing"
    second = store.write("a/key", b"new", if_equal=first.generation).result()
    assert second.generation and not store.write("a/key", b"late", if_equal=first.generation).result().generation
    store.write("b", b"").result()
    assert store.list().result() == [b"a/key", b"b"]
    store.delete_range(ts.KvStore.KeyRange("a/", "a0")).result()
    assert store.list().result() == [b"b"]

    not_there = store.read("missing").result().stamp.generation
    winners, stores = [], [kvstore() for _ in range(8)]
    def write(number, key):
        if stores[number].write(key, str(number), if_equal=not_there).result().generation:
            winners.append((key, number))
    for key in ("x", "y", "z"):
        threads = [threading.Thread(target=write, args=(number, key)) for number in range(8)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert [key for key, _ in winners] == ["x", "y", "z"], winners
    assert all(store.read(key).result().value == str(number).encode() for key, number in winners)
"""

OCDBT = """
    import sys
    import threading
    import tensorstore as ts

    def open_database():
        spec = {"driver": "ocdbt", "base": "gs://bucket/db/"}
        return ts.KvStore.open(spec, context=ts.Context()).result()

    def write(writer, database):
        for number in range(5):
            database.write(f"{writer}/{number}", bytes([writer]) * 1000 * number).result()

    threads = [threading.Thread(target=write, args=(writer, open_database())) for writer in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    database = open_database()
    assert len(database.list().result()) == 30
    for writer in range(6):
        for number in range(5):
            assert database.read(f"{writer}/{number}").result().value == bytes([writer]) * 1000 * number
"""

ORBAX = """
    import sys
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    key = jax.random.key(0)  # random numbers, as others are compressed
    tree = {"a": jax.random.normal(key, 500_000), "b": {"c": jax.random.normal(key, (300, 1000))}}
    with ocp.CheckpointManager("gs://bucket/run", options=ocp.CheckpointManagerOptions(max_to_keep=2)) as manager:
        if sys.argv[1] == "save":
            for step in range(3):
                manager.save(step, args=ocp.args.StandardSave(jax.tree.map(lambda array: array + step, tree)))
            manager.wait_until_finished()
        assert manager.all_steps() == [1, 2]
        if sys.argv[1] == "restore":
            restored = manager.restore(2, args=ocp.args.StandardRestore(tree))
            jax.tree.map(lambda array, found: np.testing.assert_array_equal(array + 2, found), tree, restored)
"""


def test_gcsfs(server: Server, run_python: RunPython) -> None:
    run_python(GCSFS, env=environment(server.port), warnings="default")
    kinds = server.counts()
    assert kinds["chunk"] > 6  # the big file came in several
    assert kinds.keys() >= {"resumable", "multipart", "read", "list", "stat", "move", "copy", "compose", "delete"}
    assert kinds["other"] == 0
    assert server.bytes_written("a/big$") == {"bucket/a/big": 6 * 2**20}


def test_google_cloud_storage(server: Server, run_python: RunPython) -> None:
    run_python(STORAGE, env=environment(server.port))
    assert [entry.written for entry in server.requests("chunk")] == [CHUNK, CHUNK, CHUNK, CHUNK - 10]
    assert server.counts()["batch"] == 1
    assert server.counts()["other"] == 0


def test_tensorstore(server: Server, run_python: RunPython) -> None:
    run_python(TENSORSTORE, env=environment(server.port))
    assert server.counts()["other"] == 0
    assert server.bytes_read("key$") == {"bucket/ts/a/key": 2 * 2**20 + 1000}


def test_concurrent_writers_of_one_database(server: Server, run_python: RunPython) -> None:
    run_python(OCDBT, env=environment(server.port))
    assert any(entry.status == 412 for entry in server.requests("media", "manifest"))  # they did meet


@pytest.mark.parametrize(
    "faults",
    [
        ["503 kind=write after=3 times=1", "429 kind=read after=3 times=1"],
        [
            "cut-before kind=write after=2 times=1",
            "cut-after kind=write name=(ts/b|a/piped)$ times=1",
            "cut-after kind=read times=1",
        ],
        ["truncate:500 kind=read times=1", "drip:9000000 kind=read after=1 times=1"],
    ],
    ids=["errors", "cuts", "truncated"],
)
@pytest.mark.parametrize("program", [TENSORSTORE, GCSFS], ids=["tensorstore", "gcsfs"])
def test_clients_survive_faults(server: Server, run_python: RunPython, program: str, faults: list[str]) -> None:
    server.add_faults(*faults)
    run_python(program, env=environment(server.port), warnings="default")
    assert sum(entry.effect != "" for entry in server.log()) == sum(Rule.parse(rule).times or 0 for rule in faults)


def test_checkpoints_of_orbax(tmp_path: Path, run_python: RunPython) -> None:
    with ServerProcess(tmp_path / "data") as server:
        run_python(ORBAX, "save", env=environment(server.port, "saver"), warnings="default")
        server.kill()
        server.start()
        run_python(ORBAX, "restore", env=environment(server.port, "restorer"), warnings="default")
        assert {entry.client for entry in server.log()} == {"restorer"}
        size = 4 * (500_000 + 300 * 1000)
        assert 0.8 * size < sum(server.bytes_read(r"/ocdbt.*/d/").values()) < 1.5 * size
        assert server.counts()["other"] == 0
