"""What a call of a training step takes on the caller's thread, beside a loop written by hand with `jax.jit`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torchorbax
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from benchmarks.measure import median

_SHAPE = (8, 8)


class Many(torch.nn.Module):
    """Many small parameters, whose loss takes next to nothing."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.weights = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(_SHAPE)) for _ in range(count)])

    def forward(self, x: torch.Tensor) -> Any:
        """The loss."""
        return sum((weight.square().sum() for weight in self.weights), x.sum())


def _mesh() -> Mesh | None:
    return Mesh(np.array(jax.devices()), ("fsdp",)) if jax.device_count() > 1 else None


def ours(count: int, kind: str) -> Callable[[], jax.Array]:
    """`torchorbax.train_step` with AdamW of torch or of optax; each call is a step and returns its loss."""
    model, mesh = Many(count), _mesh()
    optimizer: Any = (
        torch.optim.AdamW(model.parameters())
        if kind == "torch"
        else torchorbax.OptaxOptimizer(model, optax.adamw(1e-3))
    )
    torchorbax.place_(model, optimizer, None if mesh is None else (mesh, {"*": P("fsdp")}))
    step = torchorbax.train_step(model, optimizer, lambda model, x: model(x))
    batch = _batch(mesh)
    return lambda: step(batch).jax()


def by_hand(count: int) -> Callable[[], jax.Array]:
    """`params, state, loss = step(params, state, batch)`, with as many arrays in the same layout, donated."""
    mesh, tx = _mesh(), optax.adamw(1e-3)
    batch = _batch(mesh)
    made = {f"weights.{index}": jnp.ones(_SHAPE) for index in range(count)}
    like = jax.tree.map(lambda array: _sharding(mesh, array.ndim), (made, tx.init(made)))

    def laid_out(tree: Any) -> Any:
        return tree if mesh is None else jax.lax.with_sharding_constraint(tree, like)

    def update(params: Any, state: Any, batch: Any) -> Any:
        def loss_of(params: Any) -> Any:
            return sum((jnp.square(param).sum() for param in params.values()), batch.sum())

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = tx.update(grads, state, params)
        return *laid_out((optax.apply_updates(params, updates), state)), loss

    step = jax.jit(update, donate_argnums=(0, 1))
    params, state = jax.jit(lambda: laid_out((made, tx.init(made))))()

    def call() -> jax.Array:
        nonlocal params, state
        params, state, loss = step(params, state, batch)
        return loss

    return call


def caller_times(call: Callable[[], jax.Array], calls: int) -> dict[str, float]:
    """Medians over some calls, each on idle devices: processor time of the caller's thread, and until it returns."""
    thread, wall = [], []
    for _ in range(calls):
        started, used = time.perf_counter(), time.thread_time()
        loss = call()
        thread.append(time.thread_time() - used)
        wall.append(time.perf_counter() - started)
        loss.block_until_ready()
    return {"thread_s": median(thread), "wall_s": median(wall)}


def _sharding(mesh: Mesh | None, ndim: int) -> Sharding | None:
    return None if mesh is None else NamedSharding(mesh, P("fsdp") if ndim else P())


def _batch(mesh: Mesh | None) -> jax.Array:
    return jax.device_put(np.ones(8, np.float32), _sharding(mesh, 0))
