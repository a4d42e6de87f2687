"""Trees of arrays and plain values."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, ClassVar

import jax
import numpy as np
import torch

from torchorbax._src.arrays.leaves import ARRAY_TYPES, Array, is_key, leaf_name, place_like, without_key_type
from torchorbax._src.arrays.sharding_rules import ShardingRules
from torchorbax._src.format.manifest import ItemMeta, LeafMeta
from torchorbax._src.format.values import add_leaf, decode, encode
from torchorbax._src.state.compare import compare_leaves, compare_values
from torchorbax._src.state.item import Captured, ItemPlan
from torchorbax._src.state.live_leaves import array_meta, target_beside
from torchorbax._src.state.request import Request, selected
from torchorbax._src.tensors.live import array_in, settle
from torchorbax.errors import MismatchError


class PytreeItem:
    """A tree of containers with tensors, arrays and plain values, living in `slot[key]`.

    Tensors, numpy arrays and mutable containers are written in place; what is immutable is replaced, up to the slot
    itself.
    """

    kind: ClassVar[str] = "pytree"

    def __init__(self, name: str, slot: Any, key: Any) -> None:
        self._name = name
        self._slot = slot
        self._key = key
        # Kept, for to make them up takes microseconds a leaf: the names of the leaves of a structure, and what
        # `Captured.values` says of leaves with some names if all of them are arrays on devices.
        self._structure: Any = None
        self._names: list[str] = []
        self._values: dict[str, Any] = {}

    def _flatten(self, tree: Any) -> tuple[dict[str, Any], Any]:
        leaves, structure = jax.tree_util.tree_flatten(tree, is_leaf=_is_value)
        if not self._is_known(structure):
            named: dict[str, Any] = {}
            for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_value)[0]:
                add_leaf(leaf_name(path), leaf, named)
            self._structure, self._names = structure, list(named)
        return dict(zip(self._names, leaves, strict=True)), structure

    def _is_known(self, structure: Any) -> bool:
        try:
            return bool(structure == self._structure)
        except Exception:  # it compares what nodes of others are registered with: perhaps numpy arrays
            return False

    def capture(self, handed: Any = None) -> Captured:
        live, _ = self._flatten(self._slot[self._key])
        if handed is None:
            return self._captured(live)
        named, _ = self._flatten(handed)
        given = self._captured(named)
        if live.keys() == named.keys() and all(map(_are_alike, live.values(), named.values())):
            return given  # as always, so what follows need not be fast
        captured = self._captured(live)
        problems = compare_leaves(self._name, _metas(captured), _metas(given))
        problems += compare_values(
            self._name, captured.values.keys() - captured.leaves.keys(), given.values.keys() - given.leaves.keys()
        )
        if problems:  # or it could not be restored
            raise MismatchError("the state handed to save", problems)
        return given

    def _captured(self, named: Mapping[str, Any]) -> Captured:
        one_of_each_type = {type(leaf): leaf for leaf in named.values()}.values()
        if all(isinstance(leaf, jax.Array) and not is_key(leaf) for leaf in one_of_each_type):
            if self._values.keys() != named.keys():
                self._values = {name: encode(leaf, {}, lambda path: path[0], (name,)) for name, leaf in named.items()}
            return Captured(self.kind, named, values=self._values)
        leaves: dict[str, Any] = {}
        values = {
            name: encode(without_key_type(leaf), leaves, lambda path: path[0], (name,)) for name, leaf in named.items()
        }
        return Captured(self.kind, leaves, values=values)

    def plan(self, saved: ItemMeta, rules: ShardingRules | None, request: Request) -> ItemPlan:
        captured = self.capture()
        values = {name: name for name in captured.values if request.selects(self._name, name)}
        live = {name: array_meta(captured.leaves[name]) for name in values if name in captured.leaves}
        stored_values = selected(self._name, {name: name for name in saved.values}, request)
        stored = {name: leaf for name, leaf in stored_values.items() if leaf in saved.leaves}
        found = {name: saved.leaves[leaf] for name, leaf in stored.items()}
        plan = ItemPlan(problems=compare_leaves(self._name, live, found, cast=request.cast))
        plan.problems += compare_values(
            self._name,
            [name for name in values if name not in live and name not in stored],
            [name for name in stored_values if name not in stored and name not in live],
        )
        if plan.problems and request.strict:
            return plan
        plan.match(live, stored, saved)
        plain = [name for name in values if name in stored_values and name not in live and name not in stored]
        plan.values = {name: stored_values[name] for name in (*plan.sources, *plain)}
        plan.targets = {
            leaf: target_beside(captured.leaves[name], saved.leaves[leaf]) for name, leaf in plan.sources.items()
        }
        return plan

    def apply(self, saved: ItemMeta, plan: ItemPlan, arrays: Mapping[str, Array], undo: ExitStack) -> None:
        live = self._slot[self._key]
        named, structure = self._flatten(live)
        new = [
            self._restored(leaf, decode(saved.values[plan.values[name]], arrays), undo) if name in plan.values else leaf
            for name, leaf in named.items()
        ]
        merged = _merged(live, jax.tree.unflatten(structure, new), undo)
        if merged is not live:  # a tuple cannot hold another value, and need not
            undo.callback(self._slot.__setitem__, self._key, live)
            self._slot[self._key] = merged

    @staticmethod
    def _restored(live: Any, value: Any, undo: ExitStack) -> Any:
        if isinstance(live, torch.Tensor):
            settle(live, array_in(value), undo)
            return live
        if is_key(live):
            return jax.random.wrap_key_data(value, impl=jax.random.key_impl(live))
        if isinstance(live, list) and isinstance(value, list):
            undo.callback(_refill, live, live.copy())
            live[:] = value
            return live
        if isinstance(live, np.ndarray) and live.flags.writeable:
            undo.callback(np.copyto, live, live.copy())
            np.copyto(live, value)
            return live
        return place_like(value, live) if isinstance(live, jax.Array) else value


def _is_value(node: Any) -> bool:
    """Is this a value as a whole? None may have become something else since the last start, and a list of plain values,
    such as the losses so far, longer."""
    return node is None or (type(node) is list and all(_is_plain(one) for one in node))


def _is_plain(value: Any) -> bool:
    if type(value) in (list, tuple):
        return all(_is_plain(one) for one in value)
    return value is None or isinstance(value, bool | int | float | complex | str | bytes)


def _are_alike(leaf: Any, other: Any) -> bool:
    if type(leaf) is not type(other):
        return False
    if isinstance(leaf, ARRAY_TYPES):
        return bool(leaf.shape == other.shape and leaf.dtype == other.dtype)
    return _is_plain(leaf)  # a set may have arrays in it


def _metas(captured: Captured) -> dict[str, LeafMeta]:
    return {name: array_meta(leaf) for name, leaf in captured.leaves.items()}


def _merged(live: Any, new: Any, undo: ExitStack) -> Any:
    """`new`, but with the mutable containers of `live` kept and filled."""
    if isinstance(live, dict | list):
        undo.callback(_refill, live, live.copy())
        keys = list(live) if isinstance(live, dict) else range(len(live))
        for key in keys:
            live[key] = _merged(live[key], new[key], undo)
        return live
    return new


def _refill(container: Any, content: Any) -> None:
    if isinstance(container, dict):
        container.update(content)
    else:
        container[:] = content
