"""Every step is an Orbax checkpoint that plain Orbax reads, and the other way round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torchorbax
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from torchorbax._src.storage import array_reader
from torchorbax._src.storage.traffic import Traffic

from tests.helpers.models import objects
from tests.helpers.steps import metas, random, write
from tests.helpers.tensors import bits


def test_plain_orbax_reads_every_item(trained_run: str) -> None:
    model, optimizer, _ = objects("adamw")
    with torchorbax.resume(model, optimizer, trained_run):
        pass
    with ocp.CheckpointManager(trained_run) as manager:
        assert list(manager.all_steps()) == [0, 1]
        restored = manager.restore(
            1, args=ocp.args.Composite(model=ocp.args.PyTreeRestore(), optimizer=ocp.args.PyTreeRestore())
        )
    assert set(restored["model"]) == {name for name, _ in model.named_parameters()} | {
        name for name, _ in model.named_buffers()
    }
    assert bits(restored["model"]["hidden.weight"]) == bits(model.hidden.weight.detach().numpy())
    exp_avg = optimizer.state[model.hidden.weight]["exp_avg"]
    assert bits(restored["optimizer"]["hidden.weight.exp_avg"]) == bits(exp_avg.numpy())


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


def test_the_metadata_is_what_orbax_itself_writes(mesh: Mesh, mesh_2d: Mesh, tmp_path: Path) -> None:
    """But for the times, and for arrays that are gathered on the host, which Orbax need not put on devices again."""
    large = random((256, 128))
    arrays: dict[str, Any] = {
        "rows": jax.device_put(large, NamedSharding(mesh, P("fsdp"))),
        "both": jax.device_put(large, NamedSharding(mesh_2d, P("tp", "fsdp"))),
        "single": jax.device_put(large, SingleDeviceSharding(jax.devices()[3])),
        "host/with a.dot": large,
        "quote's": large,
    }
    write(tmp_path / "ours", arrays, step=5)
    with ocp.CheckpointManager(tmp_path / "theirs") as manager:
        manager.save(5, args=ocp.args.Composite(state=ocp.args.PyTreeSave(arrays)))
    for path in ("state/_METADATA", "state/_sharding", "_CHECKPOINT_METADATA"):
        ours, theirs = (json.loads((tmp_path / who / "5" / path).read_text()) for who in ("ours", "theirs"))
        if path == "_CHECKPOINT_METADATA":
            assert ours.keys() == theirs.keys()
            assert ours["item_handlers"].pop("manifest").endswith(".JsonCheckpointHandler")
            ours, theirs = ours["item_handlers"], theirs["item_handlers"]
        elif path == "state/_METADATA":
            for leaf in theirs["tree_metadata"].values():
                leaf["value_metadata"].pop("write_shape", None)  # of chunks, which the arrays' own metadata has
            theirs.pop("array_metadata_store", None)
        assert ours == theirs


def test_what_plain_orbax_has_written_is_read(mesh: Mesh, tmp_path: Path) -> None:
    """Compressed, in a chunk for each shard, small leaves as well: as this library wrote before, and others do."""
    sharding = NamedSharding(mesh, P("fsdp"))
    arrays = {"large": jax.device_put(random((256, 128)), sharding), "small": jax.device_put(random((8, 4)), sharding)}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "item", args=ocp.args.PyTreeSave(arrays))
    wanted = {name: (meta, sharding) for name, meta in metas(arrays).items()}
    found = array_reader.read(str(tmp_path / "item"), wanted, Traffic())
    assert {name: bits(array) for name, array in found.items()} == {name: bits(array) for name, array in arrays.items()}
