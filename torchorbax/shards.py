"""What one process has of an array: its shards, on its devices or in host memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

AXIS = "shard"
"""Of the mesh of a process's own devices."""


@dataclass(frozen=True)
class HostShard:
    """A part of an array, as `jax.Shard` tells it."""

    index: tuple[slice, ...]
    replica_id: int
    data: np.ndarray


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
    addressable_shards: tuple[HostShard, ...]
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


def parts(array: jax.Array) -> list[jax.Array]:
    """What each device of this process has of an array."""
    # Private, but `addressable_shards` would also work out the index of each, which takes as long as all the rest, and
    # `addressable_data` gives the first device's of a replicated array whatever it is asked for.
    array._check_if_deleted()  # type: ignore[attr-defined]  # its parts would be None
    return list(array._arrays)  # type: ignore[attr-defined]


def stacked(parts: Sequence[jax.Array]) -> jax.Array:
    """Arrays of one shape, each on a device of its own, as one array along the first axis; they stay where they are.

    0-d arrays, which have no axis, must be the same and stay one.
    """
    mesh = local_mesh(tuple(part.device for part in parts))
    if not parts[0].ndim:
        return jax.make_array_from_single_device_arrays((), NamedSharding(mesh, PartitionSpec()), list(parts))
    length, *rest = parts[0].shape
    layout = NamedSharding(mesh, PartitionSpec(AXIS))
    return jax.make_array_from_single_device_arrays((length * len(parts), *rest), layout, list(parts))


@functools.cache
def local_mesh(devices: tuple[Any, ...]) -> Mesh:
    """Some devices along one axis."""
    return Mesh(np.array(devices), (AXIS,))
