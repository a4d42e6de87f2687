"""The state of a torch optimizer goes into a step as few arrays, and is in its tensors afterwards."""

from __future__ import annotations

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchorbax
from jax.sharding import Mesh
from torch import nn
from torchorbax._src.tensors import torchax_tensors

from tests.helpers.models import batch_of, loss_fn, seeded
from tests.training.test_updates import OPTIMIZERS, train_in_torch

_COUNTING = {name: make for name, make in OPTIMIZERS.items() if not name.startswith("SGD")}


def counters(optimizer: torch.optim.Optimizer) -> list[jax.Array]:
    """The arrays of the counters of all parameters."""
    return [torchax_tensors.array_of(entries["step"]) for entries in optimizer.state.values()]


def adamw() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    model = seeded(dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, optimizer, torchorbax.train_step(model, optimizer, loss_fn)


@pytest.mark.parametrize("name", _COUNTING)
def test_all_of_torchs_optimizers_count_every_parameter_s_steps_alike(name: str) -> None:
    model = seeded(dropout=0.0)
    optimizer = _COUNTING[name](model.parameters())
    step = torchorbax.train_step(model, optimizer, loss_fn)
    for count in (1, 2):
        step(batch_of(count))
        assert [float(array) for array in counters(optimizer)] == [count] * len(optimizer.state)
        assert len(set(map(id, counters(optimizer)))) == 1, "each parameter's counter is an array of its own"


def test_a_counter_that_is_set_goes_on_by_itself() -> None:
    model, optimizer, step = adamw()
    reference = copy.deepcopy(model)
    expected = torch.optim.AdamW(reference.parameters(), lr=0.01)
    train_in_torch(reference, expected, 2)
    for i in range(2):
        step(batch_of(i))
    expected.state[reference.hidden.weight]["step"] = torch.tensor(100.0)
    counter = optimizer.state[model.hidden.weight]["step"]
    torchax_tensors.set_array(counter, jnp.full_like(counter.jax(), 100.0))
    train_in_torch(reference, expected, 2)
    for i in range(2):
        step(batch_of(i))
    for live, plain in zip(optimizer.state.values(), expected.state.values(), strict=True):
        assert float(live["step"].jax()) == float(plain["step"])
    assert float(optimizer.state[model.hidden.weight]["step"].jax()) == 102
    np.testing.assert_allclose(
        model.hidden.weight.jax(), reference.hidden.weight.detach().numpy(), rtol=2e-3, atol=2e-4
    )


def test_the_counter_of_a_parameter_that_is_frozen_stays() -> None:
    model, optimizer, step = adamw()
    step(batch_of(0))
    model.hidden.weight.requires_grad_(False)
    step(batch_of(1))
    model.hidden.weight.requires_grad_(True)
    step(batch_of(2))
    assert float(optimizer.state[model.hidden.weight]["step"].jax()) == 2
    assert float(optimizer.state[model.hidden.bias]["step"].jax()) == 3


def test_a_state_that_is_replaced_is_taken_up_without_another_compilation(compilations: list[str], mesh: Mesh) -> None:
    model, optimizer, step = adamw()
    torchorbax.place_(model, optimizer, (mesh, {}))
    step(batch_of(0))
    step(batch_of(1))
    for entries in optimizer.state.values():
        entries.update({key: torch.zeros(tuple(entry.shape)) for key, entry in entries.items()})
    step(batch_of(2))
    assert [float(array) for array in counters(optimizer)] == [1] * len(optimizer.state)
    assert compilations.count("step") == 1


def test_an_optimizer_that_gets_a_hook_is_no_longer_one_of_torch_s_own() -> None:
    model, optimizer, step = adamw()
    step(batch_of(0))

    def count_one_twice(optimizer: Any, args: Any, kwargs: Any) -> None:
        optimizer.state[model.hidden.bias]["step"] += 1

    optimizer.register_step_post_hook(count_one_twice)
    for i in range(2):
        step(batch_of(i))
    assert float(optimizer.state[model.hidden.bias]["step"].jax()) == 5
    assert float(optimizer.state[model.hidden.weight]["step"].jax()) == 3
