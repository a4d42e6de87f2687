"""`assign_`: writes a tree of arrays into the live tensors of a matching tree, in place.

Both trees are walked first. The walk collects a write for every leaf and every problem; only if there are no problems
are the writes made, each of which registers how to undo it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, MutableSequence
from contextlib import ExitStack
from typing import Any, TypeVar

import jax
import numpy as np
import torch

from torchorbax._src.arrays.leaves import Array, place_like
from torchorbax._src.tensors import torchax_tensors
from torchorbax._src.tensors.live import (
    array_in,
    device_dtype,
    live_array,
    live_dtype,
    module_tensors,
    named_leaves,
    overwrite,
    raise_if_deleted,
    settle,
    unshared,
)
from torchorbax.errors import MismatchError, Problem, UnsupportedLeafError

Live = TypeVar("Live")

Write = Callable[[ExitStack], None]
"""Writes one leaf, which has been checked, and registers on the stack how to undo it."""


def assign_(live: Live, arrays: Any) -> Live:
    """Write `arrays` into the live tensors of `live`, in place, and return `live`.

    Every alias, tied weight, View and optimizer that refers to a tensor sees the new values. A torchax tensor keeps its
    sharding, and a CPU tensor keeps its memory. A tensor on meta becomes a torchax tensor, on the devices of its array.
    Everything is checked first; if anything does not fit, nothing is written.

    If the new array already has the sharding of a torchax tensor, the tensor holds that very array afterwards, without
    a copy. Donating one of the two then donates the other.

    Args:
        live: a tensor; a module; or a tree of mutable containers (dicts, lists) of tensors and arrays, in which raw
            `jax.Array`s are replaced. Tuples may hold tensors, but no raw arrays.
        arrays: the same tree with arrays (jax or numpy). For a module, a dict by `state_dict` names; for a tied weight,
            one of its names is enough.

    Raises:
        MismatchError: names are missing or unexpected, or shapes or dtypes differ; `.problems` has all problems.
        DeletedArrayError: some of `arrays` have been donated, or the tensor behind a live View has.
        UnsupportedLeafError: a raw array is in an immutable container, or a jax device cannot hold a dtype.
    """
    targets: Any = dict(module_tensors(live)) if isinstance(live, torch.nn.Module) else live
    raise_if_deleted(named_leaves(arrays))
    raise_if_deleted(
        {name: leaf for name, leaf in named_leaves(targets).items() if isinstance(leaf, torchax_tensors.View)}
    )
    writes: list[Write] = []
    problems: list[Problem] = []
    if isinstance(live, torch.nn.Module) and isinstance(arrays, Mapping):
        targets, arrays = _once_per_tie(targets, dict(arrays), problems)
    _plan_writes("", targets, arrays, None, writes, problems)
    if problems:
        raise MismatchError("the given tree", problems)
    with ExitStack() as undo:
        for write in writes:
            write(undo)
        undo.pop_all()
    return live


def _once_per_tie(
    tensors: dict[str, torch.Tensor], arrays: dict[str, Any], problems: list[Problem]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The live tensors and the new arrays with one name for every tensor, so that a tied weight is written once.

    Tied weights that are given different values are added to `problems`.
    """
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    for group in names.values():
        first, *aliases = [name for name in group if name in arrays] or group[:1]
        for alias in aliases:
            if arrays[alias] is not arrays[first] and not _same_bits(arrays[alias], arrays[first]):
                problems.append(Problem("ties", "", alias, f"the value of {first}, with which it is tied", "another"))
        for name in {*group} - {first}:
            del tensors[name]
            arrays.pop(name, None)
    return tensors, arrays


def _same_bits(left: Any, right: Any) -> bool:
    left, right = (array_in(value) if isinstance(value, torch.Tensor) else value for value in (left, right))
    return (
        left.shape == right.shape
        and left.dtype == right.dtype
        and np.asarray(left).tobytes() == np.asarray(right).tobytes()
    )


def _plan_writes(
    name: str,
    live: Any,
    value: Any,
    replace: Callable[[Any], None] | None,
    writes: list[Write],
    problems: list[Problem],
) -> None:
    """Walk both trees together, and collect the writes of all leaves in `writes` and all problems in `problems`.

    Args:
        name: the dotted name of this node.
        live: the live node.
        value: the new node.
        replace: puts another object in the place of `live`; None if its container is immutable.
        writes: where to add the writes.
        problems: where to add the problems.
    """
    join = f"{name}." if name else ""
    if isinstance(live, torch.Tensor):
        _plan_tensor(name, live, value, writes, problems)
    elif isinstance(live, Mapping):
        if not isinstance(value, Mapping):
            problems.append(Problem("missing", "", name, "a mapping"))
            return
        problems += [Problem("missing", "", f"{join}{key}", _kind(live[key])) for key in live if key not in value]
        problems += [
            Problem("unexpected", "", f"{join}{key}", "", _kind(value[key])) for key in value if key not in live
        ]
        for key in [key for key in live if key in value]:
            put = _setter(live, key) if isinstance(live, MutableMapping) else None
            _plan_writes(f"{join}{key}", live[key], value[key], put, writes, problems)
    elif isinstance(live, list | tuple):
        if not isinstance(value, list | tuple) or len(value) != len(live):
            problems.append(Problem("shape", "", name, f"{len(live)} entries", _kind(value)))
            return
        for index, (entry, new) in enumerate(zip(live, value, strict=True)):
            put = _setter(live, index) if isinstance(live, list) else None
            _plan_writes(f"{join}{index}", entry, new, put, writes, problems)
    elif isinstance(live, np.ndarray):
        if (checked := _checked(name, live.shape, live.dtype, value, problems)) is not None:
            writes.append(lambda undo: overwrite(live, np.asarray(checked), undo))
    elif replace is None:
        raise UnsupportedLeafError(
            name, f"a {type(live).__name__} in an immutable container cannot be replaced in place"
        )
    elif isinstance(live, jax.Array):
        if (checked := _checked(name, live.shape, live.dtype, value, problems)) is not None:
            writes.append(lambda undo: _replace(replace, live, place_like(unshared(checked), live), undo))
    else:
        writes.append(lambda undo: _replace(replace, live, value, undo))


def _plan_tensor(name: str, live: torch.Tensor, value: Any, writes: list[Write], problems: list[Problem]) -> None:
    dtype = live_dtype(live)
    if dtype is None:
        raise UnsupportedLeafError(name, f"torch {live.dtype} cannot be kept bit for bit")
    if (array := _checked(name, tuple(live.shape), dtype, value, problems)) is None:
        return
    on_jax = live.is_meta or isinstance(live, torchax_tensors.View)
    if isinstance(array, np.ndarray) and on_jax:
        array = array.astype(device_dtype(name, array.dtype, array), copy=False)
    writes.append(lambda undo: settle(live, _placed_like(array, live), undo))


def _checked(name: str, shape: tuple[int, ...], dtype: np.dtype, value: Any, problems: list[Problem]) -> Array | None:
    """`value` as an array if it has this shape and dtype; otherwise None, and the problem is added to `problems`."""
    if isinstance(value, torch.Tensor):
        live_array(name, value)  # raises UnsupportedLeafError, with a reason, where `array_in` would only fail
        value = array_in(value)
    elif isinstance(value, np.generic):
        value = np.asarray(value)
    if not isinstance(value, jax.Array | np.ndarray):
        problems.append(Problem("dtype", "", name, f"an array of {dtype}", _kind(value)))
        return None
    if tuple(value.shape) != tuple(shape):
        problems.append(Problem("shape", "", name, str(tuple(shape)), str(tuple(value.shape))))
        return None
    if value.dtype != dtype and not (dtype == np.int64 and value.dtype == np.int32 and isinstance(value, jax.Array)):
        problems.append(Problem("dtype", "", name, str(dtype), str(value.dtype)))
        return None
    return value


def _placed_like(array: Array, live: torch.Tensor) -> Array:
    if isinstance(live, torchax_tensors.Tensor):
        return place_like(unshared(array), torchax_tensors.array_of(live))
    if not (live.is_meta or isinstance(live, torchax_tensors.View)):
        return np.asarray(array).astype(live_dtype(live), copy=False)  # widens what `device_dtype` narrowed
    placed: jax.Array = jax.device_put(unshared(array))
    return placed


def _replace(put: Callable[[Any], None], old: Any, new: Any, undo: ExitStack) -> None:
    undo.callback(put, old)
    put(new)


def _setter(container: Any, key: Any) -> Callable[[Any], None]:
    def put(value: Any) -> None:
        container[key] = value

    return put


def _kind(value: object) -> str:
    if isinstance(value, torch.Tensor | jax.Array | np.ndarray):
        return f"{str(value.dtype).removeprefix('torch.')}{tuple(value.shape)}"
    if isinstance(value, MutableMapping | MutableSequence | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
