"""Averages of weights are those of torch, outside and inside torchax's modes, beside the step and within it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchax
import torchorbax
from torch import nn
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_multi_avg_fn,
)
from torchorbax import to_jax

from tests.helpers.models import batch_of, loss_fn, seeded
from tests.helpers.tensors import bits


class ModelEma(nn.Module):
    """As timm's ModelEmaV3 does it: through the values of `state_dict`."""

    def __init__(self, model: nn.Module, foreach: bool) -> None:
        super().__init__()
        self.module = copy.deepcopy(model).eval()
        self.foreach = foreach

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        mine, theirs = list(self.module.state_dict().values()), list(model.state_dict().values())
        floats = [(a, b) for a, b in zip(mine, theirs, strict=True) if a.is_floating_point()]
        for a, b in zip(mine, theirs, strict=True):
            if not a.is_floating_point():
                a.copy_(b)
        if self.foreach:
            torch._foreach_lerp_([a for a, _ in floats], [b for _, b in floats], weight=0.1)
        else:
            for a, b in floats:
                a.lerp_(b, weight=0.1)


AVERAGES: dict[str, Callable[[nn.Module], Any]] = {
    "swa": AveragedModel,
    "swa multi": lambda m: AveragedModel(m, multi_avg_fn=get_swa_multi_avg_fn()),
    "ema": lambda m: AveragedModel(m, avg_fn=get_ema_avg_fn(0.9), use_buffers=True),
    "ema multi": lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
    "timm": lambda m: ModelEma(m, foreach=False),
    "timm foreach": lambda m: ModelEma(m, foreach=True),
}


@pytest.mark.parametrize("where", ["outside", "inside"])
@pytest.mark.parametrize("kind", AVERAGES)
def test_averages_follow_torch(kind: str, where: str) -> None:
    model = seeded(dropout=0.0)
    reference = copy.deepcopy(model)
    average, expected = AVERAGES[kind](model), AVERAGES[kind](reference)
    torchorbax.place_(average)
    step = torchorbax.train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn)
    other = torch.optim.SGD(reference.parameters(), lr=0.1)
    for i in range(4):
        loss = loss_fn(reference, batch_of(i))
        other.zero_grad()
        loss.backward()
        other.step()
        expected.update_parameters(reference)
        step(batch_of(i))
        if where == "outside":
            average.update_parameters(model)
        else:
            with torchax.default_env():
                average.update_parameters(model)
    for name, tensor in expected.state_dict().items():
        np.testing.assert_allclose(to_jax(average)[name], tensor.numpy(), rtol=1e-4, atol=1e-6, err_msg=name)


def test_an_average_within_the_compiled_step() -> None:
    def run(compiled: bool) -> tuple[list[float], Any]:
        model = seeded(dropout=0.0)
        teacher = ModelEma(model, foreach=True)

        def consistent(model: nn.Module, batch: Any) -> torch.Tensor:
            teacher.update_parameters(model)
            with torch.no_grad():
                target = teacher.module(batch[0])
            return loss_fn(model, batch) + (model(batch[0]) - target).square().mean()

        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = torchorbax.train_step(model, optimizer, consistent)
        losses = []
        for i in range(3):
            if compiled:
                losses.append(float(step(batch_of(i))))
                continue
            loss = consistent(model, batch_of(i))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, teacher

    expected, reference = run(False)
    losses, live = run(True)
    assert losses == pytest.approx(expected, rel=1e-3)
    for name, tensor in reference.state_dict().items():
        np.testing.assert_allclose(to_jax(live)[name], tensor.numpy(), rtol=1e-3, atol=1e-5, err_msg=name)


def test_a_copy_outlives_the_donation_of_its_source() -> None:
    model, kept = seeded(), seeded()
    torchorbax.place_(model)
    torchorbax.place_(kept)
    with torch.no_grad():
        for mine, theirs in zip(kept.parameters(), model.parameters(), strict=True):
            mine.copy_(theirs)
    before = bits(to_jax(model.hidden.weight))
    step = torchorbax.train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn)
    step(batch_of(0))
    step(batch_of(1))
    assert bits(to_jax(kept.hidden.weight)) == before


def test_gradients_outside_the_step_are_still_refused() -> None:
    model = nn.Linear(2, 2)
    torchorbax.place_(model)
    with pytest.raises(AssertionError, match="can only do math within the torchax environment"):
        model.weight * 2
