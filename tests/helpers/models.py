"""A small network that has what goes wrong: tied weights, BatchNorm's buffers, dropout."""

from __future__ import annotations

from typing import Any

import optax
import torch
import torchorbax
from jax.sharding import PartitionSpec as P
from torch import nn
from torch.nn import functional as F

TOKENS, WIDTH, BATCH = 64, 32, 16

RULES = {"embed.weight": P("fsdp"), "hidden.weight": P(None, "fsdp"), "norm.*": P("fsdp")}

RULES_2D = {"embed.weight": P("fsdp", "tp"), "hidden.weight": P("tp", "fsdp")}


class TiedNet(nn.Module):
    def __init__(self, dropout: float = 0.5) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(torch.tanh(self.hidden(self.norm(self.embed(tokens))))))


def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    tokens, targets = batch
    return F.cross_entropy(model(tokens), targets)


def batch_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The batch of a step, the same in every process."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, TOKENS, (2, BATCH), generator=generator)
    return tokens[0], tokens[1]


def seeded(dropout: float = 0.5) -> TiedNet:
    torch.manual_seed(0)
    return TiedNet(dropout)


def objects(kind: str, *, meta: bool = False) -> tuple[TiedNet, Any, dict[str, Any]]:
    torch.manual_seed(0)
    with torch.device("meta" if meta else "cpu"):
        model = TiedNet()
    if kind == "optax":
        return model, torchorbax.OptaxOptimizer(model, optax.adamw(0.01)), {}
    cls = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}[kind]
    optimizer = cls(model.parameters(), lr=0.01, **({"momentum": 0.9} if kind == "sgd" else {}))
    return model, optimizer, {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2)}


class Tied(nn.Module):
    """A tied weight, a buffer with a counter, and one that is not persistent."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4, device=device)
        self.norm = nn.BatchNorm1d(4, device=device)
        self.head = nn.Linear(4, 6, bias=False, device=device)
        self.head.weight = self.embed.weight
        self.register_buffer("scratch", torch.zeros(2, device=device), persistent=False)


class Net(nn.Module):
    """A tied weight, BatchNorm's counter, a frozen parameter and a buffer that is not persistent."""

    def __init__(self, device: str = "cpu", width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, width, device=device)
        self.norm = nn.BatchNorm1d(width, device=device)
        self.head = nn.Linear(width, 16, bias=False, device=device)
        self.head.weight = self.embed.weight
        self.norm.bias.requires_grad_(False)
        self.register_buffer("scratch", torch.ones(2, device=device), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.embed(tokens)))


def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer some state, on the CPU."""
    model(torch.arange(16)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
