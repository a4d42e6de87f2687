"""A consistent copy of the state at one step, taken without stalling the loop.

JAX arrays are immutable, so a reference to one is a snapshot, unless the loop donates it. Then it takes a copy on the
devices, which is dispatched here and not waited for; or, on the CPU, a numpy view of the array's memory: JAX's CPU
backend gives memory that somebody looks at to no other array. CPU torch tensors and numpy arrays can change at any time
and are copied at once.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import threading
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from functools import cached_property
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import torch

from torchorbax.adapter import Array, host_copy, live_array, live_dtype, raise_if_deleted
from torchorbax.dtypes import dtype_name
from torchorbax.errors import ConfigError
from torchorbax.frozen import NEW_BASE, Identities, Key, Look
from torchorbax.manifest import ItemMeta, LeafMeta
from torchorbax.sharding import describe
from torchorbax.shards import HostShards, Shard, devices, is_on_device, parts, shards, stacked
from torchorbax.state import Captured

Staging = Literal["auto", "reference", "device", "host"]

_WORTH_A_VIEW_BYTES = 64 << 10
"""Bytes of a shard from which on a view of it (some microseconds) is cheaper than a copy."""
_SPARE = 0.05
"""The part of a device's memory that copies leave alone: the step needs some for itself."""

_logger = logging.getLogger(__name__)


class Snapshot:
    """The arrays to write, what the manifest says of all leaves, and which the frozen ones are.

    Its properties do their work when they are first asked for, which is on the thread that saves.

    Attributes:
        identities: the frozen arrays.
    """

    def __init__(
        self, captured: Mapping[str, Captured], held: Mapping[Key, Any], staged: dict[Key, _Staged], look: Look
    ) -> None:
        self.identities: Identities = look.identities
        self._frozen = look.known
        self._to_write = list(staged)
        self._captured = {item: (one.kind, list(one.leaves), one.ties, one.values) for item, one in captured.items()}
        self._held = held
        self._staged = staged

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all arrays, each counted once however many devices hold it."""
        return sum(self.items[item].leaves[name].nbytes for item, name in self._to_write)

    @cached_property
    def arrays(self) -> dict[str, MutableMapping[str, Array]]:
        """By item and leaf. Whoever takes one out of its item has the only reference to it."""
        return {
            item: {name: _array(self._staged.pop((item, name))) for name in names if (item, name) in self._staged}
            for item, (_, names, _, _) in self._captured.items()
        }

    @cached_property
    def items(self) -> dict[str, ItemMeta]:
        """By item, without fingerprints."""
        held, self._held = self._held, {}  # live arrays, which must not be kept alive
        return {
            item: ItemMeta(kind, {name: self._meta(item, name, held) for name in names}, ties, values)
            for item, (kind, names, ties, values) in self._captured.items()
        }

    def _meta(self, item: str, name: str, held: Mapping[Key, Any]) -> LeafMeta:
        known = self._frozen.get((item, name))
        return known or _meta(held[item, name], NEW_BASE if (item, name) in self._frozen else None)


def _meta(held: jax.Array | np.ndarray | torch.Tensor, base: int | None) -> LeafMeta:
    if isinstance(held, jax.Array):  # which says these things when it has been donated, too
        return LeafMeta(tuple(held.shape), dtype_name(held.dtype), "jax", describe(held.sharding), base=base)
    dtype = live_dtype(held) if isinstance(held, torch.Tensor) else held.dtype
    return LeafMeta(tuple(held.shape), dtype_name(dtype), "host")


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
        staging: `reference` keeps references to jax arrays (right only where nothing is donated; a donated one makes
            the save fail, never wrong); `device` copies them on their devices, dispatched and not waited for, as far as
            there is memory; `host` copies them to host memory before it returns; `auto` takes views of what is computed
            and lies on CPU devices, and is `device` for the rest.
        look: the frozen leaves, of which those that the run's base area has are left out.

    Raises:
        UnsupportedLeafError, DeletedArrayError: a leaf cannot be saved; nothing has been copied.
    """
    look = look or Look({}, {})
    leaves = {(item, name): leaf for item, one in captured.items() for name, leaf in one.leaves.items()}
    try:
        held = {
            key: live_array(f"{key[0]}.{key[1]}", leaf) for key, leaf in leaves.items() if look.known.get(key) is None
        }
        on_device = {key: array for key, array in held.items() if isinstance(array, jax.Array)}
        gone = any(array.is_deleted() for array in on_device.values())
    except RuntimeError:  # a view of an array that has been deleted
        raise_if_deleted(_named(leaves))
        raise
    if gone:
        raise_if_deleted(_named(leaves))
    staged = _stage(on_device, staging)
    for key, array in held.items():
        if not isinstance(array, jax.Array):
            staged[key] = host_copy(array)
    return Snapshot(captured, held, staged, look)


def _named(leaves: Mapping[Key, Any]) -> dict[str, Any]:
    return {f"{item}.{name}": leaf for (item, name), leaf in leaves.items()}


def _stage(arrays: Mapping[Key, jax.Array], staging: Staging) -> dict[Key, _Staged]:
    if staging == "reference":
        return dict(arrays)
    if staging == "host":
        return _host_copies(arrays)
    views = {key: _View(array) for key, array in arrays.items() if staging == "auto" and _is_worth_a_view(array)}
    rest = {key: array for key, array in arrays.items() if key not in views}
    on_device = {key: array for key, array in rest.items() if is_on_device(array.sharding)}
    fitting = _fitting(on_device)
    if len(fitting) < len(on_device):
        _warn_of_full_devices()
    others = {key: array for key, array in rest.items() if key not in fitting}
    return {**views, **_copies(fitting), **_host_copies(others)}


# -------------------------------------------------------------------------------------------------------------- views


class _View:
    """An array on CPU devices, kept from being overwritten by numpy views of its shards.

    Of an array of several processes, of the shards of this one.
    """

    def __init__(self, array: jax.Array) -> None:
        self.shape, self.dtype, self.nbytes = tuple(array.shape), array.dtype, array.nbytes
        self._sharding = array.sharding
        self._views = [np.asarray(part) for part in parts(array)]

    def array(self) -> jax.Array:
        """A `jax.Array` of the same memory, which nobody else has and can donate."""
        shards = jax.device_put(self._views, devices(self._sharding, self.shape))
        return jax.make_array_from_single_device_arrays(self.shape, self._sharding, shards, dtype=self.dtype)


_Staged = jax.Array | np.ndarray | HostShards | _View


def _array(staged: _Staged) -> Any:
    return staged.array() if isinstance(staged, _View) else staged


def _is_worth_a_view(array: jax.Array) -> bool:
    if array.nbytes < _WORTH_A_VIEW_BYTES * array.sharding.num_devices or array.platform() != "cpu":
        return False
    if not is_on_device(array.sharding):
        return False
    return bool(array.is_ready())  # type: ignore[attr-defined]  # a view of what is being computed would wait for it


# ------------------------------------------------------------------------------------------------------------- copies


def _host_copies(arrays: Mapping[Key, jax.Array]) -> dict[Key, _Staged]:
    for array in arrays.values():
        array.copy_to_host_async()  # all of them on their way before the first is waited for
    return {
        key: np.array(array) if array.is_fully_addressable else _host_shards(array) for key, array in arrays.items()
    }


def _host_shards(array: jax.Array) -> HostShards:
    """What this process has of an array of several processes; what several of its devices have, once."""
    copies: dict[tuple[int, ...], np.ndarray] = {}
    copied: list[Shard] = []
    for shard in shards(array):
        if shard.start not in copies:
            copies[shard.start] = np.array(shard.data)
        copied.append(dataclasses.replace(shard, data=copies[shard.start]))
    return HostShards(tuple(array.shape), np.dtype(array.dtype), array.sharding, tuple(copied))


def _fitting(arrays: Mapping[Key, jax.Array]) -> dict[Key, jax.Array]:
    """Those of which the devices have room for a copy, the first ones first."""
    free = {device: room for device in jax.local_devices() if (room := _room(device)) is not None}
    if not free:
        return dict(arrays)
    fitting: dict[Key, jax.Array] = {}
    for key, array in arrays.items():
        nbytes = math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
        holders = array.sharding.addressable_devices & free.keys()
        if all(free[device] >= nbytes for device in holders):
            fitting[key] = array
            for device in holders:
                free[device] -= nbytes
    return fitting


def _room(device: jax.Device) -> int | None:
    """Bytes that a snapshot may take on a device beside what the loop needs; None if the device does not say."""
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return None
    needed = max(_loop_peak(device), stats["bytes_in_use"])
    room: int = stats["bytes_limit"] - int(_SPARE * stats["bytes_limit"]) - needed
    return room


@functools.cache
def _loop_peak(device: jax.Device) -> int:
    """The most memory that a device has had in use before the first snapshot: the state and what a step works with."""
    stats = device.memory_stats()
    return int(stats.get("peak_bytes_in_use", stats["bytes_in_use"]))


@functools.cache
def _warn_of_full_devices() -> None:
    """Once in a process."""
    _logger.warning(
        "the devices have no room for a copy of the whole state beside the training step, so part of every snapshot is "
        "copied to host memory while the loop waits; staging='reference' avoids the copy where nothing is donated"
    )


def _copies(arrays: Mapping[Key, jax.Array]) -> dict[Key, _Staged]:
    """Copies on the devices, dispatched and not waited for.

    Of an array of several processes, what this one has is copied by programs of this process alone: another may copy
    other arrays, if its devices have room for others.
    """
    copied = _copied([_of_this_process(array) for array in arrays.values()])
    return {
        key: copy if array.is_fully_addressable else _of_all_processes(copy, array)
        for (key, array), copy in zip(arrays.items(), copied, strict=True)
    }


def _of_this_process(array: jax.Array) -> jax.Array:
    """An array of the shards that this process has, one after the other along the first axis; or the array itself if
    that is all of it."""
    if array.is_fully_addressable:
        return array
    return stacked(parts(array))


def _of_all_processes(local: jax.Array, like: jax.Array) -> jax.Array:
    """The reverse of `_of_this_process`."""
    shards = {part.device: part for part in parts(local)}
    order = [part.device for part in parts(like)]
    return jax.make_array_from_single_device_arrays(
        like.shape, like.sharding, [shards[device] for device in order], dtype=like.dtype
    )


_AT_ONCE = (64, 16, 4, 1)
"""So many arrays alike are copied by one program. One for all arrays would take seconds to compile (2.8 s for 2,000,
the first time), and one for each milliseconds to start."""


def _copied(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    alike: dict[Any, list[int]] = {}
    for at, array in enumerate(arrays):
        alike.setdefault((array.shape, array.dtype, array.sharding), []).append(at)
    copies: dict[int, jax.Array] = {}
    for places in alike.values():
        for some in _split(places):
            copies.update(zip(some, _copy([arrays[at] for at in some]), strict=True))
    return [copies[at] for at in range(len(arrays))]


def _split(places: Sequence[int]) -> Iterator[Sequence[int]]:
    start = 0
    while start < len(places):
        size = next(size for size in _AT_ONCE if size <= len(places) - start)
        yield places[start : start + size]
        start += size


@jax.jit
def _copy(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    return [jnp.copy(array) for array in arrays]


def prepare(captured: Mapping[str, Captured], staging: Staging) -> None:
    """Compile, on a thread of its own, what snapshots of such leaves and of optimizer state like them will need.

    Without it, the first save would keep the loop waiting for that.
    """
    if staging not in ("auto", "device"):
        return
    shapes: set[Any] = set()
    for item, one in captured.items():
        for name, leaf in one.leaves.items():
            held = live_array(f"{item}.{name}", leaf)
            if not isinstance(held, jax.Array) or held.is_deleted():
                continue
            if staging == "device" or not _is_worth_a_view(held):
                array = _of_this_process(held)
                shapes.add((array.shape, array.dtype, array.sharding))
    if shapes:
        threading.Thread(target=_compile, args=(shapes,), name="torchorbax-prepare").start()


def _compile(shapes: Collection[Any]) -> None:
    for shape, dtype, sharding in shapes:
        one = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for size in _AT_ONCE:
            _copy.lower([one] * size).compile()
