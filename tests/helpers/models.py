"""A small network that has what goes wrong: tied weights, BatchNorm's buffers, dropout."""

from __future__ import annotations

import numpy as np
import torch
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


def bits(array: object) -> bytes:
    """The bytes of an array, so that NaNs and signed zeros compare as well."""
    return np.asarray(array).tobytes()
