"""An optax state."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from typing import Any, ClassVar

import jax

from torchorbax._src.arrays.leaves import Array, is_key, put, without_key_type
from torchorbax._src.arrays.sharding_rules import ShardingRules
from torchorbax._src.format.encode import add_leaf
from torchorbax._src.format.manifest import ItemMeta, LeafMeta
from torchorbax._src.format.values import Json, LayoutError, built, how_built
from torchorbax._src.state.compare import compare_leaves
from torchorbax._src.state.item import Captured, ItemPlan
from torchorbax._src.state.live_leaves import as_typed, default_device
from torchorbax._src.state.request import Request
from torchorbax._src.state.sharing import Restoring
from torchorbax._src.state.values import decode, encode
from torchorbax._src.tensors.optimizers import OptaxOptimizer
from torchorbax._src.tensors.placement import target_shardings
from torchorbax._src.tensors.torchax_tensors import array_of, is_torchax
from torchorbax.errors import MismatchError, Problem, UnsupportedLeafError

_AS_SAVED = {"params": "params"}
"""The values of a plan that restores the state for the parameters that it was saved for, trained now or not."""

Owners = dict[str, str | None]
"""The leaves of a state by name, and the parameter that each belongs to."""


class OptaxItem:
    """An `OptaxOptimizer`: the leaves of its state, named after the parameter that they belong to.

    A step says which parameters were trained when the run was opened. Where the same are trained, the program has been
    built the same, and gets back the state for whichever parameters it was made.

    Args:
        name: the item's name.
        optimizer: the optimizer.
        by_rules: do sharding rules say where its model belongs?
    """

    kind: ClassVar[str] = "optax"

    def __init__(self, name: str, optimizer: OptaxOptimizer, *, by_rules: bool = True) -> None:
        self._name = name
        self._optimizer = optimizer
        self._by_rules = by_rules
        self._trained_at_start = list(optimizer.params())
        self._known: tuple[Any, Owners, Json] | None = None  # a structure, and what was made of it

    # ------------------------------------------------------------------------------------------------------------ save

    def capture(self, handed: Any = None) -> Captured:
        state = self._optimizer.state if handed is None else handed
        if state is None:
            return Captured(self.kind, {}, values=None)
        leaves, structure = jax.tree.flatten(state)
        if self._known is None or self._known[0] != structure:
            owners = self._owners(state)
            self._check(owners, leaves)
            # Whose leaf it is: that a parameter was renamed cannot be read off `fc.weight.0.mu`.
            known = {"params": list(self._optimizer.state_params()), "owners": owners}
            self._known = structure, owners, built(self._trained_at_start, encode(known, {}))
        _, owners, values = self._known
        return Captured(self.kind, dict(zip(owners, map(without_key_type, leaves), strict=True)), values=values)

    def _owners(self, state: Any) -> Owners:
        owners: Owners = {}
        for name, owner in self._optimizer.leaf_names(state):
            add_leaf(name, owner, owners)
        return owners

    def _check(self, owners: Owners, leaves: list[Any]) -> None:
        """See that this is a state that the transformation makes, or it could not be restored.

        Raises:
            UnsupportedLeafError: it has something that is no array.
            MismatchError: it has other leaves.
        """
        for name, leaf in zip(owners, leaves, strict=True):
            if not isinstance(leaf, jax.Array):
                raise UnsupportedLeafError(f"{self._name}.{name}", f"a {type(leaf).__name__} is no jax.Array")
        made = self._owners(self._optimizer.abstract_state(self._optimizer.state_params()))
        problems = [Problem("missing", self._name, name, "a leaf") for name in made if name not in owners]
        problems += [Problem("unexpected", self._name, name, "", "a leaf") for name in owners if name not in made]
        if problems:
            raise MismatchError("the state of the OptaxOptimizer", problems, "Its state must be one that its tx makes.")

    # --------------------------------------------------------------------------------------------------------- restore

    def plan(self, saved: ItemMeta, rules: ShardingRules | None, request: Request) -> ItemPlan:
        if saved.values is None:  # saved before the first step
            return ItemPlan(values={"": ""} if request.selects(self._name) else {})
        _, saved_owners = _known_of(saved)
        plan = ItemPlan()
        if how_built(saved.values) == self._trained_at_start and request.rename is None and request.selects(self._name):
            plan.values = dict(_AS_SAVED)
        names = self._names(saved, plan)
        abstract = self._optimizer.abstract_state(names)
        owners = self._owners(abstract)
        live = {
            name: _abstract_meta(leaf)
            for name, leaf in zip(owners, jax.tree.leaves(abstract), strict=True)
            if request.selects(self._name, name)
        }
        stored = {
            name: leaf
            for leaf in saved.leaves
            if request.selects(self._name, name := self._live_name(leaf, saved_owners.get(leaf), request))
        }
        found = {name: saved.leaves[leaf] for name, leaf in stored.items()}
        plan.problems += compare_leaves(self._name, live, found, cast=request.cast)
        if plan.problems and request.strict:
            return plan
        plan.match(live, stored, saved)
        if plan.sources:
            placed = target_shardings(
                {name: param for name, param in self._optimizer.model.named_parameters() if name in names},
                rules if self._by_rules else None,
            )
            where = {name: sharding or default_device() for name, sharding in placed.items()}
            shardings = jax.tree.leaves(self._optimizer.state_shardings(where, names))
            by_name = dict(zip(owners, shardings, strict=True))
            bound = {} if rules is None and self._is_free() else by_name
            plan.targets = {leaf: bound.get(name) for name, leaf in plan.sources.items()}
        return plan

    def _is_free(self) -> bool:
        """Are the parameters bound to no device? Then the state must not be either, as before the restore: a training
        step gives back everything bound if something was, and its next call compiles again."""
        params = self._optimizer.model.parameters()
        return not any(is_torchax(param) and getattr(array_of(param), "committed", True) for param in params)

    def _names(self, saved: ItemMeta, plan: ItemPlan) -> Collection[str]:
        """The parameters that the restored state is for."""
        return _known_of(saved)[0] if plan.values == _AS_SAVED else list(self._optimizer.state_params())

    def _live_name(self, leaf: str, owner: str | None, request: Request) -> str:
        """Renamed with its parameter, or by its own name."""
        if owner is not None and (renamed := request.live_name(self._name, owner)) != owner:
            return renamed + leaf.removeprefix(owner)
        return request.live_name(self._name, leaf)

    def apply(
        self, saved: ItemMeta, plan: ItemPlan, arrays: Mapping[str, Array], undo: ExitStack, restoring: Restoring
    ) -> None:
        if not plan.restores_something:
            return
        undo.callback(self._optimizer.adopt, self._optimizer.state, list(self._optimizer.state_params()))
        if saved.values is None:
            self._optimizer.state = None
            return
        names = self._names(saved, plan)
        abstract, structure = jax.tree.flatten(self._optimizer.abstract_state(names))
        owners = self._owners(jax.tree.unflatten(structure, abstract))
        # What is not restored keeps the value that it has, or starts with.
        whole = len(plan.sources) == len(owners) and not any(map(is_key, abstract))  # of a key, the kind is needed
        present = abstract if whole else jax.tree.leaves(self._optimizer.init())
        typed = as_typed(saved, arrays)
        leaves = [
            _like(leaf, typed[plan.sources[name]]) if name in plan.sources else leaf
            for name, leaf in zip(owners, present, strict=True)
        ]
        self._optimizer.adopt(jax.tree.unflatten(structure, leaves), names)


def _known_of(saved: ItemMeta) -> tuple[list[str], Owners]:
    """The parameters that a saved state is for, if the step says so, and whose its leaves are."""
    if how_built(saved.values) is None:
        return [], saved.values
    match decode(saved.values, {}):
        case {"params": list(params), "owners": dict(owners)}:
            return params, owners
    raise LayoutError("not the state of an optax optimizer")


def _abstract_meta(leaf: Any) -> LeafMeta:
    data = jax.eval_shape(jax.random.key_data, leaf) if is_key(leaf) else leaf
    return LeafMeta(tuple(data.shape), str(data.dtype), "jax")


def _like(leaf: Any, array: Array) -> Any:
    """`array`, as a typed PRNG key if `leaf` is one."""
    on_device = put(array, None)
    return jax.random.wrap_key_data(on_device, impl=jax.random.key_impl(leaf)) if is_key(leaf) else on_device
