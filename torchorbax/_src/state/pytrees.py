"""Trees of arrays and plain values, which may grow and change while the program runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import jax

from torchorbax._src.arrays.leaves import Array, is_key
from torchorbax._src.arrays.sharding_rules import ShardingRules
from torchorbax._src.format.manifest import ItemMeta, digest
from torchorbax._src.format.values import Json, LayoutError, Node, StoredLeaf, built, how_built
from torchorbax._src.state.compare import compare_leaves, compare_values
from torchorbax._src.state.item import Captured, ItemPlan, below_item
from torchorbax._src.state.live_leaves import as_typed, on_their_side, target_beside
from torchorbax._src.state.merge import Merge
from torchorbax._src.state.request import Request, selected
from torchorbax._src.state.sharing import Restoring, containers_among, leaves_among
from torchorbax._src.state.trees import (
    are_alike,
    children_of,
    flat,
    is_iterable_leaf,
    meta_of,
    nodes_in,
    outline,
    registered,
    with_leaves,
)
from torchorbax._src.state.values import decode, encode
from torchorbax.errors import MismatchError, UnsupportedLeafError

Path = tuple[str, ...]


class PytreeItem:
    """A tree of containers with tensors, arrays and plain values, living in `slot[key]`.

    A step says what the tree looked like when the program opened the run. A program whose tree looks the same then has
    been built the same, and gets back whatever the tree had become. For any other program the tree on storage must be
    like the live one, name by name.

    Tensors, numpy arrays and mutable containers are written in place; what is immutable is replaced, up to the slot
    itself.

    Raises:
        UnsupportedLeafError: the tree has something that could never be saved.
    """

    kind: ClassVar[str] = "pytree"

    def __init__(self, name: str, slot: Any, key: Any) -> None:
        self._name = name
        self._slot = slot
        self._key = key
        tree = slot[key]
        encode(tree, {}, below_item, (name,), _any_node)  # raises what a save would raise
        self._nodes = dict(nodes_in(tree, (name,)))
        self._at_start = {one: meta_of(leaf) for one, leaf in flat(tree).items()}
        self._outline = digest(outline(tree))
        # Kept, because making them up takes microseconds a leaf: what the last tree of nothing but arrays on devices
        # looked like, and what was made of it.
        self._known: _Known | None = None

    # ------------------------------------------------------------------------------------------------------------ save

    def capture(self, handed: Any = None) -> Captured:
        tree = self._slot[self._key] if handed is None else handed
        structure, arrays, met = _arrays_only(tree)
        if self._known is not None and self._known.is_like(structure, arrays):
            leaves = dict(zip(self._known.names, arrays, strict=True))
            containers = [met[index] for index in self._known.order]
            return Captured(self.kind, leaves, values=self._known.values, containers=containers)
        leaves, containers = {}, []
        values = built(self._outline, encode(tree, leaves, below_item, (self._name,), self._node_of, containers))
        if handed is not None:
            self._check_handed(handed)
        if arrays and len(leaves) == len(arrays):  # else some keys are numpy scalars, which are leaves, too
            names = {id(leaf): name for name, leaf in leaves.items()}
            order = {id(one): index for index, one in enumerate(met)}
            self._known = _Known(
                structure,
                _described(arrays),
                [names[id(leaf)] for leaf in arrays],
                values,
                [order[id(one)] for one in containers],
            )
        return Captured(self.kind, leaves, values=values, containers=containers)

    def _node_of(self, value: Any, path: Path) -> Node | None:
        """A node of a registered type, if one like it was there at the start, of which a restore can make it anew."""
        if (found := registered(value)) is None:
            return None
        structure, children = found
        if path not in self._nodes or not are_alike(structure, self._nodes[path]):
            raise UnsupportedLeafError(
                ".".join(path),
                f"a {type(value).__qualname__} can only be restored where the tree had one when the run was opened, "
                "with the same fixed parts; put one there before, or keep its content in a dict",
            )
        return Node(type(value).__qualname__, children)

    def _check_handed(self, handed: Any) -> None:
        """See that a tree handed to `save` has all that the live one had at the start, in the same shapes and dtypes.

        Raises:
            MismatchError: it has not, so it must be a slip.
        """
        given = {name: meta_of(leaf) for name, leaf in flat(handed).items()}
        parts = [name.split(".") for name in given]
        there = {".".join(one[:count]) for one in parts for count in range(len(one) + 1)}  # what has become a container
        start = {name: meta for name, meta in self._at_start.items() if name not in there or name in given}
        problems = compare_leaves(
            self._name,
            {name: meta for name, meta in start.items() if meta is not None and given.get(name, meta) is not None},
            {name: meta for name, meta in given.items() if meta is not None and start.get(name) is not None},
        )
        problems += compare_values(self._name, [name for name in start if start[name] is None], given)
        if problems := [problem for problem in problems if problem.kind != "unexpected"]:
            raise MismatchError("the state handed to save", problems)

    # --------------------------------------------------------------------------------------------------------- restore

    def plan(self, saved: ItemMeta, rules: ShardingRules | None, request: Request) -> ItemPlan:
        live = flat(self._slot[self._key])
        stored = flat(_tree_of(saved, {name: StoredLeaf(name) for name in saved.leaves}))
        if how_built(saved.values) == self._outline and request.rename is None and request.selects(self._name):
            beside = {leaf.name: live.get(name) for name, leaf in stored.items() if isinstance(leaf, StoredLeaf)}
            # What was in host memory stays there, whatever the program had in its place at the start.
            targets = {
                name: target_beside(beside.get(name), meta) if meta.residence == "jax" else None
                for name, meta in saved.leaves.items()
            }
            return ItemPlan(values={_WHOLE: _WHOLE}, targets=targets)
        return self._plan_by_name(live, stored, saved, request)

    def _plan_by_name(
        self, live: Mapping[str, Any], stored: Mapping[str, Any], saved: ItemMeta, request: Request
    ) -> ItemPlan:
        live = {name: leaf for name, leaf in live.items() if request.selects(self._name, name)}
        old_names = selected(self._name, {name: name for name in stored}, request)
        live_arrays = {name: meta for name, leaf in live.items() if (meta := meta_of(leaf)) is not None}
        leaves = {name: leaf.name for name, old in old_names.items() if isinstance(leaf := stored[old], StoredLeaf)}
        found = {name: saved.leaves[leaf] for name, leaf in leaves.items()}
        plan = ItemPlan(problems=compare_leaves(self._name, live_arrays, found, cast=request.cast))
        values = [name for name in live if name not in live_arrays and name not in leaves]
        stored_values = [name for name in old_names if name not in leaves and name not in live_arrays]
        plan.problems += compare_values(self._name, values, stored_values)
        if plan.problems and request.strict:
            return plan
        plan.match(live_arrays, leaves, saved)
        plan.values = {name: old_names[name] for name in (*plan.sources, *values) if name in old_names}
        plan.targets = {leaf: target_beside(live[name], saved.leaves[leaf]) for name, leaf in plan.sources.items()}
        return plan

    def apply(
        self, saved: ItemMeta, plan: ItemPlan, arrays: Mapping[str, Array], undo: ExitStack, restoring: Restoring
    ) -> None:
        live = self._slot[self._key]
        given = restoring.given(saved)
        loaded = as_typed(saved, on_their_side(saved, arrays)) | leaves_among(given)
        objects: dict[str | int, Any] = {}
        tree = _tree_of(saved, {**dict.fromkeys(saved.leaves), **loaded}, containers_among(given), objects)
        if plan.values != {_WHOLE: _WHOLE}:
            stored = flat(tree)
            tree = with_leaves(live, {name: stored[old] for name, old in plan.values.items()})
        merge = Merge(undo, restoring, given.values(), children_of, self._built, to_jax=True)
        merged = merge.into(live, tree, (self._name,))
        restoring.finish(self._name, merge.became(objects))
        if merged is not live:  # a tuple cannot hold another value, and need not
            undo.callback(self._slot.__setitem__, self._key, live)
            self._slot[self._key] = merged

    def _built(self, path: Path, children: Mapping[str, Any]) -> Any:
        return jax.tree.unflatten(self._nodes[path], list(children.values()))


def _any_node(value: Any, path: Path) -> Node | None:
    found = registered(value)
    return None if found is None else Node(type(value).__qualname__, found[1])


_WHOLE = "*the whole tree*"
"""Stands for the tree among the names of values."""


@dataclass(frozen=True)
class _Known:
    """What has been made of a tree that has nothing but arrays on devices.

    Attributes:
        structure: JAX's.
        described: shape and dtype of each array.
        names: of the leaves, in JAX's order.
        values: `Captured.values`.
        order: for each of `Captured.containers`, which of those that JAX meets it is.
    """

    structure: Any
    described: list[tuple[Any, Any]]
    names: list[str]
    values: Json
    order: list[int]

    def is_like(self, structure: Any, arrays: list[Any]) -> bool:
        """Can the same be said of this tree?"""
        try:
            same = bool(structure == self.structure)
        except Exception:  # it compares what nodes of others are registered with: perhaps numpy arrays
            return False
        return same and _described(arrays) == self.described


def _described(arrays: list[Any]) -> list[tuple[Any, Any]]:
    return [(array.shape, array.dtype) for array in arrays]


def _arrays_only(tree: Any) -> tuple[Any, list[Any], list[Any]]:
    """JAX's structure of a tree, its leaves, and its mutable containers, in JAX's order.

    Only if all leaves are arrays on devices, each in one place; else nothing.
    """
    met: dict[int, Any] = {}

    def repeats(node: Any) -> bool:
        """Is this a container that has been met? JAX would follow one that is in itself until Python breaks down."""
        if not isinstance(node, list | dict):
            return is_iterable_leaf(node)
        found = id(node) in met
        met[id(node)] = node
        return found or (isinstance(node, dict) and not _can_be_sorted(node))

    try:
        leaves, structure = jax.tree.flatten(tree, is_leaf=repeats)
    except (TypeError, ValueError):  # from a node that is no container, but looks like one to JAX
        return None, [], []
    one_of_each_type = {type(leaf): leaf for leaf in leaves}.values()
    if not all(isinstance(leaf, jax.Array) and not is_key(leaf) for leaf in one_of_each_type):
        return None, [], []
    return (structure, leaves, [*met.values()]) if len(set(map(id, leaves))) == len(leaves) else (None, [], [])


def _can_be_sorted(keys: Iterable[Any]) -> bool:
    """Can JAX sort these keys? If not, its error costs the thread a level of recursion each time, for good."""
    try:
        sorted(keys)
    except TypeError:
        return False
    return True


def _tree_of(
    saved: ItemMeta,
    leaves: Mapping[str, Any],
    containers: Mapping[int, Any] | None = None,
    objects: dict[str | int, Any] | None = None,
) -> Any:
    """The tree on storage; by flat names as one without structure, as long as steps had no more to say."""
    if how_built(saved.values) is not None:
        return decode(saved.values, leaves, containers, objects)
    if not isinstance(saved.values, dict):
        raise LayoutError("not the values of a tree")
    return {name: decode(value, leaves) for name, value in saved.values.items()}
