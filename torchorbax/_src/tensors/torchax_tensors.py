"""The few facts about torchax's tensors that we use."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import torch._ops

from torchorbax._src.tensors import torchax_lowerings as torchax_lowerings  # registers them
from torchorbax._src.tensors.torchax_import import Tensor as Tensor
from torchorbax._src.tensors.torchax_import import View as View
from torchorbax._src.tensors.torchax_import import mappings
from torchorbax._src.tensors.torchax_import import torchax as torchax

VERSION: str = torchax.__version__


def is_torchax(value: object) -> bool:
    """Is `value` a torchax tensor or a view of one?"""
    return isinstance(value, _TENSORS)


_TENSORS = (Tensor, View)
"""A tuple, as `adapter.ARRAY_TYPES`."""


@functools.cache
def can_hold(dtype: torch.dtype) -> bool:
    """Can a torchax tensor have this dtype? Not all that a `jax.Array` and torch have in common."""
    try:
        return bool(mappings.j2t_dtype(jnp.dtype(mappings.t2j_dtype(dtype))) == dtype)
    except RuntimeError:
        return False


def array_of(tensor: torch.Tensor) -> jax.Array:
    """The `jax.Array` behind a torchax tensor (no copy), or the one that a View describes."""
    array: jax.Array = tensor.jax()  # type: ignore[attr-defined]
    return array


def wrap(array: jax.Array, *, requires_grad: bool = False) -> torch.Tensor:
    """A torchax tensor that holds `array` (no copy)."""
    tensor: torch.Tensor = Tensor(array, torchax.default_env(), requires_grad=requires_grad)
    return tensor


def set_array(tensor: torch.Tensor, array: jax.Array) -> None:
    """Put `array` into a torchax tensor or View, seen by every alias. Checks nothing.

    Assigning `_elem` is the write that reaches the tensor; `_jax_array`, `data = array` and a View's `_elem` do
    nothing.
    """
    if isinstance(tensor, View):
        tensor.update(array)
    else:
        tensor._elem = array  # type: ignore[attr-defined]


def become_torchax(tensor: torch.Tensor, array: jax.Array) -> torch.Tensor:
    """Turn a CPU or meta tensor into a torchax tensor holding `array`, keeping its identity for all that refer to it.

    Returns:
        What the tensor was; `torch.utils.swap_tensors` of both undoes it.

    Raises:
        RuntimeError: torch cannot swap this tensor (something holds a weak reference to it, or it is part of a graph).
    """
    new = wrap(array, requires_grad=tensor.requires_grad)
    vars(new).update({name: value for name, value in vars(tensor).items() if name not in vars(new)})
    if isinstance(tensor, torch.nn.Parameter):
        new._is_param = True  # how torch tells a Parameter that is a tensor subclass
    torch.utils.swap_tensors(tensor, new)
    return new


def rng_key() -> jax.Array:
    """Torchax's random key of this thread: a typed key, or raw `uint32[2]` after `manual_seed`."""
    key: jax.Array = torchax.default_env().param.prng
    return key


def set_rng_key(key: jax.Array) -> None:
    """Set torchax's random key of this thread."""
    torchax.default_env().param.prng = key
