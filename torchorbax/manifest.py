"""What a step says about itself: the JSON item `manifest`, with all that Orbax cannot hold."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torchorbax.dtypes import BY_NAME
from torchorbax.values import Json

FORMAT = 1

Residence = Literal["jax", "host"]


@dataclass(frozen=True)
class LeafMeta:
    """One stored array.

    Attributes:
        shape: its dimensions.
        dtype: its dtype's name, the same for torch, numpy and JAX (`torchorbax.dtypes`).
        residence: whether it lived on jax devices or in host memory.
        sharding: how it was sharded when saved, for people to read (`torchorbax.sharding.describe`).
        fingerprint: of its data (`torchorbax.fingerprint`); empty until that is known.
    """

    shape: tuple[int, ...]
    dtype: str
    residence: Residence
    sharding: Mapping[str, Any] | None = None
    fingerprint: str = ""

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


@dataclass(frozen=True)
class Manifest:
    """One step.

    Attributes:
        step: its number.
        time: when `save` was called, in UTC.
        metrics: the numbers given with it.
        items: what was saved, by item name.
        versions: the libraries that wrote it.
    """

    step: int
    time: datetime.datetime
    metrics: Mapping[str, float]
    items: Mapping[str, ItemMeta]
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Json]:
        """The JSON object that `from_json` reads."""
        content = {"format": FORMAT, **asdict(self), "time": self.time.isoformat()}
        return {**content, "sha256": _digest(content)}

    @classmethod
    def from_json(cls, content: Json) -> Manifest:
        """The manifest in a JSON object.

        Raises:
            ValueError: not a manifest, of a newer format, or changed since it was written.
        """
        try:
            if content["format"] > FORMAT:
                raise ValueError(f"manifest format {content['format']} is newer than this torchorbax reads ({FORMAT})")
            if content["sha256"] != _digest({key: value for key, value in content.items() if key != "sha256"}):
                raise ValueError("the manifest is not what was written: its SHA-256 differs")
            items = {
                name: ItemMeta(
                    kind=item["kind"],
                    leaves={leaf: _leaf_meta(meta) for leaf, meta in item["leaves"].items()},
                    ties=dict(item["ties"]),
                    values=item["values"],
                )
                for name, item in content["items"].items()
            }
            time = datetime.datetime.fromisoformat(content["time"])
            return cls(content["step"], time, dict(content["metrics"]), items, dict(content["versions"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a torchorbax manifest: {type(error).__name__}: {error}") from error


def _digest(content: Json) -> str:
    """SHA-256 of JSON content: Orbax keeps no checksum, and a learning rate with a flipped bit is one, too."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _leaf_meta(content: Json) -> LeafMeta:
    return LeafMeta(
        tuple(content["shape"]),
        content["dtype"],
        content["residence"],
        content["sharding"],
        content["fingerprint"],
    )
