"""Staging: how a snapshot keeps the values of jax arrays while the training loop goes on and donates them.

An array is kept in one of four ways: by reference, if nothing is donated; as a view of its memory, on CPU devices; as a
copy on its devices, which is dispatched and not waited for; or as a copy in host memory, which the loop waits for.
A view works because JAX's CPU backend does not give the memory of a donated array to another array while a numpy view
of it exists. Device copies are limited by the devices' free memory; what does not fit is copied to the host.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from torchorbax._src.arrays import stacks
from torchorbax._src.arrays.jax_context import own_context
from torchorbax._src.arrays.shards import HostShards, Shard, devices, is_on_device, parts, shards, stacked
from torchorbax._src.arrays.stacks import Layout, Row, by_layout, can_be_stacked, in_programs
from torchorbax._src.format.manifest import Key
from torchorbax._src.state.item import Captured
from torchorbax._src.tensors.live import live_array
from torchorbax.errors import ConfigError

Staging = Literal["auto", "reference", "device", "host"]

_WORTH_A_VIEW_BYTES = 64 << 10
"""The least size of a shard for which a view, which takes some microseconds, is cheaper than a copy."""
_GROWTH = 4
"""How many times as many arrays there may be once the optimizer has made its state: parameters, two moments and master
weights, all of one layout."""
_SPARE = 0.05
"""The share of a device's memory that copies leave free, for what the training step needs."""

Groups = dict[Layout, dict[Key, jax.Array]]
"""Arrays, grouped by layout."""

_logger = logging.getLogger(__name__)


def check_staging(staging: str) -> Staging:
    """`staging`, if it is one of the words that are allowed.

    Raises:
        ConfigError: it is not.
    """
    if staging not in get_args(Staging):
        raise ConfigError(f"staging must be one of {', '.join(map(repr, get_args(Staging)))}, not {staging!r}")
    return staging  # type: ignore[return-value]  # checked above


def stage(arrays: Mapping[Key, jax.Array], staging: Staging) -> dict[Key, Staged]:
    """Keep the values of jax arrays; see `snapshot.take` for the ways."""
    if staging == "reference":
        return dict(arrays)
    if staging == "host":
        return _host_copies(arrays)
    # Sort the arrays by the way in which they are kept.
    staged: dict[Key, Staged] = {}
    offloaded: dict[Key, jax.Array] = {}
    to_copy: Groups = {}
    for layout, group in by_layout(arrays).items():
        if not is_on_device(layout[2]):
            offloaded |= group
        elif staging == "auto" and _are_worth_views(layout):
            # To make a view of an array that is still being computed would wait for it.
            ready = {key: array for key, array in group.items() if _is_ready(array)}
            staged |= {key: _View(array) for key, array in ready.items()}
            to_copy[layout] = {key: array for key, array in group.items() if key not in ready}
        else:
            to_copy[layout] = group
    # Copy on the devices what fits there, and the rest to the host.
    fitting, not_fitting = _fitting(to_copy)
    if not_fitting:
        _warn_of_full_devices()
    with own_context():
        copies = _copies(fitting)
    return {**staged, **copies, **_host_copies({**not_fitting, **offloaded})}


# Views.


class _View:
    """Views of this process's shards of an array on CPU devices, which protect its memory from being reused."""

    def __init__(self, array: jax.Array) -> None:
        self._shape, self._dtype, self._sharding = array.shape, array.dtype, array.sharding
        # A `memoryview` is a little cheaper than a numpy view, but does not support bfloat16 and the like.
        view = memoryview if array.dtype.isbuiltin == 1 else np.asarray
        self._views: list[Any] = [view(part) for part in parts(array)]

    def array(self) -> jax.Array:
        """A new `jax.Array` of the same memory, which the loop does not know and so cannot donate."""
        views = map(np.asarray, self._views)  # in the order in which the callback is called
        with own_context():
            return jax.make_array_from_callback(self._shape, self._sharding, lambda _: next(views), dtype=self._dtype)


Staged = jax.Array | np.ndarray | HostShards | Row | _View
"""A staged array; `as_array` makes an array of it."""


def as_array(staged: Staged) -> Any:
    """The array, to be written."""
    return staged.array() if isinstance(staged, _View) else staged


def _is_ready(array: jax.Array) -> bool:
    return bool(array.is_ready())  # type: ignore[attr-defined]  # public, but not declared


def _are_worth_views(layout: Layout) -> bool:
    shape, dtype, sharding = layout
    if math.prod(shape) * dtype.itemsize < _WORTH_A_VIEW_BYTES * sharding.num_devices:
        return False
    return all(device.platform == "cpu" for device in devices(sharding, shape))


# Copies.


def _host_copies(arrays: Mapping[Key, jax.Array]) -> dict[Key, Staged]:
    """Copies in host memory. All transfers are started before the first is waited for."""
    for array in arrays.values():
        array.copy_to_host_async()
    return {
        key: np.array(array) if array.is_fully_addressable else _host_shards(array) for key, array in arrays.items()
    }


def _host_shards(array: jax.Array) -> HostShards:
    """A host copy of this process's shards. Equal shards of several of its devices share one copy."""
    copies: dict[tuple[int, ...], np.ndarray] = {}
    copied: list[Shard] = []
    for shard in shards(array):
        if shard.start not in copies:
            copies[shard.start] = np.array(shard.data)
        copied.append(dataclasses.replace(shard, data=copies[shard.start]))
    return HostShards(tuple(array.shape), np.dtype(array.dtype), array.sharding, tuple(copied))


def _fitting(groups: Groups) -> tuple[Groups, dict[Key, jax.Array]]:
    """Divide arrays into those of which the devices have room for a copy, taken in order, and all others."""
    free = {device: room for device in jax.local_devices() if (room := _room(device)) is not None}
    not_fitting: dict[Key, jax.Array] = {}
    if not free:
        return groups, not_fitting
    fitting: Groups = {}
    for (shape, dtype, sharding), group in groups.items():
        nbytes = math.prod(sharding.shard_shape(shape)) * dtype.itemsize
        holders = sharding.addressable_devices & free.keys()
        room = min((max(free[device], 0) // nbytes for device in holders), default=len(group)) if nbytes else len(group)
        keys = list(group)
        fitting[shape, dtype, sharding] = {key: group[key] for key in keys[:room]}
        not_fitting |= {key: group[key] for key in keys[room:]}
        for device in holders:
            free[device] -= nbytes * len(keys[:room])
    return fitting, not_fitting


def _room(device: jax.Device) -> int | None:
    """Bytes that a snapshot may take of a device's memory, beside what the loop needs; None if it reports none."""
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        return None
    needed = max(_loop_peak(device), stats["bytes_in_use"])
    room: int = stats["bytes_limit"] - int(_SPARE * stats["bytes_limit"]) - needed
    return room


@functools.cache
def _loop_peak(device: jax.Device) -> int:
    """The peak memory use of a device before the first snapshot, in bytes: the state, and what a training step needs.

    It is cached, so that the copies of later snapshots are not counted.
    """
    stats = device.memory_stats()
    return int(stats.get("peak_bytes_in_use", stats["bytes_in_use"]))


@functools.cache
def _warn_of_full_devices() -> None:
    """Log a warning; cached, so that it is logged once in a process."""
    _logger.warning(
        "the devices have no room for a copy of the whole state beside the training step, so part of every snapshot is "
        "copied to host memory while the loop waits; staging='reference' avoids the copy where nothing is donated"
    )


def _copies(groups: Groups) -> dict[Key, Staged]:
    """Copies on the devices, dispatched and not waited for. Small arrays become rows of stacks, as they are written.

    The shards of an array of several processes are copied by programs of this process alone. The programs of another
    process may differ, because its devices may have room for other arrays.
    """
    copies: dict[Key, Staged] = {}
    for layout, group in groups.items():
        if can_be_stacked(layout):
            copies.update(stacks.stack(group))
            continue
        for keys in in_programs(list(group)):
            copied = stacks.run(_copy, [_of_this_process(group[key]) for key in keys])
            copies.update(
                (key, copy if layout[2].is_fully_addressable else _of_all_processes(copy, group[key]))
                for key, copy in zip(keys, copied, strict=True)
            )
    return copies


def _of_this_process(array: jax.Array) -> jax.Array:
    """An array on this process's devices alone: the array itself, or its shards stacked along the first axis."""
    if array.is_fully_addressable:
        return array
    return stacked(parts(array))


def _of_all_processes(local: jax.Array, like: jax.Array) -> jax.Array:
    """The reverse of `_of_this_process`: an array like `like`, of the shards in `local`."""
    shards = {part.device: part for part in parts(local)}
    order = [part.device for part in parts(like)]
    return jax.make_array_from_single_device_arrays(
        like.shape, like.sharding, [shards[device] for device in order], dtype=like.dtype
    )


@jax.jit
def _copy(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    return [jnp.copy(array) for array in arrays]


def prepare(captured: Mapping[str, Captured], staging: Staging) -> None:
    """Compile the programs that snapshots of these leaves and of their optimizer state will need, on a new thread.

    Otherwise the first save would keep the loop waiting while they are compiled.
    """
    if staging not in ("auto", "device"):
        return
    held = {
        (item, name): live_array(f"{item}.{name}", leaf)
        for item, of_item in captured.items()
        for name, leaf in of_item.leaves.items()
    }
    arrays = {key: array for key, array in held.items() if isinstance(array, jax.Array) and not array.is_deleted()}
    to_compile: list[tuple[Layout, jax.ShapeDtypeStruct, int]] = []
    for layout, group in by_layout(arrays).items():
        viewed = staging == "auto" and _are_worth_views(layout) and all(map(_is_ready, group.values()))
        if is_on_device(layout[2]) and not viewed:
            local = _of_this_process(next(iter(group.values())))
            like = jax.ShapeDtypeStruct(local.shape, local.dtype, sharding=local.sharding)
            to_compile.append((layout, like, _GROWTH * len(group)))
    if to_compile:
        threading.Thread(target=_compile, args=(to_compile,), name="torchorbax-prepare").start()


def _compile(layouts: Sequence[tuple[Layout, jax.ShapeDtypeStruct, int]]) -> None:
    with own_context():
        for layout, like, count in layouts:
            for size in stacks.AT_ONCE:
                if size <= count and can_be_stacked(layout):
                    stacks.compile_stack(like, size)
                elif size <= count:
                    stacks.compile_ahead(_copy, like, size)
