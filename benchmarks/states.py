"""The states that are saved: trees of random float32 arrays, sharded over all devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Tree = dict[str, Any]


def sharding() -> NamedSharding:
    """Along the first axis, over all devices."""
    return NamedSharding(Mesh(np.array(jax.devices()), ("fsdp",)), P("fsdp"))


def state(leaves: int, leaf_bytes: int) -> Tree:
    """So many arrays of so many bytes, as a training step leaves them: in memory of their own."""
    rng = np.random.default_rng(0)
    rows = max(16, leaf_bytes // 4096)
    shape = (rows, leaf_bytes // 4 // rows)
    host = {f"layers.{index}.weight": rng.standard_normal(shape, np.float32) for index in range(leaves)}
    return step()(jax.device_put(host, sharding()))


def step() -> Callable[[Tree], Tree]:
    """A program that donates its argument and changes every value, so that nothing can be reused from the last save."""
    change = jax.jit(lambda tree: jax.tree.map(lambda array: array * 1.0001, tree), donate_argnums=0)

    def run(tree: Tree) -> Tree:
        new: Tree = jax.block_until_ready(change(tree))
        return new

    return run


def abstract(tree: Tree) -> Tree:
    """Shapes and dtypes, on today's devices."""
    return {name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding()) for name, array in tree.items()}
