"""What one process has of an array, against what jax says of it."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from torchorbax._src.arrays.shards import parts, shards

DEVICES = np.array(jax.devices())
SQUARE = Mesh(DEVICES.reshape(4, 2), ("x", "y"))
SHARDINGS: dict[str, Sharding] = {
    "one device": SingleDeviceSharding(DEVICES[3]),
    "along the first axis": NamedSharding(Mesh(DEVICES, ("x",)), P("x")),
    "devices the other way round": NamedSharding(Mesh(DEVICES[::-1], ("x",)), P("x")),
    "devices of two axes exchanged": NamedSharding(Mesh(DEVICES.reshape(4, 2).T, ("x", "y")), P("y", "x")),
    "in part replicated": NamedSharding(SQUARE, P("x")),
    "replicated along the first axis of the mesh": NamedSharding(SQUARE, P(None, "y")),
    "replicated": NamedSharding(SQUARE, P()),
    "some devices": NamedSharding(Mesh(DEVICES[[5, 2]], ("x",)), P(None, "x")),
}


@pytest.mark.parametrize("name", SHARDINGS)
def test_shards_are_those_that_jax_tells_of(name: str) -> None:
    array = jax.device_put(np.arange(64.0).reshape(8, 8), SHARDINGS[name])
    expected = array.addressable_shards
    found = shards(array)
    assert [(one.index, one.replica_id) for one in found] == [(one.index, one.replica_id) for one in expected]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.data.device == theirs.device
        assert mine.start == tuple(part.indices(8)[0] for part in theirs.index)
        np.testing.assert_array_equal(mine.data, theirs.data)


def test_a_donated_array_is_told_by_jax() -> None:
    array = jax.device_put(np.arange(8.0), SHARDINGS["along the first axis"])
    array.delete()
    with pytest.raises(RuntimeError, match="deleted"):
        parts(array)
