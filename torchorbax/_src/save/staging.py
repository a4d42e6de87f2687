"""How it is taken: views, device copies, host copies."""

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
from torchorbax._src.arrays.stacks import Layout, Row, alike, can_be_stacked, in_programs
from torchorbax._src.format.manifest import Key
from torchorbax._src.state.item import Captured
from torchorbax._src.tensors.live import live_array
from torchorbax.errors import ConfigError

Staging = Literal["auto", "reference", "device", "host"]

_WORTH_A_VIEW_BYTES = 64 << 10
"""Bytes of a shard from which on a view of it (some microseconds) is cheaper than a copy."""
_GROWTH = 4
"""So many times the arrays of a model are there when its optimizer has made its state: moments, master weights."""
_SPARE = 0.05
"""The part of a device's memory that copies leave alone: the step needs some for itself."""

Groups = dict[Layout, dict[Key, jax.Array]]
"""Arrays by their layout."""

_logger = logging.getLogger(__name__)


def check_staging(staging: str) -> Staging:
    """`staging`, if it is one of the known ways.

    Raises:
        ConfigError: it is not.
    """
    if staging not in get_args(Staging):
        raise ConfigError(f"staging must be one of {', '.join(map(repr, get_args(Staging)))}, not {staging!r}")
    return staging  # type: ignore[return-value]  # checked above


def stage(arrays: Mapping[Key, jax.Array], staging: Staging) -> dict[Key, Staged]:
    if staging == "reference":
        return dict(arrays)
    if staging == "host":
        return _host_copies(arrays)
    staged: dict[Key, Staged] = {}
    offloaded: dict[Key, jax.Array] = {}
    to_copy: Groups = {}
    for layout, group in alike(arrays).items():
        if not is_on_device(layout[2]):
            offloaded |= group
        elif staging == "auto" and _are_worth_views(layout):
            ready = {key: array for key, array in group.items() if _is_ready(array)}  # a view of others would wait
            staged |= {key: _View(array) for key, array in ready.items()}
            to_copy[layout] = {key: array for key, array in group.items() if key not in ready}
        else:
            to_copy[layout] = group
    fitting, others = _fitting(to_copy)
    if others:
        _warn_of_full_devices()
    with own_context():
        copies = _copies(fitting)
    return {**staged, **copies, **_host_copies({**others, **offloaded})}


# -------------------------------------------------------------------------------------------------------------- views


class _View:
    """An array on CPU devices, kept from being overwritten by views of its shards.

    Of an array of several processes, of the shards of this one.
    """

    def __init__(self, array: jax.Array) -> None:
        self._shape, self._dtype, self._sharding = array.shape, array.dtype, array.sharding
        # A `memoryview` is a little cheaper, but has no names for bfloat16 and the like.
        view = memoryview if array.dtype.isbuiltin == 1 else np.asarray
        self._views: list[Any] = [view(part) for part in parts(array)]

    def array(self) -> jax.Array:
        """A `jax.Array` of the same memory, which nobody else has and can donate."""
        views = map(np.asarray, self._views)  # in the order in which JAX asks for them
        with own_context():
            return jax.make_array_from_callback(self._shape, self._sharding, lambda _: next(views), dtype=self._dtype)


Staged = jax.Array | np.ndarray | HostShards | Row | _View


def as_array(staged: Staged) -> Any:
    return staged.array() if isinstance(staged, _View) else staged


def _is_ready(array: jax.Array) -> bool:
    return bool(array.is_ready())  # type: ignore[attr-defined]  # public, but not declared


def _are_worth_views(layout: Layout) -> bool:
    shape, dtype, sharding = layout
    if math.prod(shape) * dtype.itemsize < _WORTH_A_VIEW_BYTES * sharding.num_devices:
        return False
    return all(device.platform == "cpu" for device in devices(sharding, shape))


# ------------------------------------------------------------------------------------------------------------- copies


def _host_copies(arrays: Mapping[Key, jax.Array]) -> dict[Key, Staged]:
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


def _fitting(groups: Groups) -> tuple[Groups, dict[Key, jax.Array]]:
    """Those of which the devices have room for a copy, the first ones first; and the others."""
    free = {device: room for device in jax.local_devices() if (room := _room(device)) is not None}
    others: dict[Key, jax.Array] = {}
    if not free:
        return groups, others
    fitting: Groups = {}
    for (shape, dtype, sharding), group in groups.items():
        nbytes = math.prod(sharding.shard_shape(shape)) * dtype.itemsize
        holders = sharding.addressable_devices & free.keys()
        room = min((max(free[device], 0) // nbytes for device in holders), default=len(group)) if nbytes else len(group)
        keys = list(group)
        fitting[shape, dtype, sharding] = {key: group[key] for key in keys[:room]}
        others |= {key: group[key] for key in keys[room:]}
        for device in holders:
            free[device] -= nbytes * len(keys[:room])
    return fitting, others


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


def _copies(groups: Groups) -> dict[Key, Staged]:
    """Copies on the devices, dispatched and not waited for; small arrays as rows of stacks, as they will be written.

    Of an array of several processes, what this one has is copied by programs of this process alone: another may copy
    other arrays, if its devices have room for others.
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


@jax.jit
def _copy(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    return [jnp.copy(array) for array in arrays]


def prepare(captured: Mapping[str, Captured], staging: Staging) -> None:
    """Compile, on a thread of its own, what snapshots of such leaves and of optimizer state like them will need.

    Without it, the first save would keep the loop waiting for that.
    """
    if staging not in ("auto", "device"):
        return
    held = {
        (item, name): live_array(f"{item}.{name}", leaf)
        for item, one in captured.items()
        for name, leaf in one.leaves.items()
    }
    arrays = {key: one for key, one in held.items() if isinstance(one, jax.Array) and not one.is_deleted()}
    to_compile: list[tuple[Layout, jax.ShapeDtypeStruct, int]] = []
    for layout, group in alike(arrays).items():
        viewed = staging == "auto" and _are_worth_views(layout) and all(map(_is_ready, group.values()))
        if is_on_device(layout[2]) and not viewed:
            here = _of_this_process(next(iter(group.values())))
            one = jax.ShapeDtypeStruct(here.shape, here.dtype, sharding=here.sharding)
            to_compile.append((layout, one, _GROWTH * len(group)))
    if to_compile:
        threading.Thread(target=_compile, args=(to_compile,), name="torchorbax-prepare").start()


def _compile(layouts: Sequence[tuple[Layout, jax.ShapeDtypeStruct, int]]) -> None:
    with own_context():
        for layout, one, count in layouts:
            for size in stacks.AT_ONCE:
                if size <= count and can_be_stacked(layout):
                    stacks.compile_stack(one, size)
                elif size <= count:
                    stacks.compile_ahead(_copy, one, size)
