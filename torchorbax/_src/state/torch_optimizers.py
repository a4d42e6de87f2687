"""Optimizers as items: state and hyperparameters keyed by parameter name, never by index."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack, suppress
from typing import Any, ClassVar

import torch
from jax.sharding import Sharding

from torchorbax._src.arrays.dtypes import BY_NAME
from torchorbax._src.arrays.leaves import Array
from torchorbax._src.arrays.sharding_rules import ShardingRules
from torchorbax._src.format.manifest import ItemMeta, LeafMeta
from torchorbax._src.format.values import StoredLeaf, built, how_built
from torchorbax._src.state.compare import compare_leaves
from torchorbax._src.state.item import Captured, ItemPlan, NotReadyError, calling
from torchorbax._src.state.live_leaves import as_typed, on_their_side
from torchorbax._src.state.merge import Merge
from torchorbax._src.state.request import Request, selected
from torchorbax._src.state.sharing import Restoring, containers_among, leaves_among
from torchorbax._src.state.torch_optimizer_tree import (
    anywhere,
    beside,
    checked_tree,
    described,
    leaves_in,
    placed_meta,
    reset,
    short_name,
)
from torchorbax._src.state.values import decode, encode
from torchorbax._src.tensors.placement import target_shardings
from torchorbax.errors import ConfigError, Problem

_OTHERS = "*others*"
"""Among the names of a plan's values: what belongs to no parameter is restored as well."""
_UNMOVED = "*unmoved*"
"""The same: all parameters are on the side, jax or the host, that they were on when saved."""
_WHOSE = ("params", "param_names")
"""Entries of a group that say whose it is."""


class TorchOptimizerItem:
    """A `torch.optim` optimizer: `weight.exp_avg` and the like as leaves, the groups' hyperparameters with the
    manifest.

    A step says which groups the program began with. A program that begins with the same has been built the same, and
    gets back the groups as they were when it was saved. Any other must have the same groups.

    Args:
        name: the item's name.
        optimizer: the optimizer.
        modules: all modules that are saved, by item.
        by_rules: those of them that sharding rules are for.

    Raises:
        ConfigError: it has parameters that belong to none of the modules, or could never be restored from what it is
            saved as.
    """

    kind: ClassVar[str] = "torch.optim"

    def __init__(
        self,
        name: str,
        optimizer: torch.optim.Optimizer,
        modules: Mapping[str, torch.nn.Module],
        by_rules: Collection[str] = (),
    ) -> None:
        self._name = name
        self._optimizer = optimizer
        self._modules = modules
        self._by_rules = by_rules
        # A parameter of the one module is called as it is there; of several, with the item's name in front.
        self._only_module: str | None = None
        self._group_names(self._names())  # raises if some are of none
        owners = self._owners()
        items = {owners[id(param)][0] for group in optimizer.param_groups for param in group["params"]}
        if len(items) == 1:
            self._only_module = items.pop()
        self._groups_at_start = self._group_names(self._names())
        self._check_state_dict()

    # ----------------------------------------------------------------------------------------------------------- names

    def _owners(self) -> dict[int, tuple[str, str]]:
        """For every parameter of the modules, by id, its item and its name there."""
        owners: dict[int, tuple[str, str]] = {}
        for item, module in self._modules.items():
            for name, param in module.named_parameters():
                owners.setdefault(id(param), (item, name))
        return owners

    def _check_state_dict(self) -> None:
        """See that its `state_dict` has nothing besides what is saved.

        Raises:
            ConfigError: it has.
        """
        customized = type(self._optimizer).state_dict is not torch.optim.Optimizer.state_dict
        if not customized and not self._optimizer._optimizer_state_dict_post_hooks:
            return
        with suppress(NotReadyError), calling(self._name, f"state_dict of {type(self._optimizer).__name__}"):
            if further := sorted(map(str, self._optimizer.state_dict().keys() - {"state", "param_groups"})):
                raise ConfigError(
                    f"{self._name}: the state_dict of {type(self._optimizer).__name__} has {', '.join(further)} "
                    "besides state and param_groups, which would not be saved; keep it in optimizer.state, or hand its "
                    "owner to resume in state="
                )

    def _names(self) -> dict[int, str]:
        """The names of all parameters that it could have, by id."""
        owners = self._owners().items()
        if self._only_module is not None:
            return {param: name for param, (item, name) in owners if item == self._only_module}
        return {param: f"{item}.{name}" for param, (item, name) in owners}

    def _group_names(self, names: Mapping[int, str]) -> list[list[str]]:
        """The names of the parameters of each group.

        Raises:
            ConfigError: some belong to no module, or to another than the optimizer has had so far.
        """
        params = [param for group in self._groups for param in group["params"]]
        if strangers := [param for param in params if id(param) not in names]:
            if owner := self._owners().get(id(strangers[0])):
                raise ConfigError(
                    f"{self._name}: the optimizer has got parameters of {owner[0]} since the run was opened; close the "
                    "run and open another with the optimizer as it is now"
                )
            raise ConfigError(
                f"{self._name}: {len(strangers)} of the optimizer's {len(params)} parameters belong to no model that "
                "is saved. Was the optimizer built for another model, or before model.to('jax'), which makes new "
                "parameters? Build it afterwards, or move both with torchorbax.place_(model, optimizer)."
            )
        return [[names[id(param)] for param in group["params"]] for group in self._groups]

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    def _params(self) -> dict[str, torch.Tensor]:
        """The parameters of its groups."""
        names = self._names()
        return {names[id(param)]: param for group in self._groups for param in group["params"]}

    # ------------------------------------------------------------------------------------------------------------ save

    def capture(self, handed: Any = None) -> Captured:
        if handed is not None:
            raise ConfigError(
                f"{self._name}: a torch.optim optimizer is saved from the live object; nothing can be handed over"
            )
        names = self._names()
        groups = self._group_names(names)
        params = {names[id(param)]: param for group in self._groups for param in group["params"]}
        state: dict[str, Any] = {}
        others: dict[Any, Any] = {}
        for key, entries in self._optimizer.state.items():
            if not isinstance(key, torch.Tensor):
                others[key] = entries
            elif id(key) in names:
                state[names[id(key)]] = entries
                params.setdefault(names[id(key)], key)
            else:
                raise ConfigError(
                    f"{self._name}: the optimizer's state has an entry for a tensor of shape {tuple(key.shape)} that "
                    "is no parameter of a model that is saved; key it by a name"
                )
        tree = {
            "class": type(self._optimizer).__name__,
            "state": state,
            "param_groups": [{**group, "params": mine} for group, mine in zip(self._groups, groups, strict=True)],
            # What the state belongs to: its own shapes tell only part of that (Adafactor's rows and columns).
            "params": {name: described(param) for name, param in params.items()},
            **({"others": others} if others else {}),
        }
        leaves: dict[str, Any] = {}
        containers: list[Any] = []
        values = encode(tree, leaves, short_name, (self._name,), containers=containers)
        if own := [name for name, leaf in leaves.items() if id(leaf) in names]:
            raise ConfigError(
                f"{self._name}: {own[0]} is a parameter of the model itself, and would come back apart from it; "
                "keep a clone in the optimizer's state"
            )
        return Captured(self.kind, leaves, values=built(self._groups_at_start, values), containers=containers)

    # --------------------------------------------------------------------------------------------------------- restore

    def plan(self, saved: ItemMeta, rules: ShardingRules | None, request: Request) -> ItemPlan:
        tree = checked_tree(decode(saved.values, {name: StoredLeaf(name) for name in saved.leaves}))
        kind = type(self._optimizer).__name__
        if tree["class"] != kind:  # whose state and hyperparameters would mean something else, or nothing
            problem = Problem("placement", self._name, "the optimizer", f"a {kind}", f"a {tree['class']}")
            return ItemPlan(problems=[problem])
        stored = selected(self._name, {name: name for name in tree["params"]}, request)
        params = self._restored_params(tree, saved, request)
        placed = self._placed(params, rules)
        live = {
            name: placed_meta(name, param, placed[name])
            for name, param in params.items()
            if request.selects(self._name, name)
        }
        plan = ItemPlan()
        if not self._takes_groups(saved, request):
            plan.problems += self._compare_groups(tree["param_groups"], live, stored)
        metas = {name: LeafMeta(tuple(one[0]), one[1], "jax") for name, one in tree["params"].items()}
        both = {name: metas[stored[name]] for name in live if name in stored}
        plan.problems += compare_leaves(self._name, {name: live[name] for name in both}, both, cast=request.cast)
        if plan.problems and request.strict:
            return plan
        bad = {problem.name for problem in plan.problems}
        plan.values = {name: stored[name] for name in both if name not in bad}
        if request.selects(self._name):
            plan.values[_OTHERS] = ""
        self._plan_targets(plan, tree, saved, placed, {name: (both[name], live[name]) for name in both})
        return plan

    def _takes_groups(self, saved: ItemMeta, request: Request) -> bool:
        """Are the groups taken as they were saved?"""
        return how_built(saved.values) == self._groups_at_start and request.rename is None

    def _restored_params(self, tree: Mapping[str, Any], saved: ItemMeta, request: Request) -> dict[str, torch.Tensor]:
        """The parameters whose state may be restored: those of its groups, and those that it had when saved."""
        params = self._params()
        if self._takes_groups(saved, request):
            params |= {name: param for name, param in self._by_name().items() if name in tree["params"]}
        return params

    def _by_name(self) -> dict[str, torch.Tensor]:
        names = self._names()
        params = (param for module in self._modules.values() for param in module.parameters())
        return {names[id(param)]: param for param in params if id(param) in names}

    def _placed(self, params: Mapping[str, torch.Tensor], rules: ShardingRules | None) -> dict[str, Sharding | None]:
        """Where the parameters are, or will be by the rules for their module; None for host memory."""
        owners = self._owners()
        placed: dict[str, Sharding | None] = {}
        for item in self._modules:
            full = {owners[id(param)][1]: name for name, param in params.items() if owners[id(param)][0] == item}
            mine = {own: params[name] for own, name in full.items()}
            shardings = target_shardings(mine, rules if item in self._by_rules else None, host=True)
            placed |= {full[own]: sharding for own, sharding in shardings.items()}
        return placed

    def _plan_targets(
        self,
        plan: ItemPlan,
        tree: Mapping[str, Any],
        saved: ItemMeta,
        placed: Mapping[str, Sharding | None],
        metas: Mapping[str, tuple[LeafMeta, LeafMeta]],
    ) -> None:
        """Where each stored leaf goes that is needed: beside its parameter, or in host memory."""
        moved = self._have_moved(tree, placed)
        if not moved:
            plan.values[_UNMOVED] = ""
        for name, owner in plan.values.items():
            if name not in metas:
                continue
            was, now = metas[name]
            state = tree["state"].get(owner, {})
            for key, entry in state.items() if isinstance(state, dict) else [("", state)]:
                for leaf in leaves_in(entry):
                    meta = saved.leaves[leaf]
                    plan.targets.setdefault(leaf, beside(meta, placed[name], was.shape, moved))
                    counts = key == "step"  # float32 whatever the parameter is, as torch's load_state_dict has it
                    if was.dtype != now.dtype and meta.dtype == was.dtype and not counts:
                        plan.dtypes[leaf] = BY_NAME[now.dtype]
        further = [group for _, group in self._groups_to_restore(tree, plan)]
        for leaf in leaves_in([further, tree.get("others") if _OTHERS in plan.values else None]):
            plan.targets.setdefault(leaf, None if saved.leaves[leaf].residence == "host" else anywhere(placed))

    @staticmethod
    def _have_moved(tree: Mapping[str, Any], placed: Mapping[str, Sharding | None]) -> bool:
        """Do parameters go to another side, jax or the host, than they were on when saved? Their state goes along."""
        sides = {name: one[2] if len(one) > 2 else None for name, one in tree["params"].items()}
        return any(sides.get(name) != ("host" if one is None else "jax") for name, one in placed.items())

    def _groups_to_restore(
        self, tree: Mapping[str, Any], plan: ItemPlan
    ) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """The live groups whose hyperparameters are restored, with the stored ones: where a parameter of theirs is."""
        if len(tree["param_groups"]) != len(self._groups) and _OTHERS in plan.values:
            news = [dict(self._optimizer.defaults) for _ in tree["param_groups"][len(self._groups) :]]
            pairs = list(zip([*self._groups, *news], tree["param_groups"], strict=False))
        else:
            pairs = list(zip(self._groups, tree["param_groups"], strict=False))  # strict=False has fewer
        restored = set(plan.values.values())
        return [(live, saved) for live, saved in pairs if not saved["params"] or restored & set(saved["params"])]

    def _compare_groups(
        self, saved: list[dict[str, Any]], wanted: Collection[str], stored: Mapping[str, str]
    ) -> list[Problem]:
        live = self._group_names(self._names())
        group_of_live = {name: index for index, group in enumerate(live) for name in group if name in wanted}
        group_of = {name: index for index, group in enumerate(saved) for name in group["params"]}
        group_of_saved = {name: group_of[owner] for name, owner in stored.items() if owner in group_of}
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
        if len(live) != len(saved) and len(wanted) == len(self._params()):
            problems.append(Problem("groups", self._name, "param_groups", f"{len(live)} of them", str(len(saved))))
        return problems

    def apply(
        self, saved: ItemMeta, plan: ItemPlan, arrays: Mapping[str, Array], undo: ExitStack, restoring: Restoring
    ) -> None:
        by_name = self._by_name()
        if _UNMOVED in plan.values:
            arrays = on_their_side(saved, arrays)
        given = restoring.given(saved)
        loaded = {**dict.fromkeys(saved.leaves), **as_typed(saved, arrays), **leaves_among(given)}
        objects: dict[str | int, Any] = {}
        tree = decode(saved.values, loaded, containers_among(given), objects)
        merge = Merge(undo, restoring, given.values())
        state = self._optimizer.state
        undo.callback(reset, state, dict(state))
        for name, owner in plan.values.items():
            if name == _OTHERS:
                self._restore_others(tree.get("others", {}), merge)
            elif name == _UNMOVED:
                continue
            elif owner in tree["state"]:
                state[by_name[name]] = merge.into(state.get(by_name[name]), tree["state"][owner])
            else:
                state.pop(by_name[name], None)
        self._restore_groups(tree, plan, saved, merge, undo)
        restoring.finish(self._name, merge.became(objects))

    def _restore_others(self, others: Mapping[Any, Any], merge: Merge) -> None:
        state = self._optimizer.state
        for key in [key for key in state if not isinstance(key, torch.Tensor) and key not in others]:
            del state[key]
        for key, value in others.items():
            state[key] = merge.into(state.get(key), value)

    def _restore_groups(
        self, tree: Mapping[str, Any], plan: ItemPlan, saved: ItemMeta, merge: Merge, undo: ExitStack
    ) -> None:
        pairs = self._groups_to_restore(tree, plan)
        whole = _OTHERS in plan.values and how_built(saved.values) == self._groups_at_start
        by_name = self._by_name()
        for group, stored in pairs:
            undo.callback(reset, group, dict(group))
            new = {key: merge.into(group.get(key), value) for key, value in stored.items() if key not in _WHOSE}
            if whole:
                params = [by_name[name] for name in stored["params"]]
                named = {"param_names": stored["param_names"]} if "param_names" in stored else {}
                new = {"params": params, **named, **new}
                for key in group.keys() - new.keys() - self._optimizer.defaults.keys():
                    del group[key]
            group.update(new)
        if whole:
            undo.callback(self._groups.__setitem__, slice(None), list(self._groups))
            self._groups[:] = [group for group, _ in pairs]
