"""Fingerprints of arrays that do not depend on how they are laid out over devices.

An array is read as words: elements of 1, 2 or 4 bytes are one word each, larger elements are several words of 4 bytes
along an axis of their own. The trailing axes count columns `c` and the leading axes count rows `r`, each in row-major
order. `_split` chooses the axis where they part, by the shape alone. With `b_rc` the bits of a word, a fingerprint is
the two sums

    s_k = sum_r u_k(r) * (sum_c b_rc * v_k(c))  mod 2**64,    k = 0, 1,

with odd weights that are hashed from the index: `u_0` and `u_1` have 64 bits; `v_0` and `v_1` have 32 bits and are the
halves of one hash. A word therefore costs two 32-bit products and no hash: the weights of columns come from a table,
and those of rows are computed once a row.

The sums of an array are the totals of the sums of its parts, however it is divided. So every shard is summed on its own
device, with the indices that its rows and columns have in the whole array, and no device communicates with another.

**Any change within one word is found with certainty**, for example a flipped bit: it adds `d * v * u`, where
`0 < |d * v| < 2**64`, and an odd `u` never makes that 0 modulo 2**64.

**Any other change is missed with a probability of less than 2**-50**, with the weights taken as independent random odd
numbers. Proof, for one sum: let `2**z`, `z <= 31`, be the highest power of two that divides all the differences `d_rc`,
and let `d_rj` be one that `2**(z+1)` does not divide. Row `r` adds `u(r) * X`, where `X = sum_c d_rc v(c)`.

- For `z < t <= 64`, `2**t` divides `X` with probability at most `2**(1 - min(t - z, 32))`: whatever the other weights
  are, `v(j)` is then fixed modulo `2**min(t - z, 32)`, and all but one of those bits are random.
- If `2**t` is the highest power that divides `X`, `t < 64`, the sum is 0 with probability at most `2**(t - 63)`:
  whatever the other rows add, `u(r)` is then fixed modulo `2**(64 - t)`.

So the change is missed with probability at most `sum_{t=z..63} P(2**t divides X) * 2**(t - 63) + P(X = 0)`, which is
largest for `z = 31`: `2**-32 + 32 * 2**-31 + 2**-31 < 2**-25`. The two sums have no weights in common, so both miss it
with a probability of less than `2**-50`. (This bound is for differences in the top bits of words only, such as flipped
signs, of which sums modulo 2**32 would always miss an even number. If any difference is odd, the bound is `2**-58`.)
The weights are no secret, so a fingerprint does not protect against somebody who forges an array.

The hash is splitmix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from torchorbax._src.arrays.jax_context import own_context
from torchorbax._src.arrays.leaves import Array
from torchorbax._src.arrays.shards import AXIS, Shard, is_on_device, local_mesh, shards, stacked
from torchorbax._src.arrays.stacks import Row, by_layout

Key = TypeVar("Key", bound=Hashable)
Sums = np.ndarray
"""`uint64[2]`: `s_0` and `s_1` of an array, or of a part of it."""

_COLUMN_SEED, *_ROW_SEEDS = 0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0  # the digits of pi's fraction
_GAMMA, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}
_LEAST_COLUMNS = 128
"""The number of columns at which `_split` stops adding axes to them: enough words then share the hash of their row."""
_MOST_COLUMNS = 1 << 17
"""The most columns: the table of their weights then has a megabyte. If the last axis is longer, each word is a row."""
_BLOCK_WORDS = 1 << 20
"""The number of words of a host array that one program sums."""
_CACHED_WORDS = 1 << 15
"""The number of words of a host array that numpy sums at once: they stay in the processor's cache."""
_SMALL_BYTES = 64 << 10
"""Up to this size, an array is summed on the host: that costs less than to start a program."""
_AT_ONCE = 8
"""The number of arrays of one layout that one program sums, in little more than half the time of eight programs."""
_AT_ONCE_BYTES = 8 << 20
"""Larger shards are summed one array at a time, because a training step has to wait for the program to end."""


def fingerprints(arrays: Mapping[Key, Array]) -> dict[Key, str]:
    """The fingerprints of arrays, 32 hexadecimal digits each.

    Args:
        arrays: jax or numpy arrays of any dtype and shape. Large jax arrays are summed on their devices, each distinct
            part once. All programs are dispatched before any result is waited for.
    """
    return {key: text(finish()) for key, finish in start_all(arrays).items()}


def text(sums: Sums) -> str:
    """The fingerprint of an array with these sums."""
    return "".join(f"{int(lane):016x}" for lane in sums)


def sums(fingerprint: str) -> Sums:
    """The reverse of `text`."""
    return np.array([int(fingerprint[start : start + 16], 16) for start in (0, 16)], np.uint64)


def total(parts: Any) -> Sums:
    """The sums of an array, from the sums of its parts."""
    added: Sums = np.asarray(parts, np.uint64).reshape(-1, len(_ROW_SEEDS)).sum(axis=0, dtype=np.uint64)
    return added


def start_all(arrays: Mapping[Key, Array]) -> dict[Key, Callable[[], Sums]]:
    """`start` for each of several arrays."""
    started: dict[Key, Callable[[], Sums]] = {}
    for keys in batches(arrays):
        started |= start_batch({key: arrays[key] for key in keys})
    return {key: started[key] for key in arrays}


def batches(arrays: Mapping[Key, Array]) -> list[list[Key]]:
    """The keys, grouped as `start_batch` takes them. Fewer programs cost less time to start."""
    found: list[list[Key]] = []
    programs: dict[Key, jax.Array] = {}
    for key, array in arrays.items():
        if isinstance(array, jax.Array) and _runs_on_devices(array) and array.nbytes > _SMALL_BYTES:
            programs[key] = array
        else:
            found.append([key])
    for (shape, dtype, sharding), group in by_layout(programs).items():
        keys = list(group)
        size = _AT_ONCE if math.prod(sharding.shard_shape(shape)) * dtype.itemsize <= _AT_ONCE_BYTES else 1
        whole = len(keys) // size * size
        found += [keys[start : start + size] for start in range(0, whole, size)]
        found += [[key] for key in keys[whole:]]  # a program for another number of arrays would have to be compiled
    return found


def start_batch(arrays: Mapping[Key, Array]) -> dict[Key, Callable[[], Sums]]:
    """`start` for one of the `batches`."""
    keys, several = list(arrays), list(arrays.values())
    if len(several) == 1:
        return {keys[0]: start(several[0])}
    by_shard = functools.cache(_start_on_devices(several, [_first_replicas(array) for array in several]))
    return {key: functools.partial(lambda at: total(by_shard()[:, at]), at) for at, key in enumerate(keys)}


def start(array: Array) -> Callable[[], Sums]:
    """Start to sum what this process has of an array; of replicas, only the first. Call the result for the sums."""
    if isinstance(array, np.ndarray | Row):
        return _start_on_host(np.asarray(array), (0,) * len(array.shape), array.shape)
    if array.nbytes <= _SMALL_BYTES and array.is_fully_addressable:
        if array.platform() != "cpu":
            array.copy_to_host_async()
        return lambda: _start_on_host(np.asarray(array), (0,) * array.ndim, array.shape)()
    by_shard = _start_shards(array, _first_replicas(array))
    return lambda: total(by_shard())


def _first_replicas(array: Any) -> list[Shard]:
    return [shard for shard in shards(array) if shard.replica_id == 0]


def start_parts(array: jax.Array) -> Callable[[], dict[int, Sums]]:
    """Start to sum each distinct part of an array that this process has, even if it is a later replica.

    Call the result for the sums, by the row-major index that the part's first element has in the array.
    """
    parts = {_flat(shard.start, array.shape): shard for shard in shards(array)}
    by_shard = _start_shards(array, list(parts.values()))
    return lambda: dict(zip(parts, by_shard(), strict=True))


def _start_shards(array: Array, held: Sequence[Shard]) -> Callable[[], np.ndarray]:
    """Start to sum some shards of an array. Call the result for a `uint64[shards, 2]`."""
    if _runs_on_devices(array):
        by_shard = _start_on_devices([array], [held])
        return lambda: by_shard()[:, 0]
    parts = [_start_on_host(np.asarray(shard.data), shard.start, array.shape) for shard in held]
    return lambda: np.asarray([part() for part in parts], np.uint64).reshape(-1, len(_ROW_SEEDS))


def _start_on_devices(arrays: Sequence[Array], held: Sequence[Sequence[Shard]]) -> Callable[[], np.ndarray]:
    """Start to sum the same shards of arrays of one layout, on their devices.

    Call the result for a `uint64[shards, arrays, 2]`.
    """
    firsts = tuple(shard.start for shard in held[0])
    if not firsts:
        return lambda: np.zeros((0, len(arrays), len(_ROW_SEEDS)), np.uint64)
    data = [[shard.data for shard in of_array] for of_array in held]
    mesh, local = local_mesh(tuple(part.device for part in data[0])), data[0][0].shape
    with own_context():
        positions = _positions(mesh, arrays[0].shape, local, firsts)
        result = _sums_by_shard(mesh)([stacked(of_array) for of_array in data], *positions)
    return lambda: np.asarray(result)


def _runs_on_devices(array: Array) -> bool:
    if array.ndim == 0 or array.size == 0 or not _one_word_each(array.dtype):
        return False
    return isinstance(array, jax.Array) and is_on_device(array.sharding)


def _start_on_host(part: np.ndarray, first: tuple[int, ...], shape: tuple[int, ...]) -> Callable[[], Sums]:
    """Start to sum a part of an array, in host memory.

    Args:
        part: the part.
        first: the index of its first element in the whole array, along each axis.
        shape: the shape of the whole array.
    """
    words = _words(part)
    if words.size == 0:
        return lambda: total([])
    # As a grid of rows and columns. Axes that only count words within an element are never divided between parts.
    added = words.shape[len(shape) :]
    first, shape = (*first, *(0 for _ in added)), (*shape, *added)
    split = _split(shape)
    grid = words.reshape(math.prod(words.shape[:split]), -1)
    weights = _column_weights(first[split:], shape[split:], words.shape[split:]).reshape(len(_ROW_SEEDS), -1)
    if words.shape[1:split] != shape[1:split]:  # the indices of its rows have gaps
        rows = _indices(first[:split], shape[:split], words.shape[:split]).reshape(-1)
        found = _grid_sums(grid, rows, weights)  # computed now, so that the result does not keep the array alive
        return lambda: found
    # Whole blocks by a program, the rest by numpy.
    first_row = _flat(first[:split], shape[:split])
    height = _BLOCK_WORDS // grid.shape[1]
    in_blocks = len(grid) // height * height
    results = []
    if in_blocks:
        mesh = local_mesh((_computing_device(),))
        with own_context():
            table, stride = jax.device_put((weights[None], np.ones(1, np.uint64)), mesh.devices.flat[0])
            for start in range(0, in_blocks, height):
                block = jax.device_put(grid[start : start + height], mesh.devices.flat[0])
                row = np.array([first_row + start], np.uint64)
                results.append(_sums_by_shard(mesh)([block], table, row, stride))
    rest = _grid_sums(grid[in_blocks:], first_row + np.arange(in_blocks, len(grid), dtype=np.uint64), weights)
    return lambda: total([rest, *(np.asarray(result)[0, 0] for result in results)])


@functools.cache
def _computing_device() -> jax.Device:
    try:
        device: jax.Device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS excludes the CPU
        device = jax.local_devices()[0]
    return device


def _split(shape: tuple[int, ...]) -> int:
    """The first of the axes that count columns. It is never axis 0, so that there is an axis of rows."""
    split, columns = len(shape), 1
    while split > 1 and columns < _LEAST_COLUMNS and columns * shape[split - 1] <= _MOST_COLUMNS:
        split -= 1
        columns *= shape[split]
    return split


def _flat(index: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """The row-major index of an element."""
    return sum(along_axis * int(stride) for along_axis, stride in zip(index, _strides(shape), strict=True))


def _strides(shape: tuple[int, ...]) -> np.ndarray:
    """The row-major strides of a shape, in elements."""
    return np.array([math.prod(shape[axis + 1 :]) for axis in range(len(shape))], np.uint64)


def _one_word_each(dtype: np.dtype) -> bool:
    """Is each element one word, whose bits a device program can read? XLA has no bit casts of complex numbers."""
    return dtype.itemsize in _UNSIGNED and dtype.kind != "c"


# On devices.


@functools.cache
def _sums_by_shard(mesh: Mesh) -> Callable[..., jax.Array]:
    """The program `([stacked shards of an array, ...], weights of columns, first row of each shard, strides of rows) ->
    uint64[shards, arrays, 2]`. Its devices do not communicate."""
    parts = PartitionSpec(AXIS)
    return jax.jit(
        jax.shard_map(_shard_sums, mesh=mesh, in_specs=(parts, parts, parts, PartitionSpec()), out_specs=parts)
    )


def _shard_sums(parts: Sequence[jax.Array], weights: jax.Array, first: jax.Array, strides: jax.Array) -> jax.Array:
    return jnp.stack([_sums_of(part, weights, first, strides) for part in parts])[None]


def _sums_of(shard: jax.Array, weights: jax.Array, first: jax.Array, strides: jax.Array) -> jax.Array:
    word = _UNSIGNED[shard.dtype.itemsize]
    bits = shard.astype(word) if shard.dtype == np.bool_ else lax.bitcast_convert_type(shard, word)
    bits = bits.astype(np.uint64)
    split = len(strides)
    columns = tuple(range(split, shard.ndim))
    weights = weights[0].astype(np.uint64)
    # One reduction gives both sums, so that the array is read once. Both factors of each product have 32 bits, so the
    # compiler needs no multiplication of 64 by 64 bits.
    in_rows = _both_sums([bits * lax.broadcast_in_dim(lane, shard.shape, columns) for lane in weights], columns)
    index = first[0]
    for axis in range(split):
        index = index + lax.broadcasted_iota(np.uint64, shard.shape[:split], axis) * strides[axis]
    weighted = [lane * _row_weights(index, seed) for lane, seed in zip(in_rows, _ROW_SEEDS, strict=True)]
    return jnp.stack(_both_sums(weighted, tuple(range(split))))


def _both_sums(terms: Sequence[jax.Array], axes: tuple[int, ...]) -> Sequence[jax.Array]:
    if not axes:
        return terms
    sums: Sequence[jax.Array] = lax.reduce(tuple(terms), (np.uint64(0), np.uint64(0)), _add_both, axes)
    return sums


def _add_both(left: tuple[jax.Array, ...], right: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(first + second for first, second in zip(left, right, strict=True))


@functools.lru_cache(maxsize=64)
def _positions(
    mesh: Mesh, shape: tuple[int, ...], local: tuple[int, ...], firsts: tuple[tuple[int, ...], ...]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The arguments of `_sums_by_shard` that follow from where the shards lie in an array, on their devices.

    Cached, because to make them takes as long as a sum. The weights of columns are among them: computed within the
    program, XLA would hash them again for every row.

    Args:
        mesh: the devices of the shards.
        shape: the shape of the whole array.
        local: the shape of one shard.
        firsts: for each shard, the index of its first element in the whole array.
    """
    split = _split(shape)
    tables = np.stack([_column_weights(first[split:], shape[split:], local[split:]) for first in firsts])
    rows = np.array([_flat(first[:split], shape[:split]) for first in firsts], np.uint64)
    parts = NamedSharding(mesh, PartitionSpec(AXIS))
    with own_context():
        table, first_rows = jax.device_put((tables, rows), parts)
        return table, first_rows, jax.device_put(_strides(shape[:split]), NamedSharding(mesh, PartitionSpec()))


# Weights.


def _hash(index: Any, seed: int) -> Any:
    """splitmix64 of a `uint64` array, of jax or numpy."""
    number = np.uint64
    mixed = index * number(_GAMMA) + number(seed)
    mixed = (mixed ^ (mixed >> number(30))) * number(_MIX_1)
    mixed = (mixed ^ (mixed >> number(27))) * number(_MIX_2)
    return mixed ^ (mixed >> number(31))


def _row_weights(index: Any, seed: int) -> Any:
    """The odd `uint64` weights of rows, by their indices: a `uint64` array of jax or numpy."""
    return _hash(index, seed) | np.uint64(1)


@functools.lru_cache(maxsize=64)
def _column_weights(first: tuple[int, ...], shape: tuple[int, ...], local: tuple[int, ...]) -> np.ndarray:
    """The weights of a part of the columns, as `uint32[2, *local]`. `first` is the index of its first column."""
    hashed = _hash(_indices(first, shape, local).reshape(-1), _COLUMN_SEED).reshape(local)
    return np.stack([hashed >> np.uint64(32), hashed & np.uint64(0xFFFFFFFF)]).astype(np.uint32) | np.uint32(1)


def _indices(first: tuple[int, ...], shape: tuple[int, ...], local: tuple[int, ...]) -> np.ndarray:
    """The row-major indices in the whole array, as `uint64[local]`, of a part that begins at `first`."""
    index: np.ndarray = np.full(local, _flat(first, shape), np.uint64)
    for axis, stride in enumerate(_strides(shape)):
        steps = np.arange(local[axis], dtype=np.uint64) * stride
        index = index + steps.reshape([-1 if other == axis else 1 for other in range(len(local))])
    return index


# On the host.


def _words(array: np.ndarray) -> np.ndarray:
    """All words of a numpy array; those of larger elements along an axis of their own. At least one axis."""
    array = np.ascontiguousarray(array)
    if array.dtype.itemsize in _UNSIGNED:
        return array.view(_UNSIGNED[array.dtype.itemsize])
    return array.reshape(*array.shape, 1).view(np.uint32)


def _grid_sums(grid: np.ndarray, rows: np.ndarray, weights: np.ndarray) -> Sums:
    """The sums of rows of words, given the indices of the rows."""
    parts: list[Sums] = []
    height = max(1, _CACHED_WORDS // grid.shape[1])
    for start in range(0, len(grid), height):
        piece, index = grid[start : start + height].astype(np.uint64), rows[start : start + height]
        in_rows = [np.einsum("rc,c->r", piece, lane.astype(np.uint64)) for lane in weights]
        weighted = [lane * _row_weights(index, seed) for lane, seed in zip(in_rows, _ROW_SEEDS, strict=True)]
        parts.append(np.array([np.sum(lane, dtype=np.uint64) for lane in weighted]))
    return total(parts)
