"""A small network with an optimizer, saved and compared as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optax
import torch
from torch import nn
from torchorbax import Checkpointer, OptaxOptimizer

from tests.helpers.tensors import bits


class Net(nn.Module):
    """An encoder and a head, tied if asked to."""

    def __init__(
        self, encoder: str = "encoder", width: int = 4, tied: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        setattr(self, encoder, nn.Sequential(nn.Linear(4, width, dtype=dtype), nn.Linear(width, 4, dtype=dtype)))
        self.head = nn.Linear(4, 4, bias=False, dtype=dtype)
        self.out = nn.Linear(4, 4, bias=False, dtype=dtype)
        if tied:
            self.out.weight = self.head.weight


def optimizer_of(model: nn.Module, kind: str, steps: int) -> Any:
    """An optimizer with the state that this many steps leave."""
    if kind == "optax":
        optimizer: Any = OptaxOptimizer(model, optax.adam(0.1))
        for _ in range(steps):
            state = optimizer.init()
            optimizer.state = (
                state[0]._replace(count=state[0].count + 1, mu={k: v + 1 for k, v in state[0].mu.items()}),
                *state[1:],
            )
        return optimizer
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(steps):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
    return optimizer


def save(path: Path, model: nn.Module, kind: str = "torch", steps: int = 2, **state: Any) -> str:
    with Checkpointer(str(path), {"model": model, "optimizer": optimizer_of(model, kind, steps), **state}) as run:
        run.save(5, force=True)
    return str(path)


def everything(*objects: Any) -> list[Any]:
    """The bits and hyperparameters of modules and optimizers, and which tensors are which."""
    seen: list[Any] = []
    for one in objects:
        if isinstance(one, nn.Module):
            seen += [(name, id(value), bits(value)) for name, value in one.state_dict(keep_vars=True).items()]
        elif isinstance(one, torch.optim.Optimizer):
            seen.append([{**group, "params": [id(p) for p in group["params"]]} for group in one.param_groups])
            seen += [(id(p), key, bits(value)) for p, state in one.state.items() for key, value in state.items()]
    return seen
