"""What one process has of an array: its shards, on its devices or in host memory."""

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


def bounds_of(index: Iterable[slice], shape: tuple[int, ...]) -> Bounds:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


AXIS = "shard"
"""Of the mesh of a process's own devices."""


@dataclass(frozen=True)
class Shard:
    """What one device has of an array, as `jax.Shard` tells it; the data may lie in host memory.

    Attributes:
        index: the part of the array.
        start: its first element, along each axis.
        replica_id: how many devices with the same part come before this one.
        data: the part.
    """

    index: tuple[slice, ...]
    start: tuple[int, ...]
    replica_id: int
    data: Any


@dataclass(frozen=True)
class HostShards:
    """What this process has of an array that is laid out over several processes, in host memory; looks like the array.

    Attributes:
        shape: of the whole array.
        dtype: of the array.
        sharding: how it is laid out.
        addressable_shards: the parts that this process has.
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
        """Bytes of the whole array."""
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
    """This process's devices of an array, in the order of its `parts`."""
    return [place[0] for place in _places(sharding, shape)]


@functools.lru_cache(maxsize=1024)
def _places(
    sharding: Sharding, shape: tuple[int, ...]
) -> list[tuple[jax.Device, tuple[slice, ...], tuple[int, ...], int]]:
    """The devices of this process, with index, start and replica of what each has: jax works them out for every array
    anew."""
    places, seen = [], Counter[tuple[int, ...]]()
    for device, index in sharding.devices_indices_map(shape).items():
        start = tuple(part.indices(size)[0] for part, size in zip(index, shape, strict=True))
        if device in sharding.addressable_devices:
            places.append((device, index, start, seen[start]))
        seen[start] += 1
    return places


def parts(array: jax.Array) -> list[jax.Array]:
    """What each device of this process has of an array."""
    # Private, but `addressable_shards` would also work out the index of each, which takes as long as all the rest, and
    # `addressable_data` gives the first device's of a replicated array whatever it is asked for.
    array._check_if_deleted()  # type: ignore[attr-defined]  # private, too: of a deleted array the parts are None
    return list(array._arrays)  # type: ignore[attr-defined]  # private, for the reason above


@functools.lru_cache(maxsize=1024)
def is_on_device(sharding: Sharding) -> bool:
    """Is it of the memory that programs compute in? Not so for what is offloaded to the host's (`pinned_host`)."""
    kind, held_by = sharding.memory_kind, cast("set[Any]", sharding.addressable_devices)
    return kind is None or all(kind == device.default_memory().kind for device in held_by)


def place(part: np.ndarray, device: jax.Device, sharding: Sharding) -> jax.Array:
    """A device's part of an array with this sharding, in the same kind of memory."""
    placed: jax.Array = jax.device_put(part, SingleDeviceSharding(device, memory_kind=sharding.memory_kind))
    return placed


def stacked(parts: Sequence[jax.Array]) -> jax.Array:
    """Arrays of one shape, each on a device of its own, as one array along the first axis; they stay where they are.

    0-d arrays, which have no axis, must be the same and stay one.
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
    """Some devices along one axis."""
    return Mesh(np.array(devices), (AXIS,))
