"""The step is right in whatever circumstances it is called, or says what is wrong."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import torch
import torchorbax
from jax.sharding import Mesh
from torch import nn
from torchorbax import ConfigError, to_jax
from torchorbax._src.tensors import torchax_tensors as _torchax
from torchorbax._src.training import in_flight

from tests.helpers.models import RULES, batch_of, loss_fn, seeded
from tests.helpers.programs import RunPython


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def test_the_first_call_may_come_in_any_thread() -> None:
    losses: list[float] = []

    def train() -> None:
        model = seeded()
        step = torchorbax.train_step(model, adamw(model), loss_fn)
        losses.extend(float(step(batch_of(i))) for i in range(3))
        assert not isinstance(_torchax.rng_key(), jax.core.Tracer)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    train()
    assert len(losses) == 6


def test_a_fresh_program_trains_with_adamw(run_python: RunPython) -> None:
    """Torchax makes its key when it is first asked for one, which must not be within a trace."""
    run_python(
        """
        import torch, torchorbax
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5))
        step = torchorbax.train_step(model, torch.optim.AdamW(model.parameters()), lambda m, x: m(x).sum())
        for _ in range(3):
            float(step(torch.ones(4, 2)))
        """
    )


@pytest.mark.parametrize("sharded", [False, True])
def test_no_transfer_is_left_to_jax(sharded: bool, mesh: Mesh) -> None:
    model = seeded()
    optimizer = adamw(model)
    torchorbax.place_(model, optimizer, (mesh, RULES) if sharded else None)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    step = torchorbax.train_step(model, optimizer, loss_fn)
    evaluate = torchorbax.eval_step(model, loss_fn)
    with jax.transfer_guard("disallow"):
        for i in range(3):
            assert float(step(batch_of(i))) > 0
            assert float(evaluate(batch_of(i))) > 0
            scheduler.step()


@pytest.mark.parametrize("implementation", ["rbg", "threefry2x32"])
def test_a_key_of_another_implementation_than_jax_uses_now(implementation: str) -> None:
    _torchax.torchax.default_env().manual_seed(3)
    before = jax.config.jax_default_prng_impl
    jax.config.update("jax_default_prng_impl", implementation)
    try:
        model = seeded()
        step = torchorbax.train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), loss_fn)
        assert len({float(step(batch_of(0))) for _ in range(3)}) == 3
    finally:
        jax.config.update("jax_default_prng_impl", before)


def test_a_layer_added_after_the_first_step_is_trained() -> None:
    def grow(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        torch.manual_seed(1)
        model.append(nn.Linear(3, 3))
        optimizer.add_param_group({"params": list(model[-1].parameters())})

    model = nn.Sequential(nn.Linear(3, 3))
    reference = copy.deepcopy(model)
    optimizer, other = (torch.optim.SGD(one.parameters(), lr=0.1) for one in (model, reference))
    step = torchorbax.train_step(model, optimizer, lambda m, x: m(x).square().mean())
    x = torch.ones(2, 3)
    for i in range(4):
        if i == 2:
            grow(model, optimizer)
            grow(reference, other)
        loss = reference(x).square().mean()
        other.zero_grad()
        loss.backward()
        other.step()
        assert float(step(x)) == pytest.approx(loss.item(), rel=1e-4)


def test_a_layer_replaced_or_removed_after_the_first_step() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    step = torchorbax.train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda m, x: m(x).sum())
    step(torch.ones(2, 3))
    model[1] = nn.Linear(3, 3)
    with pytest.raises(
        ConfigError, match=r"2 of the optimizer's 4 .*\(1\.weight, 1\.bias, which the model had before\)"
    ):
        step(torch.ones(2, 3))
    del model[1]
    with pytest.raises(ConfigError, match="after layers were replaced"):
        step(torch.ones(2, 3))


def test_batchnorm_without_momentum_averages_as_in_torch() -> None:
    model = nn.BatchNorm1d(4, momentum=None)
    reference = copy.deepcopy(model)
    step = torchorbax.train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), lambda m, x: m(x).square().sum())
    for seed in range(3):
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
        reference(x)
        step(x)
    for name, buffer in reference.named_buffers():
        np.testing.assert_allclose(to_jax(model)[name], buffer.numpy(), rtol=1e-5, err_msg=name)


def test_steps_whose_losses_nobody_reads_are_bounded_on_cpu_devices(mesh: Mesh) -> None:
    models = [seeded(), seeded()]
    steps = []
    for model in models:
        optimizer = adamw(model)
        torchorbax.place_(model, optimizer, (mesh, RULES))
        steps.append(torchorbax.train_step(model, optimizer, loss_fn))
    losses = [step(batch_of(i)) for i in range(40) for step in steps]
    assert len(in_flight._unread) == 16, "all steps of the process together"
    assert all(loss.jax().is_ready() for loss in losses[:-16])


def autocast_of_torchax(model: nn.Module, batch: Any) -> torch.Tensor:
    import torchax.amp

    with torchax.amp.autocast("jax", dtype=torch.bfloat16, env=torchax.default_env()):
        return model(batch).sum()


def autocast_of_torch(device: str) -> Callable[[nn.Module, Any], torch.Tensor]:
    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            return model(batch).sum()

    return loss


@pytest.mark.parametrize("loss", [autocast_of_torch("cpu"), autocast_of_torch("jax"), autocast_of_torchax])
def test_autocast_is_refused_instead_of_ignored(loss: Callable[[nn.Module, Any], torch.Tensor]) -> None:
    model = nn.Linear(2, 2)
    step = torchorbax.train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), loss)
    with pytest.raises(ConfigError, match=r"autocast.* train in bfloat16 by model\.bfloat16\(\)"):
        step(torch.ones(1, 2))


def test_processes_that_jax_does_not_know_of_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    model = nn.Linear(2, 2)
    step = torchorbax.train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda m, x: m(x).sum())
    with pytest.raises(ConfigError, match=r"torch\.distributed has 2 processes, and JAX takes each"):
        step(torch.ones(1, 2))
