"""What every process has for itself, in host memory: random number generators, a data loader's position.

Arrays that are laid out over the devices of all processes are one, whoever looks at them. Anything else is a process's
own. That of process 0 is part of the step like everything; another process adds a file of its own for those items in
which it has something else.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace

import numpy as np

from torchorbax._src.arrays.dtypes import BY_NAME
from torchorbax._src.arrays.fingerprint import fingerprints
from torchorbax._src.arrays.leaves import Array, is_global
from torchorbax._src.format.manifest import ItemMeta, LeafMeta, Manifest, digest
from torchorbax._src.format.values import Json


@dataclass(frozen=True)
class HostItem:
    """What a process has of an item for itself.

    Attributes:
        values: what is no array.
        metas: its own leaves.
        arrays: the same.
        shared: the names of the other leaves.
    """

    values: Json
    metas: Mapping[str, LeafMeta]
    arrays: Mapping[str, Array]
    shared: tuple[str, ...]

    def digest(self) -> str:
        """The same in two processes if they have the same."""
        found = fingerprints(self.arrays)
        described = {name: [list(meta.shape), meta.dtype, found.get(name)] for name, meta in self.metas.items()}
        return digest([self.values, described])

    def to_json(self) -> Json:
        """All of it."""
        leaves = {}
        for name, meta in self.metas.items():
            data = np.asarray(self.arrays[name]).tobytes() if name in self.arrays else b""
            leaves[name] = {
                "shape": list(meta.shape),
                "dtype": meta.dtype,
                "residence": meta.residence,
                "weak_type": meta.weak_type,
                "data": base64.b64encode(data).decode(),
            }
        return {"values": self.values, "leaves": leaves, "shared": self.shared}


def host_items(items: Mapping[str, ItemMeta], arrays: Mapping[str, Mapping[str, Array]]) -> dict[str, HostItem]:
    """What this process has for itself of a snapshot."""
    found = {}
    for item, meta in items.items():
        own = {name: array for name, array in arrays[item].items() if not is_global(array)}
        metas = {name: leaf for name, leaf in meta.leaves.items() if name in own}
        found[item] = HostItem(meta.values, metas, own, tuple(name for name in meta.leaves if name not in own))
    return found


def drop_host_arrays(arrays: Mapping[str, MutableMapping[str, Array]]) -> None:
    """Leave only what the processes have together."""
    for one in arrays.values():
        for name in [name for name, array in one.items() if not is_global(array)]:
            del one[name]


def to_text(items: Mapping[str, HostItem]) -> str:
    """The content of a process's file."""
    return json.dumps({name: item.to_json() for name, item in items.items()})


def digest_of(text: str) -> str:
    """SHA-256 of the content of a file."""
    return hashlib.sha256(text.encode()).hexdigest()


def from_text(text: str) -> dict[str, HostItem]:
    """The reverse of `to_text`.

    Raises:
        ValueError, KeyError, TypeError: it is nothing that `to_text` wrote.
    """
    items = {}
    for item, content in json.loads(text).items():
        metas, arrays = {}, {}
        for name, leaf in content["leaves"].items():
            data = np.frombuffer(bytearray(base64.b64decode(leaf["data"])), BY_NAME[leaf["dtype"]])
            arrays[name] = data.reshape(leaf["shape"])
            metas[name] = LeafMeta(
                tuple(leaf["shape"]), leaf["dtype"], leaf["residence"], weak_type=leaf.get("weak_type", False)
            )
        items[item] = HostItem(content["values"], metas, arrays, tuple(content["shared"]))
    return items


def as_seen_by(manifest: Manifest, own: Mapping[str, HostItem]) -> Manifest:
    """What a step is for a process that has these items of its own."""
    items = dict(manifest.items)
    for name, item in own.items():
        shared = {leaf: items[name].leaves[leaf] for leaf in item.shared}
        items[name] = replace(items[name], values=item.values, leaves={**shared, **item.metas})
    return replace(manifest, items=items)
