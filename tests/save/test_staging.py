"""What is saved is what was live when `save` was called, whatever the loop does next."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchorbax
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from torch import nn
from torchorbax import Checkpointer, ConfigError, SaveError
from torchorbax._src.save import snapshot
from torchorbax._src.save import staging as staging_module
from torchorbax._src.state.item import Captured

from tests.helpers.memory_storage import MemoryStorage
from tests.helpers.models import seeded
from tests.helpers.snapshots import STAGINGS, by_name, donate, nothing_read_from_devices, take
from tests.helpers.tensors import bits


@pytest.mark.parametrize("staging", ["auto", "device", "host"])
@pytest.mark.parametrize("spec", [P(), P("fsdp")], ids=str)
@pytest.mark.parametrize("size", [1 << 21, 1 << 10])
def test_donation_right_after_save_leaves_the_checkpoint_right(
    staging: Any, spec: P, size: int, mesh: Mesh, tmp_path: Path
) -> None:
    w = jax.device_put(jnp.arange(size, dtype=jnp.float32), NamedSharding(mesh, spec))
    expected = bits(w)
    overwrite = jax.jit(lambda w: w * 0 - 1, donate_argnums=0)
    with Checkpointer(str(tmp_path / "run"), {"w": {"w": w}}, rng=False, staging=staging) as run:
        w = jax.block_until_ready(w + 0)  # a program's result, in memory that donation can take
        run.save(0, {"w": {"w": w}})
        for _ in range(3):  # in the memory of the saved one, where that is not refused
            w = overwrite(w)
        assert float(w.max()) == -1
    assert bits(torchorbax.load(str(tmp_path / "run"), item="w")["w"]) == expected


def test_cpu_tensors_changed_right_after_save(tmp_path: Path) -> None:
    model = nn.Linear(256, 256)
    expected = bits(model.weight.detach().numpy())
    with torchorbax.resume(model, None, str(tmp_path / "run")) as run:
        run.save(0)
        with torch.no_grad():
            model.weight.zero_()
    assert bits(torchorbax.load(run.path)["weight"]) == expected


def test_reference_staging_fails_aloud_when_arrays_are_donated(storage: MemoryStorage) -> None:
    storage.gate.clear()
    state = {"w": {"w": jnp.ones(4)}}
    run = Checkpointer("run", state, rng=False, staging="reference")
    run.save(0)
    jax.jit(lambda w: w + 1, donate_argnums=0)(state["w"]["w"])
    storage.gate.set()
    with pytest.raises(SaveError, match="deleted"):
        run.close()
    assert storage.steps() == []


def test_deleted_arrays_are_named_and_nothing_is_lost(tmp_path: Path) -> None:
    model = seeded()
    torchorbax.place_(model)
    with torchorbax.resume(model, None, str(tmp_path / "run")) as run:
        run.save(0)
        run.wait()
        jax.jit(lambda w: w + 1, donate_argnums=0)(model.hidden.weight.jax())
        with pytest.raises(torchorbax.DeletedArrayError, match=r"model\.hidden\.weight"):
            run.save(1)
        assert run.all_steps() == [0]
        run.restore()
        assert not model.hidden.weight.jax().is_deleted()
        assert run.save(1)


def test_the_caller_never_waits_for_the_device(tmp_path: Path) -> None:
    """No array is read back on the caller's thread: JAX would refuse it here."""
    state = {"w": {"w": jax.device_put(jnp.ones((8, 8)))}}
    run = Checkpointer(str(tmp_path / "run"), state, rng=False)
    with jax.transfer_guard_device_to_host("disallow"):
        run.save(0, metrics={"loss": jnp.float32(1.0)})
    run.close()
    assert run.all_steps() == [0]


def test_staging_is_one_of_four() -> None:
    assert [staging_module.check_staging(staging) for staging in STAGINGS] == STAGINGS
    for wrong in ("Device", "", None, "gpu"):
        with pytest.raises(ConfigError, match="staging must be one of 'auto', 'reference', 'device', 'host', not "):
            staging_module.check_staging(wrong)  # type: ignore[arg-type]


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
    staging_module._loop_peak.cache_clear()
    staging_module._warn_of_full_devices.cache_clear()
    leaves = {str(index): jax.device_put(jnp.full(8 * 4000, index, jnp.int32), sharding) for index in range(4)}
    for _ in range(2):
        taken = by_name(snapshot.take({"state": Captured("pytree", leaves)}, "device"))
        assert [type(taken[name]) is np.ndarray for name in leaves] == [False, False, True, True]
        assert {name: bits(array) for name, array in taken.items()} == {name: bits(leaves[name]) for name in leaves}
        stats["peak_bytes_in_use"] = 396_000  # with our own copies
    assert [record.message for record in caplog.records if "no room" in record.message] == [caplog.records[0].message]
    staging_module._loop_peak.cache_clear()
    staging_module._warn_of_full_devices.cache_clear()


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
    staging_module.prepare({"state": Captured("pytree", leaves)}, "auto")
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
    staging_module.prepare({"state": Captured("pytree", {"array": by_rows})}, "device")
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
