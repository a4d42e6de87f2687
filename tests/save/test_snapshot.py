"""A snapshot holds the values of its moment, whatever the loop does next, and takes them without reading the device."""

from __future__ import annotations

import gc
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
from torchorbax import DeletedArrayError, UnsupportedLeafError, to_jax
from torchorbax._src.format.manifest import LeafMeta
from torchorbax._src.save import snapshot
from torchorbax._src.state.item import Captured
from torchorbax._src.tensors import torchax_tensors as _torchax

from tests.helpers.snapshots import STAGINGS, by_name, donate, nothing_read_from_devices, take
from tests.helpers.tensors import DTYPES, WIDE, aligned, bits, tensors


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


@pytest.mark.parametrize("staging", STAGINGS)
def test_it_describes_what_it_holds_whatever_becomes_of_the_live_objects(staging: Any, mesh: Mesh) -> None:
    """The descriptions are made on the saving thread, by when the loop may have cast or replaced what is live."""
    place = NamedSharding(mesh, P("fsdp"))
    leaves: dict[str, Any] = {
        "cast": torch.nn.Parameter(torch.ones(2, 3)),
        "resized": torch.ones(4),
        "array": np.ones(4, np.float32),
        "torchax": _torchax.wrap(jax.device_put(jnp.ones(8), place)),
    }
    taken = snapshot.take({"model": Captured("module", leaves)}, staging)
    leaves["cast"].data = torch.ones(2, 3, dtype=torch.float16)
    leaves["resized"].resize_(7)
    leaves["array"].resize(2, refcheck=False)
    _torchax.set_array(leaves["torchax"], jnp.ones(2, jnp.int32))
    found = taken.items["model"].leaves
    arrays = by_name(taken)
    for name, shape in {"cast": (2, 3), "resized": (4,), "array": (4,), "torchax": (8,)}.items():
        assert (found[name].shape, found[name].dtype) == (shape, "float32")
        assert (arrays[name].shape, arrays[name].dtype) == (shape, np.float32)


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


def test_a_snapshot_keeps_no_live_array_alive(mesh: Mesh) -> None:
    array = jax.device_put(jnp.arange(1 << 18, dtype=jnp.int32), NamedSharding(mesh, P("fsdp")))
    alive = weakref.ref(array)
    taken = snapshot.take({"state": Captured("pytree", {"array": array})}, "device")
    assert taken.items["state"].leaves["array"].shape == array.shape
    del array
    gc.collect()
    assert alive() is None
    assert taken.nbytes == 4 << 18
