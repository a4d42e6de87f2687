"""The arrays of one item on storage, written and read with TensorStore in Orbax's own layout: zarr in OCDBT.

Orbax's array handlers hold a whole state in host memory, open every leaf by itself (0.5 ms each) and make a commit of
every chunk. Here leaves go out in batches, each of them one transaction and one data file; small leaves are gathered on
the host and written as plain keys. Every leaf stays readable by plain Orbax under its own name.
"""

from __future__ import annotations

import functools
import json
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import jax
import numpy as np
import tensorstore as ts
from jax.sharding import NamedSharding, Sharding
from orbax.checkpoint._src.serialization import ocdbt_process_spec, tensorstore_utils  # private, as Orbax's options are

from torchorbax import _gcs, fingerprint
from torchorbax.adapter import Array, put
from torchorbax.contexts import own_context
from torchorbax.dtypes import BY_NAME
from torchorbax.fingerprint import Sums
from torchorbax.gathering import GATHERED_BYTES, Stack, alike, can_be_stacked, in_programs
from torchorbax.manifest import LeafMeta
from torchorbax.replicas import FirstReplica, first_devices, is_shared
from torchorbax.shards import HostShards, is_on_device, place, shards

__all__ = ["LEAST_HOST_BYTES", "Traffic", "context_of", "is_gathered", "longest_wait_s", "read", "write"]

_STACKED = 64
"""So many small leaves alike are worth a program, which has to be compiled; no loop waits for fewer, one by one."""
_CHUNK_BYTES = 64 << 20
"""The largest chunk: what is read at least for any part of it, and held in host memory at most for each."""
LEAST_HOST_BYTES = _CHUNK_BYTES
_LOCAL_BATCHES = 2
"""Transactions that are committed at once on a local disk, which more of them only slow down."""
_LOCAL_READ_BYTES = 32 << 20
"""What is read at once from a local disk: it keeps the disk busy, and a restore needs some multiple of it."""
_BATCH_BYTES = 128 << 20
"""What goes into one data file: large enough for object storage, small enough to let memory go early."""

_MERGED_BYTES = 16 << 20
"""Neighbouring chunks on object storage are read together up to this size, and in parallel beyond."""

Index = tuple[slice, ...]


@dataclass(frozen=True)
class Traffic:
    """How arrays travel between host memory and storage.

    Attributes:
        compressed: zstd, level 1. Costs far more time than it saves bytes, for trained weights.
        max_host_bytes: host memory for copies on their way, per save or restore; one chunk at least (64 MiB).
        all_write: of a part that several devices hold, each writes its share; else the first one writes all of it.
        timeout_s: how long to wait for a URI's storage.
        alone: whatever other processes there are, this one writes all that is given to it.
        one_reads: what several processes hold is read by the first replica's alone (`torchorbax.replicas`).
    """

    compressed: bool = False
    max_host_bytes: int = 1 << 30
    all_write: bool = False
    one_reads: bool = False
    timeout_s: float = 300.0
    alone: bool = False


def context_of(folder: str, traffic: Traffic) -> ts.Context:
    """TensorStore's resources for what is below a folder."""
    context = tensorstore_utils.get_ts_context(use_ocdbt=True)
    return _gcs.context(context.spec.to_json(), traffic.timeout_s) if _gcs.is_uri(folder) else context


def longest_wait_s(folder: str, traffic: Traffic) -> float | None:
    """How long to wait for one answer. Local disks always answer."""
    return traffic.timeout_s if _gcs.is_uri(folder) else None


def is_gathered(array: Array) -> bool:
    """Is the array small enough to be written as one host array, and all of it in every process that has any?"""
    if array.nbytes > GATHERED_BYTES:
        return False
    return isinstance(array, np.ndarray) or array.is_fully_addressable or array.sharding.is_fully_replicated


# -------------------------------------------------------------------------------------------------------------- write


def write(folder: str, arrays: MutableMapping[str, Array], traffic: Traffic) -> dict[str, Sums]:
    """Write this process's part of arrays, each taken out of `arrays` as soon as it is written.

    Args:
        folder: the item's folder, local or a URI.
        arrays: by name; none is empty. Its caller should hold no other references, so that memory is freed on the way.
        traffic: how.

    Returns:
        By name the sums that make up its fingerprint, of the part that this process has, taken of the same bytes.
    """
    names = list(arrays)
    process = 0 if traffic.alone else jax.process_index()
    options = tensorstore_utils.OcdbtKvStoreWriteOptions(mode=tensorstore_utils.OcdbtWriteMode.WRITE)
    spec = tensorstore_utils.build_kvstore_tspec(
        folder, ocdbt_process_spec=ocdbt_process_spec.OcdbtProcessSpec(str(process)), ocdbt_write_options=options
    )
    context = context_of(folder, traffic)
    at_once = traffic.max_host_bytes if _gcs.is_uri(folder) else _LOCAL_BATCHES * _BATCH_BYTES
    wait_s = longest_wait_s(folder, traffic)
    out = _Batches(ts.KvStore.open(spec, context=context).result(wait_s), spec, context, traffic, at_once, wait_s)
    try:
        with own_context():
            started = _add_small(out, arrays, process)
            batch_of = {name: batch for batch in fingerprint.batches(arrays) for name in batch}
            for name in list(arrays):
                if name not in started:
                    started |= fingerprint.start_batch({one: arrays[one] for one in batch_of[name]})
                out.add_large(name, arrays[name])
                out.when_written(functools.partial(arrays.pop, name))
            out.finish()
    except BaseException:
        out.abort()
        raise
    return {name: started[name]() for name in names if name in started}


def merge(folder: Any, traffic: Traffic) -> None:
    """Make what the processes have written into an item's folder, an epath, one database; their files stay.

    Raises:
        FileNotFoundError: none has written anything.
    """
    context, wait_s = context_of(str(folder), traffic), longest_wait_s(str(folder), traffic)
    options = tensorstore_utils.OcdbtKvStoreWriteOptions(mode=tensorstore_utils.OcdbtWriteMode.MERGE)
    written = [entry for entry in folder.iterdir() if entry.name.startswith(ocdbt_process_spec.PROCESS_PREFIX)]
    if not written:
        raise FileNotFoundError(f"no array data in {folder}")
    transaction = ts.Transaction(atomic=True)
    spec = tensorstore_utils.build_kvstore_tspec(folder.as_posix(), use_ocdbt=True, ocdbt_write_options=options)
    whole = ts.KvStore.open(spec, context=context).result(wait_s).with_transaction(transaction)
    for entry in written:
        spec = tensorstore_utils.build_kvstore_tspec(entry.as_posix(), use_ocdbt=True)
        part = ts.KvStore.open(spec, context=context).result(wait_s)
        part.experimental_copy_range_to(whole).result(wait_s)
    transaction.commit_async().result(wait_s)


def _add_small(out: _Batches, arrays: MutableMapping[str, Array], process: int) -> dict[str, Callable[[], Sums]]:
    """Take the small arrays, which the first process writes."""
    small = {name: arrays.pop(name) for name in list(arrays) if is_gathered(arrays[name])}
    started = {}
    for name, on_host in _gathered(small) if process == 0 else ():
        started[name] = fingerprint.start(on_host)
        out.add_small(name, on_host)
    return started


def _gathered(arrays: Mapping[str, Array]) -> Iterator[tuple[str, np.ndarray]]:
    """Small arrays on the host. Those of one shape and layout come together."""
    here: dict[str, jax.Array] = {}
    for name, array in arrays.items():
        if isinstance(array, HostShards):
            yield name, array.addressable_shards[0].data
        elif isinstance(array, jax.Array):
            here[name] = array if array.is_fully_addressable else array.addressable_data(0)
        else:
            yield name, np.asarray(array)
    for layout, group in alike(here).items():
        for names in in_programs(list(group)):
            some = [group[name] for name in names]
            stacked = len(some) >= _STACKED and can_be_stacked(layout) and is_on_device(layout[2])
            yield from zip(names, Stack(some).rows if stacked else map(np.asarray, some), strict=True)


@dataclass
class _Batch:
    transaction: ts.Transaction
    copies: list[Any]
    written: list[Callable[[], object]]
    nbytes: int = 0
    commit: Any = None


class _Batches:
    """Transactions that are filled, committed and waited for, with a bound on the bytes of all that are open."""

    def __init__(
        self,
        database: ts.KvStore,
        spec: Any,
        context: ts.Context,
        traffic: Traffic,
        at_once_bytes: int,
        wait_s: float | None,
    ) -> None:
        self._is_first = traffic.alone or jax.process_index() == 0
        self._wait_s = wait_s
        self._database = database
        self._spec = spec
        self._context = context
        self._traffic = traffic
        self._batch_bytes = min(_BATCH_BYTES, traffic.max_host_bytes // 2)
        self._most_bytes = min(traffic.max_host_bytes, at_once_bytes)
        self._committing: deque[_Batch] = deque()
        self._batch = self._new()

    def add_small(self, name: str, array: np.ndarray) -> None:
        """One key with all of an array, uncompressed."""
        self._room_for(array.nbytes)
        database = self._database.with_transaction(self._batch.transaction)
        database[f"{name}/.zarray"] = _zarray(array.dtype, array.shape, array.shape, False)
        database[f"{name}/{_first_chunk(array.ndim)}"] = array.tobytes()

    def add_large(self, name: str, array: Array) -> None:
        """A chunk or more for each distinct shard that this process has."""
        shares = _shares(array) if self._traffic.all_write else 1
        chunks = _chunk_shape(_share_shape(array, shares), array.dtype.itemsize)
        zarray = _zarray(array.dtype, array.shape, chunks, self._traffic.compressed)
        spec = {"driver": "zarr", "kvstore": {**self._spec, "path": f"{name}/"}, "metadata": json.loads(zarray)}
        # A chunk of zeros is data as well; Orbax, too, says in its metadata that such chunks are stored.
        spec["store_data_equal_to_fill_value"] = True
        store = ts.open(spec, context=self._context, open=True, assume_metadata=True).result(self._wait_s)
        if self._is_first:
            self._room_for(0)
            self._database.with_transaction(self._batch.transaction)[f"{name}/.zarray"] = zarray
        for index, host in _chunks(array, chunks, shares):
            self._room_for(host.nbytes)
            target = store.with_transaction(self._batch.transaction)[index]
            self._batch.copies.append(target.write(host, can_reference_source_data_indefinitely=True))

    def when_written(self, then: Callable[[], object]) -> None:
        """Call `then` when all that has been added so far is on storage."""
        self._batch.written.append(then)

    def finish(self) -> None:
        """Commit what is left and wait for all of it."""
        self._commit()
        while self._committing:
            self._wait_for_oldest()

    def abort(self) -> None:
        """Write no more; what was written is of no use."""
        for batch in (*self._committing, self._batch):
            batch.transaction.abort()

    def _new(self) -> _Batch:
        return _Batch(ts.Transaction(), [], [])

    def _room_for(self, nbytes: int) -> None:
        if self._batch.nbytes and self._batch.nbytes + nbytes > self._batch_bytes:
            self._commit()
        while self._committing and nbytes + self._open_bytes() > self._most_bytes:
            self._wait_for_oldest()
        self._batch.nbytes += nbytes

    def _open_bytes(self) -> int:
        return self._batch.nbytes + sum(batch.nbytes for batch in self._committing)

    def _commit(self) -> None:
        for written in self._batch.copies:
            written.copy.result(self._wait_s)
        self._batch.commit = self._batch.transaction.commit_async()
        self._committing.append(self._batch)
        self._batch = self._new()

    def _wait_for_oldest(self) -> None:
        batch = self._committing.popleft()
        batch.commit.result(self._wait_s)
        for written in batch.copies:
            written.result(self._wait_s)
        for then in batch.written:
            then()


def _shares(array: Any) -> int:
    """Among how many devices writing a shard can be shared evenly: all that hold it, or one."""
    if isinstance(array, np.ndarray):
        return 1
    shard = array.sharding.shard_shape(array.shape)
    holders = array.sharding.num_devices * math.prod(shard) // array.size
    return holders if any(size % holders == 0 for size in shard) else 1


def _share_shape(array: Any, shares: int) -> tuple[int, ...]:
    """The part of a shard that one of those that share it writes."""
    shape = array.shape if isinstance(array, np.ndarray) else array.sharding.shard_shape(array.shape)
    axis = next((axis for axis, size in enumerate(shape) if size % shares == 0), 0)
    return tuple(size // shares if at == axis else size for at, size in enumerate(shape)) if shares > 1 else shape


def _chunks(array: Any, chunks: tuple[int, ...], shares: int = 1) -> Iterator[tuple[Index, np.ndarray]]:
    """The chunks of this process's shards, or of its shares of them, each on the host when it is asked for."""
    if isinstance(array, np.ndarray):  # which only the first process has
        yield from ((index, array[index]) for index in _grid(array.shape, chunks))
        return
    held = [shard for shard in shards(array) if shard.replica_id < shares]
    share = _share_shape(array, shares)
    if math.prod(chunks) * array.dtype.itemsize * len(held) <= _CHUNK_BYTES and not _is_on_host(array):
        array.copy_to_host_async()
    for shard in held:
        data = shard.data if is_on_device(array.sharding) else np.asarray(shard.data)
        for index in _grid(data.shape, chunks):
            if shares > 1 and _share_of(index, share) != shard.replica_id:
                continue
            moved = tuple(
                slice(part.start + offset, part.stop + offset) for part, offset in zip(index, shard.start, strict=True)
            )
            if isinstance(data, np.ndarray):
                yield moved, np.ascontiguousarray(data[index])
            elif data.shape == chunks:
                yield moved, np.asarray(data)
            else:  # never the whole shard on the host
                starts = [part.start for part in index]
                yield moved, np.asarray(jax.lax.dynamic_slice(data, starts, chunks))


def _share_of(index: Index, share: tuple[int, ...]) -> int:
    """Whose share of a shard a chunk of it belongs to: shares follow each other along one axis."""
    return max((part.start // size for part, size in zip(index, share, strict=True)), default=0)


def _is_on_host(array: Any) -> bool:
    return isinstance(array, HostShards) or array.platform() == "cpu" or not is_on_device(array.sharding)


@functools.lru_cache(maxsize=256)
def _grid(shape: tuple[int, ...], chunks: tuple[int, ...]) -> list[Index]:
    """The chunks of a shape, the same for many arrays."""
    counts = [size // chunk for size, chunk in zip(shape, chunks, strict=True)]
    return [
        tuple(slice(at * chunk, (at + 1) * chunk) for at, chunk in zip(cell, chunks, strict=True))
        for cell in np.ndindex(*counts)
    ]


def _chunk_shape(shard: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The shape of a shard, cut along its leading axes into equal parts of at most `_CHUNK_BYTES`."""
    chunk = list(shard)
    for axis, size in enumerate(shard):
        least = math.ceil(math.prod(chunk) * itemsize / _CHUNK_BYTES)
        if least > 1:
            chunk[axis] = next((size // parts for parts in range(least, size) if size % parts == 0), 1)
    return tuple(chunk)


def _first_chunk(ndim: int) -> str:
    return ".".join(["0"] * max(ndim, 1))


def _zarray(dtype: np.dtype, shape: tuple[int, ...], chunks: tuple[int, ...], compressed: bool) -> bytes:
    """The zarr v2 metadata of an array."""
    content = {**_zarray_of(str(dtype)), "shape": shape, "chunks": chunks}
    content["compressor"] = {"id": "zstd", "level": 1} if compressed else None
    return json.dumps(content).encode()


@functools.cache
def _zarray_of(dtype: str) -> dict[str, Any]:
    """What TensorStore writes for a dtype: zarr has no names for bfloat16 and the like."""
    database = ts.KvStore.open("memory://").result()
    spec = {"driver": "zarr", "kvstore": "memory://", "dtype": dtype, "metadata": {"shape": [1], "chunks": [1]}}
    context = ts.Context()
    ts.open(spec, create=True, context=context).result()
    database = ts.KvStore.open("memory://", context=context).result()
    found: dict[str, Any] = json.loads(database[".zarray"])
    return found


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
    if _gcs.is_uri(folder):  # else neighbours become one read without end, and one stream has all of them
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
    most_bytes = min(_BATCH_BYTES if _gcs.is_uri(folder) else _LOCAL_READ_BYTES, traffic.max_host_bytes // 2)
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
        name: (database.read(f"{name}/.zarray"), database.read(f"{name}/{_first_chunk(len(meta.shape))}"))
        for name, (meta, _) in wanted.items()
    }
    on_host: dict[str, np.ndarray] = {}
    for name, (zarray, chunk) in asked.items():
        meta = wanted[name][0]
        expected = json.loads(_zarray(BY_NAME[meta.dtype], meta.shape, meta.shape, False))
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
    if target is None or (
        target.is_fully_addressable and meta.nbytes <= min(_BATCH_BYTES, traffic.max_host_bytes // 4)
    ):
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
