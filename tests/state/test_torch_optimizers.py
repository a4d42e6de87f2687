"""Optimizers of torch as items: their state goes by the names of parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchorbax
from torch import nn
from torchorbax import Checkpointer, MismatchError

from tests.helpers.restores import Net, optimizer_of, save
from tests.helpers.tensors import bits


def test_schedulers_of_another_kind_are_no_silent_swap(tmp_path: Path) -> None:
    def objects(kind: Callable[..., Any]) -> dict[str, Any]:
        model = Net()
        optimizer = optimizer_of(model, "torch", 1)
        return {"model": model, "optimizer": optimizer, "scheduler": kind(optimizer)}

    with Checkpointer(str(tmp_path), objects(lambda o: torch.optim.lr_scheduler.StepLR(o, 3))) as run:
        run.save(0, force=True)
    with (
        Checkpointer(str(tmp_path), objects(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 9))) as run,
        pytest.raises(
            MismatchError, match=r"scheduler: T_max: expected a value.*\n(.*\n)*.*scheduler: step_size: found"
        ),
    ):
        run.restore()


@pytest.mark.parametrize("kind", ["torch", "optax"])
def test_only_part_of_an_optimizer(kind: str, tmp_path: Path) -> None:
    saved = save(tmp_path / "run", Net(), kind)
    model = Net()
    optimizer = optimizer_of(model, kind, 0)
    with Checkpointer(saved, {"model": model, "optimizer": optimizer}) as run:
        run.restore(only=["optimizer.head.*"])
    if kind == "torch":
        assert list(optimizer.state) == [model.head.weight]
        assert optimizer.state[model.head.weight]["step"] == 2
    else:
        assert [(name, float(array.mean())) for name, array in optimizer.state[0].mu.items() if array.any()] == [
            ("head.weight", 2.0)
        ]


@pytest.mark.parametrize("kind", ["torch", "optax"])
@pytest.mark.parametrize(
    "rename",
    [
        {"encoder": "backbone"},
        {"model.encoder": "model.backbone", "optimizer.encoder": "optimizer.backbone"},
        {f"encoder.{i}.{part}": f"backbone.{i}.{part}" for i in range(2) for part in ("weight", "bias")},
        lambda name: name.replace("encoder", "backbone"),
    ],
    ids=["prefix", "with items", "every leaf", "function"],
)
def test_renamed_leaves_take_their_optimizer_state_along(tmp_path: Path, kind: str, rename: Any) -> None:
    saved = save(tmp_path / "run", Net(), kind)
    model = Net("backbone")
    optimizer = optimizer_of(model, kind, 0)
    with Checkpointer(saved, {"model": model, "optimizer": optimizer}) as run:
        assert run.restore(rename=rename) == 5
        run.save(6, force=True)
        run.wait()
        source = torchorbax.load(saved, 5)
        moments = torchorbax.load(saved, 5, item="optimizer")
        assert bits(model.backbone[1].weight) == bits(source["encoder.1.weight"])
        for name, array in torchorbax.load(saved, 6, item="optimizer").items():
            assert bits(array) == bits(moments[name.replace("backbone", "encoder")]), name
        if not callable(rename):
            run.restore(6, rename=rename)  # the argument may stay where it is after that


def test_an_optimizer_of_another_class_is_a_mismatch(tmp_path: Path) -> None:
    """Its state and hyperparameters would mean something else, or nothing."""
    model = nn.Linear(2, 2)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with torchorbax.resume(model, sgd, tmp_path, save=None) as run:
        run.save(0, force=True)
    adam = torch.optim.AdamW(model.parameters())
    with pytest.raises(torchorbax.MismatchError, match="the optimizer: placement: expected a AdamW, found a SGD"):
        torchorbax.resume(model, adam, tmp_path)
    assert adam.param_groups[0]["lr"] == 1e-3
    with torchorbax.resume(model, adam, tmp_path, strict=False) as run:
        assert [problem.item for problem in run.left_out] == ["optimizer"]
        assert adam.param_groups[0]["lr"] == 1e-3
