"""`to_jax`: the `jax.Array`s that the tensors of a tree hold, without a copy where there is one already."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import torch

from torchorbax._src.arrays.dtypes import fits_on_device
from torchorbax._src.arrays.leaves import ARRAY_TYPES, leaf_name
from torchorbax._src.tensors import torchax_tensors
from torchorbax._src.tensors.live import host_copy, live_array, module_tensors, named_leaves, raise_if_deleted
from torchorbax.errors import UnsupportedLeafError


def to_jax(tree: Any) -> Any:
    """The same tree with every tensor as a `jax.Array`.

    A torchax tensor gives the very array that it holds, without a copy, and a View gives the array that it describes.
    CPU torch tensors and numpy arrays are copied, so that later changes to them do not change the result. Where JAX
    would narrow a dtype (64 bits while `jax_enable_x64` is off), the result is a numpy array of that dtype. Python
    numbers, strings and None stay as they are.

    Args:
        tree: a tensor, a module (the result is a dict by the names of its `state_dict`, with tied weights under each of
            their names), or any JAX pytree of tensors and arrays.

    Raises:
        UnsupportedLeafError: a leaf has no values (it is on meta), or a dtype or type that no array can hold.
        DeletedArrayError: buffers of torchax tensors have been donated; the error names all of them.
    """
    if isinstance(tree, torch.nn.Module):
        tree = dict(module_tensors(tree))
    flat, structure = jax.tree_util.tree_flatten_with_path(tree)
    try:
        arrays = [
            torchax_tensors.array_of(leaf)
            if type(leaf) is torchax_tensors.Tensor
            else _leaf_to_jax(leaf_name(path), leaf)
            for path, leaf in flat
        ]
        deleted = any(isinstance(array, jax.Array) and array.is_deleted() for array in arrays)
    except RuntimeError:  # from a View of an array that has been deleted
        raise_if_deleted(named_leaves(tree))
        raise
    if deleted:
        raise_if_deleted(named_leaves(tree))
    return jax.tree.unflatten(structure, arrays)


def _leaf_to_jax(name: str, leaf: Any) -> Any:
    if isinstance(leaf, ARRAY_TYPES):
        array = live_array(name, leaf)
        return array if isinstance(array, jax.Array) else _to_device(host_copy(array))
    if leaf is None or isinstance(leaf, bool | int | float | complex | str):
        return leaf
    raise UnsupportedLeafError(name, f"a {type(leaf).__name__} is neither a tensor nor an array")


def _to_device(array: np.ndarray) -> jax.Array | np.ndarray:
    return jax.device_put(array) if fits_on_device(array.dtype) else array
