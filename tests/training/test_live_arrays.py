"""The arrays of many live tensors are read and set together."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import torchorbax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from torch import nn
from torchorbax._src.tensors import torchax_tensors
from torchorbax._src.training.live_arrays import Layout, LiveArrays


def test_tensors_of_every_kind_are_read_and_set() -> None:
    plain = torchax_tensors.wrap(jnp.zeros((2, 3)))
    whole = torchax_tensors.wrap(jnp.zeros((2, 3)))
    with torchax_tensors.torchax.default_env():
        row = whole[0]
        detached = plain.detach()
    assert isinstance(row, torchax_tensors.View), "torchax makes no view here, so this test shows nothing"
    for tensors in ([plain], [plain, row], [detached]):
        live = LiveArrays(tensors)
        new = [array + 1 for array in live.get()]
        live.set(new)
        for tensor, array in zip(live, new, strict=True):
            assert (torchax_tensors.array_of(tensor) == array).all()
    assert whole.jax().tolist() == [[1, 1, 1], [0, 0, 0]]


def test_a_layout_stays_the_same_object_until_a_tensor_moves(mesh: Mesh) -> None:
    model = nn.Linear(8, 8)
    torchorbax.place_(model, shardings=(mesh, {}))
    params, layout = dict(model.named_parameters()), Layout()
    layout.update(params)
    before = layout.values
    for tensor in params.values():
        array = torchax_tensors.array_of(tensor)
        equal = jax.device_put(np.asarray(array), NamedSharding(mesh, P()))
        assert equal.sharding is not array.sharding, "it is the same object, so this test shows nothing"
        torchax_tensors.set_array(tensor, equal)
    layout.update(params)
    assert layout.values is before
    moved = NamedSharding(mesh, P("fsdp"))
    torchax_tensors.set_array(model.weight, jax.device_put(torchax_tensors.array_of(model.weight), moved))
    layout.update(params)
    assert layout.shardings == {"weight": moved, "bias": before[1]}
    layout.update({"bias": model.bias})
    assert layout.names == ("bias",)
