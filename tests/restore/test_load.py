"""Reading a checkpoint without live objects."""

from __future__ import annotations

import pytest
import torchorbax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from torchorbax import ConfigError

from tests.helpers.models import RULES
from tests.helpers.tensors import bits


def test_load(trained_run: str, mesh: Mesh) -> None:
    arrays = torchorbax.load(trained_run)
    assert arrays["head.weight"] is arrays["embed.weight"]
    older = torchorbax.load(trained_run, step=0)
    assert bits(older["hidden.weight"]) != bits(arrays["hidden.weight"])
    sharded = torchorbax.load(trained_run, shardings=(mesh, RULES))
    assert sharded["embed.weight"].sharding == NamedSharding(mesh, P("fsdp"))
    assert {name: bits(array) for name, array in sharded.items()} == {
        name: bits(array) for name, array in arrays.items()
    }
    assert "hidden.weight.exp_avg" in torchorbax.load(trained_run, item="optimizer")
    with pytest.raises(ConfigError, match="no item 'ema'; it has model, optimizer, rng"):
        torchorbax.load(trained_run, item="ema")
    with pytest.raises(torchorbax.CheckpointNotFoundError, match="no step 9"):
        torchorbax.load(trained_run, step=9)
    with pytest.raises(torchorbax.CheckpointNotFoundError, match="no checkpoint found"):
        torchorbax.load(trained_run + "-not")
