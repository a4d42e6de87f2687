"""Runs with a fast folder beside their path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from torchorbax import Checkpointer


def tree(value: float) -> dict[str, Any]:
    return {"w": jnp.full((64, 64), value), "count": np.int64(value)}


def opened(folder: Path, value: float = -1, **options: Any) -> Checkpointer:
    return Checkpointer(
        folder / "rare",
        {"state": tree(value)},
        rng=False,
        local=folder / "fast",
        **{"save": 4, "local_save": 1} | options,
    )


def train(run: Checkpointer, start: int, stop: int) -> None:
    for step in range(start, stop):
        run.save(step, {"state": tree(step)}, metrics={"loss": step})
    run.wait()


def value_of(run: Checkpointer) -> float:
    tree = run.state["state"]
    assert float(tree["w"][0, 0]) == tree["count"]
    return float(tree["count"])


def host(folder: Path) -> str:
    """The only folder of process 0 below the fast folder."""
    (found,) = (folder / "fast").glob("*/process_0")
    return str(found)
