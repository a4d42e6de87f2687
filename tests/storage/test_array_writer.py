"""Arrays on storage: bit for bit on any layout, readable by plain Orbax, in bounded memory."""

from __future__ import annotations

import datetime
import gc
import weakref
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from torchorbax import CorruptCheckpointError, SaveError
from torchorbax._src.arrays import fingerprint
from torchorbax._src.arrays import stacks as gathering
from torchorbax._src.arrays.dtypes import BY_NAME, fits_on_device
from torchorbax._src.arrays.fingerprint import fingerprints
from torchorbax._src.format.manifest import ItemMeta, Key, LeafMeta, Manifest
from torchorbax._src.storage import array_reader, array_writer
from torchorbax._src.storage.opening import open_storage
from torchorbax._src.storage.storage import Folders, Storage
from torchorbax._src.storage.traffic import Traffic

from tests.helpers.tensors import bits

SMALL = gathering.GATHERED_BYTES


def metas(arrays: dict[str, Any]) -> dict[str, LeafMeta]:
    return {name: LeafMeta(tuple(array.shape), str(array.dtype), "jax") for name, array in arrays.items()}


def write(folder: Path, arrays: dict[str, Any], traffic: Traffic | None = None, step: int = 0) -> Storage:
    storage = open_storage(str(folder), traffic or Traffic())
    storage.create()
    manifest = Manifest(step, datetime.datetime.now(datetime.UTC), {}, {"state": ItemMeta("pytree", metas(arrays))})
    mine = {("state", name): array for name, array in arrays.items()}

    def fill(folders: Folders) -> Manifest:
        sums = storage.write_arrays(folders, mine, 0)
        return manifest.stamped({key: fingerprint.text(found) for key, found in sums.items()})

    storage.write(step, mine, fill)
    return storage


def read(storage: Storage, targets: dict[str, Any], step: int = 0, when_read: Any = None) -> dict[str, Any]:
    wanted = {("state", name): target for name, target in targets.items()}
    found = storage.read(step, storage.manifest(step).leaves, wanted, when_read)
    return {name: array for (_, name), array in found.items()}


def random(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    raw = np.random.default_rng(0).integers(0, 256, int(np.prod(shape)) * np.dtype(dtype).itemsize, np.uint8)
    return (raw & 1 if dtype == np.bool_ else raw).view(dtype).reshape(shape)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("rows", [8, 256], ids=["small", "large"])
def test_every_dtype(compressed: bool, rows: int, mesh: Mesh, tmp_path: Path) -> None:
    hosts = {dtype: random((rows, 512), BY_NAME[dtype]) for dtype in BY_NAME}
    arrays = {
        dtype: jax.device_put(host, NamedSharding(mesh, P("fsdp"))) if fits_on_device(host.dtype) else host
        for dtype, host in hosts.items()
    }
    storage = write(tmp_path, arrays, Traffic(compressed))
    targets = {dtype: getattr(array, "sharding", None) for dtype, array in arrays.items()}
    assert {dtype: bits(array) for dtype, array in read(storage, targets).items()} == {
        dtype: bits(host) for dtype, host in hosts.items()
    }
    leaves = storage.manifest(0).items["state"].leaves
    assert {dtype: leaf.fingerprint for dtype, leaf in leaves.items()} == fingerprints(hosts)


@pytest.mark.parametrize("spec", [P(), P("fsdp"), P(None, "fsdp")], ids=str)
def test_many_small_leaves_alike(spec: P, mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are stacked on their devices, which must not tidy up a bit of them."""
    monkeypatch.setattr(gathering, "AT_ONCE", (4, 1))
    monkeypatch.setattr(array_writer, "_STACKED", 4)
    sharding = NamedSharding(mesh, spec)
    dtypes = [dtype for dtype in BY_NAME if fits_on_device(BY_NAME[dtype])]
    hosts = {
        f"{dtype}.{index}": np.roll(random((8, 16), BY_NAME[dtype]), index) for dtype in dtypes for index in range(9)
    }
    storage = write(tmp_path, {name: jax.device_put(host, sharding) for name, host in hosts.items()})
    found = read(storage, dict.fromkeys(hosts, sharding))
    assert {name: bits(array) for name, array in found.items()} == {name: bits(host) for name, host in hosts.items()}
    assert {array.sharding for array in found.values()} == {sharding}


LAYOUTS = [P(), P("fsdp"), P(None, "tp"), P("tp", "fsdp"), P(("fsdp", "tp"))]


@pytest.mark.parametrize("whole_bytes", [1, 1 << 30], ids=["by shards", "whole"])
@pytest.mark.parametrize("spec", LAYOUTS, ids=str)
def test_any_layout_to_any_other(
    spec: P, whole_bytes: int, mesh_2d: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(array_reader, "_BATCH_BYTES", whole_bytes)
    host = random((256, 128))
    array = jax.device_put(host, NamedSharding(mesh_2d, spec))
    storage = write(tmp_path, {"large": array, "small": array[:8], "scalar": array[0, 0]})
    shardings: list[Any] = [NamedSharding(mesh_2d, other) for other in LAYOUTS]
    for target in [*shardings, SingleDeviceSharding(jax.devices()[3]), None]:
        found = read(storage, {"large": target, "small": target, "scalar": None})
        assert bits(found["large"]) == bits(host)
        assert bits(found["small"]) == bits(host[:8])
        assert bits(found["scalar"]) == bits(host[0, 0])
        assert getattr(found["large"], "sharding", None) == getattr(found["small"], "sharding", None) == target


@given(
    shape=st.lists(st.sampled_from([1, 2, 3, 5, 7, 8, 12, 64]), max_size=4).map(tuple),
    most=st.sampled_from([1, 4, 24, 100, 10_000]),
)
def test_chunks_are_equal_parts_of_a_shard(shape: tuple[int, ...], most: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(array_writer, "_CHUNK_BYTES", most)
        chunk = array_writer._chunk_shape(shape, 4)
    assert all(size % part == 0 for size, part in zip(shape, chunk, strict=True))
    assert np.prod(chunk, dtype=int) * 4 <= max(most, 4)
    if np.prod(shape, dtype=int) * 4 <= most:
        assert chunk == shape


def test_shards_larger_than_a_chunk(mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_writer, "_CHUNK_BYTES", 20_000)
    host = random((256, 6, 30))
    array = jax.device_put(host, NamedSharding(mesh, P("fsdp")))
    storage = write(tmp_path, {"array": array, "host": host})
    found = read(storage, {"array": array.sharding, "host": None})
    assert bits(found["array"]) == bits(found["host"]) == bits(host)


def test_plain_orbax_reads_every_leaf_under_its_own_name(mesh: Mesh, mesh_2d: Mesh, tmp_path: Path) -> None:
    """Also names with dots, slashes and spaces; small ones as host arrays, large ones as they were sharded."""
    sharding = NamedSharding(mesh, P("fsdp"))
    large = jax.device_put(random((256, 128)), sharding)
    arrays = {f"layer.{index}.weight": jax.device_put(random((8, 4)) + index, sharding) for index in range(20)}
    arrays |= {"large": large, "a/b c": large * 2, "scalar": jnp.float32(3), "zero": jnp.zeros((256, 128))}
    write(tmp_path, arrays, step=5)
    with ocp.CheckpointManager(tmp_path) as manager:
        with pytest.warns(UserWarning, match="Sharding info not provided"):
            found = manager.restore(5, args=ocp.args.Composite(state=ocp.args.PyTreeRestore()))["state"]
        assert {name: bits(array) for name, array in found.items()} == {
            name: bits(array) for name, array in arrays.items()
        }
        assert found["large"].sharding == sharding
        assert type(found["layer.3.weight"]) is np.ndarray
        other = NamedSharding(mesh_2d, P(None, "tp"))
        abstract = {name: jax.ShapeDtypeStruct((8, 4), np.float32, sharding=other) for name in arrays if "." in name}
        found = manager.restore(
            5,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(
                    item=abstract,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
                    partial_restore=True,
                )
            ),
        )["state"]
        assert all(bits(array) == bits(arrays[name]) and array.sharding == other for name, array in found.items())


def test_what_plain_orbax_has_written_is_read(mesh: Mesh, tmp_path: Path) -> None:
    """Compressed, in a chunk for each shard, small leaves as well: as this library wrote before, and others do."""
    sharding = NamedSharding(mesh, P("fsdp"))
    arrays = {"large": jax.device_put(random((256, 128)), sharding), "small": jax.device_put(random((8, 4)), sharding)}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "item", args=ocp.args.PyTreeSave(arrays))
    wanted = {name: (meta, sharding) for name, meta in metas(arrays).items()}
    found = array_reader.read(str(tmp_path / "item"), wanted, Traffic())
    assert {name: bits(array) for name, array in found.items()} == {name: bits(array) for name, array in arrays.items()}


def test_what_differs_from_the_manifest_is_refused(tmp_path: Path) -> None:
    storage = write(tmp_path, {"large": random((256, 128)), "small": random((4, 4))})
    for name, shape in (("large", (128, 256)), ("small", (2, 8))):
        meta = LeafMeta(shape, "float32", "jax")
        with pytest.raises(
            CorruptCheckpointError, match=rf"{name} is float32\(\d+, \d+\), but the manifest says float"
        ):
            storage.read(0, {("state", name): meta}, {("state", name): None})
        with pytest.raises(CorruptCheckpointError, match="other is missing from the array data"):
            storage.read(0, {("state", "other"): meta}, {("state", "other"): None})


def test_a_missing_chunk_is_not_taken_for_zeros(mesh: Mesh, tmp_path: Path) -> None:
    storage = write(tmp_path, {"large": jax.device_put(random((256, 128)), NamedSharding(mesh, P("fsdp")))})
    database = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{tmp_path}/0/state/"}).result()
    database.delete_range(ts.KvStore.KeyRange("large/3.0", "large/3.1")).result()
    with pytest.raises(CorruptCheckpointError, match=r"item state: .*large/3\.0"):
        read(storage, {"large": None})


def test_leaves_are_handed_on_while_others_are_read(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more than `_LOCAL_READ_BYTES` are on their way when a leaf is handed on, and each of them comes once."""
    monkeypatch.setattr(array_reader, "_LOCAL_READ_BYTES", 512 << 10)
    arrays = {f"large {index}": random((256, 256)) for index in range(8)} | {"small": random((2, 3))}
    storage = write(tmp_path, arrays)
    asked, handed, ahead = [], [], []
    parts = array_reader._parts
    monkeypatch.setattr(array_reader, "_parts", lambda *args: asked.append(args[0]) or parts(*args))

    def when_read(key: Key, array: Any) -> None:
        item, name = key
        assert item == "state"
        np.testing.assert_array_equal(np.asarray(array), arrays[name])
        handed.append(name)
        ahead.append(len(asked) - sum(one.startswith("large") for one in handed))

    targets = {name: NamedSharding(mesh, P("fsdp")) if index % 2 else None for index, name in enumerate(arrays)}
    targets["small"] = None
    found = read(storage, targets, when_read=when_read)
    assert handed == ["small", *(name for name in arrays if name != "small")]
    assert found.keys() == arrays.keys()
    assert max(ahead) == 2


def test_memory_is_let_go_leaf_by_leaf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the last leaf is being read from its device, all but those of the last two batches are gone."""
    monkeypatch.setattr(array_writer, "_BATCH_BYTES", 256 << 10)
    arrays: dict[str, Any] = {str(index): jnp.full((256, 256), float(index)) for index in range(12)}
    alive = [weakref.ref(array) for array in arrays.values()]
    counts = []
    chunks = array_writer._chunks

    def counted(array: Any, *shapes: Any) -> Any:
        gc.collect()
        counts.append(sum(ref() is not None for ref in alive))
        return chunks(array, *shapes)

    monkeypatch.setattr(array_writer, "_chunks", counted)
    array_writer.write(str(tmp_path), arrays, Traffic(max_host_bytes=512 << 10))
    assert arrays == {}
    assert counts[0] == 12
    assert counts[-1] <= 4, counts


@pytest.mark.parametrize("most", [1 << 16, 1 << 20])
def test_host_memory_is_bounded(most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_writer, "_BATCH_BYTES", most // 2)
    monkeypatch.setattr(array_writer, "_CHUNK_BYTES", most // 4)
    seen = []
    room_for = array_writer._Batches._room_for

    def counted(self: Any, nbytes: int) -> None:
        room_for(self, nbytes)
        seen.append(self._open_bytes())

    monkeypatch.setattr(array_writer._Batches, "_room_for", counted)
    arrays = {str(index): random((256, 256)) for index in range(8)}
    storage = write(tmp_path, arrays, Traffic(max_host_bytes=most))
    assert most // 4 < max(seen) <= most
    found = read(storage, dict.fromkeys(arrays))
    assert all(bits(found[name]) == bits(array) for name, array in arrays.items())


def test_an_error_on_the_way_leaves_no_step_and_no_transaction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_writer, "_BATCH_BYTES", 64 << 10)
    calls = []

    def failing(self: Any, name: str, array: Any) -> None:
        calls.append(name)
        if len(calls) == 3:
            raise OSError("device gone")
        large(self, name, array)

    large = array_writer._Batches.add_large
    monkeypatch.setattr(array_writer._Batches, "add_large", failing)
    arrays = {str(index): random((256, 128)) for index in range(5)}
    with pytest.raises(SaveError, match="OSError: device gone"):
        write(tmp_path, arrays)
    assert open_storage(str(tmp_path)).steps() == []


def test_zstd_is_an_option(tmp_path: Path) -> None:
    zeros = {"zeros": np.zeros((512, 512), np.float32)}
    sizes = {}
    for compressed in (False, True):
        write(tmp_path / str(compressed), zeros, Traffic(compressed))
        files = (tmp_path / str(compressed)).rglob("*")
        sizes[compressed] = sum(file.stat().st_size for file in files if file.is_file())
    assert sizes[True] < 100_000 < zeros["zeros"].nbytes < sizes[False]


def test_a_batch_is_one_data_file(mesh: Mesh, tmp_path: Path) -> None:
    arrays: dict[str, Any] = {str(index): jnp.full((8, 8), float(index)) for index in range(500)}
    arrays |= {
        f"large{index}": jax.device_put(random((256, 128)), NamedSharding(mesh, P("fsdp"))) for index in range(5)
    }
    storage = write(tmp_path, arrays)
    files = [file for file in (tmp_path / "0/state/ocdbt.process_0/d").iterdir() if file.stat().st_size > 100_000]
    assert len(files) <= 3  # small leaves and large ones are asked for one after the other
    database = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{tmp_path}/0/state/"}).result()
    assert {b"7/.zarray", b"7/0.0", b"large3/7.0"} <= set(database.list().result())
    assert storage.steps() == [0]
