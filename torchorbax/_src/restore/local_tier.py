"""Reads the local tier: each process's part of the state, in a folder of its own host such as `/dev/shm`.

With one process, a local tier is a run like any other. With several processes, each has written its own shards as
`save.local_tier` describes. Such a step can be restored with the same shardings on the same processes, each of which
finds its shards on its own host. If some hosts have lost theirs, and the state is replicated over slices, the processes
of one complete slice can send the data to the others.

The model is Orbax's `experimental.emergency.CheckpointManager`. It is not used, because it needs a mesh with an axis of
at least two slices, fixes the structure of the state when it is created, and has no fingerprints (in orbax-checkpoint
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
from torchorbax._src.storage.storage import Source, Storage
from torchorbax._src.verification.checked_read import CheckedReader, leaf_batches
from torchorbax.errors import CheckpointNotFoundError, CorruptCheckpointError


@dataclass(frozen=True)
class LocalStep:
    """A step of the local tiers of several processes, as a `Source` that has only this step.

    Attributes:
        storage: this process's local tier.
        whole: the manifest of the step with whole arrays, the same in all processes.
        local: the manifest in this process's folder, which has its parts of the arrays; None if it has lost the step.
        received: the own state of another process, for a process that has lost the step; empty otherwise.
        holders: the processes that have the step.
        all_hold: do all processes have the step?
        verify: compare what is read with its fingerprints.
    """

    storage: Storage
    whole: Manifest
    local: Manifest | None
    received: Mapping[str, HostItem]
    holders: frozenset[int]
    all_hold: bool
    verify: bool

    @property
    def path(self) -> str:
        """The path of this process's local tier."""
        return self.storage.path

    @property
    def bases(self) -> Source:
        """The bases of this process's local tier. With several processes there are none."""
        return self.storage.bases

    def steps(self) -> list[int]:
        """The number of the step, as a list."""
        return [self.whole.step]

    def manifest(self, step: int) -> Manifest:
        """The manifest with whole arrays."""
        return self.whole

    def as_seen_by(self, manifest: Manifest, process: int) -> tuple[Manifest, Mapping[str, HostItem]]:
        """The manifest, with the own state that this process has received from another, if it has lost the step."""
        if self.local is not None:
            return manifest, {}
        return per_process.as_seen_by(manifest, self.received), self.received

    def read(
        self,
        step: int,
        leaves: Mapping[Key, LeafMeta],
        targets: Mapping[Key, Sharding | None],
        when_read: Callable[[Key, Any], object] | None = None,
    ) -> dict[Key, Any]:
        """Read leaves from this host's folder; see `Source.read`.

        If some processes have lost the step, shared arrays come as `FirstReplica`s.

        Raises:
            CorruptCheckpointError: the step is damaged, or no process has a part that a device needs.
        """
        if self.local is None:
            return {key: self._placed(step, key, target, None) for key, target in targets.items()}
        found: dict[Key, Any] = {}
        reader = CheckedReader(self.storage, self.local, verify=self.verify)
        for keys in leaf_batches(self.local):
            read_into = {key: None if self._is_part(key) else targets[key] for key in keys if key in targets}
            for key, array in reader.read_and_check(read_into).items():
                found[key] = self._placed(step, key, targets[key], array) if self._is_part(key) else array
        return found

    def _is_part(self, key: Key) -> bool:
        """Is the leaf shared, so that each process has stored its own part of it?"""
        return key[1] in self.whole.parts.get(key[0], {})

    def _placed(self, step: int, key: Key, target: Sharding | None, stacked: np.ndarray | None) -> Any:
        """A shared array, put together from the shards on this host.

        Args:
            step: the number of the step, for errors.
            key: the leaf.
            target: the sharding of the array.
            stacked: the stored shards of this process; None if it has lost the step.
        """
        item, name = key
        part = (self.whole if self.local is None else self.local).parts[item][name]
        shape = tuple(part["shape"])
        if target is None:
            raise self._unusable(step, f"{item}: {name} is to be whole in host memory")
        stored = {} if stacked is None else _unstacked(stacked, part["bounds"])
        # The devices whose shards come from storage: all of them; or, of each part, the first device of a process that
        # has the step, from which the other devices receive it.
        devices: dict[Any, Bounds] = {
            device: bounds_of(index or (), shape) for device, index in target.devices_indices_map(shape).items()
        }
        if self.all_hold:
            readers = {device for device in devices if device.process_index == jax.process_index()}
        else:
            first: dict[Bounds, Any] = {}
            for device, bounds in sorted(devices.items(), key=lambda entry: int(entry[0].id)):
                if device.process_index in self.holders:
                    first.setdefault(bounds, device)
            if missing := set(devices.values()) - set(first):
                raise self._unusable(step, f"no process has {item}: {name} at {min(missing)}")
            readers = set(first.values())
        # Those of this process.
        local = {device: devices[device] for device in readers if device.process_index == jax.process_index()}
        if missing := set(local.values()) - set(stored):
            raise self._unusable(step, f"{item}: {name} at {min(missing)} is not on this host: another layout saved it")
        shards = {device: place(stored[bounds], device, target) for device, bounds in local.items()}
        # The array, or its first replica.
        dtype = self.whole.items[item].leaves[name].dtype
        if self.all_hold:
            ordered = [shards[device] for device in target.addressable_devices_indices_map(shape)]
            return jax.make_array_from_single_device_arrays(shape, target, ordered)
        if not isinstance(target, NamedSharding) or not is_shared(target, BY_NAME[dtype]):
            raise self._unusable(step, f"{item}: {name} of {dtype} cannot be sent from device to device")
        return FirstReplica(shape, BY_NAME[dtype], target, shards)

    def _unusable(self, step: int, reason: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(self.path, {step: f"the local copy cannot be used: {reason}"})


def _unstacked(stacked: np.ndarray, bounds: Iterable[Json]) -> dict[Bounds, np.ndarray]:
    """Shards by their bounds, from an array in which they follow each other along the first axis."""
    parts = [tuple((int(start), int(stop)) for start, stop in of_part) for of_part in bounds]
    if len(parts) == 1:
        return {parts[0]: stacked}
    length = len(stacked) // len(parts)
    return {part: stacked[at * length : (at + 1) * length] for at, part in enumerate(parts)}


def open_step(storage: Storage, step: int, holders: frozenset[int], channel: Channel, *, verify: bool) -> LocalStep:
    """Open a step that at least one process has on its host. All processes call it together.

    Args:
        storage: this process's local tier.
        step: the number of the step.
        holders: the processes that have the step.
        channel: to the other processes.
        verify: compare what is read with its fingerprints.

    Raises:
        CorruptCheckpointError: a process among `holders` cannot read its manifest.
    """
    index, sender = channel.processes.index, min(holders)
    all_hold = len(holders) == channel.processes.count

    # Every process reads its manifest.
    def read_manifest() -> Manifest | None:
        try:
            return storage.manifest(step) if index in holders else None
        except CheckpointNotFoundError as error:  # the step was listed a moment ago
            raise CorruptCheckpointError(storage.path, {step: str(error)}) from error

    local = channel.attempt("local", read_manifest)
    if all_hold and local is not None:
        return LocalStep(storage, _with_whole_arrays(local), local, {}, holders, all_hold, verify)

    # The first process that has the step sends its manifest and own state to those that have lost it.
    def sent() -> Json:
        if local is None or index != sender:
            return None
        return {"manifest": local.to_json(), "own": _own_text(storage, local)}

    content = channel.agree("local manifest", sent, lambda contents: contents[sender])
    manifest = local or Manifest.from_json(content["manifest"])
    received = {} if local is not None else per_process.from_text(content["own"])
    return LocalStep(storage, _with_whole_arrays(manifest), local, received, holders, all_hold, verify)


def _own_text(storage: Storage, manifest: Manifest) -> str:
    """This process's own state in a step, as text, to be sent to other processes."""
    own = {}
    for item, meta in manifest.items.items():
        names = [name for name in meta.leaves if name not in manifest.parts.get(item, {})]
        read = storage.read(manifest.step, manifest.leaves, {(item, name): None for name in names})
        arrays = {name: array for (_, name), array in read.items()}
        shared = tuple(name for name in meta.leaves if name not in arrays)
        own[item] = HostItem(meta.values, {name: meta.leaves[name] for name in names}, arrays, shared)
    return per_process.to_text(own)


def _with_whole_arrays(manifest: Manifest) -> Manifest:
    """The manifest with the shapes and shardings of whole arrays, in place of those of this process's parts."""
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
