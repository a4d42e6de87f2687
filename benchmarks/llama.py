"""A training program that is killed and comes back: a Llama so small that only coming back takes time.

`python -m benchmarks.llama RUN LAYERS` trains one step, says `trained`, saves it, says `saved`, and waits to be killed.
"""

from __future__ import annotations

import sys

import torch
import torchorbax
from torch import nn
from torch.nn import functional as F

TOKENS, WIDTH, HIDDEN, HEADS, GROUPS, LENGTH = 512, 128, 344, 4, 2, 64


class Attention(nn.Module):
    """Grouped queries, with rotary positions."""

    def __init__(self) -> None:
        super().__init__()
        each = WIDTH // HEADS
        self.q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k, self.v = (nn.Linear(WIDTH, GROUPS * each, bias=False) for _ in range(2))
        self.o = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """`(batch, length, width)` to the same."""

        def heads(y: torch.Tensor, count: int) -> torch.Tensor:
            return y.view(*x.shape[:2], count, WIDTH // HEADS).transpose(1, 2)

        def turned(y: torch.Tensor) -> torch.Tensor:
            first, second = y.chunk(2, dim=-1)
            return y * cos + torch.cat((-second, first), dim=-1) * sin

        q, k, v = turned(heads(self.q(x), HEADS)), turned(heads(self.k(x), GROUPS)), heads(self.v(x), GROUPS)
        k, v = (y.repeat_interleave(HEADS // GROUPS, dim=1) for y in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(out.transpose(1, 2).reshape(x.shape))


class Layer(nn.Module):
    """Attention and a gated linear unit, each after a norm and beside a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attention = Attention()
        self.gate, self.up = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """`(batch, length, width)` to the same."""
        x = x + self.attention(self.norm1(x), cos, sin)
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """Tokens to logits."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        each = WIDTH // HEADS
        turns = torch.outer(torch.arange(LENGTH), 1e4 ** (-torch.arange(0, each, 2) / each)).repeat(1, 2)
        self.register_buffer("cos", turns.cos())
        self.register_buffer("sin", turns.sin())

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """`(batch, length)` to `(batch, length, tokens)`."""
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


def loss_fn(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """The loss of the next token."""
    return F.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1, dims=1).flatten())


def main(path: str, layers: int) -> None:
    """See the module."""
    torch.manual_seed(0)
    model = Llama(layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train_step = torchorbax.train_step(model, optimizer, loss_fn)
    run = torchorbax.resume(model, optimizer, path)
    float(train_step(torch.randint(0, TOKENS, (2, LENGTH))))
    print("trained", flush=True)
    run.save(run.next_step, force=True)
    run.wait()
    print("saved", run.next_step, run.timings, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
