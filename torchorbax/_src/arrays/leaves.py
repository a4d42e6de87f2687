"""An array: its name, its key type, where it is put."""

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
"""A tuple, which `isinstance` is asked about for every leaf; to make a union of it each time takes a microsecond."""


def leaf_name(path: tuple[Any, ...]) -> str:
    """The dotted name of a pytree path: `layers.0.weight`."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def is_key(leaf: Any) -> bool:
    """Is this a typed PRNG key, or the abstract form of one?"""
    typed = isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and not isinstance(leaf.dtype, np.dtype)
    return typed and bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def without_key_type(leaf: Any) -> Any:
    """A typed PRNG key as its raw `uint32` data; anything else as it is."""
    return jax.random.key_data(leaf) if isinstance(leaf, jax.Array) and is_key(leaf) else leaf


def place_like(array: Array, like: jax.Array) -> jax.Array:
    """`array` on the devices and in the layout of `like`, which may have been donated; no copy if it is there."""
    if isinstance(array, jax.Array) and array.sharding == like.sharding:
        return array
    return put(array, like.sharding if getattr(like, "committed", True) else None)


def put(array: Array, sharding: Sharding | None) -> jax.Array:
    """An array where it belongs; None is the default device, uncommitted.

    What a process has for itself, the same as all others have, can go to the devices of several processes; each then
    puts its part there, while `device_put` would first have them all compare it on their devices.
    """
    if sharding is None or sharding.is_fully_addressable or not _is_here(array):
        placed: jax.Array = jax.device_put(array, sharding)
        return placed
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        data = put(jax.random.key_data(array), sharding)
        with own_context():
            placed = jax.jit(jax.random.wrap_key_data, static_argnames="impl")(data, impl=jax.random.key_impl(array))
        return placed
    on_host = np.asarray(array)
    return jax.make_array_from_callback(on_host.shape, sharding, on_host.__getitem__)


def _is_here(array: Array) -> bool:
    return isinstance(array, np.ndarray) or array.is_fully_addressable


def is_global(array: Array) -> bool:
    """Is the array laid out over the devices of several processes?"""
    return not isinstance(array, np.ndarray) and not array.is_fully_addressable
