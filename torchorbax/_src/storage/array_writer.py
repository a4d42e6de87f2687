"""Writes the arrays of one item to storage with TensorStore, in Orbax's own layout: zarr in OCDBT.

Orbax's array handlers hold a whole state in host memory, open every leaf by itself (0.5 ms each) and commit every chunk
by itself. Here leaves are written in batches, each of which is one transaction and one data file. Small leaves are
gathered on the host and written as plain keys. Plain Orbax can still read every leaf under its own name.
"""

from __future__ import annotations

import functools
import json
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from orbax.checkpoint._src.serialization import ocdbt_process_spec, tensorstore_utils  # private, as Orbax's options are

from torchorbax._src.arrays import fingerprint
from torchorbax._src.arrays.fingerprint import Sums
from torchorbax._src.arrays.jax_context import own_context
from torchorbax._src.arrays.leaves import Array
from torchorbax._src.arrays.shards import HostShards, is_on_device, shards
from torchorbax._src.arrays.stacks import GATHERED_BYTES, Stack, by_layout, can_be_stacked, in_programs
from torchorbax._src.storage import gcs
from torchorbax._src.storage.files_at import files_at
from torchorbax._src.storage.traffic import BATCH_BYTES, CHUNK_BYTES, Traffic
from torchorbax._src.storage.zarr import Index, context_of, first_chunk, longest_wait_s, zarr_metadata

_STACKED = 64
"""The fewest small leaves of one layout that a program copies together. Fewer leaves are copied one by one: that takes
longer on the saving thread, but needs no program to be compiled."""
_LOCAL_BATCHES = 2
"""The number of transactions that are committed at once on a local disk. More would only slow the disk down."""


def is_gathered(array: Array) -> bool:
    """Is the array written as one host array: small, and whole in every process that has a part of it?"""
    if array.nbytes > GATHERED_BYTES:
        return False
    return isinstance(array, np.ndarray) or array.is_fully_addressable or array.sharding.is_fully_replicated


def folder_of(process: int) -> str:
    """The folder within an item's into which a process writes."""
    return f"{ocdbt_process_spec.PROCESS_PREFIX}{process}"


def write(folder: str, arrays: MutableMapping[str, Array], traffic: Traffic, process: int = 0) -> dict[str, Sums]:
    """Write this process's shards of arrays, and sum them for their fingerprints.

    Args:
        folder: the item's folder, local or a URI.
        arrays: by name; no array is empty. Each is removed as soon as it is written; its memory is then freed, if the
            caller holds no other reference.
        traffic: how arrays are written.
        process: the number of this process among those that write. Process 0 writes small arrays and metadata.

    Returns:
        By name, the sums of the shards that this process has written.
    """
    names = list(arrays)
    options = tensorstore_utils.OcdbtKvStoreWriteOptions(mode=tensorstore_utils.OcdbtWriteMode.WRITE)
    spec = tensorstore_utils.build_kvstore_tspec(
        folder, ocdbt_process_spec=ocdbt_process_spec.OcdbtProcessSpec(str(process)), ocdbt_write_options=options
    )
    context = context_of(folder, traffic)
    at_once = traffic.max_host_bytes if gcs.is_uri(folder) else _LOCAL_BATCHES * BATCH_BYTES
    wait_s = longest_wait_s(folder, traffic)
    out = _Batches(
        ts.KvStore.open(spec, context=context).result(wait_s), spec, context, traffic, at_once, wait_s, process
    )
    try:
        with own_context():
            started = _add_small(out, arrays, process)
            # Large arrays, one after another. Their sums are started a batch at a time, just before they are needed.
            batch_of = {name: batch for batch in fingerprint.batches(arrays) for name in batch}
            for name in list(arrays):
                if name not in started:
                    started |= fingerprint.start_batch({member: arrays[member] for member in batch_of[name]})
                out.add_large(name, arrays[name])
                out.when_written(functools.partial(arrays.pop, name))
            out.finish()
    except BaseException:
        out.abort()
        raise
    return {name: started[name]() for name in names if name in started}


def merge(folder: str, traffic: Traffic) -> None:
    """Merge the databases that the processes have written into an item's folder into one. Their data files stay.

    Args:
        folder: the item's folder, local or a URI.
        traffic: how arrays are written.

    Raises:
        FileNotFoundError: no process has written anything.
    """
    context, wait_s = context_of(folder, traffic), longest_wait_s(folder, traffic)
    options = tensorstore_utils.OcdbtKvStoreWriteOptions(mode=tensorstore_utils.OcdbtWriteMode.MERGE)
    entries = files_at(folder, traffic.timeout_s).entries()
    written = [entry.name for entry in entries if entry.name.startswith(ocdbt_process_spec.PROCESS_PREFIX)]
    if not written:
        raise FileNotFoundError(f"no array data in {folder}")
    transaction = ts.Transaction(atomic=True)
    spec = tensorstore_utils.build_kvstore_tspec(folder, use_ocdbt=True, ocdbt_write_options=options)
    whole = ts.KvStore.open(spec, context=context).result(wait_s).with_transaction(transaction)
    for name in written:
        spec = tensorstore_utils.build_kvstore_tspec(f"{folder}/{name}", use_ocdbt=True)
        part = ts.KvStore.open(spec, context=context).result(wait_s)
        part.experimental_copy_range_to(whole).result(wait_s)
    transaction.commit_async().result(wait_s)


def _add_small(out: _Batches, arrays: MutableMapping[str, Array], process: int) -> dict[str, Callable[[], Sums]]:
    """Take the small arrays out of `arrays`. Process 0 adds them to the batches and starts to sum them."""
    small = {name: arrays.pop(name) for name in list(arrays) if is_gathered(arrays[name])}
    started = {}
    for name, on_host in _gathered(small) if process == 0 else ():
        started[name] = fingerprint.start(on_host)
        out.add_small(name, on_host)
    return started


def _gathered(arrays: Mapping[str, Array]) -> Iterator[tuple[str, np.ndarray]]:
    """Small arrays on the host. Those of one layout are copied there together."""
    on_devices: dict[str, jax.Array] = {}
    for name, array in arrays.items():
        if isinstance(array, HostShards):
            yield name, array.addressable_shards[0].data
        elif isinstance(array, jax.Array):
            on_devices[name] = array if array.is_fully_addressable else array.addressable_data(0)
        else:
            yield name, np.asarray(array)
    for layout, group in by_layout(on_devices).items():
        for names in in_programs(list(group)):
            members = [group[name] for name in names]
            stacked = len(members) >= _STACKED and can_be_stacked(layout) and is_on_device(layout[2])
            yield from zip(names, Stack(members).rows if stacked else map(np.asarray, members), strict=True)


@dataclass
class _Batch:
    """Arrays that are written in one transaction.

    Attributes:
        transaction: the transaction.
        copies: the writes of chunks into it.
        written: functions to call when the transaction has been committed.
        nbytes: bytes of the chunks.
        commit: the future of the commit, once it has been started.
    """

    transaction: ts.Transaction
    copies: list[Any]
    written: list[Callable[[], object]]
    nbytes: int = 0
    commit: Any = None


class _Batches:
    """The batches of a write. Each is filled, committed and awaited in turn; their total number of bytes is bounded."""

    def __init__(
        self,
        database: ts.KvStore,
        spec: Any,
        context: ts.Context,
        traffic: Traffic,
        at_once_bytes: int,
        wait_s: float | None,
        process: int,
    ) -> None:
        self._is_first = process == 0
        self._wait_s = wait_s
        self._database = database
        self._spec = spec
        self._context = context
        self._traffic = traffic
        self._batch_bytes = min(BATCH_BYTES, traffic.max_host_bytes // 2)
        self._most_bytes = min(traffic.max_host_bytes, at_once_bytes)
        self._committing: deque[_Batch] = deque()
        self._batch = self._new()

    def add_small(self, name: str, array: np.ndarray) -> None:
        """Add an array as a single uncompressed chunk."""
        self._room_for(array.nbytes)
        database = self._database.with_transaction(self._batch.transaction)
        database[f"{name}/.zarray"] = zarr_metadata(array.dtype, array.shape, array.shape, False)
        database[f"{name}/{first_chunk(array.ndim)}"] = array.tobytes()

    def add_large(self, name: str, array: Array) -> None:
        """Add an array as one chunk or more for each distinct shard that this process has."""
        shares = _shares(array) if self._traffic.all_replicas_write else 1
        chunks = _chunk_shape(_share_shape(array, shares), array.dtype.itemsize)
        zarray = zarr_metadata(array.dtype, array.shape, chunks, self._traffic.compressed)
        spec = {"driver": "zarr", "kvstore": {**self._spec, "path": f"{name}/"}, "metadata": json.loads(zarray)}
        # By default, TensorStore does not store chunks of zeros. Orbax's metadata says that they are stored, and a
        # chunk of zeros could then not be distinguished from a lost one.
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
        """Call `then` when everything that has been added so far has been committed."""
        self._batch.written.append(then)

    def finish(self) -> None:
        """Commit the last batch and wait for all of them."""
        self._commit()
        while self._committing:
            self._wait_for_oldest()

    def abort(self) -> None:
        """Abort all transactions that are not committed."""
        for batch in (*self._committing, self._batch):
            batch.transaction.abort()

    def _new(self) -> _Batch:
        return _Batch(ts.Transaction(), [], [])

    def _room_for(self, nbytes: int) -> None:
        """Count these bytes for the current batch. If a bound would be exceeded, first start a new batch or wait."""
        if self._batch.nbytes and self._batch.nbytes + nbytes > self._batch_bytes:
            self._commit()
        while self._committing and nbytes + self._open_bytes() > self._most_bytes:
            self._wait_for_oldest()
        self._batch.nbytes += nbytes

    def _open_bytes(self) -> int:
        return self._batch.nbytes + sum(batch.nbytes for batch in self._committing)

    def _commit(self) -> None:
        """Start to commit the current batch, and begin a new one."""
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
    """The number of devices that share the writing of a shard: all that hold it, or one if no axis divides evenly."""
    if isinstance(array, np.ndarray):
        return 1
    shard = array.sharding.shard_shape(array.shape)
    holders = array.sharding.num_devices * math.prod(shard) // array.size
    return holders if any(size % holders == 0 for size in shard) else 1


def _share_shape(array: Any, shares: int) -> tuple[int, ...]:
    """The shape of the part of a shard that one device writes, if `shares` devices share the shard."""
    shape = array.shape if isinstance(array, np.ndarray) else array.sharding.shard_shape(array.shape)
    axis = next((axis for axis, size in enumerate(shape) if size % shares == 0), 0)
    return tuple(size // shares if at == axis else size for at, size in enumerate(shape)) if shares > 1 else shape


def _chunks(array: Any, chunks: tuple[int, ...], shares: int = 1) -> Iterator[tuple[Index, np.ndarray]]:
    """The chunks that this process writes, each with its index in the array. Each is copied to the host on request."""
    if isinstance(array, np.ndarray):  # process 0 writes all of it
        yield from ((index, array[index]) for index in _grid(array.shape, chunks))
        return
    held = [shard for shard in shards(array) if shard.replica_id < shares]
    share = _share_shape(array, shares)
    if math.prod(chunks) * array.dtype.itemsize * len(held) <= CHUNK_BYTES and not _is_on_host(array):
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
            else:  # copy the chunk alone to the host, never the whole shard
                starts = [part.start for part in index]
                yield moved, np.asarray(jax.lax.dynamic_slice(data, starts, chunks))


def _share_of(index: Index, share: tuple[int, ...]) -> int:
    """The replica_id of the device that writes a chunk of a shard. The shares follow each other along one axis."""
    return max((part.start // size for part, size in zip(index, share, strict=True)), default=0)


def _is_on_host(array: Any) -> bool:
    return isinstance(array, HostShards) or array.platform() == "cpu" or not is_on_device(array.sharding)


@functools.lru_cache(maxsize=256)
def _grid(shape: tuple[int, ...], chunks: tuple[int, ...]) -> list[Index]:
    """The indices of all chunks of a shape. Cached, because many arrays have the same shape."""
    counts = [size // chunk for size, chunk in zip(shape, chunks, strict=True)]
    return [
        tuple(slice(at * chunk, (at + 1) * chunk) for at, chunk in zip(cell, chunks, strict=True))
        for cell in np.ndindex(*counts)
    ]


def _chunk_shape(shard: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """The shape of a chunk: a shard, cut along its leading axes into equal parts of at most `CHUNK_BYTES`."""
    chunk = list(shard)
    for axis, size in enumerate(shard):
        least = math.ceil(math.prod(chunk) * itemsize / CHUNK_BYTES)
        if least > 1:
            chunk[axis] = next((size // parts for parts in range(least, size) if size % parts == 0), 1)
    return tuple(chunk)
