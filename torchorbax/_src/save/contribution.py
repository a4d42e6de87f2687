"""The contribution of one process to a step: what it is about to write, and the summary of that for process 0."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torchorbax._src.arrays import fingerprint
from torchorbax._src.arrays.fingerprint import Sums
from torchorbax._src.arrays.leaves import Array, is_global
from torchorbax._src.format import per_process
from torchorbax._src.format.manifest import ItemMeta, Key, Manifest, digest, leaves_of
from torchorbax._src.format.per_process import HostItem
from torchorbax._src.format.values import Json
from torchorbax._src.save import local_tier
from torchorbax._src.save.frozen import NEW_BASE, Identities
from torchorbax._src.save.snapshot import Snapshot


@dataclass(frozen=True)
class Contribution:
    """What one process is about to write.

    Attributes:
        items: the descriptions of the items, for the manifest.
        arrays: the arrays by key; each is removed as it is written.
        own: the process's own state by item; empty if there is only one process.
        sums: the sums of this process's shards of new frozen leaves, for their fingerprints.
        identities: the frozen arrays.
        parts: in a local tier, which part of which array a leaf holds, by item and leaf.
    """

    items: Mapping[str, ItemMeta]
    arrays: dict[Key, Array]
    own: Mapping[str, HostItem]
    sums: Mapping[Key, Sums]
    identities: Identities
    parts: Mapping[str, Mapping[str, Json]]

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that have not been written yet, each counted once however many devices hold it."""
        return sum(array.nbytes for array in self.arrays.values())

    def summary(self, step: int) -> dict[str, Json]:
        """What process 0 compares with its own contribution, as JSON."""
        shared = {
            item: {name: [list(meta.leaves[name].shape), meta.leaves[name].dtype] for name in self.own[item].shared}
            for item, meta in self.items.items()
        }
        bases = {item: {name: leaf.base for name, leaf in meta.leaves.items()} for item, meta in self.items.items()}
        frozen = {
            item: {name: base for name, base in of_item.items() if base is not None} for item, of_item in bases.items()
        }
        return {
            "step": step,
            "shared": digest(shared),
            "frozen": digest(frozen),
            "sums": [[*key, fingerprint.text(sums)] for key, sums in self.sums.items()],
            "own": {item: own.digest() for item, own in self.own.items()},
        }


def contribution(snapshot: Snapshot, process: int, count: int, *, localized: bool) -> Contribution:
    """What a process writes of a snapshot.

    Args:
        snapshot: the snapshot, whose arrays are taken over.
        process: the number of this process.
        count: how many processes write the step.
        localized: write this process's part of the state as a step of its own (see `save.local_tier`).
    """
    items, arrays = snapshot.items, snapshot.arrays
    parts: dict[str, dict[str, Json]] = {}
    if localized:
        items, arrays, parts = local_tier.localized(items, arrays)
    return _contribution(items, arrays, snapshot.identities, parts, process, count)


def with_frozen(mine: Contribution, process: int, count: int) -> Contribution | None:
    """A contribution that has the frozen leaves, too, which bases were believed to hold; None if an array is gone."""
    items, arrays = dict(mine.items), dict(mine.arrays)
    arrays |= {(item, name): array for item, own in mine.own.items() for name, array in own.arrays.items()}
    for item, meta in mine.items.items():
        leaves = dict(meta.leaves)
        for name, leaf in meta.leaves.items():
            if leaf.base is not None and (item, name) not in arrays:
                array = mine.identities[item, name]()  # the live one
                if array is None or array.is_deleted():
                    return None
                leaves[name] = dataclasses.replace(leaf, base=NEW_BASE, fingerprint="")
                arrays[item, name] = array
        items[item] = dataclasses.replace(meta, leaves=leaves)
    return _contribution(items, arrays, mine.identities, mine.parts, process, count)


def _contribution(
    items: Mapping[str, ItemMeta],
    arrays: dict[Key, Array],
    identities: Identities,
    parts: Mapping[str, Mapping[str, Json]],
    process: int,
    count: int,
) -> Contribution:
    new = {key: arrays[key] for key, leaf in leaves_of(items).items() if leaf.base == NEW_BASE and key in arrays}
    own: dict[str, HostItem] = {}
    if count > 1:
        own = per_process.host_items(items, arrays)
        if process > 0:  # the step itself holds only the own state of process 0
            arrays = {key: array for key, array in arrays.items() if is_global(array)}
            new = {key: array for key, array in new.items() if is_global(array)}
    sums = {key: finish() for key, finish in fingerprint.start_all(new).items()}
    return Contribution(items, arrays, own, sums, identities, parts)


def with_bases(items: Mapping[str, ItemMeta], bases: Mapping[str, Mapping[str, int]]) -> dict[str, ItemMeta]:
    """The items with the numbers of bases that process 0 has decided on, by item and leaf."""
    numbered = {}
    for item, meta in items.items():
        of_item = bases.get(item, {})
        leaves = {name: dataclasses.replace(leaf, base=of_item.get(name)) for name, leaf in meta.leaves.items()}
        numbered[item] = dataclasses.replace(meta, leaves=leaves)
    return numbered


def with_reports(manifest: Manifest, parts: Sequence[dict[str, Json]]) -> Manifest:
    """The manifest with the fingerprints, from the processes' reports of what they have written (see `Writer`)."""
    texts: dict[Key, list[str]] = {}
    for part in parts:
        for item, of_item in part["sums"].items():
            for name, text in of_item.items():
                texts.setdefault((item, name), []).append(text)
    fingerprints = {
        key: several[0]
        if len(several) == 1
        else fingerprint.text(fingerprint.total([fingerprint.sums(text) for text in several]))
        for key, several in texts.items()
    }
    own = {str(process): part["own"] for process, part in enumerate(parts) if part["own"]}
    files = {path: (nbytes, crc32c) for part in parts for path, (nbytes, crc32c) in part["files"].items()}
    return dataclasses.replace(manifest.with_fingerprints(fingerprints), processes=len(parts), own=own, files=files)


@functools.cache
def versions() -> dict[str, str]:
    """The versions of the libraries that write a step, by name."""
    names = ("torchorbax", "torch", "torchax", "jax", "orbax-checkpoint", "numpy")
    return {name: importlib.metadata.version(name) for name in names}
