"""Arrays in, into their shardings."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import jax
import numpy as np
import tensorstore as ts
from jax.sharding import NamedSharding, Sharding
from orbax.checkpoint._src.serialization import tensorstore_utils

from torchorbax._src.arrays.broadcast import FirstReplica, first_devices, is_shared
from torchorbax._src.arrays.dtypes import BY_NAME
from torchorbax._src.arrays.leaves import Array, put
from torchorbax._src.arrays.shards import place
from torchorbax._src.arrays.stacks import GATHERED_BYTES
from torchorbax._src.format.manifest import LeafMeta
from torchorbax._src.storage import gcs
from torchorbax._src.storage.traffic import BATCH_BYTES, Traffic
from torchorbax._src.storage.zarr import Index, context_of, first_chunk, longest_wait_s, zarr_metadata

_LOCAL_READ_BYTES = 32 << 20
"""What is read at once from a local disk: it keeps the disk busy, and a restore needs some multiple of it."""

_MERGED_BYTES = 16 << 20
"""Neighbouring chunks on object storage are read together up to this size, and in parallel beyond."""


# --------------------------------------------------------------------------------------------------------------- read


def read(
    folder: str,
    wanted: Mapping[str, tuple[LeafMeta, Sharding | None]],
    traffic: Traffic,
    then: Callable[[str, Any], object] | None = None,
) -> dict[str, Array | FirstReplica]:
    """Read arrays, each into its sharding, or into a numpy array.

    With `traffic.one_reads`, what several processes are to hold comes as a `FirstReplica`, for `replicas.broadcast`.

    Args:
        folder: the item's folder, local or a URI.
        wanted: by name, what is expected and where it goes; none is empty.
        traffic: how; of compression the data itself tells.
        then: called with each as soon as it is where it goes, while others are still being read.

    Raises:
        ValueError: one is missing, or of another shape or dtype. TensorStore raises what it likes for damaged files.
    """
    spec = tensorstore_utils.build_kvstore_tspec(folder)
    if gcs.is_uri(folder):  # else neighbours become one read without end, and one stream has all of them
        spec["experimental_read_coalescing_merged_bytes"] = _MERGED_BYTES
    context, wait_s = context_of(folder, traffic), longest_wait_s(folder, traffic)
    found: dict[str, Any] = {
        name: FirstReplica(meta.shape, BY_NAME[meta.dtype], target, {})
        for name, (meta, target) in wanted.items()
        if isinstance(target, NamedSharding) and not _devices(meta, target, traffic)
    }
    small = {name: one for name, one in wanted.items() if one[0].nbytes <= GATHERED_BYTES and name not in found}
    if small:
        found |= _read_small(ts.KvStore.open(spec, context=context).result(wait_s), small, traffic, wait_s)
    for name, array in found.items():
        if then is not None:
            then(name, array)
    large = {name: one for name, one in wanted.items() if name not in found}
    most_bytes = min(BATCH_BYTES if gcs.is_uri(folder) else _LOCAL_READ_BYTES, traffic.max_host_bytes // 2)
    for name, array in _read_large(spec, context, large, traffic, most_bytes, wait_s):
        found[name] = array
        if then is not None:
            then(name, array)
    return {name: found[name] for name in wanted}


def _devices(meta: LeafMeta, target: Sharding, traffic: Traffic) -> dict[Any, Index]:
    """The devices of this process that get their part of an array from storage, and which part."""
    devices = {device: index or () for device, index in target.addressable_devices_indices_map(meta.shape).items()}
    if not _has_one_reader(target, meta, traffic):
        return devices
    return {device: index for device, index in devices.items() if device in first_devices(target)}


def _has_one_reader(target: Sharding | None, meta: LeafMeta, traffic: Traffic) -> TypeGuard[NamedSharding]:
    return traffic.one_reads and is_shared(target, BY_NAME[meta.dtype])


def _read_small(
    database: ts.KvStore,
    wanted: Mapping[str, tuple[LeafMeta, Sharding | None]],
    traffic: Traffic,
    wait_s: float | None,
) -> dict[str, Array | FirstReplica]:
    """Those leaves that are one plain key each; without what lies otherwise, which `_read_large` takes."""
    asked = {
        name: (database.read(f"{name}/.zarray"), database.read(f"{name}/{first_chunk(len(meta.shape))}"))
        for name, (meta, _) in wanted.items()
    }
    on_host: dict[str, np.ndarray] = {}
    for name, (zarray, chunk) in asked.items():
        meta = wanted[name][0]
        expected = json.loads(zarr_metadata(BY_NAME[meta.dtype], meta.shape, meta.shape, False))
        raw = chunk.result(wait_s).value
        if (
            len(raw) == meta.nbytes
            and zarray.result(wait_s).state == "value"
            and json.loads(zarray.result(wait_s).value) == expected
        ):
            on_host[name] = np.frombuffer(bytearray(raw), BY_NAME[meta.dtype]).reshape(meta.shape)
    placed = [name for name in on_host if wanted[name][1] is not None]
    here = [name for name in placed if _is_here(wanted[name][1])]  # all at once
    arrays = jax.device_put([on_host[name] for name in here], [wanted[name][1] for name in here])
    spread = {name: _spread(on_host[name], *wanted[name], traffic) for name in placed if name not in here}
    return {**on_host, **dict(zip(here, arrays, strict=True)), **spread}


def _spread(array: np.ndarray, meta: LeafMeta, target: Any, traffic: Traffic) -> Array | FirstReplica:
    if not _has_one_reader(target, meta, traffic):
        return put(array, target)
    held = _devices(meta, target, traffic).items()
    shards = {device: place(array[index], device, target) for device, index in held}
    return FirstReplica(meta.shape, array.dtype, target, shards)


def _is_here(target: Sharding | None) -> bool:
    return target is None or target.is_fully_addressable


def _read_large(
    spec: Any,
    context: ts.Context,
    wanted: Mapping[str, tuple[LeafMeta, Sharding | None]],
    traffic: Traffic,
    most_bytes: int,
    wait_s: float | None,
) -> Iterator[tuple[str, Array | FirstReplica]]:
    """Leaves in their order, each when it is placed, while at most so many bytes of those after it are read."""
    opened = {
        name: ts.open(
            {"driver": "zarr", "kvstore": {**spec, "path": f"{name}/"}, "fill_missing_data_reads": False},
            context=context,
            open=True,
            read=True,
        )
        for name in wanted
    }
    reading: deque[tuple[str, list[_Part], list[Any], int]] = deque()
    on_the_way = 0

    def placed_oldest() -> tuple[str, Array | FirstReplica]:
        nonlocal on_the_way
        name, parts, reads, nbytes = reading.popleft()
        on_the_way -= nbytes
        meta, target = wanted[name]
        return name, _placed(meta, target, parts, [one.result(wait_s) for one in reads], traffic)

    for name, (meta, target) in wanted.items():
        store = _opened(name, meta, opened.pop(name), wait_s)
        parts = _parts(meta, target, traffic)
        nbytes = sum(part.nbytes for part in parts)
        while reading and on_the_way + nbytes > most_bytes:
            yield placed_oldest()
        reading.append((name, parts, [store[part.index].read(order="C") for part in parts], nbytes))
        on_the_way += nbytes
    while reading:
        yield placed_oldest()


def _opened(name: str, meta: LeafMeta, future: Any, wait_s: float | None) -> ts.TensorStore:
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
    """What is read at once: a part of an array, and the devices that it is for."""

    index: Index
    devices: tuple[jax.Device, ...]
    nbytes: int


def _parts(meta: LeafMeta, target: Sharding | None, traffic: Traffic) -> list[_Part]:
    """Everything at once if it is all for here and not too large, so that no chunk is read twice; else by shards."""
    if target is None or (target.is_fully_addressable and meta.nbytes <= min(BATCH_BYTES, traffic.max_host_bytes // 4)):
        return [_Part((slice(None),) * len(meta.shape), (), meta.nbytes)]
    devices: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in _devices(meta, target, traffic).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, meta.shape, strict=True))
        devices.setdefault(bounds, []).append(device)
    size = math.prod(target.shard_shape(meta.shape)) * BY_NAME[meta.dtype].itemsize
    return [_Part(tuple(slice(*one) for one in bounds), tuple(on), size) for bounds, on in devices.items()]


def _placed(
    meta: LeafMeta, target: Sharding | None, parts: list[_Part], values: list[np.ndarray], traffic: Traffic
) -> Array | FirstReplica:
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
