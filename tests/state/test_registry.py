"""Which objects go into `state=`: several of them, in containers, under names that do not meet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import optax
import pytest
import torch
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from torch import nn
from torchorbax import Checkpointer, ConfigError, OptaxOptimizer, place_, resume, to_jax

from tests.helpers.fake_runs import weights
from tests.helpers.runs import restored, saved
from tests.helpers.tensors import bits


@pytest.mark.parametrize("name", ["manifest", "rng", "a/b", "", ".hidden", 3])
def test_bad_item_names(tmp_path: Path, name: Any) -> None:
    with pytest.raises(ConfigError, match="cannot name an item"):
        Checkpointer(str(tmp_path / "run"), {name: weights()})


def gan(seed: int, kind: str) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    generator, critic = nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    if kind == "optax":
        optimizers: list[Any] = [OptaxOptimizer(model, optax.adam(0.1)) for model in (generator, critic)]
        for optimizer in optimizers:
            optimizer.init()
    else:
        optimizers = [torch.optim.Adam(model.parameters(), lr=0.1 * seed) for model in (generator, critic)]
        critic(generator(torch.ones(1, 2))).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    if kind == "dict":
        return {"g": generator, "c": critic}, {"g": optimizers[0], "c": optimizers[1]}
    return [generator, critic], optimizers


@pytest.mark.parametrize("kind", ["list", "dict", "optax"])
def test_lists_and_dicts_of_models_and_optimizers(kind: str, tmp_path: Path, mesh: Mesh) -> None:
    models, optimizers = gan(1, kind)
    with resume(models, optimizers, str(tmp_path), save=None) as run:
        run.save(0, force=True)
    again, others = gan(2, kind)
    shardings = (mesh, lambda name, shape: P())
    with resume(again, others, str(tmp_path), save=None, shardings=shardings) as run:
        assert run.step == 0
    keys = models if kind == "dict" else range(2)
    for key in keys:
        arrays = {name: bits(array) for name, array in to_jax(models[key]).items()}
        assert {name: bits(array) for name, array in to_jax(again[key]).items()} == arrays
        assert all(param.jax().sharding.mesh.size == 8 for param in again[key].parameters())
        if kind != "optax":
            assert others[key].param_groups[0]["lr"] == 0.1
            for one, two in zip(models[key].parameters(), again[key].parameters(), strict=True):
                assert bits(optimizers[key].state[one]["exp_avg"]) == bits(others[key].state[two]["exp_avg"])
                assert others[key].state[two]["exp_avg"].jax().sharding == two.jax().sharding
    with Checkpointer(str(tmp_path), {"model": again}) as run:
        run.restore(only="model")


def test_one_optimizer_over_several_models_knows_them_apart(tmp_path: Path) -> None:
    def objects() -> dict[str, Any]:
        models = [nn.Linear(2, 2), nn.Linear(2, 2)]
        params = [param for model in models for param in model.parameters()]
        return {"model": models, "optimizer": torch.optim.SGD(params, lr=0.1, momentum=0.9)}

    state = objects()
    for i, param in enumerate(state["optimizer"].param_groups[0]["params"]):
        param.grad = torch.full_like(param, float(i))
    state["optimizer"].step()
    path = saved(tmp_path, **state)
    other = objects()
    restored(path, **other)
    found = [other["optimizer"].state[param]["momentum_buffer"].mean() for param in other["model"][1].parameters()]
    assert found == [2, 3]


def test_labels_that_are_called_like_parameters_do_not_confuse_them(tmp_path: Path, mesh: Mesh) -> None:
    def optimizer_of(model: nn.Module) -> OptaxOptimizer:
        transforms = {"weight": optax.sgd(0.1, momentum=0.9), "bias": optax.adam(0.1)}
        return OptaxOptimizer(model, optax.multi_transform(transforms, {"weight": "bias", "bias": "weight"}))

    model = nn.Linear(8, 8)
    optimizer = optimizer_of(model)
    place_(model, None, (mesh, lambda name, shape: P("fsdp")))
    for (_, owner), leaf in zip(optimizer.leaf_names(optimizer.init()), jax.tree.leaves(optimizer.state), strict=True):
        if leaf.ndim:
            assert owner is not None
            assert (leaf.shape, leaf.sharding.spec) == (tuple(model.get_parameter(owner).shape), P("fsdp"))
    path = saved(tmp_path, model=model, optimizer=optimizer)
    other = nn.Linear(8, 8)
    restored(path, model=other, optimizer=optimizer_of(other))


def test_containers_may_be_nested_and_mixed(tmp_path: Path) -> None:
    def objects(value: float) -> dict[str, Any]:
        model = nn.Linear(2, 2)
        nn.init.constant_(model.weight, value)
        scheduler = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(model.parameters(), lr=value), 1)
        return {"both": {"models": (model, [nn.Identity()]), "schedulers": [scheduler], "epoch": value}}

    path = saved(tmp_path, **objects(3.0))
    state = objects(4.0)
    run = restored(path, **state)
    assert state["both"]["models"][0].weight.eq(3).all()
    assert state["both"]["schedulers"][0].base_lrs == [3.0]
    assert run.state["both"]["epoch"] == state["both"]["epoch"] == 3.0


def test_names_that_would_meet(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"two entries of the state would both be called 'model\.0'"):
        Checkpointer(str(tmp_path), {"model": [nn.Linear(1, 1)], "model.0": nn.Linear(1, 1)})
    with pytest.raises(ConfigError, match=r"'models\.a/b' cannot name an item"):
        Checkpointer(str(tmp_path), {"models": {"a/b": nn.Linear(1, 1)}})
    with pytest.raises(ConfigError, match=r"model must be a torch\.nn\.Module, or a list or dict of them, not a list"):
        resume([], None, str(tmp_path))
