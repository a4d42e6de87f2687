"""A single leaf that is an array: its name in a tree, PRNG keys, and how it is put on devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.sharding import Sharding

from torchorbax._src.arrays.jax_context import own_context

Array = jax.Array | np.ndarray

ARRAY_TYPES = (torch.Tensor, jax.Array, np.ndarray, np.generic)
"""What counts as an array. A tuple for `isinstance`: to make a union for every leaf would take a microsecond each."""


def leaf_name(path: tuple[Any, ...]) -> str:
    """The dotted name of a pytree path: `layers.0.weight`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def is_key(leaf: Any) -> bool:
    """Is this a typed PRNG key, or the abstract form of one?"""
    typed = isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and not isinstance(leaf.dtype, np.dtype)
    return typed and bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def without_key_type(leaf: Any) -> Any:
    """The raw `uint32` data of a typed PRNG key; any other leaf unchanged."""
    return jax.random.key_data(leaf) if isinstance(leaf, jax.Array) and is_key(leaf) else leaf


def place_like(array: Array, like: jax.Array) -> jax.Array:
    """`array` with the sharding of `like`, which may have been donated. Nothing is copied if it has it already."""
    if isinstance(array, jax.Array) and array.sharding == like.sharding:
        return array
    return put(array, like.sharding if getattr(like, "committed", True) else None)


def put(array: Array, sharding: Sharding | None) -> jax.Array:
    """An array with a sharding. With None it goes to the default device, uncommitted.

    An array that is local to a process, and equal in all processes, can go to a sharding over all of them. Each process
    then puts its own part there. `device_put` would first make the processes compare the array, on their devices.
    """
    if sharding is None or sharding.is_fully_addressable or is_global(array):
        placed: jax.Array = jax.device_put(array, sharding)
        return placed
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        data = put(jax.random.key_data(array), sharding)
        with own_context():
            placed = jax.jit(jax.random.wrap_key_data, static_argnames="impl")(data, impl=jax.random.key_impl(array))
        return placed
    on_host = np.asarray(array)
    return jax.make_array_from_callback(on_host.shape, sharding, on_host.__getitem__)


def is_global(array: Array) -> bool:
    """Is the array laid out over the devices of several processes?"""
    return not isinstance(array, np.ndarray) and not array.is_fully_addressable
