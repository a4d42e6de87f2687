"""Arrays that are kept in the host's memory (`pinned_host`) to leave room on the devices, such as optimizer states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from torchorbax import Checkpointer, verify
from torchorbax._src.arrays import fingerprint
from torchorbax._src.storage import array_writer as _orbax_arrays

from tests.helpers.several import RunProcesses

KINDS = ["device", "pinned_host", "unpinned_host"]


def arrays_in(memory: str, mesh: Mesh, fill: bool = True) -> dict[str, jax.Array]:
    """Of all sizes and layouts: gathered ones, alike ones, large ones, and those on one device."""
    rng = np.random.default_rng(0)
    layouts: dict[str, tuple[tuple[int, ...], Any, Any]] = {
        "rows": ((64, 4096), P("fsdp"), np.float32),
        "columns": ((64, 4096), P(None, "fsdp"), jnp.bfloat16),
        "middle": ((8, 64, 512), P(None, "fsdp"), np.float32),
        "flags": ((8, 1 << 16), P("fsdp"), np.bool_),
        "complex": ((8, 1 << 14), P("fsdp"), np.complex64),
        "replicated": ((1 << 16,), P(), np.float32),
        "scalar": ((), P(), np.float32),
        **{f"small.{index}": ((16, 4), P("fsdp"), np.float32) for index in range(70)},
    }
    shardings = {name: NamedSharding(mesh, spec, memory_kind=memory) for name, (_, spec, _) in layouts.items()}
    values = {
        name: np.asarray(rng.integers(0, 100, shape) if fill else np.zeros(shape)).astype(dtype)
        for name, (shape, _, dtype) in layouts.items()
    }
    arrays: dict[str, jax.Array] = jax.device_put(values, shardings)
    one = SingleDeviceSharding(jax.devices()[3], memory_kind=memory)
    arrays["alone"] = jax.device_put(np.arange(1 << 16, dtype=np.float32) * fill, one)
    return arrays


@pytest.mark.parametrize("staging", ["auto", "device", "reference", "host"])
@pytest.mark.parametrize("kind", KINDS)
def test_offloaded_arrays_come_back_in_any_memory(kind: str, staging: Any, tmp_path: Path, mesh: Mesh) -> None:
    saved = arrays_in(kind, mesh)
    with Checkpointer(str(tmp_path), {"state": saved}, staging=staging) as run:
        run.save(1)
        run.wait()
    assert verify(str(tmp_path)) == [1]
    for other in KINDS:
        found = arrays_in(other, mesh, fill=False)
        with Checkpointer(str(tmp_path), {"state": found}) as run:
            run.restore()
        for name, array in saved.items():
            assert np.asarray(found[name]).tobytes() == np.asarray(array).tobytes(), name
            assert found[name].sharding == array.sharding.with_memory_kind(other)
            assert {part.data.sharding.memory_kind for part in found[name].addressable_shards} == {other}


@pytest.mark.parametrize("staging", ["auto", "device", "host"])
def test_donation_after_the_save_does_not_reach_it(staging: Any, tmp_path: Path, mesh: Mesh) -> None:
    saved = arrays_in("pinned_host", mesh)
    expected = {name: np.array(array) for name, array in saved.items()}
    with Checkpointer(str(tmp_path), {"state": dict(saved)}, staging=staging) as run:
        run.save(1)
        for name in saved:
            saved[name].delete()
        jax.block_until_ready(arrays_in("pinned_host", mesh, fill=False))  # where they were, perhaps
        run.wait()
    found = arrays_in("pinned_host", mesh, fill=False)
    with Checkpointer(str(tmp_path), {"state": found}) as run:
        run.restore()
    assert {name: np.asarray(array).tobytes() for name, array in found.items()} == {
        name: array.tobytes() for name, array in expected.items()
    }


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((1 << 22,), P("fsdp")),
        ((64, 1 << 15), P("fsdp")),
        ((64, 1 << 15), P(None, "fsdp")),
        ((64, 8, 1 << 12), P("fsdp")),
        ((64, 8, 1 << 12), P(None, "fsdp")),
        ((1 << 15, 8, 8), P("fsdp")),
        ((1 << 15, 8, 8), P(None, "fsdp")),
        ((1 << 15, 8, 8), P(None, None, "fsdp")),
        ((8, 64, 1 << 15), P(None, "fsdp")),
    ],
    ids=str,
)
def test_the_fingerprint_of_large_parts_in_host_memory(shape: tuple[int, ...], spec: P, mesh: Mesh) -> None:
    """Rows that follow each other are summed in blocks by XLA, others by numpy."""
    values = np.random.default_rng(0).integers(0, 1 << 16, shape, np.uint16)
    offloaded = jax.device_put(values, NamedSharding(mesh, spec, memory_kind="pinned_host"))
    on_devices = jax.device_put(values, NamedSharding(mesh, spec))
    found = fingerprint.fingerprints({"offloaded": offloaded, "on devices": on_devices, "numpy": values})
    assert len(set(found.values())) == 1, found


SEVERAL = """
    from pathlib import Path
    import numpy as np, torchorbax
    from jax.sharding import NamedSharding, PartitionSpec as P
    from tests.helpers.several_state import VALUES, all_devices

    mesh = all_devices("slice", "fsdp", first=2)

    def state(memory, values):
        kinds = {"shards": P("fsdp"), "spread": P(("slice", "fsdp")), "copies": P()}
        return {
            name: jax.make_array_from_callback(
                values.shape, NamedSharding(mesh, spec, memory_kind=memory), lambda index: values[index]
            )
            for name, spec in kinds.items()
        }

    values = np.tile(VALUES, (8, 256))
    for staging in ("auto", "device", "reference", "host"):
        for replicas in ("first", "all"):
            path = Path(sys.argv[1]) / f"{staging}-{replicas}"
            saved = state("pinned_host", values)
            with torchorbax.Checkpointer(str(path), {"state": saved}, staging=staging, replicas=replicas) as run:
                run.save(1)
                run.wait()
            for memory in ("pinned_host", "device"):
                for single in (False, True):
                    found = state(memory, 0 * values)
                    with torchorbax.Checkpointer(str(path), {"state": found}, single_replica_restore=single) as run:
                        run.restore()
                    for name, array in found.items():
                        assert array.sharding.memory_kind == memory, array.sharding
                        for part in array.addressable_shards:
                            assert np.array_equal(np.asarray(part.data), values[part.index]), (name, part)
"""


SEVERAL += """
    for staging in ("auto", "reference"):
        path, local = f"{sys.argv[1]}/run-{staging}", f"{sys.argv[1]}/fast-{staging}"
        options = {"local": local, "local_save": 1, "save": None, "staging": staging, "barrier_timeout_s": 60}
        saved = state("pinned_host", values)
        with torchorbax.Checkpointer(path, {"state": saved}, **options) as run:
            run.save(1)
            run.wait()
            assert run._local.steps.good() == [1], run.history
        found = state("pinned_host", 0 * values)
        with torchorbax.Checkpointer(path, {"state": found}, **options) as run:
            assert run.restore() == 1 and run.all_steps() == []
        for name, array in found.items():
            for part in array.addressable_shards:
                assert part.data.sharding.memory_kind == "pinned_host"
                assert np.array_equal(np.asarray(part.data), values[part.index]), (name, part)
"""


def test_several_processes(tmp_path: Path, run_processes: RunProcesses) -> None:
    run_processes(SEVERAL, tmp_path, processes=2, devices=4, timeout=170)


def test_parts_larger_than_a_chunk(tmp_path: Path, mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_orbax_arrays, "CHUNK_BYTES", 16 << 10)
    saved = arrays_in("pinned_host", mesh)
    with Checkpointer(str(tmp_path), {"state": saved}, staging="reference") as run:
        run.save(1)
        run.wait()
    found = arrays_in("pinned_host", mesh, fill=False)
    with Checkpointer(str(tmp_path), {"state": found}) as run:
        run.restore()
    for name, array in saved.items():
        assert np.asarray(found[name]).tobytes() == np.asarray(array).tobytes(), name
