"""Where restored state is: `shardings` are for the model, and everything else is where the user has put it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torchorbax import Checkpointer, place_, resume
from torchorbax._src.tensors import torchax_tensors


def where(module: nn.Module) -> dict[str, Any]:
    """For every tensor, its sharding; None on the CPU."""
    tensors = module.state_dict(keep_vars=True)
    return {
        name: torchax_tensors.array_of(tensor).sharding.spec if torchax_tensors.is_torchax(tensor) else None
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("placed", [False, True])
def test_a_module_beside_the_model_stays_where_it_is(placed: bool, tmp_path: Path, mesh: Mesh) -> None:
    def life() -> tuple[dict[str, Any], dict[str, Any]]:
        model = nn.Linear(8, 8)
        average = AveragedModel(model)
        optimizer = torch.optim.SGD(average.parameters(), lr=0.1, momentum=0.9)
        if placed:
            place_(average, None, (mesh, {"module.weight": P(None, "fsdp")}))
        rules = (mesh, {"weight": P("fsdp")})
        state = {"average": average, "of the average".replace(" ", "_"): optimizer}
        with resume(model, None, tmp_path, state=state, shardings=rules, save=None) as run:
            run.save(run.next_step, force=True)
        return where(model), where(average)

    fresh, resumed = life(), life()
    assert fresh == resumed
    assert resumed[0]["weight"] == P("fsdp")
    assert resumed[1]["module.weight"] == (P(None, "fsdp") if placed else None)


def test_rules_are_for_all_modules_of_a_state_without_a_model(tmp_path: Path, mesh: Mesh) -> None:
    def build() -> dict[str, Any]:
        return {"generator": nn.Linear(8, 8), "critic": nn.Linear(8, 8)}

    with Checkpointer(tmp_path, build(), save=None) as run:
        run.save(0, force=True)
    state = build()
    with Checkpointer(tmp_path, state, shardings=(mesh, lambda name, shape: P("fsdp"))) as run:
        run.restore()
    assert {spec for module in state.values() for spec in where(module).values()} == {P("fsdp")}


def test_the_optimizer_of_several_models_follows_the_rules_of_each(tmp_path: Path, mesh: Mesh) -> None:
    def build() -> tuple[list[nn.Module], torch.optim.Optimizer]:
        models: list[nn.Module] = [nn.Linear(8, 8), nn.Linear(8, 8)]
        params = [param for model in models for param in model.parameters()]
        return models, torch.optim.SGD(params, lr=0.1, momentum=0.9)

    models, optimizer = build()
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    optimizer.step()
    with resume(models, optimizer, tmp_path, save=None) as run:
        run.save(0, force=True)
    models, optimizer = build()
    with resume(models, optimizer, tmp_path, shardings=(mesh, {"weight": P("fsdp")})):
        buffer = optimizer.state[models[1].weight]["momentum_buffer"]
        assert torchax_tensors.array_of(buffer).sharding.spec == P("fsdp")
