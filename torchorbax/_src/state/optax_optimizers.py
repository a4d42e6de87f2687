"""An optax state."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from torchorbax._src.arrays.leaves import Array, is_key, without_key_type
from torchorbax._src.arrays.sharding_rules import ShardingRules
from torchorbax._src.format.manifest import ItemMeta, LeafMeta
from torchorbax._src.state.compare import compare_leaves
from torchorbax._src.state.item import Captured, ItemPlan
from torchorbax._src.state.live_leaves import default_device
from torchorbax._src.state.request import Request
from torchorbax._src.tensors.optimizers import OptaxOptimizer
from torchorbax._src.tensors.placement import target_shardings


class OptaxItem:
    """An `OptaxOptimizer`: the leaves of its state, named after the parameter that they belong to."""

    kind: ClassVar[str] = "optax"

    def __init__(self, name: str, optimizer: OptaxOptimizer) -> None:
        self._name = name
        self._optimizer = optimizer

    def capture(self, handed: Any = None) -> Captured:
        state = self._optimizer.state if handed is None else handed
        if state is None:
            return Captured(self.kind, {}, values=None)
        names = self._optimizer.leaf_names(state)
        arrays = map(without_key_type, jax.tree.leaves(state))
        leaves = dict(zip([name for name, _ in names], arrays, strict=True))
        # Whose leaf it is: that a parameter was renamed cannot be read off `fc.weight.0.mu`.
        return Captured(self.kind, leaves, values={name: owner for name, owner in names if owner is not None})

    def _live(self) -> tuple[list[tuple[str, str | None]], list[Any], Any]:
        leaves, structure = jax.tree.flatten(self._optimizer.abstract_state())
        return self._optimizer.leaf_names(jax.tree.unflatten(structure, leaves)), leaves, structure

    def plan(self, saved: ItemMeta, rules: ShardingRules | None, request: Request) -> ItemPlan:
        names, leaves, _ = self._live()
        if saved.values is None:  # saved before the first step
            return ItemPlan(values={"": ""} if request.selects(self._name) else {})
        live = {
            name: _abstract_meta(leaf)
            for (name, owner), leaf in zip(names, leaves, strict=True)
            if request.selects(self._name, name)
        }
        stored: dict[str, str] = {}
        for leaf in saved.leaves:
            owner = saved.values.get(leaf)
            name = leaf if owner is None else request.live_name(self._name, owner) + leaf.removeprefix(owner)
            if request.selects(self._name, name):
                stored[name] = leaf
        found = {name: saved.leaves[leaf] for name, leaf in stored.items()}
        plan = ItemPlan(problems=compare_leaves(self._name, live, found, cast=request.cast))
        if plan.problems and request.strict:
            return plan
        plan.match(live, stored, saved)
        if plan.sources:
            placed = target_shardings(self._optimizer.params(), rules)
            shardings = self._optimizer.state_shardings({name: s or default_device() for name, s in placed.items()})
            by_name = dict(zip([name for name, _ in names], jax.tree.leaves(shardings), strict=True))
            plan.targets = {leaf: by_name[name] for name, leaf in plan.sources.items()}
        return plan

    def apply(self, saved: ItemMeta, plan: ItemPlan, arrays: Mapping[str, Array], undo: ExitStack) -> None:
        if not plan.restores_something:
            return
        undo.callback(setattr, self._optimizer, "state", self._optimizer.state)
        if saved.values is None:
            self._optimizer.state = None
            return
        names, abstract, structure = self._live()
        # What is not restored keeps the value that it has, or starts with.
        whole = len(plan.sources) == len(names) and not any(map(is_key, abstract))  # of a key, the kind is needed
        present = abstract if whole else jax.tree.leaves(self._optimizer.init())
        leaves = [
            _like(leaf, arrays[plan.sources[name]]) if name in plan.sources else leaf
            for (name, _), leaf in zip(names, present, strict=True)
        ]
        self._optimizer.state = jax.tree.unflatten(structure, leaves)


def _abstract_meta(leaf: Any) -> LeafMeta:
    data = jax.eval_shape(jax.random.key_data, leaf) if is_key(leaf) else leaf
    return LeafMeta(tuple(data.shape), str(data.dtype), "jax")


def _like(leaf: Any, array: Array) -> Any:
    """`array`, as a typed PRNG key if `leaf` is one."""
    return jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(leaf)) if is_key(leaf) else array
