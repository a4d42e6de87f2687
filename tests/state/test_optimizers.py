"""Optimizers with state of any kind."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from torch import nn
from torchorbax import (
    Checkpointer,
    ConfigError,
    MismatchError,
    OptaxOptimizer,
    UnsupportedLeafError,
    load,
    resume,
    train_step,
    verify,
)
from torchorbax._src.format.values import LayoutError
from torchorbax._src.state.torch_optimizer_tree import checked_tree

from tests.helpers.tensors import bits


def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return model(batch).square().mean()


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    optimizer.zero_grad()
    loss = loss_of(model, torch.randn(4, 3, generator=generator))
    loss.backward()
    optimizer.step()
    return loss.item()


class Preconditioned(torch.optim.SGD):
    """Keeps a mapping with keys that cannot be sorted, from the third step on."""

    def step(self, closure: Any = None) -> Any:
        self.steps = getattr(self, "steps", 0) + 1
        for param in self.param_groups[0]["params"] if self.steps > 2 else ():
            self.state[param]["precond"] = {0: torch.full((2,), 3.0), "L": (torch.ones(2), None), None: "x"}
        return super().step(closure)


def test_state_in_mappings_that_cannot_be_sorted(tmp_path: Path) -> None:
    """Every step is good, and the newest is restored."""

    def life() -> tuple[int | None, Any]:
        model = nn.Linear(3, 3)
        optimizer = Preconditioned(model.parameters(), lr=0.1)
        with resume(model, optimizer, tmp_path, save=1, keep=None) as run:
            restored = optimizer.state[model.weight].get("precond")
            for step in run.steps(4):
                trained(model, optimizer, step)
        return run.step, restored

    life()
    step, restored = life()
    assert step == 3
    assert verify(tmp_path) == [0, 1, 2, 3]
    assert list(restored) == [0, "L", None]
    assert restored[0].tolist() == [3, 3]
    assert restored["L"][0].tolist() == [1, 1]


class Counting(torch.optim.SGD):
    """Keeps something that belongs to no parameter."""

    def step(self, closure: Any = None) -> Any:
        of_all = self.state["all"]
        of_all["calls"] = of_all.get("calls", 0) + 1
        of_all.setdefault("mean", torch.zeros(2)).add_(1)
        self.state[3, "plain"] = of_all["calls"]
        return super().step(closure)


def test_state_that_belongs_to_no_parameter(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    optimizer = Counting(model.parameters(), lr=0.1, momentum=0.9)
    with resume(model, optimizer, tmp_path, save=1) as run:
        for step in run.steps(2):
            trained(model, optimizer, step)
    again = nn.Linear(3, 3)
    other = Counting(again.parameters(), lr=0.1, momentum=0.9)
    with resume(again, other, tmp_path):
        assert other.state["all"]["calls"] == other.state[3, "plain"] == 2
        assert other.state["all"]["mean"].tolist() == [2, 2]
        assert bits(other.state[again.weight]["momentum_buffer"]) == bits(
            optimizer.state[model.weight]["momentum_buffer"]
        )


class SharedCounter(torch.optim.Optimizer):
    """All parameters share one tensor."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        params = self.param_groups[0]["params"]
        for param in params:
            count = self.state[param].setdefault("t", self.state[params[0]].setdefault("t", torch.zeros(())))
            count += 1
            param.sub_(param.grad * 0.1 / count)


def test_a_tensor_that_parameters_share_stays_shared(tmp_path: Path) -> None:
    def losses(name: str, stops: list[int]) -> list[float]:
        found = []
        for stop in stops:
            torch.manual_seed(0)
            model = nn.Linear(3, 3)
            optimizer = SharedCounter(model.parameters())
            with resume(model, optimizer, tmp_path / name, save=1) as run:
                found += [trained(model, optimizer, step) for step in run.steps(stop)]
        return found

    assert losses("cut", [3, 6]) == losses("whole", [6])


def test_groups_that_have_been_added_come_back(tmp_path: Path) -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        return model, torch.optim.SGD(model[1].parameters(), lr=0.1, momentum=0.9)

    model, optimizer = build()
    with resume(model, optimizer, tmp_path, save=None) as run:
        trained(model, optimizer, 0)
        optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.25, "odd": [1, None]})
        trained(model, optimizer, 1)
        run.save(0, force=True)
    again, other = build()
    with resume(again, other, tmp_path):
        assert [len(group["params"]) for group in other.param_groups] == [2, 2]
        assert other.param_groups[1]["params"][0] is again[0].weight
        assert (other.param_groups[1]["lr"], other.param_groups[1]["odd"]) == (0.25, [1, None])
    assert [trained(model, optimizer, seed) for seed in (2, 3)] == [trained(again, other, seed) for seed in (2, 3)]


def test_a_failed_restore_takes_groups_and_state_back(tmp_path: Path) -> None:
    class Refusing:
        def state_dict(self) -> int:
            return 1

        def load_state_dict(self, state: int) -> None:
            raise RuntimeError("no")

    def build() -> dict[str, Any]:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        return {"model": model, "optimizer": Counting(model[1].parameters(), lr=0.1), "z": Refusing()}

    state = build()
    with Checkpointer(tmp_path, state, save=None) as run:
        state["optimizer"].add_param_group({"params": state["model"][0].parameters()})
        trained(state["model"], state["optimizer"], 0)
        run.save(0, force=True)
    state = build()
    group = state["optimizer"].param_groups[0]
    with Checkpointer(tmp_path, state) as run, pytest.raises(MismatchError, match="z: placement"):
        run.restore()
    assert state["optimizer"].param_groups == [group]
    assert len(group["params"]) == 2
    assert not state["optimizer"].state


def test_what_could_not_be_restored_is_refused(tmp_path: Path) -> None:
    class Further(torch.optim.SGD):
        def state_dict(self) -> dict[str, Any]:
            return {**super().state_dict(), "slow": [1]}

    model = nn.Linear(3, 3)
    with pytest.raises(ConfigError, match=r"optimizer: the state_dict of Further has slow besides state and"):
        resume(model, Further(model.parameters(), lr=0.1), tmp_path)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["schedule"] = lambda step: 0.1
    with pytest.raises(UnsupportedLeafError, match=r"optimizer\.param_groups\.0\.schedule: a function cannot be kept"):
        resume(model, optimizer, tmp_path)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with resume(model, optimizer, tmp_path, save=None) as run:
        optimizer.state[torch.ones(7)]["x"] = 1
        with pytest.raises(ConfigError, match=r"entry for a tensor of shape \(7,\) that is no parameter of a model"):
            run.save(0, force=True)


def test_a_parameter_in_the_state_is_refused_and_a_clone_is_not(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with resume(model, optimizer, tmp_path, save=None) as run:
        optimizer.state[model.weight]["anchor"] = model.weight
        with pytest.raises(ConfigError, match=r"weight\.anchor is a parameter of the model itself.* keep a clone"):
            run.save(0, force=True)
        optimizer.state[model.weight]["anchor"] = model.weight.detach().clone()
        run.save(0, force=True)


# --------------------------------------------------------------------------------------------------------------- optax


def test_the_state_of_a_model_that_is_frozen_when_it_is_saved(tmp_path: Path) -> None:
    def life(path: Path, stop: int) -> tuple[int | None, list[Any]]:
        torch.manual_seed(0)
        models = [nn.Linear(3, 3), nn.Linear(3, 2)]
        optimizers = [OptaxOptimizer(model, optax.adam(0.1)) for model in models]
        steps = [train_step(model, optimizer, loss_of) for model, optimizer in zip(models, optimizers, strict=True)]
        losses = []
        with resume(models, optimizers, path, save=1) as run:
            for number in run.steps(stop):
                batch = torch.full((1, 3), float(number))
                models[1].requires_grad_(True)
                losses.append(float(steps[1](batch)))
                models[1].requires_grad_(False)
                losses.append(float(steps[0](batch)))
        return run.step, losses

    _, expected = life(tmp_path / "whole", 5)
    life(tmp_path / "cut", 3)
    step, losses = life(tmp_path / "cut", 5)
    assert step == 2
    assert losses == expected[6:]


def test_the_names_of_a_frozen_model_s_state_are_the_same(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    optimizer = OptaxOptimizer(model, optax.adam(0.1))
    optimizer.init()
    with Checkpointer(tmp_path, {"model": model, "optimizer": optimizer}, save=None, keep=None) as run:
        run.save(0, force=True)
        model.requires_grad_(False)
        run.save(1, force=True)
    assert load(tmp_path, 0, "optimizer").keys() == load(tmp_path, 1, "optimizer").keys()


def test_the_advice_for_a_chain_that_has_changed_works(tmp_path: Path) -> None:
    """Clipping is put in front: the names in the message are renamed as it says, and the moments are there."""

    def objects(tx: Any) -> tuple[nn.Module, OptaxOptimizer]:
        model = nn.Linear(3, 3)
        return model, OptaxOptimizer(model, tx)

    model, optimizer = objects(optax.adamw(0.1))
    optimizer.init()
    optimizer.state = jax.tree.map(lambda leaf: leaf + 3, optimizer.state)
    with resume(model, optimizer, tmp_path, save=None) as run:
        run.save(0, force=True)
    again, other = objects(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)))
    with pytest.raises(MismatchError, match=r"rename=\{'0\.count': '1\.0\.count'") as caught:
        resume(again, other, tmp_path)
    advised = {problem.nearest: problem.name for problem in caught.value.problems if problem.nearest}
    shown = re.search(r"rename=(\{.*?\})", str(caught.value))
    assert shown is not None
    assert eval(shown[1]).items() <= advised.items()  # what a user would copy
    with resume(again, other, tmp_path, rename=advised) as run:
        assert run.step == 0
    assert [bits(one) for one in jax.tree.leaves(other.state)] == [
        bits(one) for one in jax.tree.leaves(optimizer.state)
    ]


def test_a_state_that_the_transformation_would_not_make_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    optimizer = OptaxOptimizer(model, optax.adam(0.1))
    with resume(model, optimizer, tmp_path, save=None) as run:
        optimizer.state = optax.sgd(0.1, momentum=0.9).init({"weight": jnp.zeros((3, 3))})
        with pytest.raises(MismatchError, match=r"optimizer: 0\.count: expected a leaf, but it is missing"):
            run.save(0, force=True)
        optimizer.state = {"lr": 0.1}
        with pytest.raises(UnsupportedLeafError, match=r"optimizer\.lr: a float is no jax\.Array"):
            run.save(0, force=True)


# ---------------------------------------------------------------------------------------------------------- weak types


def test_weakly_typed_arrays_stay_so(lives: Callable[..., Any], mesh: Mesh) -> None:
    """With bfloat16 weights an update by a strongly typed learning rate would make them float32."""
    bits_of_nan = np.asarray([0x7F800001, 0xFF812345], np.uint32).view(np.float32)

    def build() -> dict[str, Any]:
        weak = jnp.full((8,), 0.25)
        sharded = jax.device_put(weak, jax.NamedSharding(mesh, P("fsdp")))
        return {"x": {"w": jnp.ones(2, jnp.bfloat16), "lr": jnp.asarray(0.1), "n": jnp.asarray(3), "sharded": sharded}}

    def change(state: Any) -> None:
        state["x"]["nan"] = jnp.full((2,), 0.0).at[...].set(bits_of_nan)
        state["x"]["w"] = state["x"]["w"] - state["x"]["lr"] * state["x"]["w"]

    first, second = lives(build, change)
    for name, array in first["x"].items():
        other = second["x"][name]
        assert (array.weak_type, array.dtype, bits(array)) == (other.weak_type, other.dtype, bits(other)), name
    assert second["x"]["sharded"].sharding == first["x"]["sharded"].sharding
    assert (second["x"]["w"] * second["x"]["lr"]).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    "shape", [[10**5000], [-1], [True], [2.0], [2**40, 2**40]], ids=["digits", "negative", "bool", "float", "bytes"]
)
def test_a_parameter_that_cannot_be_is_no_state_of_an_optimizer(shape: list[Any]) -> None:
    """A stranger may have written it; a message that has the shape in it could not even be made."""
    tree = {"class": "SGD", "state": {}, "param_groups": [], "params": {"w": [[2, 2], "float32"]}}
    assert checked_tree(tree) == tree
    with pytest.raises(LayoutError, match=r"not the state of a torch\.optim optimizer"):
        checked_tree({**tree, "params": {"w": [shape, "float32"]}})
