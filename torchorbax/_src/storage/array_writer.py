"""Writes the arrays of a step to storage with TensorStore, in Orbax's own layout: zarr in OCDBT.

Orbax's array handlers hold a whole state in host memory, open every leaf by itself (0.5 ms each) and commit every chunk
by itself. Here leaves are written in batches, of which each item's part is one transaction and one data file. Small
leaves are gathered on the host and written as plain keys. Plain Orbax can still read every leaf under its own name.

Each item has a database of its own. Of several processes each writes into one of its own, too, and they are merged at
the end; a process that is alone writes into the item's, so that nothing is to be merged.
"""

from __future__ import annotations

import functools
import json
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
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
from torchorbax._src.format.manifest import Key
from torchorbax._src.storage import gcs
from torchorbax._src.storage.array_index import Indexes
from torchorbax._src.storage.traffic import BATCH_BYTES, CHUNK_BYTES, Traffic
from torchorbax._src.storage.zarr import Index, first_chunk, zarr_metadata

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


def is_of_process(path: str) -> bool:
    """Is a path below an item's folder in a folder into which one of several processes writes?"""
    return path.startswith(ocdbt_process_spec.PROCESS_PREFIX)


def write(
    folders: Mapping[str, str],
    arrays: MutableMapping[Key, Array],
    traffic: Traffic,
    process: int = 0,
    *,
    alone: bool = True,
) -> dict[Key, Sums]:
    """Write this process's shards of arrays, and sum them for their fingerprints.

    Args:
        folders: the items' folders, local or URIs.
        arrays: by key; no array is empty. Each is removed as soon as it is written; its memory is then freed, if the
            caller holds no other reference.
        traffic: how arrays are written.
        process: the number of this process among those that write. Process 0 writes small arrays and metadata.
        alone: is it the only process? Otherwise `merge` is needed when all have written.

    Returns:
        By key, the sums of the shards that this process has written.
    """
    keys = list(arrays)
    if not keys:
        return {}
    out = _Batches(_Databases(folders, traffic, None if alone else process), traffic, is_first=process == 0)
    try:
        with own_context():
            started = _add_small(out, arrays, process)
            # Large arrays, one after another. Their sums are started a batch at a time, just before they are needed.
            batch_of = {key: batch for batch in fingerprint.batches(arrays) for key in batch}
            for key in list(arrays):
                if key not in started:
                    started |= fingerprint.start_batch({member: arrays[member] for member in batch_of[key]})
                out.add_large(key, arrays[key])
                out.when_written(functools.partial(arrays.pop, key))
            out.finish()
    except BaseException:
        out.abort()
        raise
    return {key: started[key]() for key in keys if key in started}


def merge(folders: Mapping[str, str], written: Mapping[str, Sequence[str]], traffic: Traffic) -> None:
    """Merge the databases that several processes have written for each item into one. Their data files stay.

    Args:
        folders: the items' folders, local or URIs.
        written: by item, the names of the folders in it into which processes have written.
        traffic: how arrays are written.
    """
    options = tensorstore_utils.OcdbtKvStoreWriteOptions(mode=tensorstore_utils.OcdbtWriteMode.MERGE)
    indexes = Indexes(next(iter(folders.values())), traffic)
    context, wait_s = indexes.context, indexes.wait_s
    started = []
    # All at once: what one database needs does not depend on another.
    for item, names in written.items():
        folder = folders[item]
        transaction = ts.Transaction(atomic=True)
        spec = tensorstore_utils.build_kvstore_tspec(folder, use_ocdbt=True, ocdbt_write_options=options)
        whole = ts.KvStore.open(indexes.spec(folder, spec), context=context).result(wait_s)
        into = whole.with_transaction(transaction)
        copies = []
        for name in names:
            spec = tensorstore_utils.build_kvstore_tspec(f"{folder}/{name}", use_ocdbt=True)
            part = ts.KvStore.open(indexes.spec(folder, spec, below=name), context=context).result(wait_s)
            copies.append(part.experimental_copy_range_to(into))
        started.append((transaction, copies))
    commits = []
    for transaction, copies in started:
        for copy in copies:
            copy.result(wait_s)
        commits.append(transaction.commit_async())
    for commit in commits:
        commit.result(wait_s)
    indexes.create()


def _add_small(out: _Batches, arrays: MutableMapping[Key, Array], process: int) -> dict[Key, Callable[[], Sums]]:
    """Take the small arrays out of `arrays`. Process 0 adds them to the batches and starts to sum them."""
    small = {key: arrays.pop(key) for key in list(arrays) if is_gathered(arrays[key])}
    started = {}
    for key, on_host in _gathered(small) if process == 0 else ():
        started[key] = fingerprint.start(on_host)
        out.add_small(key, on_host)
    return started


def _gathered(arrays: Mapping[Key, Array]) -> Iterator[tuple[Key, np.ndarray]]:
    """Small arrays on the host. Those of one layout are copied there together."""
    on_devices: dict[Key, jax.Array] = {}
    for key, array in arrays.items():
        if isinstance(array, HostShards):
            yield key, array.addressable_shards[0].data
        elif isinstance(array, jax.Array):
            on_devices[key] = array if array.is_fully_addressable else array.addressable_data(0)
        else:
            yield key, np.asarray(array)
    for layout, group in by_layout(on_devices).items():
        for keys in in_programs(list(group)):
            members = [group[key] for key in keys]
            stacked = len(members) >= _STACKED and can_be_stacked(layout) and is_on_device(layout[2])
            yield from zip(keys, Stack(members).rows if stacked else map(np.asarray, members), strict=True)


class _Databases:
    """The databases that this process writes into, one for each item. Each is opened when it is first asked for.

    Args:
        folders: the items' folders.
        traffic: how arrays are written.
        process: the number of this process; None if it is alone.

    Attributes:
        wait_s: how long to wait for a result; None for ever.
        context: TensorStore's context.
        at_once_bytes: the most bytes that are written at once.
    """

    def __init__(self, folders: Mapping[str, str], traffic: Traffic, process: int | None) -> None:
        self._folders = folders
        self._process = None if process is None else ocdbt_process_spec.OcdbtProcessSpec(str(process))
        self._opened: dict[str, tuple[Any, ts.KvStore]] = {}
        anywhere = next(iter(folders.values()))
        self._indexes = Indexes(anywhere, traffic)
        self.wait_s = self._indexes.wait_s
        self.context = self._indexes.context
        self.at_once_bytes = traffic.max_host_bytes if gcs.is_uri(anywhere) else _LOCAL_BATCHES * BATCH_BYTES

    def spec(self, item: str) -> Any:
        """The spec of an item's database."""
        return self._of(item)[0]

    def database(self, item: str) -> ts.KvStore:
        """An item's database."""
        return self._of(item)[1]

    def create_indexes(self) -> None:
        """Write what says where the arrays are, when all of them have been written."""
        self._indexes.create()

    def _of(self, item: str) -> tuple[Any, ts.KvStore]:
        if item not in self._opened:
            options = tensorstore_utils.OcdbtKvStoreWriteOptions(mode=tensorstore_utils.OcdbtWriteMode.WRITE)
            spec = tensorstore_utils.build_kvstore_tspec(
                self._folders[item], ocdbt_process_spec=self._process, ocdbt_write_options=options
            )
            folder = self._folders[item] + ("" if self._process is None else f"/{self._process}")
            spec = self._indexes.spec(folder, spec)
            self._opened[item] = spec, ts.KvStore.open(spec, context=self.context).result(self.wait_s)
        return self._opened[item]


@dataclass
class _Batch:
    """Arrays that are written together, those of each item in one transaction.

    Attributes:
        transactions: the transactions by item.
        copies: the writes of chunks into them.
        written: functions to call when all have been committed.
        nbytes: bytes of the chunks.
        commits: the futures of the commits, once they have been started.
    """

    transactions: dict[str, ts.Transaction] = field(default_factory=dict)
    copies: list[Any] = field(default_factory=list)
    written: list[Callable[[], object]] = field(default_factory=list)
    nbytes: int = 0
    commits: list[Any] = field(default_factory=list)

    def transaction(self, item: str) -> ts.Transaction:
        """The transaction of an item. It is atomic: else TensorStore may commit it in several turns."""
        return self.transactions.setdefault(item, ts.Transaction(atomic=True))


class _Batches:
    """The batches of a write. Each is filled, committed and awaited in turn; their total number of bytes is bounded."""

    def __init__(self, databases: _Databases, traffic: Traffic, *, is_first: bool) -> None:
        self._is_first = is_first
        self._databases = databases
        self._wait_s = databases.wait_s
        self._traffic = traffic
        self._batch_bytes = min(BATCH_BYTES, traffic.max_host_bytes // 2)
        self._most_bytes = min(traffic.max_host_bytes, databases.at_once_bytes)
        self._committing: deque[_Batch] = deque()
        self._batch = _Batch()

    def add_small(self, key: Key, array: np.ndarray) -> None:
        """Add an array as a single uncompressed chunk."""
        self._room_for(array.nbytes)
        item, name = key
        database = self._databases.database(item).with_transaction(self._batch.transaction(item))
        database[f"{name}/.zarray"] = zarr_metadata(array.dtype, array.shape, array.shape, False)
        database[f"{name}/{first_chunk(array.ndim)}"] = array.tobytes()

    def add_large(self, key: Key, array: Array) -> None:
        """Add an array as one chunk or more for each distinct shard that this process has."""
        item, name = key
        shares = _shares(array) if self._traffic.all_replicas_write else 1
        chunks = _chunk_shape(_share_shape(array, shares), array.dtype.itemsize)
        zarray = zarr_metadata(array.dtype, array.shape, chunks, self._traffic.compressed)
        spec: dict[str, Any] = {"driver": "zarr", "kvstore": {**self._databases.spec(item), "path": f"{name}/"}}
        spec["metadata"] = json.loads(zarray)
        # By default, TensorStore does not store chunks of zeros. Orbax's metadata says that they are stored, and a
        # chunk of zeros could then not be distinguished from a lost one.
        spec["store_data_equal_to_fill_value"] = True
        store = ts.open(spec, context=self._databases.context, open=True, assume_metadata=True).result(self._wait_s)
        if self._is_first:
            self._room_for(0)
            database = self._databases.database(item).with_transaction(self._batch.transaction(item))
            # TensorStore looks for the chunks of an array without a name, such as a bare tensor, at the top.
            database[f"{name}/.zarray" if name else ".zarray"] = zarray
        for index, host in _chunks(array, chunks, shares):
            self._room_for(host.nbytes)
            target = store.with_transaction(self._batch.transaction(item))[index]
            self._batch.copies.append(target.write(host, can_reference_source_data_indefinitely=True))

    def when_written(self, then: Callable[[], object]) -> None:
        """Call `then` when everything that has been added so far has been committed."""
        self._batch.written.append(then)

    def finish(self) -> None:
        """Commit the last batch, wait for all of them, and write the indexes."""
        self._commit()
        while self._committing:
            self._wait_for_oldest()
        self._databases.create_indexes()

    def abort(self) -> None:
        """Abort all transactions that are not committed."""
        for batch in (*self._committing, self._batch):
            for transaction in batch.transactions.values():
                transaction.abort()

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
        self._batch.commits = [transaction.commit_async() for transaction in self._batch.transactions.values()]
        self._committing.append(self._batch)
        self._batch = _Batch()

    def _wait_for_oldest(self) -> None:
        batch = self._committing.popleft()
        for commit in batch.commits:
            commit.result(self._wait_s)
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
