"""One process's part of the state, for its own host."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from typing import Any

import numpy as np

from torchorbax._src.arrays.leaves import Array, is_global
from torchorbax._src.arrays.sharding_rules import describe
from torchorbax._src.arrays.shards import Bounds, HostShards, _bounds, stacked
from torchorbax._src.format.manifest import ItemMeta
from torchorbax._src.format.values import Json

# --------------------------------------------------------------------------------------------------------------- write


def localized(
    items: Mapping[str, ItemMeta], arrays: Mapping[str, MutableMapping[str, Array]]
) -> tuple[dict[str, ItemMeta], dict[str, dict[str, Json]]]:
    """What this process has of a snapshot, as if there were no other; `arrays` are replaced in place.

    Returns:
        The items, and by item and leaf which part of which array a leaf is.
    """
    own: dict[str, ItemMeta] = {}
    parts: dict[str, dict[str, Json]] = {}
    for item, meta in items.items():
        leaves = dict(meta.leaves)
        array: Any
        for name, array in arrays[item].items():
            if is_global(array):
                own_part, bounds = _own_part(array)
                parts.setdefault(item, {})[name] = {
                    "shape": list(array.shape),
                    "sharding": describe(array.sharding),
                    "bounds": bounds,
                }
                leaves[name] = replace(leaves[name], shape=tuple(own_part.shape), sharding=None)
                arrays[item][name] = own_part
        own[item] = replace(meta, leaves=leaves)
    return own, parts


def _own_part(array: Any) -> tuple[Array, list[Bounds]]:
    """The distinct shards that this process has, along the first axis, where they are."""
    shards = {_bounds(shard.index, array.shape): shard for shard in array.addressable_shards}
    bounds = sorted(shards)
    if not bounds:
        return np.empty((0, *array.shape[1:]), array.dtype), []
    datas = [shards[one].data for one in bounds]
    if len(datas) == 1:
        return datas[0], bounds
    if isinstance(array, HostShards):
        return np.concatenate(datas), bounds
    return stacked(datas), bounds
