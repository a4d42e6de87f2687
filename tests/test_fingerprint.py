"""Fingerprints: what they must find, and that no layout changes them."""

from __future__ import annotations

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
from torchorbax import fingerprint
from torchorbax.dtypes import BY_NAME, fits_on_device, torch_to_host
from torchorbax.fingerprint import fingerprints

from tests.conftest import tensors

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

    def weight(index: int, seed: int) -> int:
        mixed = (index * 0x9E3779B97F4A7C15 + seed) & MASK
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MASK
        return (mixed ^ (mixed >> 31)) | 1

    sums = [sum(word * weight(index, seed) for index, word in enumerate(words)) & MASK for seed in fingerprint._SEEDS]
    return "".join(f"{lane:016x}" for lane in sums)


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


@pytest.mark.parametrize(
    "size", [fingerprint._BLOCK_WORDS - 1, fingerprint._BLOCK_WORDS, 2 * fingerprint._BLOCK_WORDS + 7]
)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_large_host_arrays_in_blocks(size: int, dtype: Any, mesh: Mesh) -> None:
    array = np.random.default_rng(0).integers(0, 200, size).astype(dtype)
    words = fingerprint._words(array)
    assert fingerprint_of(array) == fingerprint.text(fingerprint._word_sums(words, 0))
    if dtype is np.float32:
        assert fingerprint_of(array) == fingerprint_of(jax.device_put(array))


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


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5])
def test_damage_of_several_words(value: float) -> None:
    """Structured damage that simple sums miss: flipped signs, swapped rows, moved blocks, opposite changes."""
    array = np.full((64, 32), value, np.float32)
    array[::3] = np.random.default_rng(0).standard_normal((22, 32), np.float32)
    word = array.view(np.uint32)
    damages = {"none": word.copy()}
    for other in range(1, 32):
        damages[f"two signs {other}"] = flipped = word.copy()
        flipped[0, 0] ^= np.uint32(1 << 31)
        flipped[0, other] ^= np.uint32(1 << 31)
    damages["four signs in a rectangle"] = flipped = word.copy()
    flipped[np.ix_([0, 1], [0, 1])] ^= np.uint32(1 << 31)
    damages["all signs"] = word ^ np.uint32(1 << 31)
    damages["swapped rows"] = word[[1, 0, *range(2, 64)]]
    damages["shifted"] = np.roll(word, 1, axis=0)
    damages["transposed block"] = swapped = word.copy()
    swapped[:32] = word[:32].T
    damages["lost half"] = lost = word.copy()
    lost[32:] = 0
    damages["plus and minus one"] = moved = word.copy()
    moved[0, 0] += np.uint32(1)
    moved[0, 1] -= np.uint32(1)
    found = {name: fingerprint_of(damaged) for name, damaged in damages.items()}
    assert len(set(found.values())) == len(damages), found


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


def test_the_devices_are_not_made_to_talk(mesh_2d: Mesh) -> None:
    mesh = Mesh(mesh_2d.devices.reshape(-1), (fingerprint._AXIS,))
    with jax.enable_x64(True):
        lowered = fingerprint._sums_by_shard(mesh).lower(
            jax.ShapeDtypeStruct((16, 4), np.float32), np.zeros(8, np.uint64), np.ones(2, np.uint64)
        )
    text = lowered.compile().as_text()
    assert "reduce" in text
    for collective in ("all-reduce", "all-gather", "collective-permute", "all-to-all", "reduce-scatter"):
        assert collective not in text
    assert not jax.config.jax_enable_x64
