"""What one process is about to write."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from torchorbax._src.arrays import fingerprint
from torchorbax._src.arrays.fingerprint import Sums
from torchorbax._src.arrays.leaves import Array
from torchorbax._src.format.manifest import ItemMeta, digest
from torchorbax._src.format.per_process import HostItem
from torchorbax._src.format.values import Json
from torchorbax._src.save.frozen import Identities

Key = tuple[str, str]


@dataclass(frozen=True)
class _Part:
    """What a process is about to write.

    Attributes:
        items: what the step says of its leaves.
        arrays: by item and leaf.
        own: what this process has for itself.
        sums: of the new frozen leaves.
        identities: which the frozen leaves are.
        parts: which parts of which arrays the leaves are.
    """

    items: Mapping[str, ItemMeta]
    arrays: dict[str, MutableMapping[str, Array]]
    own: Mapping[str, HostItem]
    sums: Mapping[Key, Sums]
    identities: Identities
    parts: Mapping[str, Mapping[str, Json]]

    @property
    def nbytes(self) -> int:
        """Of all arrays, each counted once however many devices and processes hold it."""
        return sum(array.nbytes for one in self.arrays.values() for array in one.values())


def _described(part: _Part) -> dict[str, Json]:
    """A process's part for process 0, to compare."""
    shared = {
        item: {name: [list(meta.leaves[name].shape), meta.leaves[name].dtype] for name in part.own[item].shared}
        for item, meta in part.items.items()
    }
    kept = {
        item: {name: leaf.base for name, leaf in meta.leaves.items() if leaf.base is not None}
        for item, meta in part.items.items()
    }
    return {
        "shared": digest(shared),
        "frozen": digest(kept),
        "sums": [[*key, fingerprint.text(sums)] for key, sums in part.sums.items()],
        "own": {item: one.digest() for item, one in part.own.items()},
    }


def _with_bases(items: Mapping[str, ItemMeta], bases: Mapping[str, Mapping[str, int]]) -> dict[str, ItemMeta]:
    """The items of another process, with the numbers that process 0 has given to bases."""
    return {
        item: dataclasses.replace(
            meta,
            leaves={
                name: dataclasses.replace(leaf, base=bases.get(item, {}).get(name))
                for name, leaf in meta.leaves.items()
            },
        )
        for item, meta in items.items()
    }
