"""What torchax's lowerings leave out: running statistics, code without gradients, custom gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchorbax
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchorbax import to_jax

from tests.helpers.models import batch_of, loss_fn, seeded
from tests.helpers.tensors import bits


def test_batchnorm_statistics_follow_torch() -> None:
    for dimensions in (1, 2):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.BatchNorm1d(3) if dimensions == 1 else nn.BatchNorm2d(3), nn.Flatten(), nn.LazyLinear(1)
        )
        x = torch.randn(6, 3) if dimensions == 1 else torch.randn(4, 3, 5, 5)
        model(x)
        model[0].reset_running_stats()
        reference = copy.deepcopy(model)
        for _ in range(3):
            reference(x).mean().backward()
        step = torchorbax.train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), lambda m, b: m(b).mean())
        for _ in range(3):
            step(x)
        for name, buffer in reference.named_buffers():
            np.testing.assert_allclose(to_jax(model)[name], buffer.numpy(), rtol=1e-5, err_msg=name)


def test_instance_norm_statistics_follow_torch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.InstanceNorm2d(3, affine=True, track_running_stats=True))
    x = torch.randn(4, 3, 5, 5)
    reference = copy.deepcopy(model)
    reference(x)
    torchorbax.train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), lambda m, b: (m(b) ** 2).mean())(x)
    for name in ("running_mean", "running_var"):
        np.testing.assert_allclose(to_jax(model)[f"0.{name}"], reference[0].get_buffer(name).numpy(), rtol=1e-5)


def test_eval_mode_leaves_statistics_alone_and_is_noticed() -> None:
    model = seeded(dropout=0.0)
    step = torchorbax.train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), loss_fn)
    step(batch_of(0))
    after_training = bits(to_jax(model)["norm.running_mean"])
    model.eval()
    step(batch_of(1))
    assert bits(to_jax(model)["norm.running_mean"]) == after_training
    model.train()
    step(batch_of(1))
    assert bits(to_jax(model)["norm.running_mean"]) != after_training


class Target(nn.Linear):
    @torch.no_grad()
    def target(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self(x)


def with_no_grad(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    out = model(batch)
    with torch.no_grad():
        target = 2 * model(batch)
    return ((out - target) ** 2).mean()


NO_GRADIENT: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "no_grad": with_no_grad,
    "decorated": lambda model, batch: ((model(batch) - model.target(batch)) ** 2).mean(),
    "detach": lambda model, batch: ((model(batch) - (2 * model(batch)).detach()) ** 2).mean(),
}


@pytest.mark.parametrize("how", NO_GRADIENT)
def test_what_has_no_gradient_in_torch_has_none_here(how: str) -> None:
    torch.manual_seed(0)
    model, x = Target(2, 2), torch.ones(3, 2)
    before = model.weight.detach().numpy().copy()
    NO_GRADIENT[how](model, x).backward()
    expected = model.weight.grad
    assert expected is not None
    torchorbax.train_step(model, torch.optim.SGD(model.parameters(), lr=1.0), NO_GRADIENT[how])(x)
    np.testing.assert_allclose(before - np.asarray(to_jax(model.weight)), expected, rtol=1e-5)


def test_spectral_norm_trains_as_in_torch() -> None:
    """Its power iteration runs under no_grad, in place."""
    torch.manual_seed(0)
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    reference, x = copy.deepcopy(model), torch.ones(3, 4)
    step = torchorbax.train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda m, b: m(b).square().mean())
    other = torch.optim.SGD(reference.parameters(), lr=0.1)
    for _ in range(3):
        loss = reference(x).square().mean()
        other.zero_grad()
        loss.backward()
        other.step()
        assert float(step(x)) == pytest.approx(loss.item(), rel=1e-4)
    for name, value in reference.state_dict().items():
        np.testing.assert_allclose(to_jax(model)[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_custom_gradient_is_refused_instead_of_ignored() -> None:
    class StraightThrough(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.round()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad

    model = nn.Linear(2, 2)
    step = torchorbax.train_step(
        model, torch.optim.SGD(model.parameters()), lambda m, b: StraightThrough.apply(m(b)).mean()
    )
    with pytest.raises(NotImplementedError, match=r"StraightThrough: a torch\.autograd\.Function has no gradient"):
        step(torch.ones(1, 2))
    on_cpu = torch.full((2,), 0.7, requires_grad=True)
    StraightThrough.apply(on_cpu).sum().backward()
    assert on_cpu.grad is not None


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_torch_s_checkpoint_warns_that_it_has_no_effect(use_reentrant: bool) -> None:
    def train(recompute: bool) -> list[float]:
        torch.manual_seed(0)
        inner, outer = nn.Linear(4, 4), nn.Linear(4, 1)
        model = nn.Sequential(inner, outer)

        def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
            hidden = checkpoint(inner, batch, use_reentrant=use_reentrant) if recompute else inner(batch)
            return (outer(hidden) ** 2).mean()

        step = torchorbax.train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), loss)
        return [float(step(torch.ones(2, 4))) for _ in range(3)]

    with pytest.warns(UserWarning, match=r"torch\.utils\.checkpoint has no effect in a compiled step"):
        found = train(recompute=True)
    assert found == train(recompute=False)
