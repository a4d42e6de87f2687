"""A module's parameters and buffers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack, suppress
from typing import Any, ClassVar

import numpy as np
import torch

from torchorbax._src.arrays.dtypes import BY_NAME, NUMPY_TO_TORCH, dtype_name
from torchorbax._src.arrays.leaves import Array
from torchorbax._src.arrays.sharding_rules import ShardingRules
from torchorbax._src.format.manifest import ItemMeta, LeafMeta
from torchorbax._src.format.values import Json, LayoutError, leaves_in
from torchorbax._src.state.compare import compare_leaves, compare_ties, compare_values
from torchorbax._src.state.item import Captured, ItemPlan, NotReadyError, below_item, calling
from torchorbax._src.state.live_leaves import as_typed, live_meta, on_their_side
from torchorbax._src.state.module_names import buffer_slots, extra_state_owners, own_tensors, saved_names
from torchorbax._src.state.request import Request, selected
from torchorbax._src.state.sharing import Restoring, leaves_among
from torchorbax._src.state.values import decode, encode
from torchorbax._src.tensors.live import live_dtype, settle, tensor_of
from torchorbax._src.tensors.placement import placed_dtype, target_shardings
from torchorbax.errors import ConfigError, MismatchError, Problem, UnsupportedLeafError

_FILLED, _EMPTIED = "*filled*", "*emptied*"
"""Among the values: buffers that were None when the run was opened and are tensors now; and the other way round."""
_Outline = tuple[dict[str, tuple[Any, ...]], dict[str, str]]
"""Shapes and dtypes by the first name of a tensor, and for every name the first."""


class ModuleItem:
    """A module: parameters and persistent buffers by name, tied ones once; extra state with the manifest.

    Args:
        name: the item's name.
        module: the module.
        by_rules: do sharding rules say where it belongs? Otherwise it stays where it is.
        before: the modules that are saved before it, by item, with which it may share tensors.

    Raises:
        ConfigError: it could never be restored from what it is saved as.
    """

    kind: ClassVar[str] = "module"

    def __init__(
        self,
        name: str,
        module: torch.nn.Module,
        *,
        by_rules: bool = True,
        before: Mapping[str, torch.nn.Module] | None = None,
    ) -> None:
        self._name = name
        self._module = module
        self._by_rules = by_rules
        self._before = dict(before or {})
        _check_methods(name, module)
        self._saved_as: dict[str, str] | None = None
        self._none_at_start = {name for name, (slot, key) in buffer_slots(module).items() if slot[key] is None}
        self._at_start: _Outline | None = None
        with suppress(NotReadyError):  # its hooks may be when something is to be saved or restored
            self._at_start = self._outline(*self._tensors())

    def _tensors(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The unique live tensors by the first of their names, and for every name the first name of its tensor."""
        tensors: dict[str, torch.Tensor] = {}
        first_of: dict[str, str] = {}
        first_by_id: dict[int, str] = {}
        if self._saved_as is None:
            self._saved_as = saved_names(self._name, self._module)
        for own_name, tensor in own_tensors(self._module):
            name = self._saved_as.get(own_name, own_name)
            if torch.nn.parameter.is_lazy(tensor):
                raise ConfigError(f"{self._name}: {name} has no shape yet; run one batch through the lazy module first")
            first_of[name] = first_by_id.setdefault(id(tensor), name)
            tensors.setdefault(first_of[name], tensor)
        return tensors, first_of

    def _shared(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
        """The tensors that are those of a module before it, by name, and that module's item."""
        items: dict[int, str] = {}
        for item, module in self._before.items():
            for _, tensor in own_tensors(module):
                items.setdefault(id(tensor), item)
        return {name: items[id(tensor)] for name, tensor in tensors.items() if id(tensor) in items}

    def _extra(self) -> dict[str, Any]:
        """What `get_extra_state` of its modules gives, by name."""
        extra = {}
        for name, owner in extra_state_owners(self._module).items():
            with calling(self._name, f"get_extra_state of {type(owner).__name__}"):
                extra[name] = owner.get_extra_state()
        return extra

    # ------------------------------------------------------------------------------------------------------------ save

    def capture(self, handed: Mapping[str, Any] | None = None) -> Captured:
        tensors, first_of = self._tensors()
        now = self._outline(tensors, first_of)
        self._at_start = self._at_start or now
        changed = {} if now == self._at_start else self._changed_buffers(self._at_start, now)
        leaves: dict[str, Any] = dict(tensors)
        if handed is not None:
            leaves.update(self._checked(handed, tensors, first_of))
        extra = {name: encode(value, leaves, below_item, (self._name, name)) for name, value in self._extra().items()}
        ties = {name: first for name, first in first_of.items() if name != first}
        frozen = (name for name, tensor in tensors.items() if is_parameter(tensor) and not tensor.requires_grad)
        return Captured(self.kind, leaves, ties, {**extra, **changed}, frozenset(frozen))

    def _outline(self, tensors: Mapping[str, torch.Tensor], first_of: Mapping[str, str]) -> _Outline:
        """What must not change, or a fresh module could not take it: names, shapes, dtypes and ties."""
        described = {
            name: (tuple(tensor.shape), torch.int32 if tensor.dtype is torch.int64 else tensor.dtype)  # as on jax
            for name, tensor in tensors.items()
        }
        shared = {name: f"{name} of {item}" for name, item in self._shared(tensors).items()}
        return described, {**first_of, **shared}

    def _changed_buffers(self, at_start: _Outline, at_save: _Outline) -> dict[str, list[str]]:
        """The buffers that were None and are tensors now, or the other way round.

        Raises:
            ConfigError: something else has changed.
        """
        ties_at_start, ties = at_start[1], at_save[1]
        slots = buffer_slots(self._module)
        new = {name for name in ties if name not in ties_at_start and name in self._none_at_start}
        filled = [name for name in ties if name in new and ties[name] in new]
        gone = [name for name in ties_at_start if name not in ties]
        emptied = [name for name in gone if name in slots and slots[name][0][slots[name][1]] is None]
        if _without(at_start, emptied) != _without(at_save, filled):
            self._refuse_change(at_start, at_save)
        return {_FILLED: filled, _EMPTIED: emptied}

    def _refuse_change(self, at_start: _Outline, at_save: _Outline) -> None:
        (start, ties_at_start), (now, ties) = at_start, at_save
        changes = [f"{name} has been added" for name in now if name not in start]
        changes += [f"{name} is gone" for name in start if name not in now]
        changes += [
            f"{name} was {start[name][1]}{start[name][0]} and is {now[name][1]}{now[name][0]}"
            for name in now
            if name in start and now[name] != start[name]
        ]
        changes += [f"{name} is tied otherwise" for name in ties if ties_at_start.get(name, ties[name]) != ties[name]]
        raise ConfigError(
            f"{self._name}: the module has changed since the run was opened, so the same program could not restore it: "
            f"{', '.join(changes[:5])}{', ...' if len(changes) > 5 else ''}. Close the run and open another with the "
            "module as it is now, and build it like that when the program is started again"
        )

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

    # --------------------------------------------------------------------------------------------------------- restore

    def plan(self, saved: ItemMeta, rules: ShardingRules | None, request: Request) -> ItemPlan:
        rules = rules if self._by_rules else None
        plan = ItemPlan()
        tensors, first_of = self._tensors()
        values = _values_of(saved)
        self._plan_buffers(values.pop(_FILLED, []), values.pop(_EMPTIED, []), tensors, first_of, plan, saved, rules)
        named: dict[str, str] = {}
        for name in [name for name, value in values.items() if name in first_of and _is_leaf(value)]:
            named[name] = values.pop(name)["name"]  # a tensor called like extra state was once taken for that
        of_values = {name: set(leaves_in(value)) for name, value in values.items()}
        named |= {leaf: leaf for leaf in sorted(saved.leaves.keys() - set(named.values()).union(*of_values.values()))}
        stored = selected(self._name, {**named, **saved.ties}, request)
        first_of = {
            name: first
            for name, first in first_of.items()
            if request.selects(self._name, name) and (name in stored or name not in request.optional)
        }
        live = {name: self._expected(name, tensors[first], rules, plan) for name, first in first_of.items()}
        found = {name: saved.leaves[leaf] for name, leaf in stored.items()}
        plan.problems += compare_leaves(self._name, live, found, cast=request.cast)
        plan.problems += compare_ties(self._name, first_of, stored)
        plan.problems += self._compare_shared(tensors, live, stored, saved, request)
        self._plan_values(plan, selected(self._name, {name: name for name in values}, request), request)
        if plan.problems and request.strict:
            return plan
        plan.match(live, stored, saved)
        plan.sources = {first_of[name]: leaf for name, leaf in plan.sources.items()}
        shardings = target_shardings(tensors, rules, host=True)
        plan.targets = {leaf: shardings[first] for first, leaf in plan.sources.items()}
        plan.targets |= dict.fromkeys(set().union(*(of_values.get(name, ()) for name in plan.values.values())))
        return plan

    def _plan_buffers(
        self,
        filled: Collection[str],
        emptied: Collection[str],
        tensors: dict[str, torch.Tensor],
        first_of: dict[str, str],
        plan: ItemPlan,
        saved: ItemMeta,
        rules: ShardingRules | None,
    ) -> None:
        """Buffers that had been made, or set to None, since the saving program opened its run.

        The former get a tensor without values among the live ones, the latter are no longer compared.
        """
        slots = buffer_slots(self._module)
        for name in filled:
            first = saved.ties.get(name, name)
            if name in slots and name not in first_of and first in saved.leaves:
                meta = saved.leaves[first]
                dtype, device = NUMPY_TO_TORCH[BY_NAME[meta.dtype]], "cpu" if rules is None else "meta"
                first_of[name] = first
                tensors.setdefault(first, torch.empty(meta.shape, dtype=dtype, device=device))
        for name in emptied:
            if name in slots and name in first_of:
                del first_of[name]
                plan.values[name] = _EMPTIED

    def _compare_shared(
        self,
        tensors: Mapping[str, torch.Tensor],
        live: Collection[str],
        stored: Mapping[str, str],
        saved: ItemMeta,
        request: Request,
    ) -> list[Problem]:
        """Tensors that are those of another module on one side only, or of different modules."""
        if saved.shared is None:
            return []
        was = {one.here: one.item for one in saved.shared if one.item in self._before and not one.detached}
        now = {name: item for name, item in self._shared(tensors).items() if request.concerns(item)}
        both = {name: was.get(stored[name]) for name in tensors if name in live and name in stored}
        return [
            Problem("ties", self._name, name, _tied_to(now.get(name)), _tied_to(item))
            for name, item in both.items()
            if now.get(name) != item and (item is None or request.concerns(item))
        ]

    def _plan_values(self, plan: ItemPlan, stored: Mapping[str, str], request: Request) -> None:
        live = [name for name in extra_state_owners(self._module) if request.selects(self._name, name)]
        plan.problems += compare_values(self._name, live, stored)
        plan.values |= {name: stored[name] for name in live if name in stored}

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

    def apply(
        self, saved: ItemMeta, plan: ItemPlan, arrays: Mapping[str, Array], undo: ExitStack, restoring: Restoring
    ) -> None:
        tensors, _ = self._tensors()
        typed = as_typed(saved, arrays)
        given = restoring.given(saved)
        slots = buffer_slots(self._module)
        for name, leaf in plan.sources.items():
            if name not in tensors:
                tensors[name] = tensor_of(on_their_side(saved, {leaf: typed[leaf]})[leaf])
                for alias in (name, *(one for one, first in saved.ties.items() if first == leaf)):
                    _put(slots[alias], tensors[name], undo)
            elif given.get(leaf) is not tensors[name]:  # else an item before this one has written it
                settle(tensors[name], typed[leaf], undo)
        became: dict[str | int, Any] = {leaf: tensors[name] for name, leaf in plan.sources.items()}
        owners = extra_state_owners(self._module)
        for name, stored in plan.values.items():
            if stored == _EMPTIED:
                _put(slots[name], None, undo)
                continue
            value = saved.values[stored]
            loaded = on_their_side(saved, {leaf: arrays[leaf] for leaf in leaves_in(value)})
            leaves = {**as_typed(saved, loaded), **leaves_among(given)}
            self._set_extra_state(owners[name], decode(value, leaves, objects=became), undo)
        restoring.finish(self._name, {key: one for key, one in became.items() if isinstance(key, str)})

    def _set_extra_state(self, owner: torch.nn.Module, state: Any, undo: ExitStack) -> None:
        with calling(self._name, f"the extra state of {type(owner).__name__}"):
            undo.callback(owner.set_extra_state, owner.get_extra_state())
            owner.set_extra_state(state)


def _without(outline: _Outline, names: Collection[str]) -> _Outline:
    described, first_of = outline
    return (
        {name: one for name, one in described.items() if name not in names},
        {name: first for name, first in first_of.items() if name not in names},
    )


def _put(slot: tuple[dict[str, torch.Tensor | None], str], buffer: torch.Tensor | None, undo: ExitStack) -> None:
    """Give a buffer's place another content."""
    buffers, key = slot
    undo.callback(buffers.__setitem__, key, buffers[key])
    buffers[key] = buffer


def _tied_to(item: str | None) -> str:
    return "not tied" if item is None else f"tied to a tensor of {item}"


def is_parameter(tensor: torch.Tensor) -> bool:
    """Also one that is a torchax tensor."""
    return isinstance(tensor, torch.nn.Parameter)


def _check_methods(name: str, module: torch.nn.Module) -> None:
    """See that nobody has put something else in the place of a module's methods.

    Raises:
        ConfigError: somebody has.
    """
    methods = ("parameters", "buffers", "named_parameters", "named_buffers", "named_modules", "state_dict")
    if hidden := [method for method in methods if not callable(getattr(module, method, None))]:
        inner = [key for key, child in module._modules.items() if child is not None]
        raise ConfigError(
            f"{name}: {type(module).__name__} has an attribute {hidden[0]!r} in place of the method of that name, as "
            f"wrappers of torchax have; hand over the module inside it ({', '.join(inner)}), whose tensors it uses"
        )


def _values_of(saved: ItemMeta) -> dict[str, Json]:
    """The extra state by name. Raises LayoutError if the manifest has something else in its place."""
    if not isinstance(saved.values, dict | None):
        raise LayoutError("not the values of a module")
    return dict(saved.values or {})


def _is_leaf(value: Any) -> bool:
    return isinstance(value, dict) and value.get("$") == "leaf"


def _dtype_name(leaf: Any) -> str:
    return dtype_name(live_dtype(leaf) if isinstance(leaf, torch.Tensor) else np.dtype(leaf.dtype))
