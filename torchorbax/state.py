"""Live objects as items of a checkpoint: what they hold, what a checkpoint must have for them, and writing it back.

Every kind of object has one class here or in `optimizer_state` and `rng`, with three methods (`Item`). None of them
copies arrays, does I/O or knows Orbax.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.sharding import Sharding, SingleDeviceSharding

from torchorbax import _torchax
from torchorbax.adapter import Array, array_in, leaf_name, live_dtype, module_tensors, place_like, settle
from torchorbax.errors import ConfigError, MismatchError, Problem, UnsupportedLeafError
from torchorbax.manifest import ItemMeta, LeafMeta
from torchorbax.placement import placed_dtype, target_shardings
from torchorbax.plan import compare_leaves, compare_ties
from torchorbax.sharding import ShardingRules
from torchorbax.values import Json, add_leaf, decode, encode


@dataclass(frozen=True)
class Captured:
    """The live leaves of an item at this moment, by reference; the rest as in `ItemMeta`."""

    kind: str
    leaves: Mapping[str, Any]
    ties: Mapping[str, str] = field(default_factory=dict)
    values: Json = None


@dataclass
class ItemPlan:
    """How to restore an item: where each stored leaf goes (None for host memory), or why that is impossible."""

    targets: dict[str, Sharding | None] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


class Item(Protocol):
    """One live object that is saved under a name of its own. `kind` says what it is, in the manifest."""

    kind: ClassVar[str]

    def capture(self, handed: Any = None) -> Captured:
        """The leaves to save; `handed` is a tree that the caller gives instead of the live values.

        Raises:
            UnsupportedLeafError, MismatchError: it cannot be saved like this.
        """

    def plan(self, saved: ItemMeta, rules: ShardingRules | None) -> ItemPlan:
        """Compare the stored item with the live object. Touches nothing."""

    def apply(self, saved: ItemMeta, arrays: Mapping[str, Array], undo: ExitStack) -> None:
        """Write the stored values, loaded as planned, into the live object; registers how to undo it."""


def default_device() -> Sharding:
    """Where arrays go that nothing else is known of."""
    return SingleDeviceSharding(jax.devices()[0])


def live_meta(tensor: torch.Tensor) -> LeafMeta:
    """What a live tensor would be saved as."""
    residence = "jax" if _torchax.is_torchax(tensor) or tensor.is_meta else "host"
    return LeafMeta(tuple(tensor.shape), str(live_dtype(tensor)), residence)  # type: ignore[arg-type]


class ModuleItem:
    """A module: parameters and persistent buffers by name, tied ones once; extra state with the manifest."""

    kind: ClassVar[str] = "module"

    def __init__(self, name: str, module: torch.nn.Module) -> None:
        self._name = name
        self._module = module

    def _tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The unique live tensors by the first of their names, and for every name the first name of its tensor."""
        tensors: dict[str, torch.Tensor] = {}
        first_of: dict[str, str] = {}
        first_by_id: dict[int, str] = {}
        for name, tensor in module_tensors(self._module):
            first_of[name] = first_by_id.setdefault(id(tensor), name)
            tensors.setdefault(first_of[name], tensor)
        return tensors, first_of

    def capture(self, handed: Mapping[str, Any] | None = None) -> Captured:
        tensors, first_of = self._tensors()
        leaves: dict[str, Any] = dict(tensors)
        if handed is not None:
            leaves.update(self._checked(handed, tensors, first_of))
        extra: dict[str, Any] = {}
        for name, value in self._module.state_dict(keep_vars=True).items():
            if not isinstance(value, torch.Tensor):
                extra[name] = encode(value, leaves, path=(name,))
        ties = {name: first for name, first in first_of.items() if name != first}
        return Captured(self.kind, leaves, ties, extra)

    def _checked(
        self, handed: Any, tensors: Mapping[str, torch.Tensor], first_of: Mapping[str, str]
    ) -> Mapping[str, Any]:
        if not isinstance(handed, Mapping):
            raise ConfigError(f"{self._name}: expected a mapping by parameter name, not a {type(handed).__name__}")
        given = {name: LeafMeta(tuple(leaf.shape), _dtype_name(leaf), "jax") for name, leaf in handed.items()}
        expected = {name: live_meta(tensors[first_of[name]]) for name in given if name in first_of}
        if problems := compare_leaves(self._name, expected, given):
            raise MismatchError("the state handed to save", problems)
        return {first_of[name]: leaf for name, leaf in handed.items()}

    def plan(self, saved: ItemMeta, rules: ShardingRules | None) -> ItemPlan:
        plan = ItemPlan()
        tensors, first_of = self._tensors()
        saved_first = {**{name: name for name in saved.leaves}, **saved.ties}
        extra = {leaf for value in (saved.values or {}).values() for leaf in _leaf_names(value)}
        for name in extra:
            plan.targets[name] = None if saved.leaves[name].residence == "host" else default_device()
            saved_first.pop(name)
        live = {name: self._expected(name, tensors[first], rules, plan) for name, first in first_of.items()}
        stored = {name: saved.leaves[first] for name, first in saved_first.items()}
        plan.problems += compare_leaves(self._name, live, stored)
        plan.problems += compare_ties(self._name, first_of, saved_first)
        if not plan.problems:
            for name, sharding in target_shardings(tensors, rules, host=True).items():
                plan.targets[saved_first[name]] = sharding
        return plan

    def _expected(self, name: str, tensor: torch.Tensor, rules: ShardingRules | None, plan: ItemPlan) -> LeafMeta:
        """What a checkpoint must have for a live tensor, which by the rules, or coming from meta, ends up on jax."""
        meta = live_meta(tensor)
        if rules is None and meta.residence == "host":
            return meta
        try:
            return LeafMeta(meta.shape, str(placed_dtype(name, tensor)), "jax")
        except UnsupportedLeafError as error:
            plan.problems.append(Problem("placement", self._name, name, "a dtype that fits on the devices", str(error)))
            return meta

    def apply(self, saved: ItemMeta, arrays: Mapping[str, Array], undo: ExitStack) -> None:
        tensors, _ = self._tensors()
        for name, tensor in tensors.items():
            array = arrays[saved.ties.get(name, name)]
            if isinstance(array, np.ndarray) and array.dtype != live_dtype(tensor):
                array = array.astype(live_dtype(tensor))  # int32 to int64, see plan.widens
            settle(tensor, array, undo)
        for name, value in (saved.values or {}).items():
            owner = self._module.get_submodule(name.rpartition(".")[0])
            undo.callback(owner.set_extra_state, owner.get_extra_state())
            owner.set_extra_state(decode(value, arrays))


def _dtype_name(leaf: Any) -> str:
    dtype = live_dtype(leaf) if isinstance(leaf, torch.Tensor) else np.dtype(leaf.dtype)
    return str(dtype)


def _leaf_names(json: Json) -> set[str]:
    """The names of all leaves that an encoded value refers to."""
    names: dict[str, None] = {}

    class _Recorder(dict[str, Any]):
        def __missing__(self, name: str) -> None:
            names[name] = None

    decode(json, _Recorder())
    return set(names)


class ObjectItem:
    """Anything with `state_dict` and `load_state_dict`, such as a learning-rate scheduler."""

    kind: ClassVar[str] = "object"

    def __init__(self, name: str, obj: Any) -> None:
        self._name = name
        self._obj = obj

    def capture(self, handed: Any = None) -> Captured:
        leaves: dict[str, Any] = {}
        values = encode(self._obj.state_dict() if handed is None else handed, leaves, path=())
        return Captured(self.kind, leaves, values=values)

    def plan(self, saved: ItemMeta, rules: ShardingRules | None) -> ItemPlan:
        live = self.capture().leaves
        return ItemPlan({name: target_beside(live.get(name), meta) for name, meta in saved.leaves.items()})

    def apply(self, saved: ItemMeta, arrays: Mapping[str, Array], undo: ExitStack) -> None:
        before: dict[str, Any] = {}
        values = encode(self._obj.state_dict(), before)
        undo.callback(lambda: self._obj.load_state_dict(decode(values, before)))
        self._obj.load_state_dict(decode(saved.values, arrays))


def target_beside(live: Any, saved: LeafMeta) -> Sharding | None:
    """Where a stored leaf goes: where its live counterpart is, if there is one on jax; else as it was when saved."""
    if _torchax.is_torchax(live):
        live = _torchax.array_of(live)
    if isinstance(live, jax.Array):
        return live.sharding
    return default_device() if saved.residence == "jax" else None


class PytreeItem:
    """A tree of containers with tensors, arrays and plain values, living in `slot[name]`.

    Tensors, numpy arrays and mutable containers are written in place; what is immutable is replaced, up to the slot
    itself.
    """

    kind: ClassVar[str] = "pytree"

    def __init__(self, name: str, slot: MutableMapping[str, Any]) -> None:
        self._name = name
        self._slot = slot

    @staticmethod
    def _flatten(tree: Any) -> tuple[dict[str, Any], Any]:
        flat, structure = jax.tree_util.tree_flatten_with_path(tree)
        named: dict[str, Any] = {}
        for path, leaf in flat:
            add_leaf(leaf_name(path), leaf, named)
        return named, structure

    def capture(self, handed: Any = None) -> Captured:
        named, _ = self._flatten(self._slot[self._name] if handed is None else handed)
        leaves: dict[str, Any] = {}
        values = {
            name: encode(_without_key_type(leaf), leaves, lambda path: path[0], (name,)) for name, leaf in named.items()
        }
        return Captured(self.kind, leaves, values=values)

    def plan(self, saved: ItemMeta, rules: ShardingRules | None) -> ItemPlan:
        captured = self.capture()
        live = {name: array_meta(leaf) for name, leaf in captured.leaves.items()}
        plan = ItemPlan(problems=compare_leaves(self._name, live, saved.leaves))
        plain = set(captured.values) - set(live)
        stored = set(saved.values) - set(saved.leaves)
        plan.problems += [Problem("missing", self._name, name, "a value") for name in sorted(plain - set(saved.values))]
        plan.problems += [
            Problem("unexpected", self._name, name, "", "a value") for name in sorted(stored - set(captured.values))
        ]
        if not plan.problems:
            plan.targets = {name: target_beside(captured.leaves[name], meta) for name, meta in saved.leaves.items()}
        return plan

    def apply(self, saved: ItemMeta, arrays: Mapping[str, Array], undo: ExitStack) -> None:
        live = self._slot[self._name]
        named, structure = self._flatten(live)
        new = [self._restored(leaf, decode(saved.values[name], arrays), undo) for name, leaf in named.items()]
        undo.callback(self._slot.__setitem__, self._name, live)
        self._slot[self._name] = _merged(live, jax.tree.unflatten(structure, new), undo)

    @staticmethod
    def _restored(live: Any, value: Any, undo: ExitStack) -> Any:
        if isinstance(live, torch.Tensor):
            settle(live, array_in(value), undo)
            return live
        if isinstance(live, jax.Array) and jnp.issubdtype(live.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(value, impl=jax.random.key_impl(live))
        return place_like(value, live) if isinstance(live, jax.Array) else value


def _without_key_type(leaf: Any) -> Any:
    """A typed PRNG key as its raw `uint32` data; anything else as it is."""
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(leaf)
    return leaf


def array_meta(leaf: Any) -> LeafMeta:
    """What a live tensor or array would be saved as."""
    if isinstance(leaf, torch.Tensor):
        return live_meta(leaf)
    return LeafMeta(tuple(leaf.shape), str(np.dtype(leaf.dtype)), "jax" if isinstance(leaf, jax.Array) else "host")


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
