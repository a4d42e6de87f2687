"""Optimizers of other models, and their state beside their parameters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest
import torch
import torchorbax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from torch import nn
from torchorbax import ConfigError, DeletedArrayError, OptaxOptimizer, place_, to_jax
from torchorbax._src.tensors import torchax_tensors as _torchax

from tests.helpers.models import Net, batch_of, loss_fn, seeded, trained
from tests.helpers.tensors import bits, shards


def test_an_optax_optimizer_of_another_model() -> None:
    one, other = nn.Linear(3, 3), nn.Linear(3, 3)
    with pytest.raises(ConfigError, match="the OptaxOptimizer was built for another model"):
        torchorbax.train_step(one, torchorbax.OptaxOptimizer(other, optax.sgd(0.1)), loss_fn)


def test_optax_state_of_other_parameters() -> None:
    model = seeded()
    step = torchorbax.train_step(model, torchorbax.OptaxOptimizer(model, optax.adam(0.1)), loss_fn)
    step(batch_of(0))
    model.hidden.bias.requires_grad_(False)
    with pytest.raises(ConfigError, match="does not fit the parameters that require a gradient"):
        step(batch_of(1))


def test_optimizer_state_follows_its_parameter(mesh: Mesh, mesh_2d: Mesh) -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    trained(model, optimizer)
    state = optimizer.state[model.embed.weight]
    moment, counter = state["exp_avg"], state["step"]
    values = bits(moment)
    for where, spec, part in ((mesh, P("fsdp"), (2, 8)), (mesh_2d, P("tp", "fsdp"), (8, 2))):
        place_(model, optimizer, (where, {"embed.weight": spec}))
        assert optimizer.state[model.embed.weight] is state
        assert state["exp_avg"] is moment
        assert bits(moment) == values
        assert shards(moment) == shards(state["exp_avg_sq"]) == shards(model.embed.weight) == {part}
        assert shards(optimizer.state[model.norm.weight]["exp_avg"]) == {(8,)}
        assert state["step"] is counter
        assert not _torchax.is_torchax(counter), "torch's Adam counts on the CPU"
        assert counter == 1


def test_other_state_on_jax_is_replicated_beside_the_parameter(mesh: Mesh) -> None:
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.state[model.weight]["norm"] = _torchax.wrap(jnp.asarray(3.0))
    optimizer.state[model.weight]["calls"] = 5
    place_(model, optimizer, (mesh, {"weight": P("fsdp")}))
    assert shards(optimizer.state[model.weight]["norm"]) == {()}
    assert to_jax(optimizer.state[model.weight]["norm"]) == 3
    assert optimizer.state[model.weight]["calls"] == 5


def test_optax_state_follows_its_parameter(mesh: Mesh) -> None:
    model = nn.Linear(8, 16)
    optimizer = OptaxOptimizer(model, optax.adam(1e-3))
    place_(model, optimizer)
    assert optimizer.state is None, "made when it is first needed"
    optimizer.init()
    structure = jax.tree.structure(optimizer.state)
    place_(model, optimizer, (mesh, {"weight": P("fsdp")}))
    assert jax.tree.structure(optimizer.state) == structure
    adam = optimizer.state[0]
    for moments in (adam.mu, adam.nu):
        assert {shard.data.shape for shard in moments["weight"].addressable_shards} == {(2, 8)}
        assert {shard.data.shape for shard in moments["bias"].addressable_shards} == {(16,)}
    assert adam.count.sharding.is_fully_replicated
    assert len(adam.count.addressable_shards) == 8


def test_donated_optimizer_state_is_named(mesh: Mesh) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trained(model, optimizer)
    place_(model, optimizer)
    to_jax(optimizer.state[model.embed.weight]["momentum_buffer"]).delete()
    before = to_jax(model.embed.weight)
    with pytest.raises(DeletedArrayError, match="momentum_buffer"):
        place_(model, optimizer, (mesh, {"embed.weight": P("fsdp")}))
    assert to_jax(model.embed.weight) is before
