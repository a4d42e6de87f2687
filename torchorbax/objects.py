"""Objects with `state_dict`, and trees of tensors, arrays and plain values, as items."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, ClassVar, Protocol

import jax
import numpy as np
import torch

from torchorbax import _torchax
from torchorbax.adapter import (
    ARRAY_TYPES,
    Array,
    array_in,
    host_copy,
    is_key,
    leaf_name,
    live_array,
    place_like,
    settle,
    without_key_type,
)
from torchorbax.dtypes import BY_NAME, dtype_name, fits_on_device
from torchorbax.errors import MismatchError, Problem
from torchorbax.manifest import ItemMeta, LeafMeta
from torchorbax.plan import Request, compare_leaves
from torchorbax.sharding import ShardingRules
from torchorbax.state import Captured, ItemPlan, compare_values, default_device, live_meta, selected
from torchorbax.values import add_leaf, decode, encode

_logger = logging.getLogger(__name__)


class Stateful(Protocol):
    """What torch calls stateful: schedulers, data loaders, metrics and many others."""

    def state_dict(self) -> Any:
        """Its state: containers, tensors, arrays and plain values."""

    def load_state_dict(self, state: Any, /) -> Any:
        """Take a state that `state_dict` gave."""


class ObjectItem:
    """Anything with `state_dict` and `load_state_dict`; restored as a whole or not at all."""

    kind: ClassVar[str] = "object"

    def __init__(self, name: str, obj: Stateful) -> None:
        self._name = name
        self._obj = obj

    def capture(self, handed: Any = None) -> Captured:
        leaves: dict[str, Any] = {}
        values = encode(self._obj.state_dict() if handed is None else handed, leaves, path=())
        return Captured(self.kind, leaves, values=values)

    def plan(self, saved: ItemMeta, rules: ShardingRules | None, request: Request) -> ItemPlan:
        if not request.selects(self._name):
            return ItemPlan()
        plan = ItemPlan(problems=self._compare(saved))
        if not plan.problems:
            on_jax = any(meta.residence == "jax" for meta in saved.leaves.values())
            live = self.capture().leaves if on_jax else {}  # making a state may cost: a data loader starts its workers
            plan.targets = {name: target_beside(live.get(name), meta) for name, meta in saved.leaves.items()}
            plan.values = {"": ""}
        return plan

    def _compare(self, saved: ItemMeta) -> list[Problem]:
        """A torch scheduler takes the state of any other without a word, so its names are compared here."""
        if not isinstance(self._obj, torch.optim.lr_scheduler.LRScheduler):
            return []
        stored = decode(saved.values, dict.fromkeys(saved.leaves))
        return compare_values(self._name, sorted(self._obj.state_dict()), sorted(stored))

    def apply(self, saved: ItemMeta, plan: ItemPlan, arrays: Mapping[str, Array], undo: ExitStack) -> None:
        if not plan.values:
            return
        self._register_undo(undo)
        try:
            self._obj.load_state_dict(decode(saved.values, arrays))
            if isinstance(self._obj, torch.utils.data.DataLoader):
                # Makes the iterator now, before the random numbers are restored, of which it takes some: the run that
                # nobody interrupted took them at the start of the epoch.
                self._obj.state_dict()
        except Exception as error:  # whatever the object thinks of it, nothing is changed and the caller reads why
            refused = f"one that it refuses: {type(error).__name__}: {error}"
            problem = Problem("placement", self._name, "", f"a state that {type(self._obj).__name__} takes", refused)
            raise MismatchError("the checkpoint", [problem], "Build the object as it was when it was saved.") from error

    def _register_undo(self, undo: ExitStack) -> None:
        if isinstance(self._obj, torch.utils.data.DataLoader):  # its state_dict would start the workers
            attributes = dict(vars(self._obj))
            undo.callback(vars(self._obj).update, attributes)
            return
        before: dict[str, Any] = {}
        values = encode(self._obj.state_dict(), before)
        held = {name: live_array(name, leaf) for name, leaf in before.items()}
        kept = {name: array if isinstance(array, jax.Array) else host_copy(array) for name, array in held.items()}
        undo.callback(lambda: self._put_back(decode(values, kept)))

    def _put_back(self, state: Any) -> None:
        try:
            self._obj.load_state_dict(state)
        except Exception:  # an error is on its way to the caller already, and says what is wrong
            _logger.exception("%s: its state before the failed restore could not be put back", self._name)


class Metrics:
    """The state of a torchmetrics metric or collection.

    Their own `state_dict` has it only after `persistent(True)`, and never the number of updates, without which a
    running mean goes on wrongly.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._metrics: dict[str, Any] = {
            name or "metric": one
            for name, one in module.named_modules()
            if is_metric(one) and hasattr(one, "_defaults")
        }

    def state_dict(self) -> dict[str, Any]:
        """The state of every metric by name."""
        return {
            name: {"updates": one._update_count, "state": {key: getattr(one, key) for key in one._defaults}}
            for name, one in self._metrics.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back.

        Raises:
            ValueError: it is that of other metrics.
        """
        names = {name: sorted(one._defaults) for name, one in self._metrics.items()}
        stored = {name: sorted(one["state"]) for name, one in state.items()}
        if names != stored:
            raise ValueError(f"expected the metrics {names}, found {stored}")
        for name, one in self._metrics.items():
            one._update_count, one._computed = state[name]["updates"], None
            for key, value in state[name]["state"].items():
                setattr(one, key, value)


def is_metric(value: object) -> bool:
    """Is this a torchmetrics `Metric` or `MetricCollection`? They are modules, but their states are no buffers."""
    return any(cls.__module__.partition(".")[0] == "torchmetrics" for cls in type(value).__mro__)


def target_beside(live: Any, saved: LeafMeta) -> jax.sharding.Sharding | None:
    """Where a stored leaf goes: where its live counterpart is, if there is one on jax; else as it was when saved."""
    if _torchax.is_torchax(live):
        live = _torchax.array_of(live)
    if not fits_on_device(BY_NAME[saved.dtype]):
        return None
    if isinstance(live, jax.Array):
        return live.sharding
    return default_device() if saved.residence == "jax" else None


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


def array_meta(leaf: Any) -> LeafMeta:
    """What a live tensor or array would be saved as."""
    if isinstance(leaf, torch.Tensor):
        return live_meta(leaf)
    return LeafMeta(
        tuple(leaf.shape), dtype_name(np.dtype(leaf.dtype)), "jax" if isinstance(leaf, jax.Array) else "host"
    )


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
