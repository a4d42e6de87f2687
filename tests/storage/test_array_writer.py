"""Arrays on storage: bit for bit on any layout, readable by plain Orbax, in bounded memory."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from torchorbax import SaveError
from torchorbax._src.arrays.dtypes import BY_NAME, fits_on_device
from torchorbax._src.arrays.fingerprint import fingerprints
from torchorbax._src.storage import array_reader, array_writer
from torchorbax._src.storage.opening import open_storage
from torchorbax._src.storage.traffic import Traffic

from tests.helpers.steps import random, read, write
from tests.helpers.tensors import bits


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


@pytest.mark.parametrize("rows", [1, 256], ids=["small", "large"])
@pytest.mark.parametrize("names", [[""], ["", "a"], ["", "0"], ["a.", ".a", "a/", "/a", "."]], ids=repr)
def test_any_name(names: list[str], rows: int, mesh: Mesh, tmp_path: Path) -> None:
    """A bare tensor has none, and the key of a dict may be empty."""
    arrays = {name: jnp.asarray(random((rows, 512))) + index for index, name in enumerate(names)}
    storage = write(tmp_path, arrays)
    found = read(storage, dict.fromkeys(names))
    assert {name: bits(array) for name, array in found.items()} == {name: bits(arrays[name]) for name in names}


LAYOUTS = [P(), P("fsdp"), P(None, "tp"), P("tp", "fsdp"), P(("fsdp", "tp"))]


@pytest.mark.parametrize("whole_bytes", [1, 1 << 30], ids=["by shards", "whole"])
@pytest.mark.parametrize("spec", LAYOUTS, ids=str)
def test_any_layout_to_any_other(
    spec: P, whole_bytes: int, mesh_2d: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(array_reader, "BATCH_BYTES", whole_bytes)
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
        patch.setattr(array_writer, "CHUNK_BYTES", most)
        chunk = array_writer._chunk_shape(shape, 4)
    assert all(size % part == 0 for size, part in zip(shape, chunk, strict=True))
    assert np.prod(chunk, dtype=int) * 4 <= max(most, 4)
    if np.prod(shape, dtype=int) * 4 <= most:
        assert chunk == shape


def test_shards_larger_than_a_chunk(mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_writer, "CHUNK_BYTES", 20_000)
    host = random((256, 6, 30))
    array = jax.device_put(host, NamedSharding(mesh, P("fsdp")))
    storage = write(tmp_path, {"array": array, "host": host})
    found = read(storage, {"array": array.sharding, "host": None})
    assert bits(found["array"]) == bits(found["host"]) == bits(host)


def test_memory_is_let_go_leaf_by_leaf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the last leaf is being read from its device, all but those of the last two batches are gone."""
    monkeypatch.setattr(array_writer, "BATCH_BYTES", 256 << 10)
    arrays: dict[Any, Any] = {("item", str(index)): jnp.full((256, 256), float(index)) for index in range(12)}
    alive = [weakref.ref(array) for array in arrays.values()]
    counts = []
    chunks = array_writer._chunks

    def counted(array: Any, *shapes: Any) -> Any:
        gc.collect()
        counts.append(sum(ref() is not None for ref in alive))
        return chunks(array, *shapes)

    monkeypatch.setattr(array_writer, "_chunks", counted)
    array_writer.write({"item": str(tmp_path)}, arrays, Traffic(max_host_bytes=512 << 10))
    assert arrays == {}
    assert counts[0] == 12
    assert counts[-1] <= 4, counts


@pytest.mark.parametrize("most", [1 << 16, 1 << 20])
def test_host_memory_is_bounded(most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_writer, "BATCH_BYTES", most // 2)
    monkeypatch.setattr(array_writer, "CHUNK_BYTES", most // 4)
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
    monkeypatch.setattr(array_writer, "BATCH_BYTES", 64 << 10)
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
    files = [file for file in (tmp_path / "0/state/d").iterdir() if file.stat().st_size > 100_000]
    assert len(files) <= 3  # small leaves and large ones are asked for one after the other
    database = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{tmp_path}/0/state/"}).result()
    assert {b"7/.zarray", b"7/0.0", b"large3/7.0"} <= set(database.list().result())
    assert storage.steps() == [0]
