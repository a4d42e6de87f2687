"""What a step says about itself: the JSON item `manifest`, with all that Orbax cannot hold."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from torchorbax._src.arrays.dtypes import BY_NAME
from torchorbax._src.format.values import Json, decode

Key = tuple[str, str]
"""Item and leaf."""


def in_base(manifest: Manifest) -> dict[Key, LeafMeta]:
    """The leaves of a step that lie in the base area."""
    return {
        (item, name): leaf
        for item, meta in manifest.items.items()
        for name, leaf in meta.leaves.items()
        if leaf.base is not None
    }


FORMAT = 1
ITEM_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
"""What an item may be called: its name is that of a folder."""

Residence = Literal["jax", "host"]

_SELDOM = {"base": None, "weak_type": False}
"""What most leaves have, and is not written."""
_FINGERPRINT = re.compile(r"[0-9a-f]{32}")
_MOST_DIMENSIONS = 64  # numpy's limit
_MOST_BYTES = 1 << 62


@dataclass(frozen=True)
class LeafMeta:
    """One stored array.

    Attributes:
        shape: its dimensions.
        dtype: its dtype's name, the same for torch, numpy and JAX (`torchorbax.dtypes`).
        residence: whether it lived on jax devices or in host memory.
        sharding: how it was sharded when saved, for people to read (`torchorbax.sharding.describe`).
        fingerprint: of its data (`torchorbax.fingerprint`); empty until that is known.
        base: where in the run's base area it lies, being frozen (`torchorbax.frozen`); None for the step itself.
        weak_type: was it weakly typed, as `jnp.asarray(0.1)` is? Such an array takes the dtype of what it meets.
    """

    shape: tuple[int, ...]
    dtype: str
    residence: Residence
    sharding: Mapping[str, Any] | None = None
    fingerprint: str = ""
    base: int | None = None
    weak_type: bool = False

    def __str__(self) -> str:
        return f"{self.dtype}{self.shape}"

    @property
    def nbytes(self) -> int:
        """Its bytes, counted once however many devices hold it."""
        return math.prod(self.shape) * BY_NAME[self.dtype].itemsize

    @property
    def is_empty(self) -> bool:
        """Has no elements: Orbax cannot store such an array, and there is nothing to store."""
        return 0 in self.shape


@dataclass(frozen=True)
class ItemMeta:
    """One item of a step.

    Attributes:
        kind: what it was taken from: `module`, `torch.optim`, `optax`, `object`, `pytree` or `rng`.
        leaves: the stored arrays by name.
        ties: further names of stored arrays, `{alias: name}`.
        values: everything that is no array, as `torchorbax.values.encode` writes it.
    """

    kind: str
    leaves: Mapping[str, LeafMeta]
    ties: Mapping[str, str] = field(default_factory=dict)
    values: Json = None

    def to_json(self) -> dict[str, Json]:
        """Its part of the manifest."""
        leaves = {
            name: {key: value for key, value in vars(leaf).items() if _SELDOM.get(key, ...) is not value}
            for name, leaf in self.leaves.items()
        }
        return {**vars(self), "leaves": leaves}


@dataclass(frozen=True)
class Manifest:
    """One step.

    Attributes:
        step: its number.
        time: when `save` was called, in UTC.
        metrics: the numbers given with it.
        items: what was saved, by item name.
        versions: the libraries that wrote it.
        processes: how many processes wrote it.
        parts: in a local tier of several processes, by item and leaf, which part of an array it is
            (`torchorbax.localtier`).
        origin: in a local tier, of which run it is a save, and of which life of it.
        own: the SHA-256 of the files of those processes that have something for themselves (`torchorbax.hoststate`).
    """

    step: int
    time: datetime.datetime
    metrics: Mapping[str, float]
    items: Mapping[str, ItemMeta]
    versions: Mapping[str, str] = field(default_factory=dict)
    processes: int = 1
    own: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, Mapping[str, Json]] = field(default_factory=dict)
    origin: str = ""

    def of_base(self, base: int) -> Manifest:
        """What a base of this step says about itself: its leaves, as if it were a step of that number."""
        items = {
            name: ItemMeta(
                item.kind,
                {key: replace(leaf, base=None) for key, leaf in item.leaves.items() if leaf.base == base},
            )
            for name, item in self.items.items()
        }
        return Manifest(base, self.time, {}, {name: item for name, item in items.items() if item.leaves}, self.versions)

    def stamped(self, fingerprints: Mapping[str, Mapping[str, str]]) -> Manifest:
        """The manifest with these fingerprints, by item and leaf; other leaves have theirs already."""
        items = {
            item: replace(
                meta,
                leaves={
                    name: replace(leaf, fingerprint=fingerprints.get(item, {}).get(name, leaf.fingerprint))
                    for name, leaf in meta.leaves.items()
                },
            )
            for item, meta in self.items.items()
        }
        return replace(self, items=items)

    def to_json(self) -> dict[str, Json]:
        """The JSON object that `from_json` reads."""
        items = {name: item.to_json() for name, item in self.items.items()}
        shared = {"format": FORMAT, **vars(self), "time": self.time.isoformat(), "items": items}
        content = json.loads(json.dumps(shared))  # a copy; `asdict` would take 0.1 s for 2,000 leaves
        return {**content, "sha256": digest(content)}

    @classmethod
    def from_json(cls, content: Json) -> Manifest:
        """The manifest in a JSON object.

        Raises:
            ValueError: not a manifest, of a newer format, changed since it was written, or nothing that `to_json`
                would write, whoever did.
        """
        try:
            if content["format"] > FORMAT:
                raise ValueError(f"manifest format {content['format']} is newer than this torchorbax reads ({FORMAT})")
            if content["sha256"] != digest({key: value for key, value in content.items() if key != "sha256"}):
                raise ValueError("the manifest is not what was written: its SHA-256 differs")
            items = {name: _item_meta(name, item) for name, item in content["items"].items()}
            time = datetime.datetime.fromisoformat(content["time"])
            metrics = {name: float(value) for name, value in content["metrics"].items()}
            processes, own = content.get("processes", 1), dict(content.get("own", {}))
            if type(processes) is not int or not all(one.isdecimal() and int(one) < processes for one in own):
                raise ValueError(f"it says that {str(processes)[:200]} processes wrote it, of which {str(own)[:200]}")
            parts = {item: dict(one) for item, one in content.get("parts", {}).items()}
            return cls(
                content["step"],
                time,
                metrics,
                items,
                dict(content["versions"]),
                processes,
                own,
                parts,
                str(content.get("origin", "")),
            )
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a torchorbax manifest: {type(error).__name__}: {str(error)[:200]}") from error


def digest(content: Json) -> str:
    """SHA-256 of JSON content: Orbax keeps no checksum, and a learning rate with a flipped bit is one, too."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _item_meta(name: str, content: Json) -> ItemMeta:
    if not ITEM_NAME.fullmatch(name):
        raise ValueError(f"{name[:200]!r} cannot name an item")
    leaves = {leaf: _leaf_meta(leaf, meta) for leaf, meta in content["leaves"].items()}
    ties = dict(content["ties"])
    if strangers := [alias for alias, leaf in ties.items() if leaf not in leaves]:
        raise ValueError(f"{name}: {strangers[0][:200]!r} is tied to a leaf that is not there")
    values = content["values"]
    # One encoded value, or several by name; decoded here so that those who use them need not expect anything else.
    for value in values.values() if isinstance(values, dict) and "$" not in values else [values]:
        decode(value, dict.fromkeys(leaves))
    return ItemMeta(str(content["kind"]), leaves, ties, values)


def _leaf_meta(name: str, content: Json) -> LeafMeta:
    shape, dtype, residence = tuple(content["shape"]), content["dtype"], content["residence"]
    base, weak_type = content.get("base"), content.get("weak_type", False)
    if (
        len(shape) > _MOST_DIMENSIONS
        or not all(type(size) is int and size >= 0 for size in shape)
        or dtype not in BY_NAME
        or math.prod(size or 1 for size in shape) * BY_NAME[dtype].itemsize > _MOST_BYTES
        or residence not in get_args(Residence)
        or not _FINGERPRINT.fullmatch(content["fingerprint"])
        or not (base is None or (type(base) is int and base >= 0))
        or type(weak_type) is not bool
    ):
        raise ValueError(f"{name[:200]!r} is described as {str(content)[:200]}, which no array can be")
    return LeafMeta(shape, dtype, residence, content["sharding"], content["fingerprint"], base, weak_type)
