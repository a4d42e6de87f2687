"""All items captured together, with what they share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from torchorbax._src.format.manifest import Shared
from torchorbax._src.state.item import Captured, Item
from torchorbax._src.state.sharing import address_of, in_order, view_of
from torchorbax._src.tensors import torchax_tensors
from torchorbax.errors import ConfigError, TorchorbaxError


def capture_all(items: Mapping[str, Item], handed: Mapping[str, Any]) -> dict[str, Captured]:
    """The live leaves of all items, and what they share.

    Args:
        items: the items.
        handed: trees in place of live values, by item.

    Raises:
        UnsupportedLeafError, MismatchError, ConfigError: as `Item.capture`.
    """
    captured = {name: item.capture(handed.get(name)) for name, item in items.items()}
    if _are_apart(captured):
        return captured
    first: dict[Any, tuple[str, str | int, Any]] = {}
    for name in in_order(captured):
        one = captured[name]
        shared: list[Shared] = []
        objects: dict[str | int, Any] = dict(enumerate(one.containers))
        objects.update(one.leaves)
        for key, value in objects.items():
            if isinstance(value, jax.Array | np.generic):  # immutable
                continue
            item, there, other = first.setdefault(view_of(value), (name, key, value))
            if item != name:
                shared.append(Shared(key, item, there, detached=other is not value))
        if shared:
            captured[name] = replace(one, shared=tuple(shared))
    return captured


def _are_apart(captured: Mapping[str, Captured]) -> bool:
    """Is it plain at a glance that no two items share anything? The full comparison takes microseconds a leaf."""
    found = [{*map(address_of, one.leaves.values()), *map(id, one.containers)} for one in captured.values()]
    return len(set().union(*found)) == sum(map(len, found))


def check_movable(items: Mapping[str, Item]) -> None:
    """See that no tree or optimizer has detached tensors of a model on the CPU, which is to move to jax without them.

    Raises:
        ConfigError: one has.
    """
    try:
        captured = capture_all(items, {})
    except TorchorbaxError:  # not ready yet, or without values: a save will say so
        return
    for name, one in captured.items():
        for shared in one.shared if one.kind in ("pytree", "torch.optim") else ():
            owner = captured[shared.item]
            of_model = owner.kind == "module" and shared.item.partition(".")[0] == "model"
            if shared.detached and of_model and not torchax_tensors.is_torchax(owner.leaves[str(shared.there)]):
                raise ConfigError(
                    f"{name}.{shared.here} has the memory of {shared.item}.{shared.there}, but is another tensor, so "
                    "it would be left behind when shardings move the model to jax devices; put the parameter itself "
                    "there, or a clone (state_dict() and detach() copy nothing)"
                )
