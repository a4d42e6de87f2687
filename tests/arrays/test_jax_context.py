"""Saving and restoring do not depend on what a caller has set for JAX: a mesh, or the width of numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from torchorbax import Checkpointer, OptaxOptimizer, load, place_, train_step, verify
from torchorbax._src.tensors import torchax_tensors as _torchax

from tests.helpers.models import RULES, TiedNet, batch_of, loss_fn
from tests.helpers.several import RunProcesses
from tests.helpers.tensors import bits

STAGINGS = ["auto", "device", "reference", "host"]


def mesh_of(kind: Any) -> jax.sharding.Mesh:
    return jax.make_mesh((8,), ("fsdp",), axis_types=(kind,))


CONTEXTS: dict[str, Callable[[], Any]] = {
    "no mesh": contextlib.nullcontext,
    "its mesh": lambda: jax.set_mesh(mesh_of(AxisType.Auto)),
    "another kind of mesh": lambda: jax.set_mesh(mesh_of(AxisType.Explicit)),
    "another mesh": lambda: jax.set_mesh(jax.make_mesh((4, 2), ("a", "b"))),
    "another mesh, of some devices": lambda: jax.set_mesh(jax.make_mesh((2,), ("a",), devices=jax.devices()[:2])),
}


@pytest.mark.parametrize("staging", STAGINGS)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("context", CONTEXTS)
def test_under_any_mesh(context: str, kind: Any, staging: Any, tmp_path: Path) -> None:
    by_rows = NamedSharding(mesh_of(kind), P("fsdp"))
    values = {
        "large": (np.arange(1 << 18, dtype=np.float32).reshape(64, -1), by_rows),
        "small": (np.arange(16, dtype=np.float32), by_rows),
        **{f"alike.{index}": (np.full((64, 512), index, np.float32), by_rows) for index in range(9)},
        "one device": (np.arange(1 << 16, dtype=np.float32), jax.devices()[3]),
        "small, one device": (np.arange(9, dtype=np.float32), jax.devices()[3]),
    }
    with CONTEXTS[context]():
        saved = {name: jax.device_put(host, place) for name, (host, place) in values.items()}
        with Checkpointer(str(tmp_path), {"state": saved}, staging=staging, rng=False) as run:
            run.save(1)
        found = {name: jax.device_put(np.zeros_like(host), place) for name, (host, place) in values.items()}
        with Checkpointer(str(tmp_path), {"state": found}, rng=False) as run:
            assert run.restore() == 1
        assert verify(str(tmp_path)) == [1]
    for name, (host, _) in values.items():
        assert bits(found[name]) == host.tobytes(), name
        assert found[name].sharding == saved[name].sharding


@pytest.mark.parametrize("staging", STAGINGS)
@pytest.mark.parametrize("when", ["always", "not for the save"])
def test_arrays_of_64_bits_where_only_a_context_enables_them(when: str, staging: Any, tmp_path: Path) -> None:
    by_rows = NamedSharding(mesh_of(AxisType.Auto), P("fsdp"))

    def state(factor: int) -> dict[str, Any]:
        return {
            **{f"small.{index}": (jnp.arange(10.0) + index) * factor for index in range(70)},
            "large": jnp.arange(60_000.0) * factor,
            "sharded": jax.device_put(np.arange(800_000).reshape(8, -1) * factor, by_rows),
            "small, sharded": jax.device_put(np.arange(800).reshape(8, -1) * factor, by_rows),
        }

    with jax.enable_x64(True):
        saved, found = state(1), state(0)
        assert {array.dtype.itemsize for array in saved.values()} == {8}
    context = contextlib.nullcontext() if when == "not for the save" else jax.enable_x64(True)
    with context, Checkpointer(str(tmp_path), {"state": saved}, staging=staging, rng=False) as run:
        run.save(1)
    with jax.enable_x64(True), Checkpointer(str(tmp_path), {"state": found}, rng=False) as run:
        assert run.restore() == 1
    assert verify(str(tmp_path)) == [1]
    assert {name: (array.dtype, bits(array)) for name, array in found.items()} == {
        name: (array.dtype, bits(array)) for name, array in saved.items()
    }


def losses_of(optimizer_of: Callable[[Any], Any], rules: bool) -> list[float]:
    torch.manual_seed(0)
    _torchax.set_rng_key(jax.random.key(0))
    model = TiedNet(dropout=0.0)
    optimizer = optimizer_of(model)
    if rules:
        place_(model, optimizer, (mesh_of(AxisType.Auto), RULES))
    step = train_step(model, optimizer, loss_fn)
    return [float(step(batch_of(index))) for index in range(3)]


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
    "optax": lambda model: OptaxOptimizer(model, optax.adamw(0.01)),
}


@pytest.mark.parametrize("rules", [True, False], ids=["sharded", "on one device"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_under_any_mesh(optimizer: str, rules: bool) -> None:
    expected = losses_of(OPTIMIZERS[optimizer], rules)
    for context in CONTEXTS.values():
        with context():
            assert losses_of(OPTIMIZERS[optimizer], rules) == expected


SEVERAL = """
    from pathlib import Path
    import numpy as np, torchorbax
    from jax.sharding import PartitionSpec as P
    from tests.helpers.several_state import VALUES, all_devices, spread

    mesh = all_devices("slice", "fsdp", first=2)
    specs = {"shards": P("fsdp"), "spread": P(("slice", "fsdp")), "copies": P()}
    jax.set_mesh(mesh)

    def state(values):
        return {name: spread(values, spec, mesh) for name, spec in specs.items()}

    values = np.tile(VALUES, (8, 64))
    for staging in ("auto", "device", "reference", "host"):
        path = f"{sys.argv[1]}/{staging}"
        saved = state(values) | {f"small.{name}": array for name, array in state(VALUES).items()}
        with torchorbax.Checkpointer(path, {"state": saved}, staging=staging) as run:
            run.save(1)
            run.wait()
        for single in (False, True):
            found = state(0 * values) | {f"small.{name}": array for name, array in state(0 * VALUES).items()}
            with torchorbax.Checkpointer(path, {"state": found}, single_replica_restore=single) as run:
                assert run.restore() == 1
            for name, array in found.items():
                expected = VALUES if name.startswith("small") else values
                for part in array.addressable_shards:
                    assert np.array_equal(np.asarray(part.data), expected[part.index]), (name, part)
"""


def test_a_mesh_of_several_processes(tmp_path: Path, run_processes: RunProcesses) -> None:
    run_processes(SEVERAL, tmp_path, processes=2, devices=4, timeout=170)


@pytest.mark.parametrize("staging", ["auto", "device", "host", "reference"])
def test_a_transfer_guard_of_the_loop_stops_no_save_and_no_restore(
    staging: Any, mesh: jax.sharding.Mesh, tmp_path: Path
) -> None:
    """The guard is there to find transfers in the loop; saving and restoring are transfers."""
    sharding = NamedSharding(mesh, P("fsdp"))
    tree = {"large": jax.device_put(np.ones((1024, 64), np.float32), sharding), "small": jnp.arange(3.0)}
    expected = {name: bits(array) for name, array in tree.items()}
    jax.config.update("jax_transfer_guard", "disallow")  # in all threads
    try:
        with Checkpointer(tmp_path, {"tree": tree}, staging=staging) as run:
            run.save(0)
            run.wait()
            assert verify(tmp_path) == [0]
            loaded = load(tmp_path, item="tree")
            assert run.restore() == 0
    finally:
        jax.config.update("jax_transfer_guard", "allow")
    assert {name: bits(array) for name, array in loaded.items()} == expected
    assert {name: bits(array) for name, array in tree.items()} == expected
