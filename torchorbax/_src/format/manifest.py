"""The manifest: the JSON item in which a step describes itself, with everything that Orbax's own files cannot hold."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

from torchorbax._src.arrays.dtypes import BY_NAME
from torchorbax._src.format import bounded_json
from torchorbax._src.format.decode import decode
from torchorbax._src.format.values import Json

Key = tuple[str, str]
"""The key of a leaf in a step: the name of the item, and the name of the leaf within the item."""

FORMAT = 1
ITEM_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
"""The names that an item may have. An item's folder has the same name."""

FileDigest = tuple[int, str]
"""The size of a file in bytes, and the CRC-32C of its content in eight hexadecimal digits."""

Residence = Literal["jax", "host"]

_OMITTED = {"base": None, "weak_type": False}
"""Values that are not written, because most leaves have them."""
_CRC32C = re.compile(r"[0-9a-f]{8}")
_FINGERPRINT = re.compile(r"[0-9a-f]{32}")
_SHA_256 = re.compile(r"[0-9a-f]{64}")
_MOST_DIMENSIONS = 64  # numpy's limit
_MOST_BYTES = 1 << 62
_MOST_PROCESSES = 1 << 20


@dataclass(frozen=True)
class LeafMeta:
    """One stored array.

    Attributes:
        shape: the shape of the array.
        dtype: the name of its dtype, the same for torch, numpy and JAX (see `arrays.dtypes`).
        residence: whether the live array was on jax devices or in host memory.
        sharding: how it was sharded when it was saved, for people to read (see `arrays.sharding_rules.describe`).
        fingerprint: the fingerprint of its data (see `arrays.fingerprint`); empty until it is known.
        base: for a frozen leaf, the number of the base that holds it (see `save.frozen`); None if the step holds it.
        weak_type: was it weakly typed, as `jnp.asarray(0.1)` is? JAX gives such an array the dtype of what it meets.
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
        """The number of bytes of the array, counted once however many devices hold it."""
        return math.prod(self.shape) * BY_NAME[self.dtype].itemsize

    @property
    def is_empty(self) -> bool:
        """Does the array have no elements? Orbax cannot store such an array, and there is nothing to store."""
        return 0 in self.shape


class Shared(NamedTuple):
    """An object of an item that is in another item, too.

    Attributes:
        here: the name of a leaf, or the number of a mutable container among those of the item's values.
        item: the other item.
        there: the name or number there.
        detached: is it another tensor or array with the same memory?
    """

    here: str | int
    item: str
    there: str | int
    detached: bool = False


@dataclass(frozen=True)
class ItemMeta:
    """One item of a step.

    Attributes:
        kind: the kind of live object that was saved: `module`, `torch.optim`, `optax`, `object`, `pytree` or `rng`.
        leaves: the stored arrays by name.
        ties: further names of stored arrays, `{alias: name}`.
        values: everything that is not an array, as `format.values.encode` writes it.
        shared: what is in other items, too; None if the step does not say, because an older version wrote it.
    """

    kind: str
    leaves: Mapping[str, LeafMeta]
    ties: Mapping[str, str] = field(default_factory=dict)
    values: Json = None
    shared: tuple[Shared, ...] | None = None

    def to_json(self) -> dict[str, Json]:
        """The JSON object of this item in the manifest."""
        leaves = {
            name: {key: value for key, value in vars(leaf).items() if _OMITTED.get(key, ...) is not value}
            for name, leaf in self.leaves.items()
        }
        shared = {} if self.shared is None else {"shared": self.shared}
        return {"kind": self.kind, "leaves": leaves, "ties": self.ties, "values": self.values, **shared}


@dataclass(frozen=True)
class Manifest:
    """The content of the manifest of one step.

    Attributes:
        step: the number of the step.
        time: when `save` was called, in UTC.
        metrics: the metrics that were given to `save`.
        items: the items that were saved, by name.
        versions: the versions of the libraries that wrote the step, by name.
        processes: how many processes wrote the step.
        parts: in a local tier of several processes, which part of which array a leaf holds, by item and leaf (see
            `save.local_tier`).
        origin: in a local tier, the run that saved the step, and which start of that run; else empty.
        run: the identity of the run that saved the step; empty in steps of before runs had one.
        epoch: how many owners the run had had by then (see `storage.ownership`).
        files: the size in bytes and the CRC-32C, in hexadecimal, of every file of the step but the manifest itself and
            the commit marker, by path; empty in steps of before that was noted.
        own: by number of the process, the SHA-256 of the file with that process's own state (see
            `format.per_process`); only for processes that have such a file.
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
    run: str = ""
    epoch: int = 0
    files: Mapping[str, FileDigest] = field(default_factory=dict)

    @property
    def leaves(self) -> dict[Key, LeafMeta]:
        """The leaves of all items."""
        return leaves_of(self.items)

    @property
    def frozen_leaves(self) -> dict[Key, LeafMeta]:
        """The leaves that the run's bases hold."""
        return {key: leaf for key, leaf in self.leaves.items() if leaf.base is not None}

    @property
    def bases(self) -> set[int]:
        """The numbers of the bases that hold frozen leaves of the step."""
        return {leaf.base for leaf in self.leaves.values() if leaf.base is not None}

    def of_base(self, base: int) -> Manifest:
        """The manifest of a base that this step writes: that of a step, with only the leaves that the base holds."""
        items = {
            name: ItemMeta(
                item.kind,
                {key: replace(leaf, base=None) for key, leaf in item.leaves.items() if leaf.base == base},
            )
            for name, item in self.items.items()
        }
        with_leaves = {name: item for name, item in items.items() if item.leaves}
        return Manifest(base, self.time, {}, with_leaves, self.versions, run=self.run, epoch=self.epoch)

    def with_fingerprints(self, fingerprints: Mapping[Key, str]) -> Manifest:
        """The manifest with these fingerprints by key. All other leaves keep theirs."""
        items = {
            item: replace(
                meta,
                leaves={
                    name: replace(leaf, fingerprint=fingerprints.get((item, name), leaf.fingerprint))
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

    def to_text(self) -> str:
        """The text that `from_text` reads.

        Raises:
            ValueError: it is too large to be read again.
        """
        text = json.dumps(self.to_json())
        bounded_json.check(text, lambda: len(self.leaves) * bounded_json.LEAF_BYTES)
        return text

    @classmethod
    def from_text(cls, text: str, other_bytes: Callable[[], int] = lambda: 0) -> Manifest:
        """The manifest in the text of its file.

        Args:
            text: the text.
            other_bytes: counts the bytes of the run's other files, which limit how much memory the manifest may take.

        Raises:
            ValueError: as `from_json` does; or the text is no JSON, or would take too much memory.
        """
        try:
            content = bounded_json.loads(text, other_bytes)
        except RecursionError as error:
            raise ValueError(f"not a torchorbax manifest: {type(error).__name__}: {error}") from error
        return cls.from_json(content)

    @classmethod
    def from_json(cls, content: Json) -> Manifest:
        """The manifest in a JSON object.

        Raises:
            ValueError: it is not a manifest, has a newer format, has been changed since it was written, or has content
                that `to_json` never writes.
        """
        try:
            if type(content["format"]) is not int or content["format"] < 1:
                raise ValueError(f"not a torchorbax manifest: its format is {str(content['format'])[:200]}")
            if content["format"] > FORMAT:
                raise ValueError(f"manifest format {content['format']} is newer than this torchorbax reads ({FORMAT})")
            if content["sha256"] != digest({key: value for key, value in content.items() if key != "sha256"}):
                raise ValueError("the manifest is not what was written: its SHA-256 differs")
            step, time = content["step"], datetime.datetime.fromisoformat(content["time"])
            if type(step) is not int or step < 0:
                raise ValueError(f"the step is {str(step)[:200]}")
            if time.tzinfo is None:
                raise ValueError(f"the time {content['time']} has no time zone")
            items = {name: _item_meta(name, item) for name, item in content["items"].items()}
            parts = {item: dict(of_item) for item, of_item in content.get("parts", {}).items()}
            versions, origin = dict(content["versions"]), content.get("origin", "")
            if not all(type(text) is str for text in (*versions.values(), origin)):
                raise ValueError(f"the versions are {str(versions)[:200]}, and the origin is {str(origin)[:200]}")
            processes, own = _processes(content)
            run, epoch = content.get("run", ""), content.get("epoch", 0)
            if type(run) is not str or type(epoch) is not int:
                raise ValueError(f"the run is {str(run)[:200]}, and its epoch {str(epoch)[:200]}")
            files = {path: _file_digest(path, found) for path, found in content.get("files", {}).items()}
            metrics = _metrics(content["metrics"])
            return cls(
                step, time, metrics, items, versions, processes, own, parts, origin, run=run, epoch=epoch, files=files
            )
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a torchorbax manifest: {type(error).__name__}: {str(error)[:200]}") from error


def _metrics(content: Json) -> dict[str, float]:
    if not all(type(value) in (int, float) for value in content.values()):
        raise ValueError(f"the metrics are {str(content)[:200]}, which are not all numbers")
    return {name: float(value) for name, value in content.items()}


def _processes(content: Json) -> tuple[int, dict[str, str]]:
    """How many processes wrote the step, and the SHA-256 of the files with their own state."""
    count, own = content.get("processes", 1), dict(content.get("own", {}))
    if type(count) is not int or not 1 <= count <= _MOST_PROCESSES:
        raise ValueError(f"it says that {str(count)[:200]} processes wrote it")
    if not all(
        index.isascii()
        and index.isdecimal()
        and index == str(int(index))
        and int(index) < count
        and _SHA_256.fullmatch(text)
        for index, text in own.items()
    ):
        raise ValueError(f"it says that of {count} processes, {str(own)[:200]} have state of their own")
    return count, own


def leaves_of(items: Mapping[str, ItemMeta]) -> dict[Key, LeafMeta]:
    """The leaves of all items, by key."""
    return {(item, name): leaf for item, meta in items.items() for name, leaf in meta.leaves.items()}


def by_base(leaves: Mapping[Key, LeafMeta], keys: Iterable[Key]) -> dict[int | None, list[Key]]:
    """Keys, grouped by the base that holds their leaves. The group of the step itself, None, is always there, last."""
    found: dict[int | None, list[Key]] = {}
    for key in keys:
        found.setdefault(leaves[key].base, []).append(key)
    of_step = found.pop(None, [])
    return {**found, None: of_step}


def digest(content: Json) -> str:
    """SHA-256 of JSON content. Orbax keeps no checksum, and a learning rate with a flipped bit is still valid JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _item_meta(name: str, content: Json) -> ItemMeta:
    if not ITEM_NAME.fullmatch(name):
        raise ValueError(f"{name[:200]!r} cannot name an item")
    leaves = {leaf: leaf_meta(leaf, meta) for leaf, meta in content["leaves"].items()}
    ties = dict(content["ties"])
    if strangers := [alias for alias, leaf in ties.items() if leaf not in leaves]:
        raise ValueError(f"{name}: {strangers[0][:200]!r} is tied to a leaf that is not there")
    check_values(content["values"], leaves)
    shared = content.get("shared")
    shared = None if shared is None else tuple(map(_shared, shared))
    return ItemMeta(str(content["kind"]), leaves, ties, content["values"], shared)


def check_values(values: Json, leaves: Iterable[str]) -> None:
    """Raise ValueError if the values of an item are not what `format.encode` writes, with these leaves.

    They are a single encoded value, or several by name. Once they have been decoded here, later code can rely on their
    form.
    """
    for value in values.values() if isinstance(values, dict) and "$" not in values else [values]:
        decode(value, dict.fromkeys(leaves))


def _shared(content: Json) -> Shared:
    match content:
        case [str() | int() as here, str(item), str() | int() as there, bool(detached)]:
            return Shared(here, item, there, detached)
    raise ValueError(f"{str(content)[:200]} does not say what two items share")


def _file_digest(path: str, content: Json) -> FileDigest:
    nbytes, crc32c = content
    parts = path.split("/")
    if type(nbytes) is not int or nbytes < 0 or not _CRC32C.fullmatch(crc32c) or {"", ".", ".."} & set(parts):
        raise ValueError(f"the file {path[:200]!r} is described as {str(content)[:200]}")
    return nbytes, crc32c


def is_possible(shape: Sequence[Json], dtype: str) -> bool:
    """Can an array have this shape and dtype, which somebody else may have written?"""
    return (
        len(shape) <= _MOST_DIMENSIONS
        and all(type(size) is int and size >= 0 for size in shape)
        and dtype in BY_NAME
        and math.prod(size or 1 for size in shape) * BY_NAME[dtype].itemsize <= _MOST_BYTES
    )


def leaf_meta(name: str, content: Json) -> LeafMeta:
    """The description of a leaf in a JSON object. Raises ValueError if no array can be so."""
    shape, dtype, residence = tuple(content["shape"]), content["dtype"], content["residence"]
    base, weak_type = content.get("base"), content.get("weak_type", False)
    if (
        not is_possible(shape, dtype)
        or residence not in get_args(Residence)
        or not _FINGERPRINT.fullmatch(content["fingerprint"])
        or not (base is None or (type(base) is int and base >= 0))
        or type(weak_type) is not bool
    ):
        raise ValueError(f"{name[:200]!r} is described as {str(content)[:200]}, which no array can be")
    return LeafMeta(shape, dtype, residence, content["sharding"], content["fingerprint"], base, weak_type)
