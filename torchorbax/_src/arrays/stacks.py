"""Stacks of small arrays: arrays of one layout are copied into one array on the devices, and to the host together.

Starting a program and a transfer for each small array would take longer than copying its data.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

Key = TypeVar("Key", bound=Hashable)
T = TypeVar("T")

Layout = tuple[tuple[int, ...], np.dtype, Sharding]
"""Shape, dtype and sharding of an array. Arrays of one layout can be handled by one program."""

GATHERED_BYTES = 64 << 10
"""The largest array that counts as small: to write it whole is cheaper than to write each of its shards."""
AT_ONCE = (256, 64, 16, 4, 1)
"""The numbers of arrays for which programs are compiled. A program for all arrays would take seconds to compile (2.8 s
for 2,000, the first time), and a program for each array would take milliseconds to start."""


def by_layout(arrays: Mapping[Key, jax.Array]) -> dict[Layout, dict[Key, jax.Array]]:
    """The arrays, grouped by layout."""
    groups: dict[Layout, dict[Key, jax.Array]] = {}
    for key, array in arrays.items():
        groups.setdefault((array.shape, array.dtype, array.sharding), {})[key] = array
    return groups


def in_programs(arrays: Sequence[T]) -> Iterator[Sequence[T]]:
    """Arrays of one layout, cut into pieces of the numbers in `AT_ONCE`."""
    start = 0
    while start < len(arrays):
        size = next(size for size in AT_ONCE if size <= len(arrays) - start)
        yield arrays[start : start + size]
        start += size


def can_be_stacked(layout: Layout) -> bool:
    """Are arrays of this layout small, all in this process, and of a dtype whose bits XLA can cast (not complex)?"""
    shape, dtype, sharding = layout
    nbytes = math.prod(shape) * dtype.itemsize
    return 0 < nbytes <= GATHERED_BYTES and dtype.kind != "c" and sharding.is_fully_addressable


class Stack:
    """Arrays of one layout, copied into one array along a new first axis. The copy is dispatched and not waited for."""

    def __init__(self, arrays: Sequence[jax.Array]) -> None:
        self._dtype = arrays[0].dtype
        self._stacked: jax.Array | None = run(_program(arrays[0].sharding), arrays)

    @cached_property
    def rows(self) -> np.ndarray:
        """The arrays in host memory, in order. Waits for the copy, and frees its memory on the devices."""
        rows: np.ndarray = np.asarray(self._stacked).view(self._dtype)
        self._stacked = None
        return rows


@dataclass(eq=False, slots=True)
class Row:
    """One of the arrays in a stack. It has a host array's attributes, and `numpy.asarray` makes one of it.

    Attributes:
        stack: the stack that it is in.
        index: its index in the stack.
        shape: the shape of this array.
        dtype: the dtype of this array.
    """

    stack: Stack
    index: int
    shape: tuple[int, ...]
    dtype: np.dtype
    is_fully_addressable: ClassVar[bool] = True

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes of the array."""
        return self.size * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The array in host memory."""
        return np.asarray(self.stack.rows[self.index], dtype, copy=copy)


def stack(arrays: Mapping[Key, jax.Array]) -> Iterator[tuple[Key, Row]]:
    """Small arrays of one layout, as rows of stacks."""
    for keys in in_programs(list(arrays)):
        first = arrays[keys[0]]
        stacked = Stack([arrays[key] for key in keys])
        for index, key in enumerate(keys):
            yield key, Row(stacked, index, first.shape, first.dtype)


def compile_stack(like: jax.ShapeDtypeStruct, size: int) -> None:
    """Compile the program that stacks `size` arrays like this one."""
    compile_ahead(_program(like.sharding), like, size)


_ahead: dict[tuple[Any, Layout, int], Any] = {}
"""Compiled programs, by jitted function, layout and number of arrays. They are kept here because a jitted function
would trace again when it is first called."""


def compile_ahead(function: Any, like: jax.ShapeDtypeStruct, size: int) -> None:
    """Compile a jitted function for a list of `size` arrays like this one, so that its first `run` need not."""
    _ahead[function, (like.shape, like.dtype, like.sharding), size] = function.lower([like] * size).compile()


def run(function: Any, arrays: Sequence[jax.Array]) -> Any:
    """Call a jitted function with a list of arrays of one layout; by the program compiled ahead, if there is one."""
    first = arrays[0]
    if program := _ahead.get((function, (first.shape, first.dtype, first.sharding), len(arrays))):
        try:
            return program(list(arrays))
        except ValueError:  # the program takes one memory layout only; the function takes any, or says what is wrong
            pass
    return function(list(arrays))


@functools.lru_cache(maxsize=64)
def _program(sharding: Sharding) -> Any:
    """The program that stacks arrays of this sharding. Every device stacks its own shards.

    They are stacked as integers: where XLA moves floats of 8 or 16 bits, it turns signalling NaNs into quiet ones.
    """

    def stack(arrays: Sequence[jax.Array]) -> jax.Array:
        if arrays[0].dtype == np.bool_:
            return jnp.stack(arrays)
        word = np.dtype(f"uint{8 * arrays[0].dtype.itemsize}")
        return jnp.stack([jax.lax.bitcast_convert_type(array, word) for array in arrays])

    if not isinstance(sharding, NamedSharding):
        return jax.jit(stack)
    return jax.jit(stack, out_shardings=NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec)))
