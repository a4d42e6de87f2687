"""Live tensors: what holds their values, whether they still have them, and how an array is put into one in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import jax
import numpy as np
import torch

from torchorbax._src.arrays.dtypes import (
    NUMPY_TO_TORCH,
    TORCH_TO_NUMPY,
    bits_of,
    fits_on_device,
    host_to_torch,
    torch_to_host,
)
from torchorbax._src.arrays.leaves import Array, leaf_name
from torchorbax._src.tensors import torchax_tensors
from torchorbax.errors import ConfigError, DeletedArrayError, UnsupportedLeafError

_SUPPORTED_DTYPES = frozenset(TORCH_TO_NUMPY.values())


def module_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The live tensors of `module.state_dict()`: parameters and persistent buffers, ties under each of their names."""
    for name, value in module.state_dict(keep_vars=True).items():
        if isinstance(value, torch.Tensor):
            yield name, value


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by their dotted names."""
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def raise_if_deleted(leaves: Mapping[str, Any]) -> None:
    """Raise DeletedArrayError, with the names of all leaves whose buffers have been deleted."""
    deleted = [name for name, leaf in leaves.items() if _is_deleted(leaf)]
    if deleted:
        raise DeletedArrayError(deleted)


def _is_deleted(leaf: object) -> bool:
    if isinstance(leaf, torchax_tensors.View):
        leaf = leaf.source_jax()
    elif isinstance(leaf, torchax_tensors.Tensor):
        leaf = torchax_tensors.array_of(leaf)
    return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted()


def live_array(name: str, leaf: Any) -> jax.Array | np.ndarray | torch.Tensor:
    """What holds a leaf's values, not copied: its `jax.Array`, or the host array or CPU torch tensor itself.

    Raises:
        UnsupportedLeafError: the leaf has no values, or no array can hold them bit for bit.
    """
    if isinstance(leaf, jax.Array):
        if leaf.dtype not in _SUPPORTED_DTYPES:
            raise UnsupportedLeafError(name, f"jax dtype {leaf.dtype} is not supported")
        return leaf
    if torchax_tensors.is_torchax(leaf):
        return torchax_tensors.array_of(leaf)
    if isinstance(leaf, np.ndarray | np.generic):
        if np.dtype(leaf.dtype) not in _SUPPORTED_DTYPES:
            raise UnsupportedLeafError(name, f"numpy dtype {leaf.dtype} is not supported")
        return np.asarray(leaf)
    tensor: torch.Tensor = leaf
    if tensor.is_meta:
        raise UnsupportedLeafError(name, "a tensor on meta has no values; place or restore it first")
    if tensor.is_nested or tensor.layout is not torch.strided or tensor.dtype not in TORCH_TO_NUMPY:
        layout = "nested layout" if tensor.is_nested else tensor.layout
        raise UnsupportedLeafError(name, f"torch {tensor.dtype} with {layout} cannot be kept bit for bit")
    if tensor.device.type != "cpu":
        raise UnsupportedLeafError(
            name, f"tensors on {tensor.device} are not supported; move it to the CPU or to 'jax'"
        )
    return tensor


def host_copy(array: np.ndarray | torch.Tensor) -> np.ndarray:
    """A copy, as a numpy array with the same bits, of what `live_array` returned for a host leaf."""
    return torch_to_host(array) if isinstance(array, torch.Tensor) else np.array(array, copy=True)


def live_dtype(tensor: torch.Tensor) -> np.dtype | None:
    """The dtype of a live tensor's values. For a torchax tensor, its array's; None if no array can hold the values."""
    if isinstance(tensor, torchax_tensors.Tensor):
        return np.dtype(torchax_tensors.array_of(tensor).dtype)
    return TORCH_TO_NUMPY.get(tensor.dtype)


def device_dtype(name: str, dtype: np.dtype, values: np.ndarray | torch.Tensor | None = None) -> np.dtype:
    """The dtype that a leaf gets as a torchax tensor on a jax device.

    It is the leaf's own dtype, except that int64 becomes int32 while `jax_enable_x64` is off, as in torchax, if no
    value is lost.

    Args:
        name: the leaf's name.
        dtype: the leaf's dtype.
        values: the leaf's values, if it has some already.

    Raises:
        UnsupportedLeafError: a torchax tensor cannot hold the leaf without loss.
    """
    if not torchax_tensors.can_hold(NUMPY_TO_TORCH[dtype]):
        raise UnsupportedLeafError(name, f"torchax has no tensors of {dtype}; keep this one on the CPU")
    if fits_on_device(dtype):
        return dtype
    if dtype != np.int64:
        raise UnsupportedLeafError(
            name,
            f"{dtype} would lose bits on jax devices; call jax.config.update('jax_enable_x64', True) at the start of "
            "the program, or convert the module to a 32-bit dtype",
        )
    narrow = np.iinfo(np.int32)
    if values is not None and 0 not in values.shape and not (values.min() >= narrow.min and values.max() <= narrow.max):
        raise UnsupportedLeafError(
            name, "int64 values beyond 32 bits cannot be on jax devices while jax_enable_x64 is off"
        )
    return np.dtype(np.int32)


def unshared(array: Array) -> Array:
    """A `jax.Array` as it is, and a copy of a numpy array.

    JAX's CPU backend may use the memory of a numpy array, which its owner could then change.
    """
    return array if isinstance(array, jax.Array) else host_copy(array)


def settle(live: torch.Tensor, array: Array, undo: ExitStack) -> None:
    """Make a live tensor hold `array`, which has its shape and dtype, and register on `undo` how to reverse it.

    The array is not moved. A `jax.Array` is put into a torchax tensor or View; a CPU or meta tensor becomes a torchax
    tensor that holds it, and remains the same Python object. A numpy array is copied into the memory of a CPU tensor.

    Raises:
        ConfigError: torch cannot exchange the content of this tensor.
    """
    if not isinstance(array, jax.Array):
        overwrite(live, array, undo)
    elif torchax_tensors.is_torchax(live):
        undo.callback(torchax_tensors.set_array, live, torchax_tensors.array_of(live))
        torchax_tensors.set_array(live, array)
    else:
        try:
            before = torchax_tensors.become_torchax(live, array)
        except RuntimeError as error:
            raise ConfigError(
                f"a tensor of shape {tuple(live.shape)} cannot move to jax in place: {error}. Do it before the first "
                "forward pass, and hold no weak reference to it."
            ) from error
        undo.callback(torch.utils.swap_tensors, live, before)


def overwrite(live: np.ndarray | torch.Tensor, array: np.ndarray, undo: ExitStack) -> None:
    """Copy `array` into the memory of a numpy array or CPU tensor, and register on `undo` how to reverse it."""
    if isinstance(live, np.ndarray):
        undo.callback(np.copyto, live, live.copy())
        np.copyto(live, array)
        return
    plain = live.is_contiguous() and not (live.is_conj() or live.is_neg() or live.is_inference())
    if not plain or TORCH_TO_NUMPY.get(live.dtype) != array.dtype:
        memory = live.detach()
        undo.callback(memory.copy_, memory.clone())
        memory.copy_(host_to_torch(array))
        return
    bits = bits_of(live)
    undo.callback(np.copyto, bits, bits.copy())
    np.copyto(bits, np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    torch.autograd.graph.increment_version(live)


def tensor_of(array: Array) -> torch.Tensor:
    """A new tensor with the values of `array`: a torchax tensor for a `jax.Array`, a CPU tensor for a numpy array."""
    return torchax_tensors.wrap(array) if isinstance(array, jax.Array) else host_to_torch(array)


def as_parameter(tensor: torch.Tensor, *, requires_grad: bool) -> torch.nn.Parameter | torch.Tensor:
    """A new tensor, such as `tensor_of` makes, as a `Parameter`."""
    if not torchax_tensors.is_torchax(tensor):
        return torch.nn.Parameter(tensor, requires_grad=requires_grad)
    param = torchax_tensors.wrap(torchax_tensors.array_of(tensor), requires_grad=requires_grad)
    torchax_tensors.mark_as_parameter(param)
    return param


def as_readable(tensor: torch.Tensor) -> torch.Tensor:
    """A new tensor, such as `tensor_of` makes, as one that can be read outside torchax's modes."""
    if not torchax_tensors.is_torchax(tensor):
        return tensor
    readable: torch.Tensor = torchax_tensors.readable(torchax_tensors.array_of(tensor))
    return readable


def array_in(tensor: torch.Tensor) -> Array:
    """The reverse of `tensor_of`: a torchax tensor's own array, or a copy of a CPU tensor's values."""
    return torchax_tensors.array_of(tensor) if torchax_tensors.is_torchax(tensor) else torch_to_host(tensor)
