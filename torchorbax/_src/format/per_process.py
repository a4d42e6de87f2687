"""The state that each process has for itself: random number generators, the position of a data loader, and the like.

An array that is sharded over the devices of several processes is shared: all processes see the same array. Everything
else is a process's own state, in host memory or on its own devices. The own state of process 0 is stored in the step
like everything else. Another process writes a file beside the manifest, with those items in which its own state differs
from that of process 0.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from torchorbax._src.arrays.dtypes import BY_NAME
from torchorbax._src.arrays.fingerprint import fingerprints
from torchorbax._src.arrays.leaves import Array, is_global
from torchorbax._src.format import bounded_json
from torchorbax._src.format.manifest import ItemMeta, Key, LeafMeta, Manifest, check_values, digest, leaf_meta
from torchorbax._src.format.values import Json

_NO_FINGERPRINT = "0" * 32


@dataclass(frozen=True)
class HostItem:
    """A process's own state in one item.

    Attributes:
        values: everything that is not an array, encoded.
        metas: the description of the process's own leaves, by name.
        arrays: the arrays of those leaves, by name.
        shared: the names of the item's other leaves, which the processes share.
    """

    values: Json
    metas: Mapping[str, LeafMeta]
    arrays: Mapping[str, Array]
    shared: tuple[str, ...]

    def digest(self) -> str:
        """A digest that is equal in two processes if their own state is equal."""
        found = fingerprints(self.arrays)
        described = {name: [list(meta.shape), meta.dtype, found.get(name)] for name, meta in self.metas.items()}
        return digest([self.values, described])

    def to_json(self) -> Json:
        """The JSON object that `from_text` reads."""
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


def host_items(items: Mapping[str, ItemMeta], arrays: Mapping[Key, Array]) -> dict[str, HostItem]:
    """This process's own state in each item of a snapshot."""
    found = {}
    for item, meta in items.items():
        here = {name: arrays[item, name] for name in meta.leaves if (item, name) in arrays}
        own = {name: array for name, array in here.items() if not is_global(array)}
        metas = {name: leaf for name, leaf in meta.leaves.items() if name in own}
        found[item] = HostItem(meta.values, metas, own, tuple(name for name in meta.leaves if name not in own))
    return found


def to_text(items: Mapping[str, HostItem]) -> str:
    """The content of the file with a process's own state."""
    return json.dumps({name: item.to_json() for name, item in items.items()})


def digest_of(text: str) -> str:
    """The SHA-256 of such a file's content."""
    return hashlib.sha256(text.encode()).hexdigest()


def from_text(text: str, other_bytes: Callable[[], int] = lambda: 0) -> dict[str, HostItem]:
    """The reverse of `to_text`.

    Args:
        text: the text.
        other_bytes: counts the bytes of the run's other files, which limit how much memory it may take.

    Raises:
        ValueError: `to_text` has not written this text, or it would take too much memory.
    """
    try:
        content = bounded_json.loads(text, other_bytes)
        return {item: _host_item(of_item) for item, of_item in content.items()}
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a process's own state: {type(error).__name__}: {str(error)[:200]}") from error


def _host_item(content: Json) -> HostItem:
    metas: dict[str, LeafMeta] = {}
    arrays: dict[str, Array] = {}
    for name, leaf in content["leaves"].items():
        metas[name] = leaf_meta(name, {**leaf, "sharding": None, "fingerprint": _NO_FINGERPRINT, "base": None})
        data = base64.b64decode(leaf["data"], validate=True)
        if len(data) != metas[name].nbytes:
            raise ValueError(f"{name[:200]!r} is {metas[name]}, but has {len(data)} bytes")
        arrays[name] = np.frombuffer(bytearray(data), BY_NAME[leaf["dtype"]]).reshape(metas[name].shape)
        metas[name] = replace(metas[name], fingerprint="")
    shared = tuple(content["shared"])
    check_values(content["values"], [*metas, *shared])
    return HostItem(content["values"], metas, arrays, shared)


def as_seen_by(manifest: Manifest, own: Mapping[str, HostItem]) -> Manifest:
    """The manifest for a process with this own state, by item: its own leaves and values replace those of process 0."""
    items = dict(manifest.items)
    for name, item in own.items():
        shared = {leaf: items[name].leaves[leaf] for leaf in item.shared}
        items[name] = replace(items[name], values=item.values, leaves={**shared, **item.metas})
    return replace(manifest, items=items)
