"""Fingerprints of arrays that do not depend on how they are laid out over devices.

An array is read as a sequence of words in row-major order: elements of 1, 2 or 4 bytes are a word each, larger ones
several words of 4 bytes. With `b_i` the bits of word `i`, a fingerprint is the two sums

    s_k = sum_i b_i * w_k(i)  mod 2**64,    w_k(i) = splitmix64(i, seed_k) | 1,    k = 0, 1.

A sum over parts of an array is the sum of the parts, whatever the parts are, so every shard is summed where it is, from
its words' indices in the whole array, and no device talks to another.

**Any change within one word is found with certainty**, a flipped bit among them: it adds `d * w` with `0 < |d| < 2**32`
and an odd `w`, which is never 0 modulo 2**64.

**Any other change is found with a probability of at least 1 - 2**-64**, with the weights taken as independent random
odd numbers. Proof: let `2**v`, `v <= 31`, be the highest power of two that divides all the differences `d_i`, and `d_j`
one that `2**(v+1)` does not divide. Whatever the other weights are, `sum_i d_i w_k(i) = 0` then fixes `w_k(j)` modulo
`2**(64 - v)`, that is at least 32 of its 63 random bits, and does so for both `k`. (The bound is reached by differences
in the top bits of words only, such as flipped signs; 2**-126 is usual. Sums modulo 2**32 would always miss two flipped
signs.) The weights are no secret, so this is no defence against somebody who wants to forge an array.

splitmix64: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from torchorbax.adapter import Array

Key = TypeVar("Key", bound=Hashable)
Sums = np.ndarray
"""`uint64[2]`: `s_0` and `s_1` of an array, or of a part of it."""

_SEEDS = (0x243F6A8885A308D3, 0x13198A2E03707344)  # the first digits of pi's fraction
_GAMMA, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}
_BLOCK_WORDS = 1 << 20
_CACHED_WORDS = 1 << 15
_SMALL_BYTES = 64 << 10
_AXIS = "shard"


def fingerprints(arrays: Mapping[Key, Array]) -> dict[Key, str]:
    """The fingerprints of arrays, 32 hexadecimal digits each.

    Args:
        arrays: jax or numpy arrays of any dtype and shape. Large jax arrays are summed on their devices, each distinct
            part once; all of it is dispatched before any result is waited for.
    """
    started = {key: start(array) for key, array in arrays.items()}
    return {key: text(finish()) for key, finish in started.items()}


def text(sums: Sums) -> str:
    """The fingerprint of an array with these sums."""
    return "".join(f"{int(lane):016x}" for lane in sums)


def sums(fingerprint: str) -> Sums:
    """The reverse of `text`."""
    return np.array([int(fingerprint[start : start + 16], 16) for start in (0, 16)], np.uint64)


def total(parts: Any) -> Sums:
    """The sums of an array, from those of its parts."""
    added: Sums = np.asarray(parts, np.uint64).reshape(-1, len(_SEEDS)).sum(axis=0, dtype=np.uint64)
    return added


def start(array: Array) -> Callable[[], Sums]:
    """Start to sum what this process has of an array (of replicas the first only), and return how to wait for it."""
    if isinstance(array, np.ndarray):
        return _start_on_host(array)
    if array.nbytes <= _SMALL_BYTES and array.is_fully_addressable:  # to start a program costs more than to sum it here
        if array.platform() != "cpu":
            array.copy_to_host_async()
        return lambda: _start_on_host(np.asarray(array))()
    rows = _start_shards(array, [shard for shard in array.addressable_shards if shard.replica_id == 0])
    return lambda: total(rows())


def start_parts(array: jax.Array) -> Callable[[], dict[int, Sums]]:
    """Start to sum every part of an array that this process has, replicas included, and return how to wait for it: the
    sums by the index that the part's first element has in the array."""
    parts = {_first_index(shard.index, array.shape): shard for shard in array.addressable_shards}
    rows = _start_shards(array, list(parts.values()))
    return lambda: dict(zip(parts, rows(), strict=True))


def _start_shards(array: Array, shards: Sequence[Any]) -> Callable[[], np.ndarray]:
    """The same of some shards; gives `uint64[shards, 2]`."""
    strides = np.array([int(np.prod(array.shape[axis + 1 :])) for axis in range(array.ndim)], np.uint64)
    starts = [_first_index(shard.index, array.shape) for shard in shards]
    on_host = bool(shards) and isinstance(shards[0].data, np.ndarray)
    if not shards or array.ndim == 0 or array.size == 0 or not _one_word_each(array.dtype) or on_host:
        parts = [
            _host_sums(np.asarray(shard.data), start, strides) for shard, start in zip(shards, starts, strict=True)
        ]
        return lambda: np.asarray(parts, np.uint64).reshape(-1, len(_SEEDS))
    mesh = Mesh(np.array([shard.device for shard in shards]), (_AXIS,))
    rows = NamedSharding(mesh, PartitionSpec(_AXIS))
    local = shards[0].data.shape
    stacked = jax.make_array_from_single_device_arrays(
        (len(shards) * local[0], *local[1:]), rows, [shard.data for shard in shards]
    )
    with jax.enable_x64(True):  # of this thread only
        result = _sums_by_shard(mesh)(stacked, np.array(starts, np.uint64), strides)
    return lambda: np.asarray(result)


def _start_on_host(array: np.ndarray) -> Callable[[], Sums]:
    flat = _words(array)
    blocks = len(flat) // _BLOCK_WORDS
    results = []
    if blocks:
        mesh = Mesh(np.array([_computing_device()]), (_AXIS,))
        with jax.enable_x64(True):
            for start in range(0, blocks * _BLOCK_WORDS, _BLOCK_WORDS):
                block = jax.device_put(flat[start : start + _BLOCK_WORDS], mesh.devices.flat[0])
                results.append(_sums_by_shard(mesh)(block, np.array([start], np.uint64), np.ones(1, np.uint64)))
    rest = _word_sums(flat[blocks * _BLOCK_WORDS :], blocks * _BLOCK_WORDS)
    return lambda: total([rest, *(np.asarray(result)[0] for result in results)])


@functools.cache
def _computing_device() -> jax.Device:
    try:
        device: jax.Device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        device = jax.local_devices()[0]
    return device


def _first_index(index: tuple[slice, ...], shape: tuple[int, ...]) -> int:
    """The row-major index, in the whole array, of the first element of a part."""
    starts = [part.indices(size)[0] for part, size in zip(index, shape, strict=True)]
    return int(np.ravel_multi_index(starts, shape)) if 0 not in shape and shape else 0


def _one_word_each(dtype: np.dtype) -> bool:
    """Are the elements words that a device can see the bits of? XLA has no bit casts of complex numbers."""
    return dtype.itemsize in _UNSIGNED and dtype.kind != "c"


# --------------------------------------------------------------------------------------------------------- on devices


@functools.cache
def _sums_by_shard(mesh: Mesh) -> Callable[..., jax.Array]:
    """`(stacked shards, first index of each, strides of the whole array) -> uint64[shards, 2]`; no communication."""
    parts = PartitionSpec(_AXIS)
    return jax.jit(jax.shard_map(_shard_sums, mesh=mesh, in_specs=(parts, parts, PartitionSpec()), out_specs=parts))


def _shard_sums(shard: jax.Array, first: jax.Array, strides: jax.Array) -> jax.Array:
    word = _UNSIGNED[shard.dtype.itemsize]
    bits = shard.astype(word) if shard.dtype == np.bool_ else lax.bitcast_convert_type(shard, word)
    bits = bits.astype(np.uint64)
    index = first[0]
    for axis in range(shard.ndim):
        index = index + lax.broadcasted_iota(np.uint64, shard.shape, axis) * strides[axis]
    terms = tuple(bits * _weight(index, seed) for seed in _SEEDS)
    zeros = tuple(np.zeros((), np.uint64) for _ in _SEEDS)
    # One reduction of both sums reads the array once, which is what this costs.
    return jnp.stack(lax.reduce(terms, zeros, _add_both, tuple(range(shard.ndim))))[None]


def _add_both(left: tuple[jax.Array, ...], right: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(one + other for one, other in zip(left, right, strict=True))


def _weight(index: Any, seed: int) -> Any:
    """The odd weight of a word; of a `uint64` array by jax or numpy."""
    number = np.uint64
    mixed = index * number(_GAMMA) + number(seed)
    mixed = (mixed ^ (mixed >> number(30))) * number(_MIX_1)
    mixed = (mixed ^ (mixed >> number(27))) * number(_MIX_2)
    return (mixed ^ (mixed >> number(31))) | number(1)


# --------------------------------------------------------------------------------------------------------- on the host


def _words(array: np.ndarray) -> np.ndarray:
    """All words of a numpy array, in order."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(_UNSIGNED.get(flat.dtype.itemsize, np.uint32))


def _host_sums(part: np.ndarray, first: int, strides: np.ndarray) -> Sums:
    """The sums of a part of an array, given the index of its first element and the strides, in elements."""
    if part.size == 0:
        return np.zeros(len(_SEEDS), np.uint64)
    index: np.ndarray = np.full(part.shape, first, np.uint64)
    for axis, stride in enumerate(strides):
        steps = np.arange(part.shape[axis], dtype=np.uint64) * stride
        index = index + steps.reshape([-1 if other == axis else 1 for other in range(part.ndim)])
    words = _words(part).reshape(part.size, -1)
    per_element = words.shape[1]
    index = index.reshape(-1, 1) * np.uint64(per_element) + np.arange(per_element, dtype=np.uint64)
    return total([np.sum(words * _weight(index, seed), dtype=np.uint64) for seed in _SEEDS])


def _word_sums(words: np.ndarray, first: int) -> Sums:
    """The sums of consecutive words, in pieces that stay in the processor's cache."""
    parts: list[Sums] = []
    for start in range(0, len(words), _CACHED_WORDS):
        piece = words[start : start + _CACHED_WORDS].astype(np.uint64)
        index = np.arange(first + start, first + start + len(piece), dtype=np.uint64)
        parts.append(total([np.sum(piece * _weight(index, seed), dtype=np.uint64) for seed in _SEEDS]))
    return total(parts)
