"""Reads the arrays of one item from storage, straight into their shardings.

Small leaves are requested all at once and put on the devices together. Large leaves are read shard by shard, in
parallel and in order, with a bound on the bytes that are in host memory.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import jax
import numpy as np
import tensorstore as ts
from jax.sharding import NamedSharding, Sharding
from orbax.checkpoint._src.serialization import tensorstore_utils  # private: Orbax has no public access to its specs

from torchorbax._src.arrays.broadcast import FirstReplica, first_devices, is_shared
from torchorbax._src.arrays.dtypes import BY_NAME
from torchorbax._src.arrays.leaves import Array, put
from torchorbax._src.arrays.shards import place
from torchorbax._src.arrays.stacks import GATHERED_BYTES
from torchorbax._src.format.manifest import LeafMeta
from torchorbax._src.storage import gcs
from torchorbax._src.storage.inspection import Inspected, inspect
from torchorbax._src.storage.traffic import BATCH_BYTES, Traffic
from torchorbax._src.storage.zarr import Index, context_of, first_chunk, longest_wait_s, zarr_metadata

_LOCAL_READ_BYTES = 32 << 20
"""The most bytes that are being read at once from a local disk. It keeps the disk busy; a restore needs a few times
this much host memory."""

_ANY_TIME = 0.0
"""What has been read at any time is good enough: a step never changes, and the caches are those of one call."""

_MERGED_BYTES = 16 << 20
"""Neighbouring chunks on object storage are merged into one request up to this size, and read in parallel beyond it."""


def read(
    folder: str,
    wanted: Mapping[str, tuple[LeafMeta, Sharding | None]],
    traffic: Traffic,
    then: Callable[[str, Any], object] | None = None,
    readers: int = 1,
) -> dict[str, Array | FirstReplica]:
    """Read arrays, each into its sharding or into a numpy array.

    With `traffic.first_replica_reads`, an array that is replicated over several processes is read by the first replica
    alone. It is returned as a `FirstReplica`, for `arrays.broadcast`.

    Args:
        folder: the item's folder, local or a URI.
        wanted: by name, the description of the array that is expected, and its sharding; None for a numpy array. No
            array is empty.
        traffic: how arrays are read. Whether they are compressed, the data itself says.
        then: called with each array as soon as it is in place, while others are still being read.
        readers: how many calls share the host memory that `traffic` allows.

    Raises:
        ValueError: an array is missing, or has another shape or dtype. Other errors of TensorStore for damaged files
            pass unchanged.
    """
    inspected = None if gcs.is_uri(folder) else inspect(folder)
    if inspected is not None:
        for name, (meta, _) in wanted.items():
            inspected.check(name, meta)
    spec = tensorstore_utils.build_kvstore_tspec(folder)
    if gcs.is_uri(folder):  # by default, neighbouring chunks of any number are merged into one request, a single stream
        spec["experimental_read_coalescing_merged_bytes"] = _MERGED_BYTES
    context, wait_s = context_of(folder, traffic), longest_wait_s(folder, traffic)
    # Arrays of which this process reads nothing: it will receive them from the first replica.
    found: dict[str, Any] = {
        name: FirstReplica(meta.shape, BY_NAME[meta.dtype], target, {})
        for name, (meta, target) in wanted.items()
        if isinstance(target, NamedSharding) and not _reading_devices(meta, target, traffic)
    }

    def take(name: str, array: Array | FirstReplica) -> None:
        found[name] = array
        if then is not None:
            then(name, array)

    for name in list(found):
        take(name, found[name])
    # Small arrays are asked for, all at once.
    rest = {name: expected for name, expected in wanted.items() if name not in found}
    small = {name: expected for name, expected in rest.items() if expected[0].nbytes <= GATHERED_BYTES}
    asked = _ask_for_small(ts.KvStore.open(spec, context=context).result(wait_s), small) if small else {}
    # Large arrays, one after another; then the small ones, of which other libraries may have stored some as large ones.
    most_bytes = min(BATCH_BYTES if gcs.is_uri(folder) else _LOCAL_READ_BYTES, traffic.max_host_bytes // 2) // readers
    for name, array in _read_large(spec, context, _without(rest, small), traffic, most_bytes, wait_s, inspected):
        take(name, array)
    for name, array in _small_arrays(asked, small, traffic, wait_s).items():
        take(name, array)
    for name, array in _read_large(spec, context, _without(rest, found), traffic, most_bytes, wait_s, inspected):
        take(name, array)
    return {name: found[name] for name in wanted}


def _reading_devices(meta: LeafMeta, target: Sharding, traffic: Traffic) -> dict[Any, Index]:
    """The devices of this process whose shards of an array are read from storage, each with the index of its shard."""
    devices = {device: index or () for device, index in target.addressable_devices_indices_map(meta.shape).items()}
    if not _has_one_reader(target, meta, traffic):
        return devices
    return {device: index for device, index in devices.items() if device in first_devices(target)}


def _has_one_reader(target: Sharding | None, meta: LeafMeta, traffic: Traffic) -> TypeGuard[NamedSharding]:
    """Is the array read by its first replica alone, and sent on to the others?"""
    return traffic.first_replica_reads and is_shared(target, BY_NAME[meta.dtype])


def _without(wanted: Mapping[str, Any], others: Collection[str]) -> dict[str, Any]:
    return {name: expected for name, expected in wanted.items() if name not in others}


def _ask_for_small(
    database: ts.KvStore, wanted: Mapping[str, tuple[LeafMeta, Sharding | None]]
) -> dict[str, tuple[Any, Any]]:
    """Start to read leaves that are stored as a single uncompressed chunk each: the description and the chunk."""
    return {
        name: (
            database.read(f"{name}/.zarray", staleness_bound=_ANY_TIME),
            database.read(
                f"{name}/{first_chunk(len(meta.shape))}", byte_range=slice(0, meta.nbytes), staleness_bound=_ANY_TIME
            ),
        )
        for name, (meta, _) in wanted.items()
    }


def _small_arrays(
    asked: Mapping[str, tuple[Any, Any]],
    wanted: Mapping[str, tuple[LeafMeta, Sharding | None]],
    traffic: Traffic,
    wait_s: float | None,
) -> dict[str, Array | FirstReplica]:
    """The leaves that have been asked for.

    Leaves that are stored in another way are missing from the result; `_read_large` reads them.
    """
    # Decode those whose metadata is as expected.
    on_host: dict[str, np.ndarray] = {}
    for name, (zarray, chunk) in asked.items():
        meta = wanted[name][0]
        expected = json.loads(zarr_metadata(BY_NAME[meta.dtype], meta.shape, meta.shape, False))
        if zarray.result(wait_s).state == "value" and json.loads(zarray.result(wait_s).value) == expected:
            raw = chunk.result(wait_s).value
            if len(raw) == meta.nbytes:
                on_host[name] = np.frombuffer(bytearray(raw), BY_NAME[meta.dtype]).reshape(meta.shape)
    # Put them on devices: those for this process alone by a single call, those shared by processes one by one.
    placed = [name for name in on_host if wanted[name][1] is not None]
    local = [name for name in placed if _is_local(wanted[name][1])]
    arrays = jax.device_put([on_host[name] for name in local], [wanted[name][1] for name in local])
    shared = {name: _put_shared(on_host[name], *wanted[name], traffic) for name in placed if name not in local}
    return {**on_host, **dict(zip(local, arrays, strict=True)), **shared}


def _put_shared(array: np.ndarray, meta: LeafMeta, target: Any, traffic: Traffic) -> Array | FirstReplica:
    """An array in host memory, put on this process's devices of a sharding over several processes."""
    if not _has_one_reader(target, meta, traffic):
        return put(array, target)
    held = _reading_devices(meta, target, traffic).items()
    shards = {device: place(array[index], device, target) for device, index in held}
    return FirstReplica(meta.shape, array.dtype, target, shards)


def _is_local(target: Sharding | None) -> bool:
    return target is None or target.is_fully_addressable


def _read_large(
    spec: Any,
    context: ts.Context,
    wanted: Mapping[str, tuple[LeafMeta, Sharding | None]],
    traffic: Traffic,
    most_bytes: int,
    wait_s: float | None,
    inspected: Inspected | None,
) -> Iterator[tuple[str, Array | FirstReplica]]:
    """Read leaves and yield them in their order, each when it is in place.

    Meanwhile the leaves after it are being read: as many as have `most_bytes` together.
    """
    opened = {
        name: ts.open(
            {
                "driver": "zarr",
                "kvstore": {**spec, "path": f"{name}/"},
                "fill_missing_data_reads": False,
                # A step never changes, so what has been read for one array is not asked for again for another.
                "recheck_cached_data": False,
                "recheck_cached_metadata": False,
            },
            context=context,
            open=True,
            read=True,
        )
        for name in wanted
    }
    reading: deque[tuple[str, list[_Part], list[Any], int]] = deque()
    reading_bytes = 0

    def placed_oldest() -> tuple[str, Array | FirstReplica]:
        nonlocal reading_bytes
        name, parts, reads, nbytes = reading.popleft()
        reading_bytes -= nbytes
        meta, target = wanted[name]
        return name, _placed(meta, target, parts, [read.result(wait_s) for read in reads], traffic)

    for name, (meta, target) in wanted.items():
        store = _opened(name, meta, opened.pop(name), wait_s)
        parts = _parts(meta, target, traffic)
        nbytes = sum(part.nbytes for part in parts)
        if inspected is not None:
            for part in parts:
                inspected.check_compressed(name, part.index)
        _check_memory(name, meta, max((part.nbytes for part in parts), default=0))
        while reading and reading_bytes + nbytes > most_bytes:
            yield placed_oldest()
        reading.append((name, parts, [store[part.index].read(order="C") for part in parts], nbytes))
        reading_bytes += nbytes
    while reading:
        yield placed_oldest()


def _check_memory(name: str, meta: LeafMeta, nbytes: int) -> None:
    """Raise MemoryError if there is no room for a part of an array. TensorStore would abort the process."""
    try:
        np.empty(nbytes, np.uint8)
    except MemoryError as error:
        raise MemoryError(f"no memory for {nbytes} bytes of {name}, which is {meta}") from error


def _opened(name: str, meta: LeafMeta, future: Any, wait_s: float | None) -> ts.TensorStore:
    """The opened array. Raises ValueError if it is missing or is not what the manifest describes."""
    try:
        store = future.result(wait_s)
    except ValueError as error:
        if "NOT_FOUND" in str(error):
            raise ValueError(f"{name} is missing from the array data") from error
        raise
    dtype = str(store.dtype.numpy_dtype)
    if tuple(store.shape) != meta.shape or dtype != meta.dtype:
        raise ValueError(f"{name} is {dtype}{tuple(store.shape)}, but the manifest says {meta}")
    return store  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Part:
    """A part of an array that is read at once, and the devices that get it. No devices stand for the whole array."""

    index: Index
    devices: tuple[jax.Device, ...]
    nbytes: int


def _parts(meta: LeafMeta, target: Sharding | None, traffic: Traffic) -> list[_Part]:
    """The parts in which this process reads an array.

    An array for this process alone is one part, unless it is too large: then no chunk is read twice. Otherwise each
    distinct shard is a part.
    """
    if target is None or (target.is_fully_addressable and meta.nbytes <= min(BATCH_BYTES, traffic.max_host_bytes // 4)):
        return [_Part((slice(None),) * len(meta.shape), (), meta.nbytes)]
    devices: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in _reading_devices(meta, target, traffic).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, meta.shape, strict=True))
        devices.setdefault(bounds, []).append(device)
    size = math.prod(target.shard_shape(meta.shape)) * BY_NAME[meta.dtype].itemsize
    return [
        _Part(tuple(slice(start, stop) for start, stop in bounds), tuple(holders), size)
        for bounds, holders in devices.items()
    ]


def _placed(
    meta: LeafMeta, target: Sharding | None, parts: list[_Part], values: list[np.ndarray], traffic: Traffic
) -> Array | FirstReplica:
    """The array, put together on its devices from the values of its parts."""
    if target is None:
        return values[0]
    if not parts[0].devices:
        placed: jax.Array = jax.device_put(values[0], target)
        return placed
    shards = {
        device: place(value, device, target)
        for part, value in zip(parts, values, strict=True)
        for device in part.devices
    }
    if _has_one_reader(target, meta, traffic):
        return FirstReplica(meta.shape, BY_NAME[meta.dtype], target, shards)
    return jax.make_array_from_single_device_arrays(meta.shape, target, list(shards.values()))
