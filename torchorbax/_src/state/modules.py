"""A module's parameters and buffers."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, ClassVar

import numpy as np
import torch

from torchorbax._src.arrays.dtypes import dtype_name
from torchorbax._src.arrays.leaves import Array
from torchorbax._src.arrays.sharding_rules import ShardingRules
from torchorbax._src.format.manifest import ItemMeta, LeafMeta
from torchorbax._src.format.values import Json, decode, encode
from torchorbax._src.state.compare import compare_leaves, compare_ties, compare_values
from torchorbax._src.state.item import Captured, ItemPlan
from torchorbax._src.state.live_leaves import default_device, live_meta
from torchorbax._src.state.request import Request, selected
from torchorbax._src.tensors.live import live_dtype, module_tensors, settle
from torchorbax._src.tensors.placement import placed_dtype, target_shardings
from torchorbax.errors import ConfigError, MismatchError, Problem, UnsupportedLeafError


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
        own = {id(tensor) for tensor in (*self._module.parameters(), *self._module.buffers())}
        for name, tensor in module_tensors(self._module):
            if name.endswith(_EXTRA):
                continue  # made anew by every state_dict(), so nothing written into it would stay
            if torch.nn.parameter.is_lazy(tensor):
                raise ConfigError(f"{self._name}: {name} has no shape yet; run one batch through the lazy module first")
            if id(tensor) not in own:
                raise ConfigError(
                    f"{self._name}: {name} of its state_dict is neither a parameter nor a buffer, so it could not be "
                    "restored; name its owner in `state` instead"
                )
            first_of[name] = first_by_id.setdefault(id(tensor), name)
            tensors.setdefault(first_of[name], tensor)
        return tensors, first_of

    def _extra(self) -> dict[str, Any]:
        """What `get_extra_state` of its modules gives, by name."""
        state = self._module.state_dict(keep_vars=True)
        return {
            name: value for name, value in state.items() if name.endswith(_EXTRA) or not isinstance(value, torch.Tensor)
        }

    def capture(self, handed: Mapping[str, Any] | None = None) -> Captured:
        tensors, first_of = self._tensors()
        leaves: dict[str, Any] = dict(tensors)
        if handed is not None:
            leaves.update(self._checked(handed, tensors, first_of))
        extra = {name: encode(value, leaves, path=(name,)) for name, value in self._extra().items()}
        ties = {name: first for name, first in first_of.items() if name != first}
        frozen = (name for name, tensor in tensors.items() if is_parameter(tensor) and not tensor.requires_grad)
        return Captured(self.kind, leaves, ties, extra, frozenset(frozen))

    def _checked(
        self, handed: Any, tensors: Mapping[str, torch.Tensor], first_of: Mapping[str, str]
    ) -> Mapping[str, Any]:
        if not isinstance(handed, Mapping):
            raise ConfigError(f"{self._name}: expected a mapping by parameter name, not a {type(handed).__name__}")
        if odd := [name for name, leaf in handed.items() if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype")]:
            raise UnsupportedLeafError(f"{self._name}.{odd[0]}", f"a {type(handed[odd[0]]).__name__} is no array")
        given = {name: LeafMeta(tuple(leaf.shape), _dtype_name(leaf), "jax") for name, leaf in handed.items()}
        expected = {name: live_meta(tensors[first_of[name]]) for name in given if name in first_of}
        if problems := compare_leaves(self._name, expected, given):
            raise MismatchError("the state handed to save", problems)
        leaves: dict[str, Any] = {}
        for name, leaf in handed.items():
            if leaves.setdefault(first_of[name], leaf) is not leaf:
                raise ConfigError(
                    f"{self._name}: {name} is tied to {first_of[name]}, but was handed over as another array; hand "
                    "over one of them"
                )
        return leaves

    def plan(self, saved: ItemMeta, rules: ShardingRules | None, request: Request) -> ItemPlan:
        plan = ItemPlan()
        tensors, first_of = self._tensors()
        values = saved.values or {}
        of_values = {name: _leaf_names(value) for name, value in values.items()}
        named = {leaf: leaf for leaf in saved.leaves.keys() - set().union(*of_values.values())}
        stored = selected(self._name, {**dict(sorted(named.items())), **saved.ties}, request)
        first_of = {
            name: first
            for name, first in first_of.items()
            if request.selects(self._name, name) and (name in stored or name not in request.optional)
        }
        live = {name: self._expected(name, tensors[first], rules, plan) for name, first in first_of.items()}
        found = {name: saved.leaves[leaf] for name, leaf in stored.items()}
        plan.problems += compare_leaves(self._name, live, found, cast=request.cast)
        plan.problems += compare_ties(self._name, first_of, stored)
        self._plan_values(plan, selected(self._name, {name: name for name in values}, request), request)
        if plan.problems and request.strict:
            return plan
        plan.match(live, stored, saved)
        plan.sources = {first_of[name]: leaf for name, leaf in plan.sources.items()}
        shardings = target_shardings(tensors, rules, host=True)
        plan.targets = {leaf: shardings[first] for first, leaf in plan.sources.items()}
        for leaf in set().union(*(of_values[name] for name in plan.values.values())):
            plan.targets[leaf] = None if saved.leaves[leaf].residence == "host" else default_device()
        return plan

    def _plan_values(self, plan: ItemPlan, stored: Mapping[str, str], request: Request) -> None:
        live = [name for name in self._extra() if request.selects(self._name, name)]
        plan.problems += compare_values(self._name, live, stored)
        plan.values = {name: stored[name] for name in live if name in stored}

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

    def apply(self, saved: ItemMeta, plan: ItemPlan, arrays: Mapping[str, Array], undo: ExitStack) -> None:
        tensors, _ = self._tensors()
        for name, leaf in plan.sources.items():
            settle(tensors[name], arrays[leaf], undo)
        for name, stored in plan.values.items():
            owner = self._module.get_submodule(name.rpartition(".")[0])
            undo.callback(owner.set_extra_state, owner.get_extra_state())
            owner.set_extra_state(decode(saved.values[stored], arrays))


_EXTRA = "_extra_state"


def is_parameter(tensor: torch.Tensor) -> bool:
    """Also one that is a torchax tensor."""
    return isinstance(tensor, torch.nn.Parameter)


def _dtype_name(leaf: Any) -> str:
    return dtype_name(live_dtype(leaf) if isinstance(leaf, torch.Tensor) else np.dtype(leaf.dtype))


def _leaf_names(json: Json) -> set[str]:
    """The names of all leaves that an encoded value refers to."""
    names: dict[str, None] = {}

    class _Recorder(dict[str, Any]):
        def __missing__(self, name: str) -> None:
            names[name] = None

    decode(json, _Recorder())
    return set(names)
