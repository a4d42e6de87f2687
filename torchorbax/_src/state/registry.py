"""Which class saves which object."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import ExitStack, suppress
from typing import Any

import numpy as np
import torch

from torchorbax._src.arrays.leaves import Array
from torchorbax._src.arrays.sharding_rules import ShardingRules
from torchorbax._src.format.manifest import ITEM_NAME, ItemMeta
from torchorbax._src.state.generators import Generator, is_generator
from torchorbax._src.state.item import RNG, Captured, Item, ItemPlan, NotReadyError
from torchorbax._src.state.modules import ModuleItem
from torchorbax._src.state.optax_optimizers import OptaxItem
from torchorbax._src.state.pytrees import PytreeItem
from torchorbax._src.state.request import Request
from torchorbax._src.state.rng import RngItem
from torchorbax._src.state.sharing import Restoring, in_order
from torchorbax._src.state.stateful import ObjectItem
from torchorbax._src.state.torch_optimizers import TorchOptimizerItem
from torchorbax._src.state.torchmetrics import Metrics, is_metric
from torchorbax._src.tensors import torchax_tensors
from torchorbax._src.tensors.live import live_array
from torchorbax._src.tensors.optimizers import OptaxOptimizer
from torchorbax.errors import ConfigError, UnsupportedLeafError

_RESERVED = ("manifest", "metrics", "default", "_CHECKPOINT_METADATA", "commit_success.txt", RNG)


def items_of(state: MutableMapping[str, Any], *, rng: bool) -> dict[str, Item]:
    """One item for every entry of `state`, and one for the random number generators.

    A list, tuple or dict that holds modules, optimizers, generators or objects with `state_dict` becomes an item for
    each of its entries: `model.0`, `model.1`.

    Raises:
        ConfigError: a name that no item can have, an optimizer of parameters that no module in `state` has, or an
            object that could never be restored.
        UnsupportedLeafError: an object that has something that could never be saved.
    """
    found = dict(_entries(state))
    modules = {name: places[-1].entry for name, places in found.items() if _is_module(places[-1].entry)}
    by_rules = _placed_by_rules(modules)
    items: dict[str, Item] = {}
    for name, places in found.items():
        items[name] = _Kept(name, _item(name, places[-1], modules, by_rules), places)
    for name, one in items.items():
        if not isinstance(found[name][-1].entry, torch.utils.data.DataLoader):  # which would start its workers
            _check_savable(name, one)
    if rng:
        items[RNG] = RngItem(RNG)
    return items


def _check_savable(name: str, item: Item) -> None:
    """See that what an item has now could be saved, as far as it is ready and has values.

    Raises:
        ConfigError, UnsupportedLeafError: it could not.
    """
    with suppress(NotReadyError):  # it may be ready when something is to be saved
        for leaf_name, leaf in item.capture().leaves.items():
            if isinstance(leaf, np.ndarray) or (isinstance(leaf, torch.Tensor) and not _is_elsewhere(leaf)):
                live_array(f"{name}.{leaf_name}" if leaf_name else name, leaf)


def _is_elsewhere(tensor: torch.Tensor) -> bool:
    """Is a tensor on jax, or still without values?"""
    return torchax_tensors.is_torchax(tensor) or tensor.is_meta


class _Place:
    """A place in a container of the user's, and what the run was opened with there.

    Attributes:
        slot: the container.
        key: which of its entries.
        entry: the entry.
    """

    def __init__(self, slot: Any, key: Any) -> None:
        self.slot = slot
        self.key = key
        self.entry = slot[key]
        self._count = len(slot)

    def has_its_entries(self) -> bool:
        """Are there as many entries as there were, and one here?"""
        there = self.key in self.slot if isinstance(self.slot, Mapping) else True
        return len(self.slot) == self._count and there

    def is_unchanged(self) -> bool:
        """Is the very object here that was here?"""
        return self.has_its_entries() and self.slot[self.key] is self.entry


class _Kept:
    """An item in containers of the user's, which must keep the entries that the run was opened with.

    A tree may become another one. Any other object must stay the one that it is, for the item refers to it.

    Raises:
        ConfigError: the innermost container is a tuple, and the value one that a restore would have to replace.
    """

    def __init__(self, name: str, item: Item, places: tuple[_Place, ...]) -> None:
        self.kind = item.kind
        self._name = name
        self._item = item
        self._places = places
        slot, entry = places[-1].slot, places[-1].entry
        mutable = not isinstance(item, PytreeItem) or isinstance(entry, list | dict | torch.Tensor | np.ndarray)
        if isinstance(slot, tuple) and not mutable:
            raise ConfigError(
                f"{name}: a {type(entry).__name__} beside objects in a tuple cannot be replaced when it is restored; "
                "use a list or a dict"
            )

    def _is_there(self) -> bool:
        *above, last = self._places
        here = last.has_its_entries() if isinstance(self._item, PytreeItem) else last.is_unchanged()
        return here and all(place.is_unchanged() for place in above)

    def capture(self, handed: Any = None) -> Captured:
        if not self._is_there():
            raise ConfigError(
                f"{self._name}: the container that it is in has got other entries since the run was opened, so the "
                "same program could not restore it. Close the run and open another with what is there now"
            )
        return self._item.capture(handed)

    def plan(self, saved: ItemMeta, rules: ShardingRules | None, request: Request) -> ItemPlan:
        return self._item.plan(saved, rules, request)

    def apply(
        self, saved: ItemMeta, plan: ItemPlan, arrays: Mapping[str, Array], undo: ExitStack, restoring: Restoring
    ) -> None:
        self._item.apply(saved, plan, arrays, undo, restoring)


def objects_in(value: Any) -> Iterator[Any]:
    """`value`, or what it holds if it is a list, tuple or dict of objects."""
    if _holds_objects(value):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from objects_in(entry)
    else:
        yield value


def _entries(slot: Any, prefix: str = "", above: tuple[_Place, ...] = ()) -> Iterator[tuple[str, tuple[_Place, ...]]]:
    """Item names, with the places that lead to the value, the innermost last."""
    seen: set[str] = set()
    for key, value in slot.items() if isinstance(slot, Mapping) else enumerate(slot):
        name = f"{prefix}{key}"
        if (not prefix and not isinstance(key, str)) or not ITEM_NAME.fullmatch(name) or name in _RESERVED:
            raise ConfigError(
                f"{name if prefix else key!r} cannot name an item: use letters, digits, '_', '-' and '.', and none of "
                f"{_RESERVED}"
            )
        places = (*above, _Place(slot, key))
        if any(value is place.slot for place in places):
            raise UnsupportedLeafError(name, f"a {type(value).__qualname__} contains itself")
        for one, found in _entries(value, f"{name}.", places) if _holds_objects(value) else [(name, places)]:
            if one in seen:
                raise ConfigError(f"two entries of the state would both be called {one!r}")
            seen.add(one)
            yield one, found


def _holds_objects(value: Any, above: tuple[Any, ...] = ()) -> bool:
    if not isinstance(value, dict | list | tuple) or any(value is one for one in above):
        return False
    entries = value.values() if isinstance(value, dict) else value
    return any(_is_object(entry) or _holds_objects(entry, (*above, value)) for entry in entries)


def _is_object(value: Any) -> bool:
    return (
        isinstance(value, OptaxOptimizer)
        or is_generator(value)
        or (callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None)))
    )


def _is_module(value: Any) -> bool:
    return isinstance(value, torch.nn.Module) and not is_metric(value)


def _placed_by_rules(modules: Mapping[str, torch.nn.Module]) -> frozenset[str]:
    """The modules that sharding rules are for: those called `model`, or all if none is.

    Others, such as an average of the weights beside the model, live where the user has put them.
    """
    models = frozenset(name for name in modules if name.partition(".")[0] == "model")
    return models or frozenset(modules)


def _item(name: str, place: _Place, modules: Mapping[str, torch.nn.Module], by_rules: frozenset[str]) -> Item:
    value = place.entry
    if is_metric(value):
        return ObjectItem(name, Metrics(value))
    if isinstance(value, torch.nn.Module):
        names = in_order(dict.fromkeys(modules, ModuleItem))
        before = {one: modules[one] for one in names[: names.index(name)]}
        return ModuleItem(name, value, by_rules=name in by_rules, before=before)
    if isinstance(value, torch.optim.Optimizer):
        return TorchOptimizerItem(name, value, modules, by_rules)
    if isinstance(value, OptaxOptimizer):
        return OptaxItem(name, value, by_rules=any(modules[one] is value.model for one in by_rules))
    if is_generator(value):
        return ObjectItem(name, Generator(value))
    return ObjectItem(name, value) if _is_object(value) else PytreeItem(name, place.slot, place.key)
