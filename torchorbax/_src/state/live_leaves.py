"""What a live leaf would be saved as, where a stored one goes, and what it is once it is there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.sharding import Sharding, SingleDeviceSharding

from torchorbax._src.arrays.dtypes import BY_NAME, dtype_name, fits_on_device
from torchorbax._src.arrays.leaves import Array, is_key, put
from torchorbax._src.format.manifest import ItemMeta, LeafMeta, Residence
from torchorbax._src.tensors import torchax_tensors
from torchorbax._src.tensors.live import live_dtype


def target_beside(live: Any, saved: LeafMeta) -> Sharding | None:
    """Where a stored leaf is loaded to: where its live counterpart is, if there is one on jax; else host memory."""
    if torchax_tensors.is_torchax(live):
        live = torchax_tensors.array_of(live)
    on_jax = isinstance(live, jax.Array) and fits_on_device(BY_NAME[saved.dtype])
    return live.sharding if on_jax else None


def array_meta(leaf: Any) -> LeafMeta:
    """What a live tensor or array would be saved as."""
    if isinstance(leaf, torch.Tensor):
        return live_meta(leaf)
    if is_key(leaf):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
        return LeafMeta(tuple(leaf.shape), dtype_name(leaf.dtype), "jax")
    return LeafMeta(
        tuple(leaf.shape), dtype_name(np.dtype(leaf.dtype)), "jax" if isinstance(leaf, jax.Array) else "host"
    )


def default_device() -> Sharding:
    """Where arrays go that nothing else is known of."""
    return SingleDeviceSharding(jax.local_devices()[0])


def live_meta(tensor: torch.Tensor) -> LeafMeta:
    """What a live tensor would be saved as."""
    residence: Residence = "jax" if torchax_tensors.is_torchax(tensor) or tensor.is_meta else "host"
    return LeafMeta(tuple(tensor.shape), dtype_name(live_dtype(tensor)), residence)


def on_their_side(saved: ItemMeta, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Loaded arrays where they were when saved: those of jax devices that have been loaded into host memory, because
    nothing says where they belong, on the default device.

    They are left uncommitted, so that they may meet arrays of any mesh.
    """
    return {
        name: put(array, None) if _belongs_on_jax(saved.leaves[name], array) else array
        for name, array in arrays.items()
    }


def _belongs_on_jax(saved: LeafMeta, array: Array) -> bool:
    return saved.residence == "jax" and isinstance(array, np.ndarray) and fits_on_device(array.dtype)


def as_typed(saved: ItemMeta, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Loaded arrays, weakly typed where they were when saved, which storage cannot say and JAX promotes otherwise."""
    return {
        name: _weakly_typed(array) if saved.leaves[name].weak_type and isinstance(array, jax.Array) else array
        for name, array in arrays.items()
    }


def _weakly_typed(array: jax.Array) -> jax.Array:
    scalar = {"f": 0.0, "c": 0j}.get(array.dtype.kind, 0)
    if array.weak_type or jnp.asarray(scalar).dtype != array.dtype:  # converted: there are no weak types but these
        return array
    with jax.set_mesh(None):  # and with 64 bits as the caller has them, on which weak types depend
        as_weak = jax.jit(_as_weak, static_argnames="scalar", out_shardings=array.sharding)
        weak: jax.Array = as_weak(array, scalar=scalar)
    return weak if getattr(array, "committed", True) else put(weak, None)


def _as_weak(array: jax.Array, scalar: complex) -> jax.Array:
    """`array` to the last bit, in an array that is as weakly typed as a Python number."""
    return jnp.full(array.shape, scalar).at[...].set(array)
