"""What a loss reads and writes in less visible places trains as in torch, or is refused by name."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchorbax
from torch import nn
from torch.nn import functional as F
from torchorbax import ConfigError, to_jax

BATCH = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.second(torch.tanh(self.first(x)))


Loss = Callable[[Any, Any], Any]


def losses(model: nn.Module, loss_fn: Loss, between: Callable[[int], object], *, compiled: bool) -> list[float]:
    """The losses of four steps, with `between(step)` called after each."""
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    step = torchorbax.train_step(model, optimizer, loss_fn) if compiled else None
    found = []
    for index in range(4):
        if step is None:
            optimizer.zero_grad()
            loss = loss_fn(model, BATCH)
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        else:
            found.append(float(step(BATCH)))
        between(index)
    return found


def same_as_torch(program: Callable[[], tuple[nn.Module, Loss, Callable[[int], object]]]) -> None:
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        results.append(losses(*program(), compiled=compiled))
    np.testing.assert_allclose(results[1], results[0], rtol=1e-4)


def nothing(_: int) -> None:
    pass


def test_frozen_parameters_of_the_model_that_forward_writes_keep_what_was_written() -> None:
    class MomentumEncoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key = Net(), Net().requires_grad_(False)

        def forward(self, x: torch.Tensor) -> Any:
            for mine, other in zip(self.query.parameters(), self.key.parameters(), strict=True):
                other.data = other.data * 0.5 + mine.data * 0.5
            return self.query(x) - self.key(x)

    same_as_torch(lambda: (MomentumEncoder(), lambda model, x: model(x).square().mean(), nothing))
    model = MomentumEncoder()
    before = copy.deepcopy(model.key.first.weight)
    losses(model, lambda model, x: model(x).square().mean(), nothing, compiled=True)
    assert not np.array_equal(np.asarray(to_jax(model.key.first.weight)), before.numpy())


def test_trained_parameters_that_the_loss_writes_are_named() -> None:
    def loss_fn(model: Any, x: Any) -> Any:
        with torch.no_grad():
            model.first.weight.clamp_(-0.01, 0.01)
        return model(x).sum()

    with pytest.raises(ConfigError, match=r"loss_fn writes into first\.weight, which the optimizer trains"):
        losses(Net(), loss_fn, nothing, compiled=True)


@pytest.mark.parametrize(
    "target",
    [
        lambda y: y.data,
        lambda y: y[:2].data,
        lambda y: y[:2].detach(),
        lambda y: y.view(2, -1)[0].detach(),
        lambda y: y.chunk(2)[1].detach(),
    ],
    ids=["data", "data of a view", "view", "view of a view", "chunk"],
)
def test_detached_values_have_no_gradient(target: Callable[[Any], Any]) -> None:
    def loss_fn(model: Any, x: Any) -> Any:
        y = model(x)
        return y.square().mean() + (target(y).sum() * y).sum()

    same_as_torch(lambda: (Net(), loss_fn, nothing))


def test_a_view_taken_without_gradients_has_none() -> None:
    def loss_fn(model: Any, x: Any) -> Any:
        y = model(x)
        with torch.no_grad():
            row = model.first.weight[0]
        return y.square().mean() + (row * model.first.weight[0]).sum()

    same_as_torch(lambda: (Net(), loss_fn, nothing))


def test_settings_of_a_callable_object_are_live_in_slots_too() -> None:
    class Criterion:
        def __init__(self) -> None:
            self.weight = 1.0

        def __call__(self, model: Any, x: Any) -> Any:
            return self.weight * model(x).square().mean()

    class Slotted:
        __slots__ = ("weight",)

        def __init__(self) -> None:
            self.weight = 1.0

        def __call__(self, model: Any, x: Any) -> Any:
            return self.weight * model(x).square().mean()

    for kind in (Criterion, Slotted):

        def program(kind: Any = kind) -> Any:
            criterion = kind()
            return Net(), criterion, lambda index: setattr(criterion, "weight", index + 2.0)

        same_as_torch(program)


def test_sets_hooks_and_names_given_to_getattr_are_live() -> None:
    class Settings:
        scale = 1.0

    def program() -> Any:
        model, settings, on = Net(), Settings(), {"plain"}

        def change(index: int) -> None:
            if index == 0:
                on.add("doubled")
            elif index == 1:
                model.first.register_forward_hook(lambda module, inputs, output: output * 2)
            else:
                settings.scale = 3.0

        def loss_fn(model: Any, x: Any) -> Any:
            return (2 if "doubled" in on else 1) * getattr(settings, "scale") * model(x).square().mean()  # noqa: B009

        settings.scale = 1.0
        return model, loss_fn, change

    same_as_torch(program)


def test_a_scheduler_that_the_loss_reads_is_live() -> None:
    def program() -> Any:
        model = Net()
        optimizer = torch.optim.SGD(Net().parameters(), lr=1.0)  # only its rate is of interest
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

        def change(_: int) -> None:
            optimizer.step()
            scheduler.step()

        def loss_fn(model: Any, x: Any) -> Any:
            return (scheduler.get_last_lr()[0] + optimizer.param_groups[0]["lr"]) * model(x).square().mean()

        return model, loss_fn, change

    same_as_torch(program)


def test_a_tensor_that_first_comes_to_be_in_a_trace_is_told(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[Any] = []

    def loss_fn(model: Any, x: Any) -> Any:
        seen.append(F.relu(model(x)).mean().detach())
        return seen[-1] + model(x).sum()

    losses(Net(), loss_fn, nothing, compiled=True)
    assert "loss_fn puts a tensor into seen[0] when it is traced, and not at every step" in caplog.text


def test_hooks_on_gradients_are_refused_by_name() -> None:
    on_parameter, on_module = Net(), Net()
    on_parameter.first.weight.register_hook(lambda gradient: gradient * 2)
    on_module.second.register_full_backward_hook(lambda module, into, out: None)
    for model, name in ((on_parameter, r"first\.weight"), (on_module, "second")):
        with pytest.raises(ConfigError, match=f"{name} has a hook on its gradient"):
            losses(model, lambda model, x: model(x).sum(), nothing, compiled=True)


class Scales:
    """Values under names that code computes."""

    def __init__(self) -> None:
        self.scale0, self.scale1 = 1.0, 2.0
        self.parts = ["scale0", "scale1"]
        self.steps = 0


def formatted(scales: Scales) -> float:
    return sum(getattr(scales, f"scale{index}") for index in range(2))


def added(scales: Scales) -> float:
    return sum(vars(scales)["scale" + str(index)] for index in range(2))


def listed(scales: Scales) -> float:
    return sum(getattr(scales, name) for name in scales.parts)


def written_out(scales: Scales) -> float:
    return sum(getattr(scales, name) for name in ("scale0", "scale1"))


def got(scales: Scales) -> float:
    found: float = operator.attrgetter("scale1")(scales)
    return found


@pytest.mark.parametrize("read", [formatted, added, listed, written_out, got], ids=lambda one: one.__name__)
@pytest.mark.parametrize("tensor", [False, True])
def test_attributes_under_computed_names_are_noticed(read: Callable[[Scales], Any], tensor: bool) -> None:
    scales, model = Scales(), nn.Linear(3, 1)
    make: Any = torch.tensor if tensor else float
    scales.scale1 = make(2.0)
    traces = []

    def loss_fn(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        traces.append(1)
        return model(x).mean() * read(scales)

    step = torchorbax.train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), loss_fn)
    x = torch.ones(2, 3)
    before, factor = float(step(x)), float(read(scales))
    scales.scale1 = make(7.0)
    assert float(step(x)) == pytest.approx(before * float(read(scales)) / factor)
    count = len(traces)
    scales.steps += 1
    step(x)
    assert len(traces) == count  # names that the code cannot mean trace nothing


class Doubling(nn.Module):
    factor = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scaled(self.linear(x))


@pytest.mark.parametrize(
    ("owner", "name", "other"),
    [
        (Doubling, "forward", lambda self, x: 6 * self.linear(x)),
        (Doubling, "scaled", lambda self, x: 6 * x),
        (Doubling, "factor", 6.0),
        (nn.Linear, "forward", lambda self, x: 3 * nn.functional.linear(x, self.weight, self.bias)),
    ],
)
def test_what_replaces_an_attribute_of_a_class_is_noticed(
    owner: type, name: str, other: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Doubling()
    step = torchorbax.train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), lambda m, x: m(x).mean())
    x = torch.ones(2, 3)
    before = float(step(x))
    monkeypatch.setattr(owner, name, other)
    assert float(step(x)) == pytest.approx(3 * before, rel=1e-5)
