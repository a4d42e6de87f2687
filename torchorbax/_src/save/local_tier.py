"""Prepares what the local tier writes: this process's part of the state, as a step of its own on its host.

An array that is sharded over several processes is written as a smaller array: the distinct shards that this process
holds, one after the other along the first axis. The manifest says which parts of which array they are.
`restore.local_tier` reads such steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from torchorbax._src.arrays.leaves import Array, is_global
from torchorbax._src.arrays.sharding_rules import describe
from torchorbax._src.arrays.shards import Bounds, HostShards, bounds_of, stacked
from torchorbax._src.format.manifest import ItemMeta, Key
from torchorbax._src.format.values import Json


def localized(
    items: Mapping[str, ItemMeta], arrays: dict[Key, Array]
) -> tuple[dict[str, ItemMeta], dict[Key, Array], dict[str, dict[str, Json]]]:
    """This process's part of a snapshot, as if there were no other process.

    Args:
        items: the descriptions of the snapshot's items.
        arrays: the snapshot's arrays, which are removed.

    Returns:
        The items and arrays of this process's part, and `Manifest.parts`: which parts of which array a leaf holds, by
        item and leaf.
    """
    leaves = {item: dict(meta.leaves) for item, meta in items.items()}
    own_arrays: dict[Key, Array] = {}
    parts: dict[str, dict[str, Json]] = {}
    for item, name in list(arrays):
        array: Any = arrays.pop((item, name))
        if is_global(array):
            own_part, bounds = _own_part(array)
            parts.setdefault(item, {})[name] = {
                "shape": list(array.shape),
                "sharding": describe(array.sharding),
                "bounds": bounds,
            }
            leaves[item][name] = replace(leaves[item][name], shape=tuple(own_part.shape), sharding=None)
            array = own_part
        own_arrays[item, name] = array
    return {item: replace(meta, leaves=leaves[item]) for item, meta in items.items()}, own_arrays, parts


def _own_part(array: Any) -> tuple[Array, list[Bounds]]:
    """The distinct shards of this process, one after the other along the first axis, and their bounds."""
    shards = {bounds_of(shard.index, array.shape): shard for shard in array.addressable_shards}
    bounds = sorted(shards)
    if not bounds:
        return np.empty((0, *array.shape[1:]), array.dtype), []
    data = [shards[part].data for part in bounds]
    if len(data) == 1:
        return data[0], bounds
    if isinstance(array, HostShards):
        return np.concatenate(data), bounds
    return stacked(data), bounds
