"""What a compiled step is called with, on the devices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from torchorbax._src.arrays.leaves import leaf_name, put
from torchorbax._src.tensors.live import device_dtype, host_copy, live_array
from torchorbax.errors import ConfigError, UnsupportedLeafError

BatchSharding = Sharding | PartitionSpec | None


def device_batch(batch: Any, batch_sharding: BatchSharding, beside: Sharding) -> Any:
    """A batch as `jax.Array`s.

    Args:
        batch: a pytree of tensors, arrays and numbers.
        batch_sharding: as `train_step` takes it.
        beside: replicated over the devices of the model.

    Raises:
        ConfigError: the sharding does not fit.
        UnsupportedLeafError: a leaf that is none of these.
    """
    sharding = batch_sharding
    if isinstance(sharding, PartitionSpec):
        if not isinstance(beside, NamedSharding):
            raise ConfigError(f"batch_sharding={sharding} needs parameters on a mesh; place the model with shardings")
        sharding = NamedSharding(beside.mesh, sharding)
    if sharding is None and not beside.is_fully_addressable:
        sharding = beside  # every process has the whole batch
    several = beside if len(beside.device_set) > 1 else None
    flat, structure = jax.tree_util.tree_flatten_with_path(batch)
    leaves = [device_leaf(_name(path), leaf, sharding, several) for path, leaf in flat]
    if several is not None:  # said here, because a transfer guard refuses it where a program does it by itself
        leaves = [put(leaf, several) if len(leaf.sharding.device_set) == 1 else leaf for leaf in leaves]
    return jax.tree.unflatten(structure, leaves)


def _name(path: tuple[Any, ...]) -> str:
    name = leaf_name(path)
    return f"batch.{name}" if name else "batch"


def device_leaf(name: str, leaf: Any, sharding: Sharding | None, beside: Sharding | None = None) -> jax.Array:
    """One tensor, array or number as a `jax.Array`; a scalar is replicated.

    Args:
        name: how messages call it.
        leaf: the tensor, array or number.
        sharding: how to lay it out; None leaves it to JAX.
        beside: where what is in host memory goes that `sharding` says nothing of.

    Raises:
        ConfigError: it cannot be laid out by `sharding`.
        UnsupportedLeafError: it is none of these, or would lose bits.
    """
    if isinstance(leaf, bool | int | float | complex):
        leaf = np.asarray(leaf)
    if not isinstance(leaf, torch.Tensor | np.ndarray | np.generic | jax.Array):
        raise UnsupportedLeafError(name, f"a {type(leaf).__name__} is neither a tensor, an array nor a number")
    held = live_array(name, leaf)
    array = held if isinstance(held, jax.Array) else host_copy(held)
    if array.dtype == np.int64 and isinstance(array, np.ndarray):
        array = array.astype(device_dtype(name, array.dtype, array), copy=False)
    try:
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            return array if sharding is None else jax.device_put(array, sharding)
        whole = array.ndim or (sharding is not None and not sharding.is_fully_addressable)
        elsewhere = None if isinstance(array, jax.Array) else beside
        return put(array, sharding if whole and sharding is not None else elsewhere)
    except ValueError as error:
        raise ConfigError(f"{name} of shape {array.shape} cannot be laid out by {sharding}: {error}") from error


def signature(batch: Any) -> tuple[Any, ...]:
    """What a program is compiled for: the structure, shapes, dtypes and layouts of a batch on the devices."""
    leaves, structure = jax.tree.flatten(batch)
    return structure, *((leaf.shape, leaf.dtype, leaf.sharding) for leaf in leaves)


def number_on_devices(number: float, sharding: Sharding) -> jax.Array:
    """A number on the devices of a replicated sharding, weakly typed as Python's are.

    Over several processes `device_put` would compare what they have with a collective; a program takes it as it is.
    """
    if sharding.is_fully_addressable:
        placed: jax.Array = jax.device_put(number, sharding if len(sharding.device_set) > 1 else None)
        return placed
    with jax.transfer_guard("allow"):
        placed = _as_it_is(sharding)(number)
    return placed


@functools.cache
def _as_it_is(sharding: Sharding) -> Callable[[float], jax.Array]:
    return jax.jit(lambda number: number, out_shardings=sharding)
