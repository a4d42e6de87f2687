"""Frozen parameters are written once, into the run's `base` area, and not again with every step.

A frozen parameter that has not changed is the very `jax.Array` that was written: arrays are immutable, so its identity
says so at no cost. After a restart, when all arrays are new, its fingerprint says so, on the background thread.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping
from typing import Any

import jax

from torchorbax.adapter import Array, live_array
from torchorbax.manifest import ItemMeta, LeafMeta, Manifest
from torchorbax.state import Captured

Key = tuple[str, str]
"""Item and leaf."""

NEW_BASE = -1
"""Stands for the number of a base that is still to be written."""


class FrozenArrays:
    """Which of the live frozen arrays lie in the base area already."""

    def __init__(self) -> None:
        self._seen: dict[Key, weakref.ref[jax.Array]] = {}
        self._changing: set[Key] = set()
        self._written: dict[Key, LeafMeta] = {}

    def look(self, captured: Mapping[str, Captured]) -> dict[Key, LeafMeta | None]:
        """The frozen leaves that need not be written, with what is known of them, and (None) those of a new base.

        One that has changed since the save before is not taken for frozen any more.
        """
        found: dict[Key, LeafMeta | None] = {}
        seen: dict[Key, weakref.ref[jax.Array]] = {}
        for key, array in _frozen_arrays(captured).items():
            before = self._seen.get(key)
            same = before is not None and before() is array
            if before is not None and not same:
                self._changing.add(key)
            seen[key] = weakref.ref(array)
            if key not in self._changing:
                found[key] = self._written.get(key) if same else None
        self._seen = seen
        return found

    def saved(self, manifest: Manifest) -> None:
        """What `look` saw last has been committed."""
        self._written = in_base(manifest)

    def restored(self, captured: Mapping[str, Captured], written: Mapping[Key, LeafMeta]) -> None:
        """A restore has just put these arrays of the base area in place."""
        self._written = dict(written)
        arrays = _frozen_arrays(captured)
        self._seen = {key: weakref.ref(array) for key, array in arrays.items() if key in written}
        self._changing.clear()


def in_base(manifest: Manifest) -> dict[Key, LeafMeta]:
    """The leaves of a step that lie in the base area."""
    return {
        (item, name): leaf
        for item, meta in manifest.items.items()
        for name, leaf in meta.leaves.items()
        if leaf.base is not None
    }


def _frozen_arrays(captured: Mapping[str, Captured]) -> dict[Key, jax.Array]:
    held: dict[Key, Any] = {
        (item, name): live_array(name, one.leaves[name]) for item, one in captured.items() for name in one.frozen
    }
    return {key: array for key, array in held.items() if isinstance(array, jax.Array) and array.size}


def numbered(
    items: Mapping[str, ItemMeta], arrays: Mapping[str, Mapping[str, Array]], newest: Manifest | None, number: int
) -> tuple[dict[str, ItemMeta], dict[str, dict[str, Array]]]:
    """What is to be written, without frozen leaves that a base has already, by their fingerprints.

    Args:
        items: with fingerprints; frozen leaves that look new are of base `NEW_BASE`.
        arrays: what would be written.
        newest: the newest step; its bases are all there.
        number: of the next base.
    """
    written = {} if newest is None else in_base(newest)
    left = {item: dict(one) for item, one in arrays.items()}
    numbered_items: dict[str, ItemMeta] = {}
    for item, meta in items.items():
        leaves = dict(meta.leaves)
        for name, leaf in meta.leaves.items():
            if leaf.base == NEW_BASE:
                known = written.get((item, name))
                leaves[name] = dataclasses.replace(leaf, base=number)
                if known is not None and dataclasses.replace(leaf, base=known.base, sharding=known.sharding) == known:
                    leaves[name] = known
                    del left[item][name]
        numbered_items[item] = dataclasses.replace(meta, leaves=leaves)
    return numbered_items, left
