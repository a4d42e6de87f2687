"""Adds to torchax what it lacks: what averages of weights need, and the grouped products of mixtures of experts.

torch's `AveragedModel` and timm's `ModelEma` write through `detach()` and `state_dict()`, use `torch._foreach_lerp_`,
and are called between training steps, where no torchax mode is on. So `detach()` shares values, `torch._foreach_*` have
lowerings, and arithmetic without gradients works outside the modes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch

from torchorbax._src.tensors.torchax_import import Tensor, View, mappings, torchax


class Detached(Tensor):  # type: ignore[misc]  # torchax is untyped
    """A tensor's values without its gradient. What is written into them reaches the tensor, as in torch."""

    @staticmethod
    def __new__(cls: type[Detached], source: Any) -> Detached:
        made: Detached = Tensor.__new__(cls, source._elem, source._env)
        return made

    def __init__(self, source: Any) -> None:
        self._source = source
        self._env = source._env

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """From now on an ordinary tensor with values of its own, as `torch.nn.Parameter` makes of what is detached."""
        array = self._elem
        self.__class__ = Tensor
        self._elem = array
        del self._source
        return self.requires_grad_(requires_grad)

    @property
    def _elem(self) -> Any:
        array = self._source._elem
        return jax.lax.stop_gradient(array) if isinstance(array, jax.core.Tracer) else array

    @_elem.setter
    def _elem(self, array: Any) -> None:
        self._source._elem = array


def _detach(self: Any) -> Any:
    return Detached(self._source if type(self) is Detached else self)


def _data(self: Any) -> Any:
    """A tensor's `data`, which has no gradient either: torchax gives the tensor itself."""
    return Detached(self) if isinstance(self._elem, jax.core.Tracer) else self


def _detach_view(view: Any) -> Any:
    """A view of the same memory without its gradient, which torchax's own `detach` would keep."""
    parent = view.parent
    return View(_detach_view(parent) if isinstance(parent, View) else _detach(parent), view.view_info, view._env)


def _set_data(self: Any, other: Any) -> None:
    if not isinstance(other, Tensor):
        raise TypeError(f"the data of a tensor on 'jax' must be one as well, not a {type(other).__name__} on the CPU")
    self._elem = other._elem


_within_modes: Callable[..., Any] = Tensor.__torch_dispatch__


def _anywhere(
    cls: type, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
) -> Any:
    """`__torch_dispatch__` that also computes outside torchax's modes, as long as no gradient is needed."""
    tensors = [one for one in jax.tree.leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
    env = torchax.default_env()
    asks = torch.is_grad_enabled() and any(one.requires_grad for one in tensors)
    if asks or env.enabled or getattr(func, "namespace", "") != "aten":
        return _within_modes(func, types, args, kwargs)
    with env:
        return env.dispatch(func, types, args, kwargs or {})


def _foreach(name: str) -> Callable[..., Any]:
    """`torch._foreach_<name>`, one tensor after the other."""
    in_place = name.endswith("_")
    method = getattr(torch.Tensor, name, None) or getattr(torch.Tensor, name.rstrip("_"), None) or getattr(torch, name)

    def lowering(tensors: list[torch.Tensor], *others: Any, **options: Any) -> list[torch.Tensor] | None:
        results = []
        for index, tensor in enumerate(tensors):
            mine = [one[index] if isinstance(one, list | tuple) else one for one in others]
            result = method(tensor, *mine, **options)
            if in_place and result is not tensor:
                tensor.copy_(result)
            results.append(result)
        return None if in_place else results

    return lowering


def _own_memory(copy: Callable[..., Any]) -> Callable[..., Any]:
    """`copy_` whose target does not share the source's array: a training step that donates one would delete both."""

    def copy_(target: Any, source: Any, *others: Any, **options: Any) -> Any:
        result = copy(target, source, *others, env=torchax.default_env(), **options)
        both = type(target) in (Tensor, Detached) and isinstance(source, Tensor | View)
        if both and not isinstance(target._elem, jax.core.Tracer):
            target._elem = jnp.copy(target._elem)
        return result

    return copy_


def _grouped_mm(
    a: jax.Array,
    b: jax.Array,
    offs: jax.Array | None = None,
    bias: jax.Array | None = None,
    out_dtype: torch.dtype | None = None,
) -> jax.Array:
    """`torch.nn.functional.grouped_mm`: products of groups, which a 2-D operand has one after the other.

    `offs[i]` is where group `i` ends, along the dimension that the operands do not both have as groups. What lies
    beyond the last group is zero.
    """
    if bias is not None:
        raise NotImplementedError("torch.nn.functional.grouped_mm takes no bias: add it to the result")
    if (offs is None) != (a.ndim == b.ndim == 3):
        raise ValueError("torch.nn.functional.grouped_mm takes offs= if an operand is 2-D, and only then")
    dtype = None if out_dtype is None else mappings.t2j_dtype(out_dtype)
    if offs is None:
        return jnp.matmul(a, b, preferred_element_type=dtype)
    starts = jnp.concatenate([jnp.zeros_like(offs, shape=1), offs[:-1]])
    ragged_dot = functools.partial(
        jax.lax.ragged_dot, group_sizes=(offs - starts).astype(jnp.int32), preferred_element_type=dtype
    )
    if b.ndim == 3:
        return ragged_dot(a, b)
    if a.ndim == 3:  # groups of columns: rows of the transposed product
        return ragged_dot(b.T, a.mT).T
    place = jnp.arange(a.shape[1])  # groups of what is summed over, for which JAX's own product has no gradient
    in_group = (starts[:, None] <= place) & (place < offs[:, None])
    return jnp.einsum("mk,gk,kn->gmn", a, in_group.astype(a.dtype), b, preferred_element_type=dtype)


def _install() -> None:
    """Register all this with torchax, without making its environment, which would take a key from the current seed."""
    Tensor.detach = _detach
    Tensor.data = property(_data, _set_data)
    View.detach = _detach_view
    View.data = property(_detach_view)
    Tensor.__torch_dispatch__ = classmethod(_anywhere)
    registry = torchax.ops.ops_registry
    lowerings: dict[Any, Callable[..., Any]] = {}
    for schema in torch._C._jit_get_all_schemas():
        name = schema.name.removeprefix("aten::_foreach_")
        if name != schema.name and (hasattr(torch.Tensor, name.rstrip("_")) or hasattr(torch, name.rstrip("_"))):
            lowerings[getattr(torch.ops.aten, f"_foreach_{name}")] = _foreach(name)
    copy = torch.ops.aten.copy_
    lowerings[copy] = _own_memory(registry.all_aten_ops[copy].func)
    if hasattr(torch.ops.aten, "_grouped_mm"):  # torch 2.8 and later
        lowerings[torch.ops.aten._grouped_mm] = _grouped_mm
    for function, lowering in lowerings.items():
        on_arrays = lowering is _grouped_mm
        operator = registry.Operator(
            function,
            lowering,
            is_jax_function=on_arrays,
            is_user_defined=True,
            needs_env=False,
            is_view_op=not on_arrays,
        )
        registry.all_aten_ops[function] = operator
        if torchax._env is not None:  # made before torchorbax was imported
            torchax._env._ops[function] = operator


_install()
