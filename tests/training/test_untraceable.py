"""Code that cannot be compiled is refused by the operation and the module, with advice that works."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import jax
import pytest
import torch
import torchax
import torchorbax
from torch import nn
from torchax.tensor import OperatorNotFound
from torchorbax import ConfigError


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)[x[:, 0] > 0]


class Chosen(nn.Module):
    """As the experts of transformers' mixtures do it, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.config = type("Config", (), {"_experts_implementation": "eager"})()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum((self.weight[index[0]] for index in x.nonzero()), start=torch.zeros(()))


def connectionist(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    targets, lengths = torch.ones(1, 2, dtype=torch.long), (torch.tensor([4]), torch.tensor([2]))
    return nn.functional.ctc_loss(model(x)[:, None].log_softmax(-1), targets, *lengths)


CASES: dict[str, tuple[Callable[[], nn.Module], Any, str, type[Exception]]] = {
    "if": (
        lambda: nn.Linear(3, 1),
        lambda m, x: m(x).mean() if m(x).sum() > 0 else -m(x).mean(),
        r"torch.Tensor.__bool__ needs the values of tensors .* torch.where",
        jax.errors.ConcretizationTypeError,
    ),
    "a mask as an index": (
        lambda: nn.Sequential(Masked()),
        lambda m, x: m(x).mean(),
        r"torch.Tensor.__getitem__ in 0 \(Masked\) needs the values",
        jax.errors.NonConcreteBooleanIndexError,
    ),
    "numpy": (
        lambda: nn.Linear(3, 1),
        lambda m, x: m(x).mean() * m(x).detach().numpy().mean(),
        "the code needs the values",
        jax.errors.TracerArrayConversionError,
    ),
    "experts": (
        lambda: nn.Sequential(Chosen()),
        lambda m, x: m(x).mean(),
        r"torch.Tensor.nonzero in 0 \(Chosen\) .*set_experts_implementation\('grouped_mm'\)",
        jax.errors.ConcretizationTypeError,
    ),
    "max_norm": (
        lambda: nn.Sequential(nn.Embedding(5, 3, max_norm=0.5)),
        lambda m, x: m(x.long()).mean(),
        r"torch.nn.functional.embedding in 0 \(Embedding\) writes into its weight .*renorm\(weight, 2.0, 0, 0.5\)",
        jax.errors.ConcretizationTypeError,
    ),
    "no lowering": (
        lambda: nn.Linear(3, 4),
        connectionist,
        r"torch.nn.functional.ctc_loss cannot be computed on jax .*call_jax",
        OperatorNotFound,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_compiled_is_named(case: str) -> None:
    make, loss_fn, says, cause = CASES[case]
    model = make()
    step = torchorbax.train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn)
    with pytest.raises(ConfigError, match=f"loss_fn cannot be compiled: {says}") as error:
        step(torch.ones(4, 3))
    assert isinstance(error.value.__cause__, cause)


def test_an_evaluation_names_it_too() -> None:
    evaluate = torchorbax.eval_step(nn.Sequential(Masked()), lambda m, x: m(x).mean())
    with pytest.raises(ConfigError, match=r"fn cannot be compiled: torch.Tensor.__getitem__ in 0 \(Masked\)"):
        evaluate(torch.ones(4, 3))


def test_errors_of_the_code_itself_come_out_as_they_are() -> None:
    model = nn.Linear(3, 1)
    step = torchorbax.train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda m, x: {}["missing"])
    with pytest.raises(KeyError, match="missing"):
        step(torch.ones(4, 3))


def test_the_advice_for_max_norm_trains_as_torch_does() -> None:
    reference = nn.Embedding(5, 3, max_norm=0.5)
    model = nn.Embedding(5, 3)
    model.load_state_dict(copy.deepcopy(reference.state_dict()))

    def loss_fn(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        return (model(tokens) - 1).square().mean()

    optimizer = torch.optim.SGD(reference.parameters(), lr=0.5)
    step = torchorbax.train_step(model, torch.optim.SGD(model.parameters(), lr=0.5), loss_fn)
    torchorbax.place_(model)
    for index in range(3):
        tokens = torch.tensor([index, index + 1, index])
        expected = loss_fn(reference, tokens)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        with torch.no_grad(), torchax.default_env():
            model.weight.copy_(torch.renorm(model.weight, 2.0, 0, 0.5))
        assert float(step(tokens)) == pytest.approx(expected.item(), rel=1e-5)
