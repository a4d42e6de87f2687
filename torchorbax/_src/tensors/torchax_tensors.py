"""What is used of torchax's tensors: the arrays behind them, their dtypes, reading outside modes, the random key."""

from __future__ import annotations

import functools
from contextlib import ExitStack
from typing import Any

import jax
import jax.numpy as jnp
import torch._ops

from torchorbax._src.tensors import torchax_lowerings as torchax_lowerings  # registers them
from torchorbax._src.tensors.torchax_import import OperatorNotFound as OperatorNotFound
from torchorbax._src.tensors.torchax_import import Tensor as Tensor
from torchorbax._src.tensors.torchax_import import View as View
from torchorbax._src.tensors.torchax_import import mappings
from torchorbax._src.tensors.torchax_import import torchax as torchax

VERSION: str = torchax.__version__


def is_torchax(value: object) -> bool:
    """Is `value` a torchax tensor or a view of one?"""
    return isinstance(value, TENSORS)


TENSORS = (Tensor, View)
"""A tuple, as `arrays.leaves.ARRAY_TYPES`."""


@functools.cache
def can_hold(dtype: torch.dtype) -> bool:
    """Can a torchax tensor have this dtype? Some dtypes that JAX and torch share are missing in torchax."""
    try:
        return bool(mappings.j2t_dtype(jnp.dtype(mappings.t2j_dtype(dtype))) == dtype)
    except RuntimeError:
        return False


def array_of(tensor: torch.Tensor) -> jax.Array:
    """The `jax.Array` behind a torchax tensor (no copy), or the one that a View describes."""
    array: jax.Array = tensor.jax()  # type: ignore[attr-defined]
    return array


def undetached(tensor: torch.Tensor) -> torch.Tensor:
    """The torchax tensor whose values a detached one shares; any other tensor itself."""
    source: torch.Tensor = tensor._source if isinstance(tensor, torchax_lowerings.Detached) else tensor
    return source


def wrap(array: jax.Array, *, requires_grad: bool = False) -> torch.Tensor:
    """A torchax tensor that holds `array` (no copy)."""
    tensor: torch.Tensor = Tensor(array, torchax.default_env(), requires_grad=requires_grad)
    return tensor


class Readable(Tensor):  # type: ignore[misc]  # torchax is untyped
    """A torchax tensor whose value can be read anywhere, also where no torchax mode is on.

    torchax refuses `float(t)`, `t.item()` and formatting outside its modes; a training loop wants them for its loss.
    """

    def item(self) -> Any:
        return self._elem.item()

    def __float__(self) -> float:
        return float(self._elem)

    def __int__(self) -> int:
        return int(self.item())

    def __bool__(self) -> bool:
        return bool(self.item())

    def __format__(self, spec: str) -> str:
        return format(self._elem.item() if self._elem.ndim == 0 else self._elem, spec)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return self._elem.__array__(dtype, copy=copy)


def readable(array: jax.Array) -> Readable:
    """A torchax tensor that holds `array` (no copy) and can be read outside torchax's modes."""
    return Readable(array, torchax.default_env())


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
        mark_as_parameter(new)
    torch.utils.swap_tensors(tensor, new)
    return new


def mark_as_parameter(tensor: torch.Tensor) -> None:
    """Make torch take a torchax tensor for a `Parameter`."""
    tensor._is_param = True  # how torch recognises a parameter whose type is another subclass of Tensor


def rng_key() -> jax.Array:
    """Torchax's random key of this thread: a typed key, or raw `uint32[2]` after `manual_seed`."""
    key: jax.Array = torchax.default_env().param.prng
    return key


def set_rng_key(key: jax.Array) -> None:
    """Set torchax's random key of this thread."""
    torchax.default_env().param.prng = key


def set_rng_key_of_all_threads(key: jax.Array, undo: ExitStack) -> None:
    """Set torchax's random key in this thread and in every other, started or not; registers how to undo it.

    torchax keeps the key of each thread in a `threading.local`, which cannot be reached from another thread. So it gets
    a new one, in which every thread finds this key.
    """
    env = torchax.default_env()
    now, before = env.param, env._property
    undo.callback(setattr, env, "_property", before)
    env._property = type(before)(content_factory=lambda: type(now)(mesh=None, prng=key, autocast_dtype=None))
    env._property.content = type(now).override(now, prng=key)
