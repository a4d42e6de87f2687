"""Small arrays of one shape and layout, taken to the host together: every program and transfer has its price."""

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
"""What arrays alike have in common: shape, dtype and sharding."""

GATHERED_BYTES = 64 << 10
"""Up to here an array is small: one write of all of it is cheaper than one for each of its shards."""
AT_ONCE = (256, 64, 16, 4, 1)
"""So many arrays alike are taken by one program. One for all arrays would take seconds to compile (2.8 s for 2,000, the
first time), and one for each milliseconds to start."""


def alike(arrays: Mapping[Key, jax.Array]) -> dict[Layout, dict[Key, jax.Array]]:
    """Arrays by their layout."""
    groups: dict[Layout, dict[Key, jax.Array]] = {}
    for key, array in arrays.items():
        groups.setdefault((array.shape, array.dtype, array.sharding), {})[key] = array
    return groups


def in_programs(arrays: Sequence[T]) -> Iterator[Sequence[T]]:
    """Arrays alike, cut into as many as one program takes."""
    start = 0
    while start < len(arrays):
        size = next(size for size in AT_ONCE if size <= len(arrays) - start)
        yield arrays[start : start + size]
        start += size


def can_be_stacked(layout: Layout) -> bool:
    """Are they small, all here, and of a dtype whose bits XLA can take? It has no bit casts of complex numbers."""
    shape, dtype, sharding = layout
    nbytes = math.prod(shape) * dtype.itemsize
    return 0 < nbytes <= GATHERED_BYTES and dtype.kind != "c" and sharding.is_fully_addressable


class Stack:
    """Arrays alike, being copied into one along a new axis; dispatched and not waited for."""

    def __init__(self, arrays: Sequence[jax.Array]) -> None:
        self._dtype = arrays[0].dtype
        self._stacked: jax.Array | None = run(_program(arrays[0].sharding), arrays)

    @cached_property
    def rows(self) -> np.ndarray:
        """The arrays in host memory, one after the other; waits for them, and frees those on the devices."""
        rows: np.ndarray = np.asarray(self._stacked).view(self._dtype)
        self._stacked = None
        return rows


@dataclass(eq=False, slots=True)
class Row:
    """One of the arrays in a stack; looks like a host array, and is one for `numpy.asarray`.

    Attributes:
        stack: where it is.
        index: its place there.
        shape: its own.
        dtype: its own.
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
        """Bytes of the array."""
        return self.size * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The array in host memory."""
        return np.asarray(self.stack.rows[self.index], dtype, copy=copy)


def stack(arrays: Mapping[Key, jax.Array]) -> Iterator[tuple[Key, Row]]:
    """Small arrays alike as rows of stacks."""
    for some in in_programs(list(arrays)):
        first = arrays[some[0]]
        together = Stack([arrays[key] for key in some])
        for index, key in enumerate(some):
            yield key, Row(together, index, first.shape, first.dtype)


def compile_stack(one: jax.ShapeDtypeStruct, size: int) -> None:
    """`compile_ahead` what stacks arrays."""
    compile_ahead(_program(one.sharding), one, size)


_ahead: dict[tuple[Any, Layout, int], Any] = {}
"""Programs by jitted function, layout and number of arrays. The function itself would be traced at its first call."""


def compile_ahead(function: Any, one: jax.ShapeDtypeStruct, size: int) -> None:
    """Do for a jitted function of a list what its first `run` with so many arrays like this one would wait for."""
    _ahead[function, (one.shape, one.dtype, one.sharding), size] = function.lower([one] * size).compile()


def run(function: Any, arrays: Sequence[jax.Array]) -> Any:
    """What a jitted function makes of a list of arrays alike."""
    first = arrays[0]
    if program := _ahead.get((function, (first.shape, first.dtype, first.sharding), len(arrays))):
        try:
            return program(list(arrays))
        except ValueError:  # it takes one order of bytes in memory only; the function takes any, and says what is wrong
            pass
    return function(list(arrays))


@functools.lru_cache(maxsize=64)
def _program(sharding: Sharding) -> Any:
    """Arrays of a sharding as one along a new axis; every device stacks what it has.

    As integers: XLA makes quiet NaNs of others where it moves small floats about.
    """

    def stack(arrays: Sequence[jax.Array]) -> jax.Array:
        if arrays[0].dtype == np.bool_:
            return jnp.stack(arrays)
        word = np.dtype(f"uint{8 * arrays[0].dtype.itemsize}")
        return jnp.stack([jax.lax.bitcast_convert_type(array, word) for array in arrays])

    if not isinstance(sharding, NamedSharding):
        return jax.jit(stack)
    return jax.jit(stack, out_shardings=NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec)))
