"""A consistent copy of the state at one step, taken without stalling the loop.

JAX arrays are immutable, so a reference to one is a snapshot, unless the loop donates it; then a copy on the devices
is, which is dispatched here and not waited for. CPU torch tensors and numpy arrays can change at any time and are
copied at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding

from torchorbax.adapter import Array, host_copy, live_array, raise_if_deleted
from torchorbax.errors import ConfigError
from torchorbax.frozen import NEW_BASE, Identities, Look
from torchorbax.manifest import ItemMeta, LeafMeta
from torchorbax.sharding import describe
from torchorbax.state import Captured

Staging = Literal["auto", "reference", "device", "host"]


@dataclass(frozen=True)
class Snapshot:
    """The arrays to write by item and leaf name, what the manifest says of all, and which the frozen ones are."""

    arrays: Mapping[str, Mapping[str, Array]]
    items: Mapping[str, ItemMeta]
    identities: Identities = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays, each counted once however many devices hold it."""
        return sum(array.nbytes for item in self.arrays.values() for array in item.values())


def check_staging(staging: str) -> Staging:
    """`staging`, if it is one of the known ways.

    Raises:
        ConfigError: it is not.
    """
    if staging not in get_args(Staging):
        raise ConfigError(f"staging must be one of {', '.join(map(repr, get_args(Staging)))}, not {staging!r}")
    return staging  # type: ignore[return-value]  # checked above


def take(captured: Mapping[str, Captured], staging: Staging, look: Look | None = None) -> Snapshot:
    """The state of this moment.

    Args:
        captured: live leaves by item.
        look: the frozen leaves, of which those that the run's base area has are left out.
        staging: `reference` keeps references to jax arrays (right only where nothing is donated; a donated one makes
            the save fail, never wrong); `device` copies them on their devices, dispatched and not waited for; `host`
            copies them to host memory before it returns; `auto` is `device`.

    Raises:
        UnsupportedLeafError, DeletedArrayError: a leaf cannot be saved; nothing has been copied.
    """
    raise_if_deleted({f"{item}.{name}": leaf for item, one in captured.items() for name, leaf in one.leaves.items()})
    look = look or Look({}, {})
    frozen = look.known
    held = {
        (item, name): live_array(f"{item}.{name}", leaf)
        for item, one in captured.items()
        for name, leaf in one.leaves.items()
        if frozen.get((item, name)) is None
    }
    on_device = {key: array for key, array in held.items() if isinstance(array, jax.Array)}
    staged: dict[tuple[str, str], Array] = dict(_stage(on_device, staging))
    for key, array in held.items():
        if not isinstance(array, jax.Array):
            staged[key] = host_copy(array)
    arrays = {
        item: {name: staged[item, name] for name in one.leaves if (item, name) in staged}
        for item, one in captured.items()
    }
    items = {
        item: ItemMeta(
            kind=one.kind,
            leaves={
                name: frozen.get((item, name))
                or _meta(arrays[item][name], held[item, name], NEW_BASE if (item, name) in frozen else None)
                for name in one.leaves
            },
            ties=one.ties,
            values=one.values,
        )
        for item, one in captured.items()
    }
    return Snapshot(arrays, items, look.identities)


def _meta(array: Array, held: Any, base: int | None) -> LeafMeta:
    if isinstance(held, jax.Array):
        return LeafMeta(tuple(array.shape), str(array.dtype), "jax", describe(held.sharding), base=base)
    return LeafMeta(tuple(array.shape), str(array.dtype), "host")


def _stage(arrays: Mapping[tuple[str, str], jax.Array], staging: Staging) -> dict[tuple[str, str], Array]:
    if staging == "reference":
        return dict(arrays)
    if staging == "host":
        return {key: np.array(array) for key, array in arrays.items()}
    copies: dict[tuple[str, str], Array] = {}
    by_devices: dict[tuple[jax.Device, ...], list[tuple[str, str]]] = {}
    for key, array in arrays.items():
        by_devices.setdefault(_devices_in_order(array.sharding), []).append(key)
    for keys in by_devices.values():  # one dispatch for all that can share a program
        copies.update(zip(keys, _copy([arrays[key] for key in keys]), strict=True))
    return copies


def _devices_in_order(sharding: Sharding) -> tuple[jax.Device, ...]:
    """What the arrays of one program must have in common."""
    if isinstance(sharding, NamedSharding):
        return tuple(sharding.mesh.devices.flat)
    return tuple(sorted(sharding.device_set, key=lambda device: device.id))


@jax.jit
def _copy(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    return [jnp.copy(array) for array in arrays]
