"""Sends arrays from the devices of the first replica to those of all other replicas.

Over a mesh of several slices, parameters are often sharded within a slice and replicated over the slices. A restore
would then read everything once for every slice. With `single_replica_restore`, only the devices of the first replica
read from storage. The others receive the data over the network between the devices, which is faster than storage.
The data is sent as a sum over all replicas, of which all but the first are zero. The bits are summed as integers, so
none of them changes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from torchorbax._src.arrays.jax_context import own_context
from torchorbax._src.arrays.shards import is_on_device

Key = TypeVar("Key", bound=tuple[str, ...])

_BATCH_BYTES = 256 << 20
"""The most bytes that one program sums. It needs as much memory again on the devices for its result."""
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


@dataclass(frozen=True)
class FirstReplica:
    """An array that has been read onto the devices of the first replica only.

    Attributes:
        shape: the shape of the whole array.
        dtype: the dtype of the array.
        sharding: the sharding that the whole array is to have.
        shards: the shards of the first replica that are on this process's devices; empty if there are none.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: NamedSharding
    shards: Mapping[jax.Device, jax.Array]
    is_fully_addressable: ClassVar[bool] = False


def is_shared(sharding: Sharding | None, dtype: np.dtype) -> bool:
    """Is an array replicated along a mesh axis and spread over several processes, and can `broadcast` sum its bits?"""
    if not isinstance(sharding, NamedSharding) or sharding.is_fully_addressable or not is_on_device(sharding):
        return False
    return math.prod(sharding.mesh.shape[axis] for axis in _replicated_axes(sharding)) > 1 and (
        dtype.itemsize in _WORDS and dtype.kind != "c"
    )


def first_devices(sharding: NamedSharding) -> frozenset[Any]:
    """The devices that hold the first replica."""
    axes = sharding.mesh.axis_names
    index = tuple(0 if axis in _replicated_axes(sharding) else slice(None) for axis in axes)
    return frozenset(np.ravel(sharding.mesh.devices[index]).tolist())


def broadcast(arrays: Mapping[Key, FirstReplica]) -> dict[Key, jax.Array]:
    """The whole arrays, on all their devices.

    This is a device collective: every process calls it with the same arrays. Their order in the mapping does not
    matter. They are sent in the order of their keys, because processes that ran different programs would wait for each
    other for ever.
    """
    found: dict[Key, jax.Array] = {}
    batch: list[Key] = []
    size = 0
    for key in sorted(arrays):
        array = arrays[key]
        nbytes = math.prod(array.shape) * array.dtype.itemsize
        if batch and (size + nbytes > _BATCH_BYTES or array.sharding.mesh != arrays[batch[0]].sharding.mesh):
            found |= _broadcast_at_once(batch, [arrays[member] for member in batch])
            batch, size = [], 0
        batch.append(key)
        size += nbytes
    return found | (_broadcast_at_once(batch, [arrays[member] for member in batch]) if batch else {})


def _broadcast_at_once(keys: Sequence[Key], arrays: Sequence[FirstReplica]) -> dict[Key, jax.Array]:
    with own_context():
        program = _sum(tuple(array.sharding for array in arrays), tuple(array.dtype for array in arrays))
        return dict(zip(keys, program(*(_stacked(array) for array in arrays)), strict=True))


def _stacked(array: FirstReplica) -> jax.Array:
    """The bits of all replicas, stacked along a new first axis; all but the first are zero."""
    sharding, word = array.sharding, _WORDS[array.dtype.itemsize]
    replicated = _replicated_axes(sharding)
    copies = math.prod(sharding.mesh.shape[axis] for axis in replicated)
    local_shape = (1, *sharding.shard_shape(array.shape))
    parts = [
        _as_words(array.shards[device])[None]
        if device in array.shards
        else jax.device_put(np.zeros(local_shape, word), device)
        for device in sorted(sharding.addressable_devices, key=_number)
    ]
    layout = NamedSharding(sharding.mesh, PartitionSpec(replicated, *sharding.spec))
    return jax.make_array_from_single_device_arrays((copies, *array.shape), layout, parts)


def _number(device: Any) -> int:
    return int(device.id)


@jax.jit
def _as_words(array: jax.Array) -> jax.Array:
    word = _WORDS[array.dtype.itemsize]
    return array.astype(word) if array.dtype == np.bool_ else jax.lax.bitcast_convert_type(array, word)


@functools.lru_cache(maxsize=64)
def _sum(shardings: tuple[NamedSharding, ...], dtypes: tuple[np.dtype, ...]) -> Callable[..., Any]:
    def added(*stacks: jax.Array) -> list[jax.Array]:
        sums = [jnp.sum(stack, axis=0, dtype=stack.dtype) for stack in stacks]
        return [
            words.astype(dtype) if dtype == np.bool_ else jax.lax.bitcast_convert_type(words, dtype)
            for words, dtype in zip(sums, dtypes, strict=True)
        ]

    return jax.jit(added, out_shardings=list(shardings))


def _replicated_axes(sharding: NamedSharding) -> tuple[str, ...]:
    """The mesh axes along which the array is replicated."""
    used = {axis for entry in sharding.spec for axis in (entry if isinstance(entry, tuple) else (entry,))}
    return tuple(axis for axis in sharding.mesh.axis_names if axis not in used)
