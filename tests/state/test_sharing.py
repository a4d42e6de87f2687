"""What is in two items stays one object, in a fresh run, after `place_` and after a restore; or is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from torch import nn
from torchorbax import Checkpointer, ConfigError, MismatchError, resume

from tests.helpers.tensors import bits

Lives = Callable[..., Any]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 8)
        self.head = nn.Linear(8, 8)


def tied() -> tuple[Net, Net]:
    model, teacher = Net(), Net()
    teacher.embed = model.embed
    return model, teacher


@pytest.mark.parametrize("name", ["teacher", "a_teacher"], ids=["after the model", "before it by name"])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_teacher_keeps_the_embedding_of_the_model(sharded: bool, name: str, tmp_path: Path, mesh: Mesh) -> None:
    rules = (mesh, {"*weight": P("fsdp")}) if sharded else None
    before = b""
    for step in range(3):
        model, teacher = tied()
        with resume(model, None, tmp_path, state={name: teacher}, shardings=rules, save=None) as run:
            assert teacher.embed.weight is model.embed.weight
            if step:
                assert bits(model.embed.weight) == before
            before = bits(model.embed.weight)
            run.save(step, force=True)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("lazily", [False, True], ids=["from the start", "later"])
def test_a_parameter_in_a_dict_is_still_that_of_the_model(
    lazily: bool, sharded: bool, tmp_path: Path, mesh: Mesh
) -> None:
    rules = (mesh, {"*weight": P("fsdp")}) if sharded else None
    for step in range(2):
        model = Net()
        watched: dict[str, Any] = {} if lazily else {"embedding": model.embed.weight, "tables": [model.head.bias]}
        with resume(model, None, tmp_path, state={"watched": watched}, shardings=rules, save=None) as run:
            if not step:
                watched |= {"embedding": model.embed.weight, "tables": [model.head.bias]}
            assert watched["embedding"] is model.embed.weight
            assert watched["tables"][0] is model.head.bias
            run.save(step, force=True)


SHARED: dict[str, Callable[[], Any]] = {
    "tensor": lambda: torch.ones(2),
    "array": lambda: np.ones(2),
    "list": lambda: [1, {"a": 2.0}],
    "dict": lambda: {"a": torch.ones(2), "b": [3]},
    "dict of jax arrays": lambda: {"b": jnp.ones(2), "a": {"c": jnp.zeros(1)}},
    "set": lambda: {1, 2},
}


@pytest.mark.parametrize("what", SHARED)
@pytest.mark.parametrize("at_start", [False, True], ids=["later", "from the start"])
def test_what_two_trees_share_stays_one_object(at_start: bool, what: str, lives: Lives) -> None:
    def share(state: Any) -> None:
        state["z"]["one"] = state["a"]["other"] = SHARED[what]()

    def build() -> dict[str, Any]:
        state: dict[str, Any] = {"z": {"x": 0}, "a": {"y": torch.zeros(1)}}
        if at_start:
            share(state)
        return state

    first, second = lives(build, (lambda state: None) if at_start else share)
    assert second["z"]["one"] is second["a"]["other"]
    assert repr(second["z"]["one"]) == repr(first["z"]["one"])


@pytest.mark.parametrize("what", SHARED)
def test_what_is_no_longer_shared_is_apart(what: str, lives: Lives) -> None:
    def build() -> dict[str, Any]:
        shared = SHARED[what]()
        return {"z": {"one": shared}, "a": {"one": shared}}

    def change(state: Any) -> None:
        state["z"]["one"] = SHARED[what]()
        for one in (state["a"]["one"], *(state["a"]["one"].values() if what == "dict" else ())):
            if isinstance(one, torch.Tensor | np.ndarray):
                one *= 5
            elif isinstance(one, list):
                one.append(5)

    first, second = lives(build, change)
    assert second["z"]["one"] is not second["a"]["one"]
    assert repr(second) == repr(first)


def test_the_best_weights_in_place_of_the_models_own_do_not_overwrite_them(lives: Lives) -> None:
    """`state_dict()` gives tensors with the memory of the parameters, so filling them in place fills those."""

    def build() -> dict[str, Any]:
        model = nn.Linear(2, 2)
        return {"model": model, "best": model.state_dict()}

    def change(state: Any) -> None:
        state["best"] = {name: torch.full_like(one, 7) for name, one in state["model"].state_dict().items()}

    first, second = lives(build, change)
    assert bits(second["model"].weight) == bits(first["model"].weight)
    assert second["best"]["weight"].tolist() == [[7, 7], [7, 7]]


@pytest.mark.parametrize("at_start", [False, True], ids=["later", "from the start"])
def test_a_detached_parameter_still_has_the_memory_of_the_parameter(at_start: bool, lives: Lives) -> None:
    def build() -> dict[str, Any]:
        model = nn.Linear(2, 2)
        return {"model": model, "seen": model.weight.detach() if at_start else None}

    def change(state: Any) -> None:
        state["seen"] = state["model"].weight.detach()

    _, second = lives(build, change)
    with torch.no_grad():
        second["model"].weight.fill_(3)
    assert second["seen"].tolist() == [[3, 3], [3, 3]]
    assert not second["seen"].requires_grad


def test_the_state_of_an_optimizer_in_a_dict_is_that_of_the_optimizer(tmp_path: Path, mesh: Mesh) -> None:
    for step in range(2):
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        moments: dict[str, Any] = {}
        rules = (mesh, {"*weight": P("fsdp")}) if step else None
        with resume(
            model, optimizer, tmp_path, state={"moments": moments}, shardings=rules, rng=False, save=None
        ) as run:
            if not step:
                for param in model.parameters():
                    param.grad = torch.ones_like(param)
                optimizer.step()
                moments["embed"] = optimizer.state[model.embed.weight]["momentum_buffer"]
            assert moments["embed"] is optimizer.state[model.embed.weight]["momentum_buffer"]
            run.save(step, force=True)


def test_a_buffer_in_the_state_of_an_optimizer_is_that_of_the_model(lives: Lives) -> None:
    def build() -> dict[str, Any]:
        model = nn.BatchNorm1d(2)
        return {"model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.1)}

    def change(state: Any) -> None:
        state["optimizer"].state[state["model"].weight]["mean"] = state["model"].running_mean

    _, second = lives(build, change)
    assert second["optimizer"].state[second["model"].weight]["mean"] is second["model"].running_mean


class Holder:
    def __init__(self, value: Any = None) -> None:
        self.value = value

    def state_dict(self) -> Any:
        return {"value": self.value}

    def load_state_dict(self, state: Any) -> None:
        self.value = state["value"]


def test_an_object_gets_the_very_tensors_that_it_shares(lives: Lives) -> None:
    def build() -> dict[str, Any]:
        return {"holder": Holder(), "another": Holder(), "x": {}, "model": nn.Linear(2, 2)}

    def change(state: Any) -> None:
        state["x"]["best"] = torch.ones(2)
        state["holder"].value = [state["model"].weight, state["x"]["best"]]
        state["another"].value = [torch.ones(1)]
        state["holder"].value.append(state["another"].value[0])

    _, second = lives(build, change)
    held = second["holder"].value
    assert held[0] is second["model"].weight
    assert held[1] is second["x"]["best"]
    assert held[2] is second["another"].value[0]


def test_modules_that_are_tied_or_untied_later_are_refused(tmp_path: Path) -> None:
    model, teacher = tied()
    with Checkpointer(tmp_path / "1", {"model": model, "teacher": teacher}, save=None) as run:
        teacher.embed = nn.Embedding(8, 8)
        with pytest.raises(ConfigError, match=r"teacher: the module has changed .* embed.weight is tied otherwise"):
            run.save(0, force=True)
    model, teacher = Net(), Net()
    with Checkpointer(tmp_path / "2", {"model": model, "teacher": teacher}, save=None) as run:
        teacher.embed = model.embed
        with pytest.raises(ConfigError, match=r"teacher: the module has changed .* embed.weight is tied otherwise"):
            run.save(0, force=True)


@pytest.mark.parametrize("was_tied", [False, True])
def test_a_program_that_ties_modules_otherwise_is_told_so(was_tied: bool, tmp_path: Path) -> None:
    model, teacher = tied() if was_tied else (Net(), Net())
    with Checkpointer(tmp_path, {"model": model, "teacher": teacher}, save=None) as run:
        run.save(0, force=True)
    model, teacher = (Net(), Net()) if was_tied else tied()
    with Checkpointer(tmp_path, {"model": model, "teacher": teacher}) as run:
        with pytest.raises(MismatchError, match=r"teacher: embed.weight: ties: .*tied to a tensor of model"):
            run.restore()
        run.restore(only="model")


def test_the_order_of_the_entries_does_not_matter(tmp_path: Path) -> None:
    model, teacher = tied()
    shared = [1]
    with Checkpointer(tmp_path, {"net": model, "teacher": teacher, "b": {"x": shared}, "a": {"x": shared}}) as run:
        run.save(0, force=True)
    model, teacher = tied()
    state: dict[str, Any] = {"a": {"x": [0]}, "b": {"x": [0]}, "teacher": teacher, "net": model}
    with Checkpointer(tmp_path, state) as run:
        run.restore()
    assert teacher.embed.weight is model.embed.weight
    assert state["a"]["x"] is state["b"]["x"]


def test_an_item_that_is_restored_alone_gets_tensors_of_its_own(tmp_path: Path) -> None:
    model = Net()
    with Checkpointer(tmp_path, {"model": model, "x": {}}, save=None) as run:
        run.state["x"]["w"] = model.embed.weight
        run.save(0, force=True)
    again = Net()
    before = bits(again.embed.weight)
    state: dict[str, Any] = {"model": again, "x": {}}
    with Checkpointer(tmp_path, state) as run:
        run.restore(only="x")
    assert bits(state["x"]["w"]) == bits(model.embed.weight)
    assert bits(again.embed.weight) == before


def test_detached_parameters_that_shardings_would_leave_behind_are_refused(tmp_path: Path, mesh: Mesh) -> None:
    rules = (mesh, {"weight": P("fsdp")})
    model = nn.Linear(8, 8)
    advice = r"best.weight has the memory of model.weight, .*put the parameter itself there, or a clone"
    with pytest.raises(ConfigError, match=advice):
        resume(model, None, tmp_path, state={"best": model.state_dict()}, shardings=rules)
    clones = {name: one.clone() for name, one in model.state_dict().items()}
    for best in (clones, dict(model.named_parameters())):
        with resume(model, None, tmp_path, state={"best": best}, shardings=rules, save=None):
            pass
    assert best["weight"] is model.weight
