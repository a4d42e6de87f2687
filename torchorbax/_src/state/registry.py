"""Which class saves which object."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Any

import torch

from torchorbax._src.format.manifest import ITEM_NAME
from torchorbax._src.state.item import RNG, Item
from torchorbax._src.state.modules import ModuleItem
from torchorbax._src.state.optax_optimizers import OptaxItem
from torchorbax._src.state.pytrees import PytreeItem
from torchorbax._src.state.rng import RngItem
from torchorbax._src.state.stateful import ObjectItem
from torchorbax._src.state.torch_optimizers import TorchOptimizerItem
from torchorbax._src.state.torchmetrics import Metrics, is_metric
from torchorbax._src.tensors.optimizers import OptaxOptimizer
from torchorbax.errors import ConfigError

_RESERVED = ("manifest", "metrics", "default", "_CHECKPOINT_METADATA", "commit_success.txt", RNG)


def items_of(state: MutableMapping[str, Any], *, rng: bool) -> dict[str, Item]:
    """One item for every entry of `state`, and one for the random number generators.

    A list, tuple or dict that holds modules, optimizers or objects with `state_dict` becomes an item for each of its
    entries: `model.0`, `model.1`.

    Raises:
        ConfigError: a name that no item can have, or an optimizer of parameters that no module in `state` has.
    """
    found = dict(_entries(state))
    modules = {name: value for name, (_, _, value) in found.items() if _is_module(value)}
    items = {name: _item(name, slot, key, value, modules) for name, (slot, key, value) in found.items()}
    if rng:
        items[RNG] = RngItem(RNG)
    return items


def objects_in(value: Any) -> Iterator[Any]:
    """`value`, or what it holds if it is a list, tuple or dict of objects."""
    if _holds_objects(value):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from objects_in(entry)
    else:
        yield value


def _entries(slot: Any, prefix: str = "") -> Iterator[tuple[str, tuple[Any, Any, Any]]]:
    """Item names, with the container and the key that the value has in it."""
    seen: set[str] = set()
    for key, value in slot.items() if isinstance(slot, Mapping) else enumerate(slot):
        name = f"{prefix}{key}"
        if (not prefix and not isinstance(key, str)) or not ITEM_NAME.fullmatch(name) or name in _RESERVED:
            raise ConfigError(
                f"{name if prefix else key!r} cannot name an item: use letters, digits, '_', '-' and '.', and none of "
                f"{_RESERVED}"
            )
        for one, entry in _entries(value, f"{name}.") if _holds_objects(value) else [(name, (slot, key, value))]:
            if one in seen:
                raise ConfigError(f"two entries of the state would both be called {one!r}")
            seen.add(one)
            yield one, entry


def _holds_objects(value: Any) -> bool:
    if not isinstance(value, dict | list | tuple):
        return False
    entries = value.values() if isinstance(value, dict) else value
    return any(_is_object(entry) or _holds_objects(entry) for entry in entries)


def _is_object(value: Any) -> bool:
    return isinstance(value, OptaxOptimizer) or (
        callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))
    )


def _is_module(value: Any) -> bool:
    return isinstance(value, torch.nn.Module) and not is_metric(value)


def _item(name: str, slot: Any, key: Any, value: Any, modules: Mapping[str, torch.nn.Module]) -> Item:
    if is_metric(value):
        return ObjectItem(name, Metrics(value))
    if isinstance(value, torch.nn.Module):
        return ModuleItem(name, value)
    if isinstance(value, torch.optim.Optimizer):
        return TorchOptimizerItem(name, value, modules)
    if isinstance(value, OptaxOptimizer):
        return OptaxItem(name, value)
    return ObjectItem(name, value) if _is_object(value) else PytreeItem(name, slot, key)
