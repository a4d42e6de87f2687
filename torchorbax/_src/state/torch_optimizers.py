"""Optimizers as items: state and hyperparameters keyed by parameter name, never by index."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack, suppress
from typing import Any, ClassVar

import jax
import torch
from jax.sharding import Sharding

from torchorbax._src.arrays.dtypes import BY_NAME
from torchorbax._src.arrays.leaves import Array
from torchorbax._src.arrays.sharding_rules import ShardingRules, replicated_like, state_sharding
from torchorbax._src.format.manifest import ItemMeta, LeafMeta
from torchorbax._src.format.values import Path, decode, encode
from torchorbax._src.state.compare import compare_leaves
from torchorbax._src.state.item import Captured, ItemPlan
from torchorbax._src.state.request import Request, selected
from torchorbax._src.tensors import torchax_tensors
from torchorbax._src.tensors.live import array_in, live_dtype, settle
from torchorbax._src.tensors.placement import placed_dtype, target_shardings
from torchorbax.errors import ConfigError, Problem, UnsupportedLeafError


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
        params = self._params(names)
        tree = {
            "class": type(self._optimizer).__name__,
            "state": {names[id(param)]: dict(state) for param, state in self._optimizer.state.items() if state},
            "param_groups": [
                {**group, "params": [names[id(param)] for param in group["params"]]}
                for group in self._optimizer.param_groups
            ],
            # What the state belongs to: its own shapes tell only part of that (Adafactor's rows and columns).
            "params": {name: [list(param.shape), str(live_dtype(param))] for name, param in params.items()},
        }
        leaves: dict[str, Any] = {}
        return Captured(self.kind, leaves, values=encode(tree, leaves, _short_name))

    def _params(self, names: Mapping[int, str]) -> dict[str, torch.Tensor]:
        return {names[id(param)]: param for group in self._optimizer.param_groups for param in group["params"]}

    def plan(self, saved: ItemMeta, rules: ShardingRules | None, request: Request) -> ItemPlan:
        names = self._names()
        params = self._params(names)
        tree = _checked_tree(decode(saved.values, {name: _LeafName(name) for name in saved.leaves}))
        stored = selected(self._name, {name: name for name in tree["params"]}, request)
        metas = {name: LeafMeta(tuple(shape), dtype, "jax") for name, (shape, dtype) in tree["params"].items()}
        placed = target_shardings(params, rules, host=True)
        live = {
            name: _placed_meta(name, param, placed[name])
            for name, param in params.items()
            if request.selects(self._name, name)
        }
        kind = type(self._optimizer).__name__
        if tree["class"] != kind:  # whose state and hyperparameters would mean something else, or nothing
            problem = Problem("placement", self._name, "the optimizer", f"a {kind}", f"a {tree['class']}")
            return ItemPlan(problems=[problem])
        plan = ItemPlan(problems=self._compare_groups(tree["param_groups"], names, live, stored))
        both = {name: metas[stored[name]] for name in live if name in stored}
        plan.problems += compare_leaves(self._name, {name: live[name] for name in both}, both, cast=request.cast)
        if plan.problems and request.strict:
            return plan
        bad = {problem.name for problem in plan.problems}
        plan.values = {name: stored[name] for name in both if name not in bad}
        for name, owner in plan.values.items():
            for key, entry in tree["state"].get(owner, {}).items():
                for leaf in _leaves_in(entry):
                    meta = saved.leaves[leaf]
                    plan.targets[leaf] = _beside(meta, placed[name], both[name].shape)
                    counts = key == "step"  # float32 whatever the parameter is, as torch's load_state_dict has it
                    if both[name].dtype != live[name].dtype and meta.dtype == both[name].dtype and not counts:
                        plan.dtypes[leaf] = BY_NAME[live[name].dtype]
        for _, group in self._groups_to_restore(tree, plan):
            for leaf in _leaves_in(group):  # hyperparameters that are tensors
                plan.targets[leaf] = None if saved.leaves[leaf].residence == "host" else _anywhere(placed)
        return plan

    def _groups_to_restore(
        self, tree: Mapping[str, Any], plan: ItemPlan
    ) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """The live groups whose hyperparameters are restored, with the stored ones: where a parameter of theirs is."""
        restored = set(plan.values.values())
        pairs = zip(self._optimizer.param_groups, tree["param_groups"], strict=False)  # strict=False has fewer
        return [(live, saved) for live, saved in pairs if not saved["params"] or restored & set(saved["params"])]

    def _compare_groups(
        self, saved: list[dict[str, Any]], names: Mapping[int, str], wanted: Collection[str], stored: Mapping[str, str]
    ) -> list[Problem]:
        live = [[names[id(param)] for param in group["params"]] for group in self._optimizer.param_groups]
        group_of_live = {name: index for index, group in enumerate(live) for name in group if name in wanted}
        group_of = {name: index for index, group in enumerate(saved) for name in group["params"]}
        group_of_saved = {name: group_of[owner] for name, owner in stored.items()}
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
            Problem("groups", self._name, name, f"in param_groups[{group}]", f"in param_groups[{group_of_saved[name]}]")
            for name, group in group_of_live.items()
            if group_of_saved.get(name, group) != group
        ]
        if len(live) != len(saved) and len(wanted) == len(names):
            problems.append(Problem("groups", self._name, "param_groups", f"{len(live)} of them", str(len(saved))))
        return problems

    def apply(self, saved: ItemMeta, plan: ItemPlan, arrays: Mapping[str, Array], undo: ExitStack) -> None:
        params = self._params(self._names())
        tree = decode(saved.values, {**dict.fromkeys(saved.leaves), **arrays})
        state = self._optimizer.state
        undo.callback(_reset, state, {param: dict(one) for param, one in state.items()})
        for name, owner in plan.values.items():
            param, stored = params[name], tree["state"].get(owner)
            if stored is None:
                state.pop(param, None)
                continue
            kept = state[param]
            state[param] = {key: _into(kept.get(key), value, undo) for key, value in stored.items()}
        for group, stored in self._groups_to_restore(tree, plan):
            undo.callback(_reset, group, dict(group))
            new = {key: _into(group.get(key), value, undo) for key, value in stored.items() if key not in _WHOSE}
            group.update(new)


_WHOSE = ("params", "param_names")
"""Entries of a group that say whose it is, and are the live optimizer's own."""


def _checked_tree(tree: Any) -> dict[str, Any]:
    """`tree`, if it is laid out as `capture` does.

    Raises:
        ValueError: it is not, so somebody else wrote it.
    """
    match tree:
        case {"class": str(), "state": dict(state), "param_groups": list(groups), "params": dict(params)}:
            named = all(isinstance(name, str) and isinstance(one, dict) for name, one in state.items())
            grouped = all(isinstance(group, dict) and _all_names(group.get("params")) for group in groups)
            known = all(isinstance(name, str) and _is_shape_and_dtype(one) for name, one in params.items())
            if named and grouped and known:
                return dict(tree)
    raise ValueError("not the state of a torch.optim optimizer")


def _all_names(names: Any) -> bool:
    return isinstance(names, list) and all(isinstance(name, str) for name in names)


def _is_shape_and_dtype(meta: Any) -> bool:
    match meta:
        case [list(shape), str(dtype)]:
            return dtype in BY_NAME and all(type(size) is int for size in shape)
    return False


def _placed_meta(name: str, param: torch.Tensor, sharding: Sharding | None) -> LeafMeta:
    """What a parameter is once it is placed; if that is impossible, the module says so."""
    dtype = live_dtype(param)
    if sharding is not None:
        with suppress(UnsupportedLeafError):
            dtype = placed_dtype(name, param)
    return LeafMeta(tuple(param.shape), str(dtype), "host" if sharding is None else "jax")


def _leaves_in(entries: Any) -> list[str]:
    return [leaf for leaf in jax.tree.leaves(entries) if isinstance(leaf, _LeafName)]


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
    if not same or live.dtype != value.dtype or torchax_tensors.is_torchax(live) != torchax_tensors.is_torchax(value):
        return value
    settle(live, array_in(value), undo)
    return live


def _reset(container: dict[Any, Any], content: Mapping[Any, Any]) -> None:
    container.clear()
    container.update(content)
