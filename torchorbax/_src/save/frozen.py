"""Frozen parameters are written once, into a base of the run, and not again with every step.

A base is a step of its own beside the steps (`base/0`). A leaf is known to be unchanged if it still is the very
`jax.Array` that was written: arrays are immutable, so comparing identities is enough and costs nothing. After a restart
all arrays are new objects. Then the fingerprints are compared, on the saving thread.
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
"""The placeholder for the number of a base that is not written yet."""

Identities = Mapping[Key, "weakref.ref[jax.Array]"]
"""References to the frozen arrays, which do not keep them alive."""


@dataclass(frozen=True)
class FrozenLeaves:
    """The frozen leaves of the state that is about to be saved.

    Attributes:
        known: the frozen leaves: the description of each in its base, or None if no base holds it yet.
        identities: the live arrays of these leaves.
    """

    known: Mapping[Key, LeafMeta | None]
    identities: Identities


class FrozenArrays:
    """Remembers which of the live frozen arrays a base holds already."""

    def __init__(self) -> None:
        self._seen: Identities = {}  # the arrays at the last observation
        self._changing: set[Key] = set()  # leaves that have changed although they are frozen
        self._written: dict[Key, tuple[weakref.ref[jax.Array], LeafMeta]] = {}  # what a base holds

    def observe(self, captured: Mapping[str, Captured]) -> FrozenLeaves:
        """The frozen leaves of the state that is about to be saved.

        A leaf that holds another array than at the last observation has changed. It no longer counts as frozen.
        """
        arrays = _frozen_arrays(captured)
        self._changing |= {key for key, array in arrays.items() if key in self._seen and self._seen[key]() is not array}
        self._seen = {key: weakref.ref(array) for key, array in arrays.items()}
        known: dict[Key, LeafMeta | None] = {}
        for key in arrays.keys() - self._changing:
            ref, leaf = self._written.get(key, (None, None))
            known[key] = leaf if ref is not None and ref() is arrays[key] else None
        return FrozenLeaves(known, self._seen)

    def saved(self, manifest: Manifest, identities: Identities) -> None:
        """Note that a step with these arrays has been committed."""
        self._written = {
            key: (identities[key], leaf) for key, leaf in manifest.frozen_leaves.items() if key in identities
        }

    def restored(self, captured: Mapping[str, Captured], written: Mapping[Key, LeafMeta]) -> None:
        """Note that a restore has put the arrays of these leaves, which bases hold, into the live objects."""
        arrays = {key: array for key, array in _frozen_arrays(captured).items() if key in written}
        self._seen = {key: weakref.ref(array) for key, array in arrays.items()}
        self._written = {key: (ref, written[key]) for key, ref in self._seen.items()}
        self._changing.clear()


def _frozen_arrays(captured: Mapping[str, Captured]) -> dict[Key, jax.Array]:
    held: dict[Key, Any] = {
        (item, name): live_array(name, of_item.leaves[name])
        for item, of_item in captured.items()
        for name in of_item.frozen
    }
    return {key: array for key, array in held.items() if isinstance(array, jax.Array) and array.size}


def numbered(
    items: Mapping[str, ItemMeta], fingerprints: Mapping[Key, str], newest: Manifest | None, number: int
) -> tuple[dict[str, ItemMeta], list[Key]]:
    """Give the new frozen leaves the number of their base.

    Args:
        items: the items. Frozen leaves that seem to be new have the base `NEW_BASE`.
        fingerprints: the fingerprints of those leaves.
        newest: the manifest of the newest step, all of whose bases exist; None if there is none.
        number: the number of the next base.

    Returns:
        The items, and the keys of those leaves whose fingerprints say that a base of `newest` holds them already.
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
