"""The arrays of many live tensors, read and set together.

A model has hundreds of tensors, and a training step reads and sets them all. Loops that run in C make that a small part
of what the dispatch of the program costs.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from itertools import repeat
from typing import Any

import jax
import torch
from jax.sharding import Sharding

from torchorbax._src.tensors import torchax_tensors

REQUIRES_GRAD = operator.attrgetter("requires_grad")
_ARRAY = operator.attrgetter("_elem")
_SHARDING = operator.attrgetter("sharding")


def all_same(some: Iterable[Any], others: Iterable[Any]) -> bool:
    """Are these the same objects, one by one? What the longer of the two has at its end is not looked at."""
    return all(map(operator.is_, some, others))


class LiveArrays:
    """The arrays of live torchax tensors, in order."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._tensors = list(tensors)
        self._has_views = any(isinstance(tensor, torchax_tensors.View) for tensor in self._tensors)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def get(self) -> list[jax.Array]:
        """What the tensors hold now."""
        return list(map(torchax_tensors.array_of if self._has_views else _ARRAY, self._tensors))

    def set(self, arrays: Iterable[jax.Array]) -> None:
        """Put an array into each tensor; checks nothing, as `torchax_tensors.set_array`."""
        if self._has_views:
            for tensor, array in zip(self._tensors, arrays, strict=True):
                torchax_tensors.set_array(tensor, array)
        else:
            deque(map(setattr, self._tensors, repeat("_elem"), arrays), maxlen=0)


class Layout:
    """The shardings of live tensors by name, which stay the same objects while they are equal.

    Attributes:
        names: the names of the tensors.
        shardings: their shardings by name.
        values: the same as a tuple, hashable.
    """

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()
        self.shardings: dict[str, Sharding] = {}
        self.values: tuple[Sharding, ...] = ()
        self._of: Mapping[str, torch.Tensor] | None = None
        self._live = LiveArrays(())
        self._seen: list[Sharding] = []

    def update(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Look where the tensors are now."""
        if tensors is not self._of:
            self._of, self._live, self._seen = tensors, LiveArrays(tensors.values()), []
        now = list(map(_SHARDING, self._live.get()))
        if self._seen and all_same(now, self._seen):
            return
        self._seen, values = now, tuple(now)
        if self.names != tuple(tensors) or self.values != values:
            self.names, self.values = tuple(tensors), values
            self.shardings = dict(zip(self.names, values, strict=True))
