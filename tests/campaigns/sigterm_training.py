"""A training program that comes to a chosen moment, for `tests.campaigns.sigterm`: SIGTERM reaches it there.

Its arguments are a folder, the moment, the number of steps until then, and the number of the trial.
"""

from __future__ import annotations

import os
import queue
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torchorbax
from jax.sharding import Mesh, PartitionSpec
from scripts.crashtest import Net, digest, loss_fn, note
from torchorbax._src.save.writer import Writer
from torchorbax._src.storage.orbax_storage import OrbaxStorage

SLOW_S = 1.0
"""Seconds that are added to a commit or a restore in which SIGTERM is to come."""


class Batches(torch.utils.data.Dataset[torch.Tensor]):
    """Batches that take their time."""

    def __len__(self) -> int:
        return 1 << 20

    def __getitem__(self, index: int) -> torch.Tensor:
        time.sleep(0.05)  # a loader that takes its time, so that workers are alive when the signal comes
        return batch_of(index)


def batch_of(step: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(step).integers(0, 16, 16))


def evaluate(model: Net) -> None:
    """An evaluation that does not end in time."""
    score = torchorbax.eval_step(model, lambda model, tokens: model(tokens).mean())
    while True:
        float(score(batch_of(0)))


def compile_something(trial: int) -> None:
    """Takes some seconds, in which Python runs no signal handler."""

    def program(x: jax.Array) -> jax.Array:
        for factor in range(300):
            x = jnp.sin(x @ x.T) * (factor + trial)
        return x

    jax.jit(program)(jnp.ones((8, 8)))


def slow(owner: Any, name: str) -> None:
    """Make a method wait before it begins."""
    method = getattr(owner, name)

    def slowly(*args: Any, **kwargs: Any) -> Any:
        time.sleep(SLOW_S)  # the moment that the signal is to fall into
        return method(*args, **kwargs)

    setattr(owner, name, slowly)


def train(folder: Path, moment: str, steps: int, trial: int) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    come = arrival(folder, trial)
    if moment == "restore":
        come()
        slow(OrbaxStorage, "read")
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    train_step = torchorbax.train_step(model, optimizer, loss_fn)
    position = {"seen": np.zeros(1, np.int64)}
    run = torchorbax.resume(
        model,
        optimizer,
        folder / "run",
        state={"scheduler": scheduler, "position": position},
        save=1_000_000,
        shardings=(Mesh(np.array(jax.devices()), ("fsdp",)), {"embed.weight": PartitionSpec("fsdp")}),
        save_on_exception=moment == "evaluation after the update",
    )
    note(folder / "starts", {"trial": trial, "step": run.step, "digest": digest(model, optimizer, position)})
    at = run.next_step + steps
    with run:
        if moment == "workers":
            loader = torch.utils.data.DataLoader(Batches(), batch_size=None, num_workers=2)
            batches: Iterator[torch.Tensor] = iter(loader)
        else:
            batches = map(batch_of, range(run.next_step, 1 << 40))
        for step in run.steps(1_000_000_000):
            if step == at:
                before_update(moment, come, model, trial)
            train_step(next(batches))
            if step == at and moment == "evaluation after the update":
                come()
                evaluate(model)
            scheduler.step()
            position["seen"] += 16
            note(folder / "steps", {"trial": trial, "step": step, "digest": digest(model, optimizer, position)})
            if step == at and moment in ("close", "wait"):
                slow(Writer, "write")
                run.save(step, force=True)
                come()
                run.close() if moment == "close" else run.wait()
                return


def arrival(folder: Path, trial: int) -> Callable[[], None]:
    return lambda: note(folder / "arrivals", {"trial": trial})


def before_update(moment: str, come: Callable[[], None], model: Net, trial: int) -> None:
    """What happens in a body before the state changes."""
    if moment == "evaluation":
        come()
        evaluate(model)
    elif moment == "compilation":
        come()
        compile_something(trial)
    elif moment == "loader":
        come()
        queue.Queue[Any]().get()
    elif moment == "stderr":
        come()
        while True:
            print("progress", file=sys.stderr, flush=True)
    elif moment in ("training", "first compilation", "workers"):
        come()


if __name__ == "__main__":
    train(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    os._exit(0)
