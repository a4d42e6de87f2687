"""A snapshot holds the values of its moment, whatever the loop does next, and takes them without reading the device."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from torchorbax import ConfigError, DeletedArrayError, UnsupportedLeafError, to_jax
from torchorbax._src.format.manifest import LeafMeta
from torchorbax._src.save import snapshot
from torchorbax._src.state.item import Captured
from torchorbax._src.tensors import torchax_tensors as _torchax

from tests.helpers.tensors import DTYPES, WIDE, aligned, bits, tensors

STAGINGS = ["auto", "device", "reference", "host"]


def take(leaves: Mapping[str, Any], staging: Any = "device") -> Mapping[str, Any]:
    return by_name(snapshot.take({"state": Captured("pytree", leaves)}, staging))


def by_name(taken: snapshot.Snapshot) -> dict[str, Any]:
    """The arrays of a snapshot of one item."""
    return {name: array for (_, name), array in taken.arrays.items()}


donate = jax.jit(lambda arrays: [~array for array in arrays], donate_argnums=0)
"""Uses the memory of its arguments (integers) for its results."""


@given(leaves=st.lists(tensors([dtype for dtype in DTYPES if dtype not in WIDE]), max_size=4))
@pytest.mark.parametrize("staging", ["auto", "device", "host"])
def test_every_bit_is_kept(staging: str, leaves: list[torch.Tensor]) -> None:
    """The device copy runs through XLA, which must not tidy up NaNs."""
    arrays = {str(index): to_jax(leaf) for index, leaf in enumerate(leaves)}
    taken = take(arrays, staging)
    for name, leaf in zip(arrays, leaves, strict=True):
        assert bits(taken[name]) == bits(leaf)
        arrays[name].delete()
        assert bits(taken[name]) == bits(leaf)
        assert taken[name].dtype == str(leaf.dtype).removeprefix("torch.")


@pytest.mark.parametrize("staging", ["auto", "device", "host"])
def test_donation_after_the_snapshot_does_not_reach_it(staging: str, mesh: Mesh) -> None:
    arrays = [
        jax.device_put(jnp.arange(1024, dtype=jnp.int32), sharding)
        for sharding in (NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P()))
    ]
    tensor = _torchax.wrap(arrays[0])
    taken = take({"tensor": tensor, "raw": arrays[1]}, staging)
    inverted = donate(arrays)
    assert all(array.is_deleted() for array in arrays)
    assert inverted[0].tolist() == [~value for value in range(1024)]
    for array in taken.values():
        assert np.asarray(array).tolist() == list(range(1024))


def test_copies_stay_where_the_arrays_are(mesh: Mesh, mesh_2d: Mesh) -> None:
    """Also of several meshes over the same devices, which need not have them in the same order."""
    backwards = Mesh(mesh.devices[::-1], ("fsdp",))
    places: dict[str, Any] = {
        "sharded": NamedSharding(mesh, P("fsdp")),
        "transposed": NamedSharding(mesh, P(None, "fsdp")),
        "replicated": NamedSharding(mesh, P()),
        "two axes": NamedSharding(mesh_2d, P("tp", "fsdp")),
        "backwards": NamedSharding(backwards, P("fsdp")),
        "one device": SingleDeviceSharding(jax.devices()[3]),
        "uncommitted": None,
    }
    values = np.arange(1 << 16, dtype=np.float32).reshape(256, 256)
    arrays = {name: jax.device_put(values, place) for name, place in places.items()}
    for name, copy in take(arrays).items():
        assert copy is not arrays[name]
        assert copy.sharding.is_equivalent_to(arrays[name].sharding, 2), name
        assert [shard.device for shard in copy.addressable_shards] == [
            shard.device for shard in arrays[name].addressable_shards
        ]
        assert copy.committed == arrays[name].committed
        assert np.array_equal(copy, values)


def test_references_share_the_array_and_show_a_donation() -> None:
    array = jnp.arange(8)
    taken = take({"tensor": _torchax.wrap(array), "raw": array}, "reference")
    assert taken["tensor"] is taken["raw"] is array
    donate([array])
    assert taken["raw"].is_deleted(), "so that saving it fails, and never stores anything else"


def test_host_staging_gives_numpy_in_memory_of_its_own(mesh: Mesh) -> None:
    array = jax.device_put(jnp.arange(16.0), NamedSharding(mesh, P("fsdp")))
    single = jnp.arange(16.0)
    taken = take({"sharded": array, "tensor": _torchax.wrap(single), "cpu": torch.ones(2)}, "host")
    assert all(type(array) is np.ndarray for array in taken.values())
    assert taken["sharded"].tolist() == list(range(16))
    assert not np.shares_memory(taken["tensor"], np.asarray(single))


@pytest.mark.parametrize("staging", STAGINGS)
def test_host_memory_is_copied_at_once(staging: str) -> None:
    numpy = aligned(np.ones(1024))
    live = {
        "numpy": numpy,
        "torch": torch.ones(1024),
        "parameter": torch.nn.Parameter(torch.ones(4)),
        "scalar": np.float64(1),
    }
    taken = take(live, staging)
    numpy[:] = 7
    live["torch"].fill_(7)
    live["parameter"].data.fill_(7)
    assert all(type(array) is np.ndarray and np.all(array == 1) for array in taken.values())
    assert taken["numpy"].dtype == np.float64
    assert taken["scalar"].shape == ()


@contextlib.contextmanager
def nothing_read_from_devices(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """JAX's own guard does nothing on its CPU backend, where there is no transfer; so values are guarded as well."""

    def read(array: Any) -> Any:
        raise AssertionError("an array has been read from its device")

    with jax.transfer_guard_device_to_host("disallow"), patch.context() as inner:
        inner.setattr(type(jnp.zeros(())), "_value", property(read))
        inner.setattr(type(jnp.zeros(())), "block_until_ready", read)
        yield


@pytest.mark.parametrize("staging", ["auto", "device", "reference"])
def test_nothing_is_read_from_the_devices(staging: str, mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    live = {
        "sharded": jax.device_put(jnp.arange(16.0), NamedSharding(mesh, P("fsdp"))),
        "tensor": _torchax.wrap(jnp.arange(4)),
        "host": torch.ones(2),
    }
    with nothing_read_from_devices(monkeypatch):
        taken = take(live, staging)
    assert np.asarray(taken["sharded"]).tolist() == list(range(16))
    with nothing_read_from_devices(monkeypatch), pytest.raises(AssertionError, match="read from its device"):
        take(live, "host")


@pytest.mark.parametrize("staging", STAGINGS)
def test_deleted_arrays_are_all_named(staging: Any) -> None:
    def gone() -> jax.Array:
        array = jnp.zeros(3)
        array.delete()
        return array

    model = Captured("module", {"weight": _torchax.wrap(gone()), "bias": torch.ones(2)})
    optimizer = Captured("optax", {"weight.mu": gone(), "count": jnp.zeros(())})
    with pytest.raises(DeletedArrayError, match="2 array") as caught:
        snapshot.take({"model": model, "optimizer": optimizer}, staging)
    assert set(caught.value.names) == {"model.weight", "optimizer.weight.mu"}


@pytest.mark.parametrize("leaf", [torch.empty(2, device="meta"), np.array([object()]), torch.eye(2).to_sparse()])
def test_what_cannot_be_saved_is_named_with_its_item(leaf: Any) -> None:
    with pytest.raises(UnsupportedLeafError, match=r"^model\.bias: ") as caught:
        snapshot.take({"model": Captured("module", {"weight": jnp.ones(2), "bias": leaf})}, "device")
    assert caught.value.name == "model.bias"


@pytest.mark.parametrize("staging", STAGINGS)
def test_the_manifest_tells_where_values_lived_not_where_they_are_staged(staging: Any, mesh: Mesh) -> None:
    leaves = {
        "sharded": _torchax.wrap(jax.device_put(jnp.zeros((8, 2), jnp.bfloat16), NamedSharding(mesh, P("fsdp")))),
        "single": jnp.zeros((), jnp.int32),
        "cpu": torch.zeros(0, 3, dtype=torch.float64),
    }
    taken = snapshot.take({"model": Captured("module", leaves, {"alias": "single"}, {"epoch": 3})}, staging)
    meta = taken.items["model"]
    assert meta.leaves == {
        "sharded": LeafMeta((8, 2), "bfloat16", "jax", {"mesh": {"fsdp": 8}, "spec": ["fsdp"]}),
        "single": LeafMeta((), "int32", "jax"),
        "cpu": LeafMeta((0, 3), "float64", "host"),
    }
    assert (meta.kind, meta.ties, meta.values) == ("module", {"alias": "single"}, {"epoch": 3})
    assert {name: (array.shape, str(array.dtype)) for name, array in by_name(taken).items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in meta.leaves.items()
    }


def test_bytes_count_once_however_many_devices_hold_them(mesh: Mesh) -> None:
    replicated = jax.device_put(jnp.zeros(100, jnp.float32), NamedSharding(mesh, P()))
    captured = {"a": Captured("pytree", {"x": replicated}), "b": Captured("pytree", {"y": torch.zeros(3)})}
    assert snapshot.take(captured, "device").nbytes == 412


def test_nothing_to_save() -> None:
    assert snapshot.take({}, "device").nbytes == 0
    assert take({}) == {}


def test_staging_is_one_of_four() -> None:
    assert [snapshot.check_staging(staging) for staging in STAGINGS] == STAGINGS
    for wrong in ("Device", "", None, "gpu"):
        with pytest.raises(ConfigError, match="staging must be one of 'auto', 'reference', 'device', 'host', not "):
            snapshot.check_staging(wrong)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------ views and full devices


def test_large_arrays_on_cpu_devices_are_viewed_not_copied(mesh: Mesh, compilations: list[str]) -> None:
    """Where a view would wait for what is being computed, and where it costs more than a copy, there is a copy."""
    sharding = NamedSharding(mesh, P("fsdp"))
    large = jax.block_until_ready(jax.device_put(jnp.arange(1 << 18, dtype=jnp.int32), sharding) + 0)
    small = jax.block_until_ready(jax.device_put(jnp.arange(64 << 10, dtype=jnp.int32), sharding) + 0)
    tiny = jax.block_until_ready(jax.device_put(jnp.arange(64, dtype=jnp.int32), sharding) + 0)
    del compilations[:]
    expected = bits(large)
    taken = snapshot.take({"state": Captured("pytree", {"large": large})}, "auto")
    assert compilations == []
    memory = {shard.data.unsafe_buffer_pointer() for shard in large.addressable_shards}
    donate([large])
    found = taken.arrays["state", "large"]
    assert {shard.data.unsafe_buffer_pointer() for shard in found.addressable_shards} == memory
    assert bits(found) == expected
    assert found.sharding == sharding
    del compilations[:]
    snapshot.take({"state": Captured("pytree", {"small": small})}, "auto")
    assert compilations == ["_copy"]
    del compilations[:]
    snapshot.take({"state": Captured("pytree", {"tiny": tiny})}, "auto")
    assert compilations == ["stack"]


def test_a_viewed_array_may_be_deleted(mesh: Mesh) -> None:
    """Whoever makes room by hand deletes arrays that are no longer needed."""
    array = jax.block_until_ready(jax.device_put(jnp.arange(1 << 18), NamedSharding(mesh, P("fsdp"))) + 0)
    expected = bits(array)
    taken = snapshot.take({"state": Captured("pytree", {"array": array})}, "auto")
    array.delete()
    assert bits(taken.arrays["state", "array"]) == expected


def test_nothing_is_waited_for(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    array = jax.device_put(jnp.arange(1 << 18, dtype=jnp.int32), NamedSharding(mesh, P("fsdp")))
    monkeypatch.setattr(type(array), "is_ready", lambda self: False)
    with nothing_read_from_devices(monkeypatch):
        taken = snapshot.take({"state": Captured("pytree", {"array": array})}, "auto").arrays["state", "array"]
    assert bits(taken) == bits(array)
    pointers = [{shard.data.unsafe_buffer_pointer() for shard in one.addressable_shards} for one in (taken, array)]
    assert not pointers[0] & pointers[1], "a copy"


def test_what_devices_have_no_room_for_goes_to_the_host(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A step needs what was in use at most before the first snapshot; what is left above takes copies in order."""
    sharding = NamedSharding(mesh, P("fsdp"))
    stats = {"bytes_limit": 400_000, "bytes_in_use": 40_000, "peak_bytes_in_use": 340_000}
    full = mesh.devices.flat[5]
    real = type(full).memory_stats
    monkeypatch.setattr(type(full), "memory_stats", lambda self: stats if self is full else real(self))
    snapshot._loop_peak.cache_clear()
    snapshot._warn_of_full_devices.cache_clear()
    leaves = {str(index): jax.device_put(jnp.full(8 * 4000, index, jnp.int32), sharding) for index in range(4)}
    for _ in range(2):
        taken = by_name(snapshot.take({"state": Captured("pytree", leaves)}, "device"))
        assert [type(taken[name]) is np.ndarray for name in leaves] == [False, False, True, True]
        assert {name: bits(array) for name, array in taken.items()} == {name: bits(leaves[name]) for name in leaves}
        stats["peak_bytes_in_use"] = 396_000  # with our own copies
    assert [record.message for record in caplog.records if "no room" in record.message] == [caplog.records[0].message]
    snapshot._loop_peak.cache_clear()
    snapshot._warn_of_full_devices.cache_clear()


def test_a_snapshot_keeps_no_live_array_alive(mesh: Mesh) -> None:
    array = jax.device_put(jnp.arange(1 << 18, dtype=jnp.int32), NamedSharding(mesh, P("fsdp")))
    alive = weakref.ref(array)
    taken = snapshot.take({"state": Captured("pytree", {"array": array})}, "device")
    assert taken.items["state"].leaves["array"].shape == array.shape
    del array
    gc.collect()
    assert alive() is None
    assert taken.nbytes == 4 << 18


@pytest.mark.parametrize("size", [16, 1 << 15], ids=["stacked", "copied"])
@pytest.mark.parametrize("count", [1, 3, 4, 5, 16, 63, 64, 65, 150])
def test_copies_of_many_arrays_alike(count: int, size: int, mesh: Mesh) -> None:
    layout = NamedSharding(mesh, P("fsdp"))
    leaves = {str(at): jax.device_put(np.full(size, at, np.float32), layout) for at in range(count)}
    leaves["other"] = jnp.arange(3)
    taken = take(leaves, "device")
    assert {name: bits(array) for name, array in taken.items()} == {name: bits(one) for name, one in leaves.items()}


def test_after_prepare_the_first_snapshot_compiles_and_traces_nothing(
    mesh: Mesh, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = NamedSharding(mesh, P("fsdp"))
    leaves = {str(at): jax.device_put(np.full((16, 7), at, np.float32), layout) for at in range(21)}
    leaves["large"] = jax.device_put(np.zeros((16, 2048), np.float32), layout)
    snapshot.prepare({"state": Captured("pytree", leaves)}, "auto")
    for thread in threading.enumerate():
        if thread.name == "torchorbax-prepare":
            thread.join()
    assert {"_copy", "stack"} <= set(compilations)
    compilations.clear()
    moments = {f"{name}.{at}": array for name, array in leaves.items() for at in range(3)}  # as an optimizer adds them
    with monkeypatch.context() as nothing_traced:
        nothing_traced.setattr(jnp, "copy", None)
        nothing_traced.setattr(jnp, "stack", None)
        taken = by_name(snapshot.take({"state": Captured("pytree", moments)}, "auto"))
    assert compilations == []
    assert {name: bits(array) for name, array in taken.items()} == {name: bits(one) for name, one in moments.items()}


@pytest.mark.parametrize("size", [8, 300], ids=["stacked", "copied"])
def test_arrays_that_lie_otherwise_in_memory_than_those_prepared_for(size: int) -> None:
    """As a program may leave them that was free to choose."""
    values = np.arange(size * size, dtype=np.float32).reshape(size, size)
    by_rows = jax.device_put(values, jax.devices()[0])
    by_columns = jax.device_put(values, Format(Layout(major_to_minor=(1, 0)), by_rows.sharding))
    snapshot.prepare({"state": Captured("pytree", {"array": by_rows})}, "device")
    for thread in threading.enumerate():
        if thread.name == "torchorbax-prepare":
            thread.join()
    assert bits(take({"array": by_rows})["array"]) == bits(take({"array": by_columns})["array"]) == values.tobytes()


@pytest.mark.parametrize("spec", [P(), P("fsdp"), P(None, "fsdp")])
@pytest.mark.parametrize("order", [range(8), (3, 1, 0, 2, 7, 6, 5, 4)])
@pytest.mark.parametrize("staging", ["auto", "device"])
def test_every_device_has_its_part(spec: P, order: Any, staging: str) -> None:
    devices = np.array(jax.devices())[list(order)]
    values = np.random.default_rng(0).standard_normal((256, 1024), np.float32)
    array = jax.device_put(values, NamedSharding(Mesh(devices, ("fsdp",)), spec))
    jax.block_until_ready(array)
    (taken,) = take({"array": array}, staging).values()
    assert taken.sharding == array.sharding
    for one, other in zip(taken.addressable_shards, array.addressable_shards, strict=True):
        assert (one.device, one.index) == (other.device, other.index)
        assert bits(one.data) == bits(other.data)
