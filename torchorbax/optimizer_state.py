"""Optimizers as items: state and hyperparameters keyed by parameter name, never by index."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, ClassVar

import jax
import torch
from jax.sharding import Sharding

from torchorbax import _torchax
from torchorbax.adapter import Array, array_in, settle
from torchorbax.errors import ConfigError, Problem
from torchorbax.manifest import ItemMeta, LeafMeta
from torchorbax.optimizers import OptaxOptimizer
from torchorbax.placement import target_shardings
from torchorbax.plan import compare_leaves
from torchorbax.sharding import ShardingRules, replicated_like, state_sharding
from torchorbax.state import Captured, ItemPlan, default_device
from torchorbax.values import Path, decode, encode


def parameter_names(
    modules: Mapping[str, torch.nn.Module], optimizer: torch.optim.Optimizer, item: str
) -> dict[int, str]:
    """The names of an optimizer's parameters by id, with the module's item name in front where it has several modules.

    Raises:
        ConfigError: it has parameters that belong to none of the modules.
    """
    owners: dict[int, tuple[str, str]] = {}
    for module_name, module in modules.items():
        for name, param in module.named_parameters():
            owners.setdefault(id(param), (module_name, name))
    params = [param for group in optimizer.param_groups for param in group["params"]]
    strangers = sum(id(param) not in owners for param in params)
    if strangers:
        raise ConfigError(
            f"{item}: {strangers} of the optimizer's {len(params)} parameters belong to no model that is saved. Was "
            "the optimizer built for another model, or before model.to('jax'), which makes new parameters? "
            "Build it afterwards, or move both with torchorbax.place_(model, optimizer)."
        )
    several = len({owners[id(param)][0] for param in params}) > 1
    return {id(param): ".".join(owners[id(param)]) if several else owners[id(param)][1] for param in params}


class TorchOptimizerItem:
    """A `torch.optim` optimizer: `weight.exp_avg` and the like as leaves, the groups' hyperparameters with the
    manifest."""

    kind: ClassVar[str] = "torch.optim"

    def __init__(self, name: str, optimizer: torch.optim.Optimizer, modules: Mapping[str, torch.nn.Module]) -> None:
        self._name = name
        self._optimizer = optimizer
        self._modules = modules
        self._names()

    def _names(self) -> dict[int, str]:
        return parameter_names(self._modules, self._optimizer, self._name)

    def capture(self, handed: Any = None) -> Captured:
        if handed is not None:
            raise ConfigError(
                f"{self._name}: a torch.optim optimizer is saved from the live object; nothing can be handed over"
            )
        names = self._names()
        tree = {
            "state": {names[id(param)]: dict(state) for param, state in self._optimizer.state.items() if state},
            "param_groups": [
                {**group, "params": [names[id(param)] for param in group["params"]]}
                for group in self._optimizer.param_groups
            ],
        }
        leaves: dict[str, Any] = {}
        return Captured(self.kind, leaves, values=encode(tree, leaves, _short_name))

    def plan(self, saved: ItemMeta, rules: ShardingRules | None) -> ItemPlan:
        names = self._names()
        tree = decode(saved.values, {name: _LeafName(name) for name in saved.leaves})
        plan = ItemPlan(problems=self._compare_groups(tree["param_groups"], names))
        params = {names[id(p)]: p for group in self._optimizer.param_groups for p in group["params"]}
        if plan.problems:
            return plan
        placed = target_shardings(params, rules, host=True)
        for owner, state in tree["state"].items():
            for value in state.values():
                if isinstance(value, _LeafName):
                    plan.targets[value] = _beside(saved.leaves[value], placed[owner], tuple(params[owner].shape))
        for name in saved.leaves.keys() - plan.targets.keys():  # hyperparameters that are tensors
            plan.targets[name] = None if saved.leaves[name].residence == "host" else _anywhere(placed)
        return plan

    def _compare_groups(self, saved: list[dict[str, Any]], names: Mapping[int, str]) -> list[Problem]:
        live = [[names[id(param)] for param in group["params"]] for group in self._optimizer.param_groups]
        stored = [group["params"] for group in saved]
        group_of_live = {name: index for index, group in enumerate(live) for name in group}
        group_of_saved = {name: index for index, group in enumerate(stored) for name in group}
        problems = [
            Problem("missing", self._name, name, f"in param_groups[{group}]")
            for name, group in group_of_live.items()
            if name not in group_of_saved
        ]
        problems += [
            Problem("unexpected", self._name, name, "", f"in param_groups[{group}]")
            for name, group in group_of_saved.items()
            if name not in group_of_live
        ]
        problems += [
            Problem(
                "placement", self._name, name, f"in param_groups[{group}]", f"in param_groups[{group_of_saved[name]}]"
            )
            for name, group in group_of_live.items()
            if group_of_saved.get(name, group) != group
        ]
        return problems

    def apply(self, saved: ItemMeta, arrays: Mapping[str, Array], undo: ExitStack) -> None:
        names = self._names()
        params = {names[id(p)]: p for group in self._optimizer.param_groups for p in group["params"]}
        tree = decode(saved.values, arrays)
        state = self._optimizer.state
        undo.callback(_reset, state, {param: dict(one) for param, one in state.items()})
        for name, param in params.items():
            stored = tree["state"].get(name)
            if stored is None:
                state.pop(param, None)
                continue
            kept = state[param]
            state[param] = {key: _into(kept.get(key), value, undo) for key, value in stored.items()}
        for group, stored in zip(self._optimizer.param_groups, tree["param_groups"], strict=True):
            undo.callback(_reset, group, dict(group))
            group.update({key: _into(group.get(key), value, undo) for key, value in stored.items() if key != "params"})


class _LeafName(str):
    """Stands for a stored array where only its name is known."""


def _short_name(path: Path) -> str:
    return ".".join(path[1:] if path[0] == "state" else path)


def _beside(saved: LeafMeta, param: Sharding | None, param_shape: tuple[int, ...]) -> Sharding | None:
    """On the host where it was there (Adam's counter) or its parameter is; else beside its parameter."""
    if param is None or (saved.residence == "host" and saved.shape != param_shape):
        return None
    return state_sharding(saved.shape, param, param_shape)


def _anywhere(placed: Mapping[str, Sharding | None]) -> Sharding | None:
    first = next(iter(placed.values()))
    return None if first is None else replicated_like(first)


def _into(live: Any, value: Any, undo: ExitStack) -> Any:
    """`value`, in the tensor `live` if that is one that can take it, so that all who refer to it see it."""
    same = isinstance(live, torch.Tensor) and isinstance(value, torch.Tensor) and live.shape == value.shape
    if not same or live.dtype != value.dtype or _torchax.is_torchax(live) != _torchax.is_torchax(value):
        return value
    settle(live, array_in(value), undo)
    return live


def _reset(container: dict[Any, Any], content: Mapping[Any, Any]) -> None:
    container.clear()
    container.update(content)


class OptaxItem:
    """An `OptaxOptimizer`: the leaves of its state, named after the parameter that they belong to."""

    kind: ClassVar[str] = "optax"

    def __init__(self, name: str, optimizer: OptaxOptimizer) -> None:
        self._name = name
        self._optimizer = optimizer

    def capture(self, handed: Any = None) -> Captured:
        state = self._optimizer.state if handed is None else handed
        if state is None:
            return Captured(self.kind, {}, values="not initialised")
        names = [name for name, _ in self._optimizer.leaf_names(state)]
        return Captured(self.kind, dict(zip(names, jax.tree.leaves(state), strict=True)))

    def plan(self, saved: ItemMeta, rules: ShardingRules | None) -> ItemPlan:
        if saved.values == "not initialised":
            return ItemPlan()
        abstract = self._optimizer.abstract_state()
        names = [name for name, _ in self._optimizer.leaf_names(abstract)]
        live = {
            name: LeafMeta(tuple(leaf.shape), str(leaf.dtype), "jax")
            for name, leaf in zip(names, jax.tree.leaves(abstract), strict=True)
        }
        plan = ItemPlan(problems=compare_leaves(self._name, live, saved.leaves))
        if not plan.problems:
            placed = target_shardings(self._optimizer.params(), rules)
            shardings = self._optimizer.state_shardings({name: s or default_device() for name, s in placed.items()})
            plan.targets = dict(zip(names, jax.tree.leaves(shardings), strict=True))
        return plan

    def apply(self, saved: ItemMeta, arrays: Mapping[str, Array], undo: ExitStack) -> None:
        undo.callback(setattr, self._optimizer, "state", self._optimizer.state)
        if saved.values == "not initialised":
            self._optimizer.state = None
            return
        abstract = self._optimizer.abstract_state()
        leaves = [arrays[name] for name, _ in self._optimizer.leaf_names(abstract)]
        self._optimizer.state = jax.tree.unflatten(jax.tree.structure(abstract), leaves)
