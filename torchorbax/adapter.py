"""torch and torchax leaves to `jax.Array`s, and arrays back into live tensors, in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence
from contextlib import ExitStack
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.sharding import Sharding

from torchorbax import _torchax
from torchorbax.contexts import own_context
from torchorbax.dtypes import NUMPY_TO_TORCH, TORCH_TO_NUMPY, fits_on_device, host_to_torch, torch_to_host
from torchorbax.errors import ConfigError, DeletedArrayError, MismatchError, Problem, UnsupportedLeafError

Array = jax.Array | np.ndarray
Live = TypeVar("Live")

ARRAY_TYPES = (torch.Tensor, jax.Array, np.ndarray, np.generic)
"""A tuple, which `isinstance` is asked about for every leaf; to make a union of it each time takes a microsecond."""


# ---------------------------------------------------------------------------------------------------- live -> arrays


def to_jax(tree: Any) -> Any:
    """The same tree with every tensor as a `jax.Array`.

    A torchax tensor gives the very array it holds (no copy), and a View the array it describes. CPU torch tensors and
    numpy arrays are copied, so that changing them later does not change the result. A dtype that JAX would narrow (64
    bits while `jax_enable_x64` is off) gives a numpy array of that dtype. Python numbers, strings and None stay as they
    are.

    Args:
        tree: a tensor, a module (gives a dict by the names of its `state_dict`, tied weights under each of their
            names), or any JAX pytree of tensors and arrays.

    Raises:
        UnsupportedLeafError: a leaf without values (meta) or of a dtype or type that no array can hold.
        DeletedArrayError: torchax tensors whose buffers were donated; names them all.
    """
    if isinstance(tree, torch.nn.Module):
        tree = dict(module_tensors(tree))
    flat, structure = jax.tree_util.tree_flatten_with_path(tree)
    try:
        arrays = [
            _torchax.array_of(leaf) if type(leaf) is _torchax.Tensor else _leaf_to_jax(leaf_name(path), leaf)
            for path, leaf in flat
        ]
        deleted = any(isinstance(array, jax.Array) and array.is_deleted() for array in arrays)
    except RuntimeError:  # a view of an array that has been deleted
        raise_if_deleted(_named_leaves(tree))
        raise
    if deleted:
        raise_if_deleted(_named_leaves(tree))
    return jax.tree.unflatten(structure, arrays)


def module_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The live tensors of `module.state_dict()`: parameters and persistent buffers, ties under each of their names."""
    for name, value in module.state_dict(keep_vars=True).items():
        if isinstance(value, torch.Tensor):
            yield name, value


def _named_leaves(tree: Any) -> dict[str, Any]:
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


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


def raise_if_deleted(leaves: Mapping[str, Any]) -> None:
    """Raise DeletedArrayError naming every leaf whose buffer is gone."""
    deleted = [name for name, leaf in leaves.items() if _is_deleted(leaf)]
    if deleted:
        raise DeletedArrayError(deleted)


def _is_deleted(leaf: object) -> bool:
    if isinstance(leaf, _torchax.View):
        leaf = leaf.source_jax()
    elif isinstance(leaf, _torchax.Tensor):
        leaf = _torchax.array_of(leaf)
    return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted()


def _leaf_to_jax(name: str, leaf: Any) -> Any:
    if isinstance(leaf, ARRAY_TYPES):
        array = live_array(name, leaf)
        return array if isinstance(array, jax.Array) else _to_device(host_copy(array))
    if leaf is None or isinstance(leaf, bool | int | float | complex | str):
        return leaf
    raise UnsupportedLeafError(name, f"a {type(leaf).__name__} is neither a tensor nor an array")


def live_array(name: str, leaf: Any) -> jax.Array | np.ndarray | torch.Tensor:
    """What holds a leaf's values, without a copy: its `jax.Array`, or the host array or CPU torch tensor itself.

    Raises:
        UnsupportedLeafError: there are no values, or no array can hold them bit for bit.
    """
    if isinstance(leaf, jax.Array):
        if leaf.dtype not in _HOST_DTYPES:
            raise UnsupportedLeafError(name, f"jax dtype {leaf.dtype} is not supported")
        return leaf
    if _torchax.is_torchax(leaf):
        return _torchax.array_of(leaf)
    if isinstance(leaf, np.ndarray | np.generic):
        if np.dtype(leaf.dtype) not in _HOST_DTYPES:
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


_HOST_DTYPES = frozenset(TORCH_TO_NUMPY.values())


def host_copy(array: np.ndarray | torch.Tensor) -> np.ndarray:
    """A numpy array of the same bits in memory of its own, of what `live_array` gave for a host leaf."""
    return torch_to_host(array) if isinstance(array, torch.Tensor) else np.array(array, copy=True)


def _to_device(array: np.ndarray) -> jax.Array | np.ndarray:
    return jax.device_put(array) if fits_on_device(array.dtype) else array


# ---------------------------------------------------------------------------------------------------- arrays -> live


Write = Callable[[ExitStack], None]
"""A checked write, which registers how to undo it."""


def assign_(live: Live, arrays: Any) -> Live:
    """Write `arrays` into the live tensors of `live`, in place, and return `live`.

    Every alias, tied weight, View and optimizer that refers to a tensor sees the new values. A torchax tensor keeps its
    sharding, a CPU tensor its memory; a tensor on meta becomes a torchax tensor where its array is. Everything is
    checked first, and if anything does not fit, nothing is written.

    A torchax tensor whose sharding is that of its array holds that very array afterwards (no copy), so donating one
    donates the other.

    Args:
        live: a tensor; a module; or a tree of mutable containers (dicts, lists) of tensors and arrays, in which raw
            `jax.Array`s are replaced. Tuples may hold tensors, but no raw arrays.
        arrays: the same tree with arrays (jax or numpy). For a module a dict by `state_dict` names; a tied weight needs
            only one of its names.

    Raises:
        MismatchError: missing or unexpected names, other shapes or other dtypes; `.problems` has all of them.
        DeletedArrayError: some of `arrays` have been donated, or the tensor that a live View shows a part of.
        UnsupportedLeafError: a raw array in an immutable container, or a dtype that a jax device cannot hold.
    """
    targets: Any = dict(module_tensors(live)) if isinstance(live, torch.nn.Module) else live
    raise_if_deleted(_named_leaves(arrays))
    raise_if_deleted({name: leaf for name, leaf in _named_leaves(targets).items() if isinstance(leaf, _torchax.View)})
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
    """Both under one name for every tensor, noting tied weights that are given different values."""
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    for group in names.values():
        first, *others = [name for name in group if name in arrays] or group[:1]
        for other in others:
            if arrays[other] is not arrays[first] and not _same_bits(arrays[other], arrays[first]):
                problems.append(Problem("ties", "", other, f"the value of {first}, with which it is tied", "another"))
        for name in {*group} - {first}:
            del tensors[name]
            arrays.pop(name, None)
    return tensors, arrays


def _same_bits(one: Any, other: Any) -> bool:
    one, other = (array_in(value) if isinstance(value, torch.Tensor) else value for value in (one, other))
    return (
        one.shape == other.shape
        and one.dtype == other.dtype
        and np.asarray(one).tobytes() == np.asarray(other).tobytes()
    )


def _plan_writes(
    name: str,
    live: Any,
    value: Any,
    replace: Callable[[Any], None] | None,
    writes: list[Write],
    problems: list[Problem],
) -> None:
    """Walk both trees together; collect the writes of the leaves, and every problem."""
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
        for index, (one, new) in enumerate(zip(live, value, strict=True)):
            put = _setter(live, index) if isinstance(live, list) else None
            _plan_writes(f"{join}{index}", one, new, put, writes, problems)
    elif isinstance(live, np.ndarray):
        if (checked := _checked(name, live.shape, live.dtype, value, problems)) is not None:
            writes.append(lambda undo: _overwrite(live, np.asarray(checked), undo))
    elif replace is None:
        raise UnsupportedLeafError(
            name, f"a {type(live).__name__} in an immutable container cannot be replaced in place"
        )
    elif isinstance(live, jax.Array):
        if (checked := _checked(name, live.shape, live.dtype, value, problems)) is not None:
            writes.append(lambda undo: _replace(replace, live, place_like(_unshared(checked), live), undo))
    else:
        writes.append(lambda undo: _replace(replace, live, value, undo))


def _plan_tensor(name: str, live: torch.Tensor, value: Any, writes: list[Write], problems: list[Problem]) -> None:
    dtype = live_dtype(live)
    if dtype is None:
        raise UnsupportedLeafError(name, f"torch {live.dtype} cannot be kept bit for bit")
    if (array := _checked(name, tuple(live.shape), dtype, value, problems)) is None:
        return
    on_jax = live.is_meta or isinstance(live, _torchax.View)
    if isinstance(array, np.ndarray) and on_jax:
        array = array.astype(device_dtype(name, array.dtype, array), copy=False)
    writes.append(lambda undo: settle(live, _placed_like(array, live), undo))


def _checked(name: str, shape: tuple[int, ...], dtype: np.dtype, value: Any, problems: list[Problem]) -> Array | None:
    """`value` as an array if it has this shape and dtype; otherwise None, with the problem noted."""
    if isinstance(value, torch.Tensor):
        live_array(name, value)  # raises what array_in would not explain
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


def live_dtype(tensor: torch.Tensor) -> np.dtype | None:
    """The dtype of a live tensor's values: for a torchax tensor that of its array; None if no array can hold them."""
    if isinstance(tensor, _torchax.Tensor):
        return np.dtype(_torchax.array_of(tensor).dtype)
    return TORCH_TO_NUMPY.get(tensor.dtype)


def device_dtype(name: str, dtype: np.dtype, values: np.ndarray | torch.Tensor | None = None) -> np.dtype:
    """The dtype that a leaf has in a torchax tensor on a jax device: its own, or int32 for int64 while
    `jax_enable_x64` is off and no value is lost, as in torchax.

    Args:
        name: the leaf's name.
        dtype: its dtype.
        values: its values, if it has some yet.

    Raises:
        UnsupportedLeafError: it cannot be there without loss.
    """
    if not _torchax.can_hold(NUMPY_TO_TORCH[dtype]):
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


def _placed_like(array: Array, live: torch.Tensor) -> Array:
    if isinstance(live, _torchax.Tensor):
        return place_like(_unshared(array), _torchax.array_of(live))
    if not (live.is_meta or isinstance(live, _torchax.View)):
        return np.asarray(array).astype(live_dtype(live), copy=False)  # widens what `device_dtype` narrowed
    placed: jax.Array = jax.device_put(_unshared(array))
    return placed


def _unshared(array: Array) -> Array:
    """`array` in memory that nobody else can change: JAX's CPU backend takes numpy's as it is where it can."""
    return array if isinstance(array, jax.Array) else host_copy(array)


def settle(live: torch.Tensor, array: Array, undo: ExitStack) -> None:
    """Make a live tensor hold `array`, of its shape and dtype, where the array is; registers how to undo it.

    A `jax.Array` goes into a torchax tensor or View, and turns a CPU or meta tensor into a torchax tensor that holds
    it, with its identity kept. A numpy array goes into the memory of a CPU tensor.

    Raises:
        ConfigError: torch cannot turn this tensor into another.
    """
    if not isinstance(array, jax.Array):
        _overwrite(live, array, undo)
    elif _torchax.is_torchax(live):
        undo.callback(_torchax.set_array, live, _torchax.array_of(live))
        _torchax.set_array(live, array)
    else:
        try:
            before = _torchax.become_torchax(live, array)
        except RuntimeError as error:
            raise ConfigError(
                f"a tensor of shape {tuple(live.shape)} cannot move to jax in place: {error}. Do it before the first "
                "forward pass, and hold no weak reference to it."
            ) from error
        undo.callback(torch.utils.swap_tensors, live, before)


def _overwrite(live: np.ndarray | torch.Tensor, array: np.ndarray, undo: ExitStack) -> None:
    if isinstance(live, np.ndarray):
        undo.callback(np.copyto, live, live.copy())
        np.copyto(live, array)
        return
    memory = live.detach()
    undo.callback(memory.copy_, memory.clone())
    memory.copy_(host_to_torch(array))


def tensor_of(array: Array) -> torch.Tensor:
    """A new tensor with the values of `array`: a torchax tensor of a `jax.Array`, a CPU tensor of a numpy array."""
    return _torchax.wrap(array) if isinstance(array, jax.Array) else host_to_torch(array)


def array_in(tensor: torch.Tensor) -> Array:
    """The reverse of `tensor_of`: a torchax tensor's own array, or a copy of a CPU tensor's values."""
    return _torchax.array_of(tensor) if _torchax.is_torchax(tensor) else torch_to_host(tensor)


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
