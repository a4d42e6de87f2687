"""Fingerprints: what they must find, and that no layout changes them."""

from __future__ import annotations

import dataclasses
import math
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from torchorbax._src.arrays import fingerprint
from torchorbax._src.arrays.dtypes import BY_NAME, fits_on_device, torch_to_host
from torchorbax._src.arrays.fingerprint import fingerprints
from torchorbax._src.arrays.shards import HostShards, shards

from tests.helpers.tensors import tensors

MASK = 2**64 - 1


@pytest.fixture(autouse=True)
def _on_devices_however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small arrays are as good as large ones for most of these tests, but would be summed on the host."""
    monkeypatch.setattr(fingerprint, "_SMALL_BYTES", 0)


def fingerprint_of(array: Any) -> str:
    return fingerprints({"array": array})["array"]


def by_definition(array: np.ndarray) -> str:
    """The sums of the module's docstring, in Python's own integers."""
    size = min(array.dtype.itemsize, 4)
    data = array.tobytes()
    words = [int.from_bytes(data[start : start + size], "little") for start in range(0, len(data), size)]
    shape = array.shape or (1,)
    if array.dtype.itemsize > size:
        shape = (*shape, array.dtype.itemsize // size)
    axes = 0  # so many count columns
    while axes < len(shape) - 1 and math.prod(shape[len(shape) - axes :]) < 128:
        if math.prod(shape[len(shape) - axes - 1 :]) > 2**17:
            break
        axes += 1
    columns = math.prod(shape[len(shape) - axes :])

    def hashed(index: int, seed: int) -> int:
        mixed = (index * 0x9E3779B97F4A7C15 + seed) & MASK
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MASK
        return mixed ^ (mixed >> 31)

    sums = [0, 0]
    for lane, (shift, seed) in enumerate([(32, 0x13198A2E03707344), (0, 0xA4093822299F31D0)]):
        for index, word in enumerate(words):
            row, column = divmod(index, columns)
            of_column = hashed(column, 0x243F6A8885A308D3) >> shift & 0xFFFFFFFF | 1
            sums[lane] += word * of_column * (hashed(row, seed) | 1)
    return "".join(f"{lane & MASK:016x}" for lane in sums)


@given(tensors())
def test_host_arrays_of_every_dtype_as_defined(tensor: torch.Tensor) -> None:
    array = torch_to_host(tensor)
    assert fingerprint_of(array) == by_definition(array)


@pytest.mark.parametrize("dtype", sorted(BY_NAME))
@pytest.mark.parametrize("x64", [False, True])
def test_device_arrays_of_every_dtype_as_the_host_s(dtype: str, x64: bool, mesh: Mesh) -> None:
    jax.config.update("jax_enable_x64", x64)
    if not fits_on_device(BY_NAME[dtype]):
        return
    raw = np.random.default_rng(0).integers(0, 256, 16 * 6 * BY_NAME[dtype].itemsize, np.uint8)
    array = (raw & 1 if dtype == "bool" else raw).view(BY_NAME[dtype]).reshape(16, 6)
    assert fingerprint_of(jax.device_put(array, NamedSharding(mesh, P("fsdp")))) == by_definition(array)
    assert fingerprint_of(jax.device_put(array[0, 0])) == by_definition(array[0, 0])
    assert fingerprint_of(jax.device_put(array[:0])) == by_definition(array[:0])


LAYOUTS = [P(), P("fsdp"), P(None, "tp"), P("tp", "fsdp"), P(("fsdp", "tp")), P(None, ("tp", "fsdp"), None)]


@pytest.mark.parametrize("spec", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16, jnp.int8, jnp.complex64], ids=lambda dtype: dtype.__name__
)
def test_no_layout_changes_it(spec: P, dtype: Any, mesh_2d: Mesh) -> None:
    bits = np.random.default_rng(0).integers(0, 256, 16 * 8 * 3 * np.dtype(dtype).itemsize, np.uint8)
    array = bits.view(np.dtype(dtype)).reshape(16, 8, 3)
    assert fingerprint_of(jax.device_put(array, NamedSharding(mesh_2d, spec))) == by_definition(array)


def test_one_device_another_device_and_several_meshes(mesh: Mesh, mesh_2d: Mesh) -> None:
    array = np.random.default_rng(0).standard_normal((64, 8), np.float32)
    backwards = Mesh(mesh.devices[::-1], ("fsdp",))
    placed = [
        jax.device_put(array),
        jax.device_put(array, SingleDeviceSharding(jax.devices()[5])),
        jax.device_put(array, NamedSharding(backwards, P("fsdp"))),
        jax.device_put(array, NamedSharding(mesh_2d, P("tp"))),
        np.asfortranarray(array),
    ]
    assert {fingerprint_of(one) for one in placed} == {by_definition(array)}


SHAPES = {
    "vector": ((4096,), P("fsdp"), 1),
    "matrix": ((64, 96), P("tp", "fsdp"), 1),
    "kernels: columns are several axes": ((8, 16, 3, 3), P("fsdp", "tp"), 1),
    "a stack of matrices": ((4, 8, 160), P("fsdp", None, "tp"), 2),
    "trailing axes too long for a table together": ((4, 2**14, 16), P(None, "fsdp"), 2),
    "a last axis too long for a table": ((2, 2**17 + 8), P("tp", "fsdp"), 2),
    "no trailing axis": ((128, 1), P("fsdp"), 1),
}


@pytest.mark.parametrize("name", SHAPES)
def test_rows_and_columns_of_every_shape(name: str, mesh_2d: Mesh) -> None:
    shape, spec, split = SHAPES[name]
    assert fingerprint._split(shape) == split
    array = np.random.default_rng(0).integers(0, 2**16, shape, np.uint16)
    found = {fingerprint_of(array), fingerprint_of(jax.device_put(array, NamedSharding(mesh_2d, spec)))}
    assert found == {by_definition(array)}


@pytest.mark.parametrize(("blocks", "more"), [(0, 3), (1, 0), (1, 1), (3, 7)])
@pytest.mark.parametrize("columns", [1, 5, 256])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_large_host_arrays_in_blocks(
    blocks: int, more: int, columns: int, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is summed by a program and whatever by numpy."""
    monkeypatch.setattr(fingerprint, "_BLOCK_WORDS", 1 << 10)
    monkeypatch.setattr(fingerprint, "_CACHED_WORDS", 1 << 6)
    height = (1 << 10) // columns
    array = np.random.default_rng(0).integers(0, 200, (blocks * height + more, columns)).astype(dtype)
    assert fingerprint_of(array) == by_definition(array)


def test_no_weight_of_a_table_is_even() -> None:
    """And all pairs of them differ, so no two columns can be swapped unseen."""
    weights = fingerprint._column_weights((0,), (fingerprint._MOST_COLUMNS,), (fingerprint._MOST_COLUMNS,))
    assert weights.shape == (2, fingerprint._MOST_COLUMNS)
    assert weights.dtype == np.uint32
    assert (weights & 1).all()
    assert len(np.unique(weights, axis=1).T) == fingerprint._MOST_COLUMNS


@given(st.data(), tensors())
def test_any_flipped_bit_is_found(data: st.DataObject, tensor: torch.Tensor) -> None:
    array = torch_to_host(tensor)
    if not array.size:
        return
    damaged = bytearray(array.tobytes())
    bit = data.draw(st.integers(0, 8 * len(damaged) - 1))
    damaged[bit // 8] ^= 1 << bit % 8
    assert fingerprint_of(np.frombuffer(bytes(damaged), array.dtype).reshape(array.shape)) != fingerprint_of(array)


def test_every_single_bit_of_an_array_on_devices(mesh: Mesh) -> None:
    """What damage within one word adds to a sum is never 0: an odd weight times less than 2**32."""
    array = np.random.default_rng(0).standard_normal((16, 4), np.float32)
    before = fingerprint_of(array)
    for bit in range(32 * array.size):
        damaged = array.copy()
        damaged.reshape(-1).view(np.uint32)[bit // 32] ^= np.uint32(1 << bit % 32)
        assert fingerprint_of(damaged) != before


def damages(word: np.ndarray) -> dict[str, np.ndarray]:
    """Structured damage of a `uint32[64, 32]` that simple sums miss."""
    sign = np.uint32(1 << 31)
    found = {"none": word.copy(), "all signs": word ^ sign}
    for other in range(1, 32):
        found[f"two signs of a row {other}"] = flipped = word.copy()
        flipped[0, [0, other]] ^= sign
        found[f"two signs of a column {other}"] = flipped = word.copy()
        flipped[[0, other], 0] ^= sign
        found[f"four signs in a rectangle {other}"] = flipped = word.copy()
        flipped[np.ix_([0, other], [0, other])] ^= sign
        found[f"opposite changes in a rectangle {other}"] = moved = word.copy()
        moved[np.ix_([0, other], [0, other])] += np.array([[1, 0xFFFFFFFF], [0xFFFFFFFF, 1]], np.uint32)
    orders = {"swapped": [1, 0, *range(2, 32)], "reversed": [*reversed(range(32))], "shifted": [31, *range(31)]}
    for name, order in orders.items():
        found[f"{name} rows"] = word[[*order, *range(32, 64)]]
        found[f"{name} columns"] = word[:, order]
    found["shifted by a row"] = np.roll(word, 1, axis=0)
    found["shifted by a word"] = np.roll(word.reshape(-1), 1).reshape(word.shape)
    found["transposed block"] = swapped = word.copy()
    swapped[:32] = word[:32].T
    found["swapped blocks"] = word[[*range(32, 64), *range(32)]]
    found["lost half"] = lost = word.copy()
    lost[32:] = 0
    found["zeros and data swapped"] = lost[[*range(32, 64), *range(32)]]
    found["plus and minus one"] = moved = word.copy()
    moved[0, 0] += np.uint32(1)
    moved[0, 1] -= np.uint32(1)
    return found


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5])
@pytest.mark.parametrize("columns", [1, 32, 2048], ids="{} columns".format)
def test_damage_of_several_words(value: float, columns: int) -> None:
    array = np.full((64, 32), value, np.float32)
    array[::3] = np.random.default_rng(0).standard_normal((22, 32), np.float32)
    array[::3, 7] = array[::3, 1] + 1  # no column is like another
    shape = {1: (2048,), 32: (16, 4, 1, 32), 2048: (1, 2048)}[columns]
    cut = {32: 1 << 6}.get(columns, fingerprint._MOST_COLUMNS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fingerprint, "_MOST_COLUMNS", cut)
        assert math.prod(shape[fingerprint._split(shape) :]) == columns
        found = {name: fingerprint_of(one.reshape(shape)) for name, one in damages(array.view(np.uint32)).items()}
    assert len(set(found.values())) == len(found), found


@pytest.mark.parametrize("lane", [0, 1])
@pytest.mark.parametrize("bit", [0, 31], ids=["lowest bits", "signs"])
def test_each_sum_alone_misses_no_more_than_chance(lane: int, bit: int) -> None:
    """A hundred thousand random small changes of the worst kind; the bound for one sum is 2**-25 each."""
    rng = np.random.default_rng(lane)
    rows, columns = rng.integers(0, 1 << 20, (2, 100_000, 4), np.uint64)
    rows[:, 1], rows[:, 3] = rows[:, 0], rows[:, 2]  # rectangles
    columns %= fingerprint._MOST_COLUMNS
    columns[:, 2:] = columns[:, :2]
    used = (rows[:, 0] != rows[:, 2]) & (columns[:, 0] != columns[:, 1])
    table = fingerprint._column_weights((0,), (fingerprint._MOST_COLUMNS,), (fingerprint._MOST_COLUMNS,))
    weights = table[lane].astype(np.uint64)[columns] * fingerprint._row_weights(rows, fingerprint._ROW_SEEDS[lane])
    changes = rng.choice(np.array([1 << bit, -(1 << bit)]), rows.shape)
    assert np.all(np.sum(weights * changes.astype(np.uint64), axis=1, dtype=np.uint64)[used] != 0)


@pytest.mark.parametrize("spec", LAYOUTS[:5], ids=str)
def test_small_arrays_are_summed_on_the_host(
    spec: P, mesh_2d: Mesh, monkeypatch: pytest.MonkeyPatch, compilations: list[str]
) -> None:
    array = np.random.default_rng(0).standard_normal((16, 8), np.float32)
    placed = jax.device_put(array, NamedSharding(mesh_2d, spec))
    del compilations[:]
    monkeypatch.setattr(fingerprint, "_SMALL_BYTES", array.nbytes)
    assert fingerprint_of(placed) == by_definition(array)
    assert not compilations
    monkeypatch.setattr(fingerprint, "_SMALL_BYTES", array.nbytes - 1)
    assert fingerprint_of(placed) == by_definition(array)


def test_one_program_for_all_layouts_of_a_shard(mesh: Mesh, mesh_2d: Mesh, compilations: list[str]) -> None:
    """What is compiled depends on the shape of a shard alone: not on the array's, nor on where its parts are."""
    shapes = {(64, 8): P("fsdp"), (8, 64): P(None, "fsdp")}
    places = [NamedSharding(mesh, spec) for spec in shapes.values()]
    arrays = {
        shape: jax.device_put(np.ones(shape, np.float32), place) for shape, place in zip(shapes, places, strict=True)
    }
    fingerprints(arrays)
    assert compilations == ["_shard_sums"]
    del compilations[:]
    fingerprints({"again": jax.device_put(np.zeros((64, 8), np.float32), places[0])})
    fingerprints({"of a larger array": jax.device_put(np.zeros((8, 64), np.float32), places[1])})
    assert not compilations


@pytest.mark.parametrize("spec", [P("fsdp"), P(None, "fsdp"), P(None, None, "fsdp")], ids=str)
def test_whoever_waits_for_sums_of_host_memory_does_not_hold_it(spec: P, mesh: Mesh) -> None:
    placed = jax.device_put(np.ones((64, 8, 4096), np.float32), NamedSharding(mesh, spec))
    copies = tuple(dataclasses.replace(one, data=np.array(one.data)) for one in shards(placed))
    alive = [weakref.ref(one.data) for one in copies]
    finish = fingerprint.start(HostShards(placed.shape, np.dtype(np.float32), placed.sharding, copies))
    del copies
    assert finish().any()
    assert [ref() for ref in alive] == [None] * 8
    assert fingerprint.text(finish()) == fingerprint_of(placed)


@pytest.mark.parametrize("spec", [P("fsdp"), P("tp"), P(None, "tp"), P()], ids=str)
def test_arrays_alike_are_summed_by_one_program(
    spec: P, mesh_2d: Mesh, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "_SMALL_BYTES", 0)
    rng = np.random.default_rng(0)
    hosts = {
        f"{dtype}.{index}": rng.integers(0, 1 << 16, (16, 24)).astype(dtype)
        for index in range(19)  # two programs of eight, and three by themselves
        for dtype in ("float32", "bfloat16", "int8", "complex64")
    }
    arrays = {name: jax.device_put(host, NamedSharding(mesh_2d, spec)) for name, host in hosts.items()}
    assert sorted(map(len, fingerprint.batches(arrays))) == [*[1] * (3 * 3 + 19), *[8] * (3 * 2)]
    del compilations[:]
    found = fingerprints(arrays)
    assert list(found) == list(arrays)
    assert found == {name: by_definition(host) for name, host in hosts.items()}
    assert compilations.count("_shard_sums") <= 3 * 2
    monkeypatch.setattr(fingerprint, "_AT_ONCE_BYTES", 0)
    assert set(map(len, fingerprint.batches(arrays))) == {1}


def test_the_devices_are_not_made_to_talk(mesh_2d: Mesh) -> None:
    mesh = Mesh(mesh_2d.devices.reshape(-1), (fingerprint.AXIS,))
    with jax.enable_x64(True):
        places = fingerprint._positions(mesh, (16, 4), (2, 4), tuple((2 * shard, 0) for shard in range(8)))
        lowered = fingerprint._sums_by_shard(mesh).lower([jax.ShapeDtypeStruct((16, 4), np.float32)], *places)
    text = lowered.compile().as_text()
    assert "reduce" in text
    for collective in ("all-reduce", "all-gather", "collective-permute", "all-to-all", "reduce-scatter"):
        assert collective not in text
    assert not jax.config.jax_enable_x64
