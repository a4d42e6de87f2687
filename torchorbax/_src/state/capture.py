"""All items captured together, with what they share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from torchorbax._src.format.manifest import Shared
from torchorbax._src.state.item import Captured, Item
from torchorbax._src.state.sharing import in_order, view_of


def capture_all(items: Mapping[str, Item], handed: Mapping[str, Any]) -> dict[str, Captured]:
    """The live leaves of all items, and what they share.

    Args:
        items: the items.
        handed: trees in place of live values, by item.

    Raises:
        UnsupportedLeafError, MismatchError, ConfigError: as `Item.capture`.
    """
    captured = {name: item.capture(handed.get(name)) for name, item in items.items()}
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
