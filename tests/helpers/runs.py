"""Runs of one step, saved and restored in one call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torchorbax
from torchorbax import Checkpointer


def saved(path: Path, **state: Any) -> str:
    with Checkpointer(str(path), state) as run:
        run.save(0, force=True)
    return str(path)


def restored(path: str, **state: Any) -> Checkpointer:
    with Checkpointer(path, state) as run:
        run.restore()
        return run


def state(value: float = 0.0) -> dict[str, Any]:
    """100 kB that do not compress."""
    return {"x": {"a": np.random.default_rng(0).standard_normal(25_000).astype(np.float32) + np.float32(value)}}


def value_of(path: Path, step: int | None = None) -> float:
    return float(np.asarray(torchorbax.load(str(path), step, item="x")["a"])[0] - state()["x"]["a"][0])


def save_and_wait(run: Checkpointer, step: int) -> None:
    run.save(step, state(step), force=True)
    run.wait()


def visible(folder: Path | str) -> list[str]:
    """The names in a folder that are not hidden."""
    return sorted(entry.name for entry in Path(folder).iterdir() if not entry.name.startswith("."))
