"""A small training run for crash testers: it resumes, trains, and writes a digest of all that it has come to.

python scripts/chaos_program.py plain --out FOLDER

It prints the step that it goes on from, and ends with an error if a newer one is committed. With `RANK` and
`WORLD_SIZE` in the environment, as torchrun sets them, it is one of several processes, joined by gloo.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import torchorbax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

STEPS = 4
STOPPED = 143
"""The exit code after SIGTERM, when steps are left to do."""

TIERS: dict[str, dict[str, Any]] = {
    "plain": {"save": 1, "keep": 2},
    "local": {"save": 2, "keep": 2, "local_save": 1, "local_keep": 2},
}


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(16, 8)
        self.dropout = torch.nn.Dropout(0.3)
        self.head = torch.nn.Linear(8, 16)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.dropout(self.embed(tokens)))
        return logits


def loss_fn(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(batch), batch)


def committed(out: Path) -> list[int]:
    """Steps under the path and in the fast folder, by the names on disk and not by what torchorbax says."""
    found = [*(out / "run").glob("*"), *(out / "fast").glob("*/process_0/*")]
    return sorted(int(entry.name) for entry in found if entry.name.isdigit())


def train(out: Path, tiers: str) -> None:
    newest = max(committed(out), default=None)
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train_step = torchorbax.train_step(model, optimizer, loss_fn)
    mesh = Mesh(np.array(jax.devices()), ("fsdp",))
    options = TIERS[tiers] | ({"local": out / "fast"} if tiers == "local" else {})
    with torchorbax.resume(
        model,
        optimizer,
        out / "run",
        shardings=(mesh, {"embed.weight": PartitionSpec("fsdp"), "*": PartitionSpec()}),
        barrier_timeout_s=60.0,
        **options,
    ) as run:
        print(f"resumed from step {run.next_step}", flush=True)  # 0 is a fresh start
        if run.step != newest:
            sys.exit(f"step {newest} is committed, but step {run.step} was resumed")
        for step in run.steps(STEPS):
            train_step(torch.from_numpy(np.random.default_rng(step).integers(0, 16, 16)))
            run.wait()  # for the save of the step before, so that files are written in the same order in every life
    done = max(committed(out), default=-1) + 1
    if done < STEPS:
        sys.exit(STOPPED)
    result = digest(model, optimizer)
    if jax.process_index() == 0:
        (out / "result.txt").write_text(result)


def digest(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> str:
    """SHA-256 of the parameters, the optimizer's state and the next random numbers. Every process calls it."""
    everywhere = NamedSharding(Mesh(np.array(jax.devices()), ("all",)), PartitionSpec())
    copied = jax.jit(lambda array: array, out_shardings=everywhere)
    found = hashlib.sha256()
    for name, array in torchorbax.to_jax(model).items():
        found.update(name.encode() + np.asarray(copied(array)).tobytes())
    for name, param in model.named_parameters():
        for key, value in sorted(optimizer.state[param].items()):
            found.update(f"{name}.{key}".encode() + np.asarray(copied(torchorbax.to_jax(value))).tobytes())
    found.update(torch.get_rng_state().numpy().tobytes())
    return found.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tiers", choices=TIERS)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    jax.config.update("jax_num_cpu_devices", 2 // processes)
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        jax.distributed.initialize(address, processes, int(os.environ["RANK"]), initialization_timeout=60)
    train(options.out, options.tiers)


if __name__ == "__main__":
    main()
