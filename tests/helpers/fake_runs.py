"""Runs on a storage in memory."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from torchorbax import Checkpointer

from tests.helpers.memory_storage import MemoryStorage


def weights(value: float = 0.0) -> dict[str, jax.Array]:
    return {"w": jnp.full((4,), value)}


def fake_run(storage: MemoryStorage, **options: Any) -> Checkpointer:
    return Checkpointer("run", {"w": weights()}, rng=False, **options)
