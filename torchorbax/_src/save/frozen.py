"""Frozen parameters are written once, into the run's `base` area, and not again with every step.

A frozen parameter that has not changed is the very `jax.Array` that was written: arrays are immutable, so its identity
says so at no cost. After a restart, when all arrays are new, its fingerprint says so, on the background thread.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from torchorbax._src.format.manifest import ItemMeta, Key, LeafMeta, Manifest
from torchorbax._src.state.item import Captured
from torchorbax._src.tensors.live import live_array

NEW_BASE = -1
"""Stands for the number of a base that is still to be written."""


Identities = Mapping[Key, "weakref.ref[jax.Array]"]


@dataclass(frozen=True)
class Look:
    """The frozen leaves of one moment.

    Attributes:
        known: of those that a base has, what is known; None for those of a new base.
        identities: which arrays they are.
    """

    known: Mapping[Key, LeafMeta | None]
    identities: Identities


class FrozenArrays:
    """Which of the live frozen arrays lie in the base area already."""

    def __init__(self) -> None:
        self._seen: Identities = {}
        self._changing: set[Key] = set()
        self._written: dict[Key, tuple[weakref.ref[jax.Array], LeafMeta]] = {}

    def look(self, captured: Mapping[str, Captured]) -> Look:
        """The frozen leaves of what is about to be saved.

        One that is another array than at the last look is not taken for frozen any more.
        """
        arrays = _frozen_arrays(captured)
        self._changing |= {key for key, array in arrays.items() if key in self._seen and self._seen[key]() is not array}
        self._seen = {key: weakref.ref(array) for key, array in arrays.items()}
        known: dict[Key, LeafMeta | None] = {}
        for key in arrays.keys() - self._changing:
            ref, leaf = self._written.get(key, (None, None))
            known[key] = leaf if ref is not None and ref() is arrays[key] else None
        return Look(known, self._seen)

    def saved(self, manifest: Manifest, identities: Identities) -> None:
        """A step with these arrays has been committed."""
        self._written = {
            key: (identities[key], leaf) for key, leaf in manifest.frozen_leaves.items() if key in identities
        }

    def restored(self, captured: Mapping[str, Captured], written: Mapping[Key, LeafMeta]) -> None:
        """A restore has just put these arrays of the base area in place."""
        arrays = {key: array for key, array in _frozen_arrays(captured).items() if key in written}
        self._seen = {key: weakref.ref(array) for key, array in arrays.items()}
        self._written = {key: (ref, written[key]) for key, ref in self._seen.items()}
        self._changing.clear()


def _frozen_arrays(captured: Mapping[str, Captured]) -> dict[Key, jax.Array]:
    held: dict[Key, Any] = {
        (item, name): live_array(name, one.leaves[name]) for item, one in captured.items() for name in one.frozen
    }
    return {key: array for key, array in held.items() if isinstance(array, jax.Array) and array.size}


def numbered(
    items: Mapping[str, ItemMeta], fingerprints: Mapping[Key, str], newest: Manifest | None, number: int
) -> tuple[dict[str, ItemMeta], list[Key]]:
    """The items with the numbers of bases, and those leaves that a base has already, by their fingerprints.

    Args:
        items: frozen leaves that look new are of base `NEW_BASE`.
        fingerprints: theirs.
        newest: the newest step; its bases are all there.
        number: of the next base.
    """
    written = {} if newest is None else newest.frozen_leaves
    numbered_items: dict[str, ItemMeta] = {}
    found: list[Key] = []
    for item, meta in items.items():
        leaves = dict(meta.leaves)
        for name, leaf in meta.leaves.items():
            if leaf.base == NEW_BASE:
                known = written.get((item, name))
                leaf = dataclasses.replace(leaf, fingerprint=fingerprints[item, name])
                leaves[name] = dataclasses.replace(leaf, base=number)
                if known is not None and dataclasses.replace(leaf, base=known.base, sharding=known.sharding) == known:
                    leaves[name] = known
                    found.append((item, name))
        numbered_items[item] = dataclasses.replace(meta, leaves=leaves)
    return numbered_items, found
