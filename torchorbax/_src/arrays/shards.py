"""The shards that this process has of an array, on its devices or in host memory."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

Bounds = tuple[tuple[int, int], ...]
"""Where a part of an array begins and ends, along each axis."""


def bounds_of(index: Iterable[slice], shape: tuple[int, ...]) -> Bounds:
    """The bounds of the part of an array of this shape that an index selects."""
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


AXIS = "shard"
"""The axis of `local_mesh`."""


@dataclass(frozen=True)
class Shard:
    """One device's shard of an array, like `jax.Shard`; but its data may be in host memory.

    Attributes:
        index: the part of the array, as slices.
        start: the index of its first element, along each axis.
        replica_id: how many devices that hold the same part come before this one.
        data: the part: a `jax.Array` or a numpy array.
    """

    index: tuple[slice, ...]
    start: tuple[int, ...]
    replica_id: int
    data: Any


@dataclass(frozen=True)
class HostShards:
    """Host copies of this process's shards of an array that is sharded over several processes.

    It has those attributes of a `jax.Array` that a save needs.

    Attributes:
        shape: the shape of the whole array.
        dtype: the dtype of the array.
        sharding: the sharding of the whole array.
        addressable_shards: this process's shards.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: Sharding
    addressable_shards: tuple[Shard, ...]
    is_fully_addressable: ClassVar[bool] = False

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements of the whole array."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes of the whole array."""
        return self.size * self.dtype.itemsize


def shards(array: jax.Array | HostShards) -> Sequence[Shard]:
    """This process's shards of an array."""
    if isinstance(array, HostShards):
        return array.addressable_shards
    places = _places(array.sharding, tuple(array.shape))
    return [
        Shard(index, start, replica, part)
        for (_, index, start, replica), part in zip(places, parts(array), strict=True)
    ]


def devices(sharding: Sharding, shape: tuple[int, ...]) -> list[jax.Device]:
    """The devices of this process that hold a shard, in the order of `parts`."""
    return [place[0] for place in _places(sharding, shape)]


@functools.lru_cache(maxsize=1024)
def _places(
    sharding: Sharding, shape: tuple[int, ...]
) -> list[tuple[jax.Device, tuple[slice, ...], tuple[int, ...], int]]:
    """The devices of this process that hold a shard, each with the shard's index, start and replica_id.

    Cached, because `jax.Array.addressable_shards` works them out again for every array.
    """
    places, seen = [], Counter[tuple[int, ...]]()
    for device, index in sharding.devices_indices_map(shape).items():
        start = tuple(part.indices(size)[0] for part, size in zip(index, shape, strict=True))
        if device in sharding.addressable_devices:
            places.append((device, index, start, seen[start]))
        seen[start] += 1
    return places


def parts(array: jax.Array) -> list[jax.Array]:
    """The data of each shard of this process, as an array on a single device.

    Raises:
        RuntimeError: the array has been deleted.
    """
    # `_arrays` is private. Its public alternatives do not serve: `addressable_shards` also works out the index of every
    # shard, which takes as long as all the rest, and `addressable_data` of a replicated array always gives the shard of
    # the first device. In a deleted array `_arrays` is None, hence the check.
    array._check_if_deleted()  # type: ignore[attr-defined]  # private, see above
    return list(array._arrays)  # type: ignore[attr-defined]  # private, see above


@functools.lru_cache(maxsize=1024)
def is_on_device(sharding: Sharding) -> bool:
    """Is the array in the devices' own memory, in which programs compute, and not offloaded to `pinned_host`?"""
    kind, held_by = sharding.memory_kind, cast("set[Any]", sharding.addressable_devices)
    return kind is None or all(kind == device.default_memory().kind for device in held_by)


def place(part: np.ndarray, device: jax.Device, sharding: Sharding) -> jax.Array:
    """A part of an array, on a device, in the kind of memory that `sharding` names."""
    placed: jax.Array = jax.device_put(part, SingleDeviceSharding(device, memory_kind=sharding.memory_kind))
    return placed


def stacked(parts: Sequence[jax.Array]) -> jax.Array:
    """One array of several arrays of one shape, each on a device of its own. No data moves.

    They follow each other along the first axis. 0-d arrays have no axis: they must be equal, and become one replicated
    0-d array.
    """
    mesh, memory = local_mesh(tuple(part.device for part in parts)), parts[0].sharding.memory_kind
    if not parts[0].ndim:
        layout = NamedSharding(mesh, PartitionSpec(), memory_kind=memory)
        return jax.make_array_from_single_device_arrays((), layout, list(parts))
    length, *rest = parts[0].shape
    layout = NamedSharding(mesh, PartitionSpec(AXIS), memory_kind=memory)
    return jax.make_array_from_single_device_arrays((length * len(parts), *rest), layout, list(parts))


@functools.cache
def local_mesh(devices: tuple[Any, ...]) -> Mesh:
    """A mesh of these devices along one axis."""
    return Mesh(np.array(devices), (AXIS,))
