"""Which class saves which object."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch

from torchorbax.errors import ConfigError
from torchorbax.manifest import ITEM_NAME
from torchorbax.optimizer_state import OptaxItem, TorchOptimizerItem
from torchorbax.optimizers import OptaxOptimizer
from torchorbax.rng import RngItem
from torchorbax.state import Item, ModuleItem, ObjectItem, PytreeItem

RNG = "rng"
_RESERVED = ("manifest", "metrics", "default", RNG)


def items_of(state: MutableMapping[str, Any], *, rng: bool) -> dict[str, Item]:
    """One item for every entry of `state`, and one for the random number generators.

    Raises:
        ConfigError: a name that no item can have, or an optimizer of parameters that no module in `state` has.
    """
    modules = {name: value for name, value in state.items() if isinstance(value, torch.nn.Module)}
    items: dict[str, Item] = {}
    for name, value in state.items():
        if not isinstance(name, str) or not ITEM_NAME.fullmatch(name) or name in _RESERVED:
            raise ConfigError(
                f"{name!r} cannot name an item: use letters, digits, '_', '-' and '.', and none of {_RESERVED}"
            )
        if isinstance(value, torch.nn.Module):
            items[name] = ModuleItem(name, value)
        elif isinstance(value, torch.optim.Optimizer):
            items[name] = TorchOptimizerItem(name, value, modules)
        elif isinstance(value, OptaxOptimizer):
            items[name] = OptaxItem(name, value)
        elif callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None)):
            items[name] = ObjectItem(name, value)
        else:
            items[name] = PytreeItem(name, state)
    if rng:
        items[RNG] = RngItem(RNG)
    return items
