"""The fast tier: every process's own part of the state, in a folder of its own host, `/dev/shm` for example.

With one process, it is a run like any other. With several, each writes what lies on its devices as if it were alone:
the distinct shards of an array of all processes, one after the other along the first axis, as an array of its own. The
manifest says which part of which array that is. Such a step is good for the same layout on the same processes, where
everybody finds what it needs on its own host; of what is replicated over slices, the processes of one whole slice can
feed the others.

Orbax's `experimental.emergency.CheckpointManager` is the model. It is not built on: it wants an axis of at least two
slices in the mesh and the state's structure once and for all, and has no fingerprints (read in orbax-checkpoint
0.12.8).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, Sharding

from torchorbax._src.arrays.broadcast import FirstReplica, is_shared
from torchorbax._src.arrays.dtypes import BY_NAME
from torchorbax._src.arrays.shards import Bounds, bounds_of, place
from torchorbax._src.distributed.channel import Channel
from torchorbax._src.format import per_process
from torchorbax._src.format.manifest import Key, LeafMeta, Manifest
from torchorbax._src.format.per_process import HostItem
from torchorbax._src.format.values import Json
from torchorbax._src.restore.checked_read import CheckedReader, batches
from torchorbax._src.storage.storage import Source, Storage
from torchorbax.errors import CheckpointNotFoundError, CorruptCheckpointError


@dataclass(frozen=True)
class LocalStep:
    """A step of the local tiers of several processes; reads like a `Storage` that has just this one.

    Attributes:
        storage: this process's local tier.
        seen: the step as all processes see it, with whole arrays.
        here: what is in this process's folder; None if it has none of the step.
        fed: what another process has for itself, for one that has nothing.
        having: the processes that have the step.
        everyone: do all of them?
        verify: compare what is read with its fingerprints.
    """

    storage: Storage
    seen: Manifest
    here: Manifest | None
    fed: Mapping[str, HostItem]
    having: frozenset[int]
    everyone: bool
    verify: bool

    @property
    def path(self) -> str:
        """Of this process's tier."""
        return self.storage.path

    @property
    def bases(self) -> Source:
        """Of this process's tier. Steps of the local tiers of several processes have none."""
        return self.storage.bases

    def steps(self) -> list[int]:
        """The one step."""
        return [self.seen.step]

    def manifest(self, step: int) -> Manifest:
        """The step as all processes see it."""
        return self.seen

    def as_seen_by(self, manifest: Manifest, process: int) -> tuple[Manifest, Mapping[str, HostItem]]:
        """The same, with what a process that has nothing gets from another."""
        return (manifest, {}) if self.here is not None else (per_process.as_seen_by(manifest, self.fed), self.fed)

    def read(
        self,
        step: int,
        leaves: Mapping[Key, LeafMeta],
        targets: Mapping[Key, Sharding | None],
        when_read: Callable[[Key, Any], object] | None = None,
    ) -> dict[Key, Any]:
        """As `Source.read`, from this host's folder. Arrays that other processes must feed are `FirstReplica`s.

        Raises:
            CorruptCheckpointError: it is damaged, or no process has the part that a device needs.
        """
        if self.here is None:
            return {key: self._placed(step, key, target, None) for key, target in targets.items()}
        found: dict[Key, Any] = {}
        reader = CheckedReader(self.storage, self.here, verify=self.verify)
        for keys in batches(self.here):
            into = {key: None if self._is_part(key) else targets[key] for key in keys if key in targets}
            for key, array in reader.read_and_check(into).items():
                found[key] = self._placed(step, key, targets[key], array) if self._is_part(key) else array
        return found

    def _is_part(self, key: Key) -> bool:
        """Does each process have a part of this leaf?"""
        return key[1] in self.seen.parts.get(key[0], {})

    def _placed(self, step: int, key: Key, target: Sharding | None, stacked: np.ndarray | None) -> Any:
        """An array of all processes, made of what this one has of it."""
        item, name = key
        part = (self.seen if self.here is None else self.here).parts[item][name]
        shape = tuple(part["shape"])
        if target is None:
            raise self._unusable(step, f"{item}: {name} is to be whole in host memory")
        mine = {} if stacked is None else _unstacked(stacked, part["bounds"])
        devices: dict[Any, Bounds] = {
            device: bounds_of(index or (), shape) for device, index in target.devices_indices_map(shape).items()
        }
        if self.everyone:
            givers = {device for device in devices if device.process_index == jax.process_index()}
        else:
            first: dict[Bounds, Any] = {}
            for device, bounds in sorted(devices.items(), key=lambda one: int(one[0].id)):
                if device.process_index in self.having:
                    first.setdefault(bounds, device)
            if missing := set(devices.values()) - set(first):
                raise self._unusable(step, f"no process has {item}: {name} at {min(missing)}")
            givers = set(first.values())
        here = {device: devices[device] for device in givers if device.process_index == jax.process_index()}
        if missing := set(here.values()) - set(mine):
            raise self._unusable(step, f"{item}: {name} at {min(missing)} is not on this host: another layout saved it")
        shards = {device: place(mine[bounds], device, target) for device, bounds in here.items()}
        dtype = self.seen.items[item].leaves[name].dtype
        if self.everyone:
            ordered = [shards[device] for device in target.addressable_devices_indices_map(shape)]
            return jax.make_array_from_single_device_arrays(shape, target, ordered)
        if not isinstance(target, NamedSharding) or not is_shared(target, BY_NAME[dtype]):
            raise self._unusable(step, f"{item}: {name} of {dtype} cannot be sent from device to device")
        return FirstReplica(shape, BY_NAME[dtype], target, shards)

    def _unusable(self, step: int, reason: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(self.path, {step: f"the local copy cannot be used: {reason}"})


def _unstacked(stacked: np.ndarray, bounds: Iterable[Json]) -> dict[Bounds, np.ndarray]:
    parts = [tuple((int(start), int(stop)) for start, stop in one) for one in bounds]
    if len(parts) == 1:
        return {parts[0]: stacked}
    length = len(stacked) // len(parts)
    return {part: stacked[at * length : (at + 1) * length] for at, part in enumerate(parts)}


def open_step(storage: Storage, step: int, having: frozenset[int], channel: Channel, *, verify: bool) -> LocalStep:
    """A step that some processes have on their hosts, at least one of them. All processes call it together.

    Raises:
        CorruptCheckpointError: a process that should have it cannot read its manifest.
    """
    index, giver = channel.processes.index, min(having)
    everyone = len(having) == channel.processes.count

    def manifest_here() -> Manifest | None:
        try:
            return storage.manifest(step) if index in having else None
        except CheckpointNotFoundError as error:  # it has been there a moment ago
            raise CorruptCheckpointError(storage.path, {step: str(error)}) from error

    here = channel.attempt("local", manifest_here)
    if everyone and here is not None:
        return LocalStep(storage, _as_seen_by_all(here), here, {}, having, everyone, verify)

    # What is missing on some hosts is given by the first process that has it.
    def given() -> Json:
        if here is None or index != giver:
            return None
        return {"manifest": here.to_json(), "own": _own_text(storage, here)}

    gift = channel.agree("local gift", given, lambda gifts: gifts[giver])
    of_giver = here or Manifest.from_json(gift["manifest"])
    fed = {} if here is not None else per_process.from_text(gift["own"])
    return LocalStep(storage, _as_seen_by_all(of_giver), here, fed, having, everyone, verify)


def _own_text(storage: Storage, manifest: Manifest) -> str:
    """What this process has for itself of a step, to be sent to others."""
    own = {}
    for item, meta in manifest.items.items():
        names = [name for name in meta.leaves if name not in manifest.parts.get(item, {})]
        read = storage.read(manifest.step, manifest.leaves, {(item, name): None for name in names})
        arrays = {name: array for (_, name), array in read.items()}
        shared = tuple(name for name in meta.leaves if name not in arrays)
        own[item] = HostItem(meta.values, {name: meta.leaves[name] for name in names}, arrays, shared)
    return per_process.to_text(own)


def _as_seen_by_all(manifest: Manifest) -> Manifest:
    items = {}
    for item, meta in manifest.items.items():
        parts = manifest.parts.get(item, {})
        leaves = {
            name: replace(leaf, shape=tuple(parts[name]["shape"]), sharding=parts[name]["sharding"], fingerprint="")
            if name in parts
            else leaf
            for name, leaf in meta.leaves.items()
        }
        items[item] = replace(meta, leaves=leaves)
    return replace(manifest, items=items)
