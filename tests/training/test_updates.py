"""The optimizer's part of a step: torch.optim and optax, schedules, frozen parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torchorbax
from torch import nn
from torchorbax import ConfigError, to_jax

from tests.helpers.models import batch_of, loss_fn, seeded
from tests.helpers.tensors import bits

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1),
    "SGD momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "SGD dampening": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.5),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.01, weight_decay=0.01),
    "Adam amsgrad": lambda params: torch.optim.Adam(params, lr=0.01, amsgrad=True),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01),
    "AdamW maximize": lambda params: torch.optim.AdamW(params, lr=0.001, maximize=True),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.01),
    "RMSprop momentum": lambda params: torch.optim.RMSprop(params, lr=0.01, momentum=0.5),
    "RMSprop centered": lambda params: torch.optim.RMSprop(params, lr=0.01, centered=True, weight_decay=0.01),
    "RAdam": lambda params: torch.optim.RAdam(params, lr=0.01),
    "Adadelta": lambda params: torch.optim.Adadelta(params, lr=0.5),
    "NAdam": lambda params: torch.optim.NAdam(params, lr=0.01),
}


def train_in_torch(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for step in range(steps):
        loss = loss_fn(model, batch_of(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_torch_optimizers_train_as_in_torch(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    model = seeded(dropout=0.0)
    reference = copy.deepcopy(model)
    expected = train_in_torch(reference, make(reference.parameters()), 5)

    step = torchorbax.train_step(model, make(model.parameters()), loss_fn)
    losses = [float(step(batch_of(i))) for i in range(5)]

    assert losses == pytest.approx(expected, rel=2e-4)
    for name, tensor in reference.state_dict().items():
        np.testing.assert_allclose(to_jax(model)[name], tensor.numpy(), rtol=2e-3, atol=2e-4, err_msg=name)


@pytest.mark.parametrize(
    "tx",
    [optax.sgd(0.1, momentum=0.9), optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))],
    ids=["sgd", "chain"],
)
def test_optax_trains_as_by_hand(tx: optax.GradientTransformation) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    weights = {"weight": jnp.asarray(model.weight.detach().numpy()), "bias": jnp.asarray(model.bias.detach().numpy())}
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    state, losses = tx.init(weights), []
    for _ in range(3):
        loss, grads = jax.value_and_grad(lambda w: ((x @ w["weight"].T + w["bias"]) ** 2).mean())(weights)
        updates, state = tx.update(grads, state, weights)
        weights = optax.apply_updates(weights, updates)
        losses.append(loss.item())

    optimizer = torchorbax.OptaxOptimizer(model, tx)
    step = torchorbax.train_step(model, optimizer, lambda model, batch: (model(batch) ** 2).mean())
    assert [float(step(x)) for _ in range(3)] == pytest.approx(losses, rel=1e-5)
    np.testing.assert_allclose(to_jax(model)["weight"], weights["weight"], rtol=1e-5)
    jax.tree.map(lambda live, by_hand: np.testing.assert_allclose(live, by_hand, rtol=1e-4), optimizer.state, state)


@pytest.mark.parametrize("name", ["SGD momentum", "AdamW"])
def test_schedulers_change_the_rate_without_compiling_again(name: str, compilations: list[str]) -> None:
    def scheduled(model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
        optimizer = OPTIMIZERS[name](model.parameters())
        return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    model = seeded(dropout=0.0)
    reference = copy.deepcopy(model)
    expected = []
    optimizer, scheduler = scheduled(reference)
    for i in range(4):
        expected += train_in_torch(reference, optimizer, 1) if i == 0 else []
        if i:
            loss = loss_fn(reference, batch_of(0))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            expected.append(loss.item())
        scheduler.step()

    optimizer, scheduler = scheduled(model)
    step = torchorbax.train_step(model, optimizer, loss_fn)
    losses = []
    for _ in range(4):
        losses.append(float(step(batch_of(0))))
        scheduler.step()
    assert losses == pytest.approx(expected, rel=2e-4)
    assert compilations.count("step") == 1


def test_other_hyperparameters_and_frozen_parameters_are_noticed() -> None:
    model = seeded(dropout=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = torchorbax.train_step(model, optimizer, loss_fn)
    step(batch_of(0))
    before = to_jax({"w": model.hidden.weight, "b": model.hidden.bias})
    before = jax.tree.map(np.asarray, before)
    model.hidden.weight.requires_grad_(False)
    step(batch_of(1))
    assert bits(model.hidden.weight.jax()) == bits(before["w"])
    assert bits(model.hidden.bias.jax()) != bits(before["b"])
    optimizer.param_groups[0]["momentum"] = 0.0
    buffer = bits(optimizer.state[model.hidden.bias]["momentum_buffer"].jax())
    step(batch_of(2))
    assert bits(optimizer.state[model.hidden.bias]["momentum_buffer"].jax()) == buffer


def test_frozen_parameters_keep_their_very_array() -> None:
    model = seeded()
    model.hidden.requires_grad_(False)
    step = torchorbax.train_step(model, torchorbax.OptaxOptimizer(model, optax.sgd(0.1)), loss_fn)
    step(batch_of(0))
    held = model.hidden.weight.jax()
    step(batch_of(1))
    assert model.hidden.weight.jax() is held


def test_optimizers_that_cannot_be_traced() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(
        model.parameters(), lr=0.1, betas=(torch.tensor(0.9), torch.tensor(0.99)), foreach=False
    )
    with pytest.raises(torchorbax.ConfigError, match="hyperparameter 'betas'"):
        torchorbax.train_step(model, optimizer, lambda m, b: m(b).mean())(np.ones((2, 2), np.float32))
    with pytest.raises(torchorbax.ConfigError, match="tx must be an optax gradient transformation"):
        torchorbax.OptaxOptimizer(model, object())


@pytest.mark.parametrize("kind", ["Adagrad", "Rprop", "Adamax", "ASGD", "LBFGS"])
def test_optimizers_whose_step_cannot_be_traced_are_named(kind: str) -> None:
    model = seeded()
    step = torchorbax.train_step(model, getattr(torch.optim, kind)(model.parameters()), loss_fn)
    with pytest.raises(ConfigError, match=rf"the step of {kind} cannot be traced: .*or optax with"):
        step(batch_of(0))
