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
from tests.helpers.timm_averages import ModelEma, ModelEmaV2, ModelEmaV3

AVERAGES: dict[str, Callable[[nn.Module], Any]] = {
    "swa": AveragedModel,
    "swa multi": lambda m: AveragedModel(m, multi_avg_fn=get_swa_multi_avg_fn()),
    "ema": lambda m: AveragedModel(m, avg_fn=get_ema_avg_fn(0.9), use_buffers=True),
    "ema multi": lambda m: AveragedModel(m, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
    "timm ModelEma": lambda m: ModelEma(m, decay=0.9),
    "timm ModelEmaV2": lambda m: ModelEmaV2(m, decay=0.9),
    "timm ModelEmaV3": lambda m: ModelEmaV3(m, decay=0.9),
    "timm ModelEmaV3, one by one": lambda m: ModelEmaV3(m, decay=0.9, foreach=False),
    "timm ModelEmaV3, copied buffers": lambda m: ModelEmaV3(m, decay=0.9, exclude_buffers=True),
}


def update(average: Any, model: nn.Module) -> None:
    (average.update_parameters if isinstance(average, AveragedModel) else average.update)(model)


def module_of(average: Any) -> nn.Module:
    """What holds the averages."""
    module: nn.Module = average.ema if isinstance(average, ModelEma) else average
    return module


@pytest.mark.parametrize("where", ["outside", "inside"])
@pytest.mark.parametrize("kind", AVERAGES)
def test_averages_follow_torch(kind: str, where: str) -> None:
    model = seeded(dropout=0.0)
    reference = copy.deepcopy(model)
    average, expected = AVERAGES[kind](model), AVERAGES[kind](reference)
    torchorbax.place_(module_of(average))
    step = torchorbax.train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn)
    other = torch.optim.SGD(reference.parameters(), lr=0.1)
    for i in range(4):
        loss = loss_fn(reference, batch_of(i))
        other.zero_grad()
        loss.backward()
        other.step()
        update(expected, reference)
        step(batch_of(i))
        if where == "outside":
            update(average, model)
        else:
            with torchax.default_env():
                update(average, model)
    for name, tensor in module_of(expected).state_dict().items():
        np.testing.assert_allclose(to_jax(module_of(average))[name], tensor.numpy(), rtol=1e-4, atol=1e-6, err_msg=name)


def test_an_average_within_the_compiled_step() -> None:
    def run(compiled: bool) -> tuple[list[float], Any]:
        model = seeded(dropout=0.0)
        teacher = ModelEmaV3(model, decay=0.9)

        def consistent(model: nn.Module, batch: Any) -> torch.Tensor:
            teacher.update(model)
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
