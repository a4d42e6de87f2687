"""What is in several items at once: found when they are captured, and still one object after a restore.

One tensor, numpy array or mutable container in several items is stored in each of them, so that each can be read
alone. The items but the first say in the manifest what it is there (`Shared`). A restore gives them the live object of
the first. What was not shared gets memory of its own, also where the program starts with one object for both.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from torchorbax._src.format.manifest import ItemMeta
from torchorbax._src.tensors import torchax_tensors

_ORDER = ("module", "torch.optim", "optax", "pytree", "object", "rng")
"""Kinds of items: those that hold on to their tensors come before those whose entries can be replaced."""


def in_order(kinds: Mapping[str, Any]) -> list[str]:
    """The names of items in the order in which they are restored, whatever the order in which the program gives them.

    Modules come first, before all the model, which sharding rules are for.

    Args:
        kinds: something with a `kind`, by name.
    """
    return sorted(kinds, key=lambda name: (_ORDER.index(kinds[name].kind), name.partition(".")[0] != "model", name))


def address_of(value: Any) -> int:
    """Equal for what is the same object or begins at the same place of host memory."""
    kind = type(value)
    if kind is torch.Tensor or kind is torch.nn.Parameter:
        return (value.data_ptr() if value.layout is torch.strided else 0) or id(value)
    if kind is np.ndarray:
        return value.ctypes.data if value.size else id(value)
    return id(torchax_tensors.undetached(value))


def view_of(value: Any) -> Any:
    """Equal for the same mutable object, and for tensors or arrays that are the same view of the same memory."""
    if torchax_tensors.is_torchax(value):
        return id(torchax_tensors.undetached(value))
    if isinstance(value, torch.Tensor) and _is_in_memory(value):
        return value.data_ptr(), value.shape, value.stride(), value.dtype
    if type(value) is np.ndarray and value.size:
        return value.ctypes.data, value.shape, value.strides, value.dtype
    return id(value)


def _is_in_memory(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.layout is torch.strided and tensor.numel() > 0


class Restoring:
    """What the items of one restore have become so far, and the memory that has been written."""

    def __init__(self) -> None:
        self._became: dict[tuple[str, str | int], Any] = {}
        self._ids: dict[int, Any] = {}  # containers, and tensors on jax
        self._starts: list[int] = []  # of the memory, in ascending order and apart from each other
        self._ends: list[int] = []

    def given(self, saved: ItemMeta) -> dict[str | int, Any]:
        """What an item shares with those before it: the live objects, by its own names and numbers."""
        found = {}
        for one in saved.shared or ():
            if (one.item, one.there) in self._became:
                live = self._became[one.item, one.there]
                found[one.here] = _detached(live) if one.detached else live
        return found

    def is_free(self, live: Any) -> bool:
        """Has no item before this one a value in this object or its memory?"""
        if (bounds := _bounds(live)) is None:
            return id(_root(live)) not in self._ids
        after = bisect.bisect_right(self._starts, bounds[0])
        overlaps_before = after > 0 and self._ends[after - 1] > bounds[0]
        overlaps_after = after < len(self._starts) and self._starts[after] < bounds[1]
        return not (overlaps_before or overlaps_after)

    def finish(self, item: str, became: Mapping[str | int, Any]) -> None:
        """Take note of what became of the saved objects of an item, all of which have been written."""
        self._became |= {(item, key): live for key, live in became.items()}
        bounds = [*zip(self._starts, self._ends, strict=True)]
        for live in became.values():
            if (one := _bounds(live)) is None:
                self._ids[id(_root(live))] = live
            else:
                bounds.append(one)
        self._starts, self._ends = _merged(bounds)


def leaves_among(given: Mapping[str | int, Any]) -> dict[str, Any]:
    """The leaves among what is given, by name."""
    return {key: live for key, live in given.items() if isinstance(key, str)}


def containers_among(given: Mapping[str | int, Any]) -> dict[int, Any]:
    """The mutable containers, by number."""
    return {key: live for key, live in given.items() if isinstance(key, int)}


def is_same_view(one: Any, other: Any) -> bool:
    """Are these two objects of one type that are the same view of the same memory?"""
    return type(one) is type(other) and bool(view_of(one) == view_of(other))


def _detached(live: Any) -> Any:
    """Another object for the same memory."""
    return live.detach() if isinstance(live, torch.Tensor) else live.view() if type(live) is np.ndarray else live


def _root(live: Any) -> Any:
    """The tensor that a view or a detached tensor is of; any other object itself."""
    while isinstance(live, torchax_tensors.View):
        live = live.parent
    return torchax_tensors.undetached(live) if torchax_tensors.is_torchax(live) else live


def _bounds(live: Any) -> tuple[int, int] | None:
    """The first address of a tensor's or array's host memory, and that after its last; None if it has none."""
    if isinstance(live, np.ndarray) and live.size:
        first, last = np.lib.array_utils.byte_bounds(live)
        return int(first), int(last)
    if not isinstance(live, torch.Tensor) or torchax_tensors.is_torchax(live) or not _is_in_memory(live):
        return None
    span = sum((size - 1) * step for size, step in zip(live.shape, live.stride(), strict=True))
    return live.data_ptr(), live.data_ptr() + (span + 1) * live.element_size()


def _merged(bounds: Iterable[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """The same memory as ranges that are apart from each other."""
    starts: list[int] = []
    ends: list[int] = []
    for start, end in sorted(bounds):
        if ends and start < ends[-1]:
            ends[-1] = max(ends[-1], end)
        else:
            starts.append(start)
            ends.append(end)
    return starts, ends
