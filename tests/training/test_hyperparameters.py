"""Schedules of any hyperparameter train as in torch, and compile nothing after the first step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchorbax
from torch import nn
from torchorbax import ConfigError, to_jax
from torchorbax._src.training.hyperparameters import Hyperparameter

from tests.helpers.models import batch_of, loss_fn, seeded

CHANGES: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], dict[str, list[Any]]]] = {
    "SGD": (
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
        {"momentum": [0.5, 0.7, 0.8], "weight_decay": [0.01, 0.02, 0.5]},
    ),
    "AdamW": (
        lambda p: torch.optim.AdamW(p, lr=0.01),
        {
            "betas": [(0.5, 0.99), (0.6, 0.9), (0.8, 0.95)],
            "weight_decay": [0.1, 0.2, 0.3],
            "eps": [1e-3, 1e-2, 1e-4],
        },
    ),
    "Adam": (
        lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1, amsgrad=True),
        {"weight_decay": [0.2, 0.01, 0.5], "betas": [(0.5, 0.99), (0.6, 0.9), (0.8, 0.95)]},
    ),
    "RMSprop": (
        lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
        {"alpha": [0.9, 0.5, 0.8], "momentum": [0.1, 0.2, 0.9], "eps": [1e-3, 1e-4, 1e-2]},
    ),
    "NAdam": (
        lambda p: torch.optim.NAdam(p, lr=0.01),
        {"momentum_decay": [0.01, 0.1, 0.02], "betas": [(0.5, 0.99), (0.6, 0.9), (0.8, 0.95)]},
    ),
    "RAdam": (lambda p: torch.optim.RAdam(p, lr=0.01), {"betas": [(0.5, 0.99), (0.6, 0.9), (0.8, 0.95)]}),
    "Adadelta": (lambda p: torch.optim.Adadelta(p, lr=0.5), {"rho": [0.5, 0.7, 0.8], "eps": [1e-3, 1e-4, 1e-2]}),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_every_hyperparameter_may_change_at_every_step(kind: str, compilations: list[str]) -> None:
    make, changes = CHANGES[kind]
    model = seeded(dropout=0.0)
    reference = copy.deepcopy(model)
    optimizer, other = make(model.parameters()), make(reference.parameters())
    step = torchorbax.train_step(model, optimizer, loss_fn)
    for i in range(4):
        loss = loss_fn(reference, batch_of(i))
        other.zero_grad()
        loss.backward()
        other.step()
        assert float(step(batch_of(i))) == pytest.approx(loss.item(), rel=1e-3)
        for one in (optimizer, other):
            for key, values in changes.items():
                one.param_groups[0][key] = values[i % 3]
    for name, tensor in reference.state_dict().items():
        np.testing.assert_allclose(to_jax(model)[name], tensor.numpy(), rtol=3e-3, atol=3e-4, err_msg=name)
    assert compilations.count("step") == 1


def test_one_cycle_compiles_once(compilations: list[str]) -> None:
    model = seeded()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20)
    step = torchorbax.train_step(model, optimizer, loss_fn)
    for i in range(10):
        step(batch_of(i))
        scheduler.step()
    assert compilations.count("step") == 1


def test_a_hyperparameter_remembers_what_is_computed_from_it() -> None:
    exact: set[int] = set()
    beta = Hyperparameter.input(0.9, 0, exact)
    rest: Any = 2 / (1 - beta) - 1
    assert float(rest) == 2 / (1 - 0.9) - 1
    assert rest.compute([0.5]) == 2 / (1 - 0.5) - 1
    assert beta != 0
    assert not exact, "whether it is zero is known without its value"
    assert rest > 5
    assert exact == {0}


def test_programs_are_bounded_and_what_changes_is_told(caplog: pytest.LogCaptureFixture) -> None:
    class Own(torch.optim.SGD):  # not torch's own, so its hyperparameters are constants
        pass

    model = nn.Linear(1, 1)
    optimizer = Own(model.parameters(), lr=0.1, momentum=0.5)
    step = torchorbax.train_step(model, optimizer, lambda m, x: m(x).sum())
    for i in range(40):
        optimizer.param_groups[0]["momentum"] = 0.01 * (i + 1)
        step(torch.ones(1, 1))
    assert len(step._programs) <= 32
    assert "compiled 16 times: momentum keeps changing" in caplog.text


class Counting(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        self.param_groups[0]["calls"] = self.param_groups[0].get("calls", 0) + 1
        return super().step(closure)


class Global(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        self.state["all"]["norm"] = torch.zeros((), device="jax")
        return super().step(closure)


@pytest.mark.parametrize(
    ("kind", "message"), [(Counting, "changes 'calls' in its param_groups"), (Global, "keeps state under 'all'")]
)
def test_state_that_a_program_cannot_update_is_refused(kind: type[torch.optim.SGD], message: str) -> None:
    model = seeded()
    step = torchorbax.train_step(model, kind(model.parameters(), lr=0.1), loss_fn)
    with pytest.raises(ConfigError, match=message):
        step(batch_of(0))
