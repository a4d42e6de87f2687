"""Steps, written and read: the only modules that import Orbax are this one and its parts, `_orbax_*`.

A step is an ordinary Orbax checkpoint (`CheckpointManager`'s layout): one item per entry of the state and the JSON item
`manifest`. Orbax's errors are translated here.
"""

from __future__ import annotations

import errno
import functools
import importlib.metadata
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epath
from jax.sharding import Sharding

from torchorbax._src.arrays import fingerprint
from torchorbax._src.arrays.dtypes import BY_NAME, fits_on_device
from torchorbax._src.arrays.leaves import Array, put
from torchorbax._src.distributed.channel import Channel
from torchorbax._src.distributed.processes import Processes
from torchorbax._src.format import per_process
from torchorbax._src.format.manifest import ItemMeta, LeafMeta, Manifest
from torchorbax._src.format.per_process import HostItem
from torchorbax._src.format.values import Json
from torchorbax._src.storage import array_reader, array_writer, gcs, orbax_commit
from torchorbax._src.storage.run_folder import BASE, COMMITTED, MANIFEST, RunFolder, answered, few
from torchorbax._src.storage.traffic import Traffic
from torchorbax.errors import CheckpointNotFoundError, CorruptCheckpointError, ProcessError, SaveError

VERSION = importlib.metadata.version("orbax-checkpoint")

_MOST_METADATA_BYTES = 1 << 30  # a million leaves take less than half of that

T = TypeVar("T")


class Storage(RunFolder):
    """A run's folder whose steps are written and read.

    Args:
        path: relative paths are taken from the current folder, now.
        traffic: how arrays are written and read.

    Raises:
        ConfigError: the path is none, or its file system needs an extra.
    """

    def __init__(self, path: str | os.PathLike[str], traffic: Traffic = Traffic()) -> None:  # noqa: B008  # immutable
        super().__init__(path, traffic.timeout_s)
        self._traffic = traffic
        self._base: Storage | None = None

    def remove_leftovers(self) -> None:
        """Of the base area, too."""
        if (self._root / BASE).exists():
            self._base_area().remove_leftovers()
        super().remove_leftovers()

    def write(
        self, manifest: Manifest, arrays: Mapping[str, MutableMapping[str, Array]], channel: Channel | None = None
    ) -> Manifest:
        """Write one step and commit it; blocks until it is listed and, on a local disk, survives a loss of power.

        Frozen leaves of a new base are committed first. With several processes, this is for process 0, while the others
        call `contribute`.

        Args:
            manifest: of the step, without fingerprints but those of frozen leaves.
            arrays: by item and leaf; each is taken out, and let go as soon as it is written.
            channel: to the other processes; None if there are none.

        Returns:
            The manifest with all fingerprints.

        Raises:
            SaveError: anything that went wrong, as `__cause__`. The step is not listed, and what was written of it is
                removed if it can be.
        """
        channel = channel or Channel(Processes(math.inf, index=0, count=1), "write")
        parts = _by_base(manifest.items, arrays)
        for one in arrays.values():
            one.clear()
        for base, part in parts.items():
            if base is None:
                return self._write(manifest, part, channel)
            try:
                self._base_area()._write(manifest.of_base(base), part, channel)
            except SaveError as error:
                raise SaveError(manifest.step, self.path, f"base {base}: {error}") from error.__cause__ or error
        return manifest

    def _write(self, manifest: Manifest, arrays: dict[str, dict[str, Array]], channel: Channel) -> Manifest:
        step, announced = manifest.step, False

        def fill(folders: Mapping[str, str]) -> Manifest:
            nonlocal announced
            announced = True
            channel.publish("write", {"folders": folders, "error": None})
            return self._filled(folders, manifest, arrays, channel)

        try:
            self._remove_rest(step)
            if self._folder(step).exists():
                reason = "somebody else has saved it meanwhile; is another run writing to this path?"
                raise SaveError(step, self.path, reason)
            leaves = {item: {name: one for name, one in part.items() if one.size} for item, part in arrays.items()}
            stamped = orbax_commit.save(self._folder(step), leaves, self._traffic, fill)
            self._make_durable(self._folder(step))
        except Exception as error:
            if not announced:
                channel.publish("write", {"error": f"{type(error).__name__}: {error}"})
            if isinstance(error, SaveError):
                raise
            self._remove_failed(step, error)
            reason = gcs.told(error) if self.is_uri else f"{type(error).__name__}: {error}"
            raise SaveError(step, self.path, reason) from error
        self._remove_unremoved()
        return stamped

    def _filled(
        self,
        folders: Mapping[str, str],
        manifest: Manifest,
        arrays: Mapping[str, MutableMapping[str, Array]],
        channel: Channel,
    ) -> Manifest:
        """Write what this process has of a step, and wait for the others."""
        sums, failure = _attempted(lambda: self._fill(folders, arrays))
        parts: list[Json] = channel.gather("write", None) or []
        if failure is not None:
            raise failure
        failed = {one: part["error"] for one, part in enumerate(parts) if part and part["error"] is not None}
        if failed:
            raise ProcessError.of_failures(failed, "write")
        added = {(item, name): [own] for item, one in (sums or {}).items() for name, own in one.items()}
        for part in parts[1:]:
            for item, texts in part["sums"].items():
                for name, text in texts.items():
                    added[item, name].append(fingerprint.sums(text))
        texts = {item: {} for item in sums or {}}
        for (item, name), one in added.items():
            texts[item][name] = fingerprint.text(fingerprint.total(one))
        own = {str(process): part["own"] for process, part in enumerate(parts) if part and part["own"]}
        return replace(manifest.stamped(texts), processes=len(parts), own=own)

    def _fill(
        self, folders: Mapping[str, str], arrays: Mapping[str, MutableMapping[str, Array]]
    ) -> dict[str, dict[str, fingerprint.Sums]]:
        sums: dict[str, dict[str, fingerprint.Sums]] = {}
        for item, one in arrays.items():
            empty = {name: one.pop(name) for name in [name for name, array in one.items() if not array.size]}
            sums[item] = {name: fingerprint.start(array)() for name, array in empty.items()}
            if one:
                sums[item].update(array_writer.write(folders[item], one, self._traffic))
        return sums

    def contribute(
        self,
        items: Mapping[str, ItemMeta],
        arrays: Mapping[str, MutableMapping[str, Array]],
        own: Mapping[str, HostItem],
        channel: Channel,
    ) -> None:
        """Write what a process other than the first has of a step that process 0 writes.

        Args:
            items: what it says of its leaves.
            arrays: by item and leaf; each is taken out, and let go as soon as it is written.
            own: what this process has for itself.
            channel: to the other processes.

        Raises:
            SaveError: process 0 has given up before.
            ProcessError: process 0 does not say where to.
        """
        parts = _by_base(items, arrays)
        for one in arrays.values():
            one.clear()
        for base, part in parts.items():
            told = channel.publish("write")
            if told["error"] is not None:
                raise ProcessError({0}, "write", told["error"])
            write = functools.partial(self._contribution, told["folders"], part, own if base is None else {})
            report, failure = _attempted(functools.partial(write, channel.processes.index))
            channel.gather("write", report or {"error": f"{type(failure).__name__}: {failure}"})
            if failure is not None:
                raise failure

    def _contribution(
        self,
        folders: Mapping[str, str],
        arrays: Mapping[str, MutableMapping[str, Array]],
        own: Mapping[str, HostItem],
        process: int,
    ) -> dict[str, Json]:
        sums = {
            item: {name: fingerprint.text(sums) for name, sums in one.items() if sums.any()}
            for item, one in self._fill(folders, arrays).items()
        }
        return {"sums": sums, "own": self._write_own(folders[MANIFEST], own, process) if own else None, "error": None}

    def _write_own(self, folder: str, own: Mapping[str, HostItem], process: int) -> str:
        text = per_process.to_text(own)
        (epath.Path(folder) / _own_name(process)).write_text(text)
        return per_process.digest_of(text)

    @answered
    def as_seen_by(self, manifest: Manifest, process: int) -> tuple[Manifest, dict[str, HostItem]]:
        """A step as a process finds it, and what that process has of it for itself.

        Raises:
            CorruptCheckpointError: the process's own file is damaged.
        """
        if str(process) not in manifest.own:
            return manifest, {}
        with self._as_corrupt(manifest.step):
            text = (self._folder(manifest.step) / MANIFEST / _own_name(process)).read_text()
            if per_process.digest_of(text) != manifest.own[str(process)]:
                raise ValueError(f"{_own_name(process)} is not what was written: its SHA-256 differs")
            own = per_process.from_text(text)
            return per_process.as_seen_by(manifest, own), own

    @answered
    def manifest(self, step: int) -> Manifest:
        """What the step says about itself.

        Raises:
            CheckpointNotFoundError: there is no such step.
            CorruptCheckpointError: there is, but its manifest is missing or unreadable.
        """
        folder = self._folder(step)
        if not ((folder / COMMITTED) if self.is_uri else folder).exists():
            raise CheckpointNotFoundError(self.path, step, self.steps())
        with self._as_corrupt(step):
            self._check_whole(folder)
            manifest = Manifest.from_json(json.loads((folder / MANIFEST / "metadata").read_text()))
            if manifest.step != step:
                raise ValueError(f"its manifest is that of step {manifest.step}")
            return manifest

    def _check_whole(self, folder: Any) -> None:
        """Raise ValueError if the folder is no step of ours, or one with metadata too large to be read."""
        if not (folder / MANIFEST).exists():
            inside = sorted(entry.name for entry in folder.iterdir())
            if not inside:
                raise ValueError("the folder is empty")
            raise ValueError(
                f"it has no manifest, so it is half deleted or was not written by torchorbax (there is {few(inside)})"
            )
        for name in (f"{MANIFEST}/metadata", *(f"{item.name}/_METADATA" for item in folder.iterdir())):
            file = folder / name
            if file.exists() and file.stat().length > _MOST_METADATA_BYTES:
                raise ValueError(f"{name} has {file.stat().length} bytes; metadata has {_MOST_METADATA_BYTES} at most")

    @answered
    def read(
        self,
        step: int,
        items: Mapping[str, ItemMeta],
        targets: Mapping[str, Mapping[str, Sharding | None]],
        then: Callable[[str, str, Any], object] | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Load leaves of a step.

        Args:
            step: which.
            items: what the manifest says about them.
            targets: by item and leaf, the sharding to load into, or None for a numpy array.
            then: called with each leaf that has data as soon as it is there, while others are still being read.

        Raises:
            CorruptCheckpointError: something is missing, unreadable, or not what the manifest says.
        """
        arrays: dict[str, dict[str, Any]] = {item: {} for item in targets}
        for base, part in _by_base(items, targets).items():
            if base is None:
                found = self._read(step, items, part, then)
            else:
                area = self._base_area()
                if not area._folder(base).exists():
                    reason = (
                        f"base/{base}, which has its frozen parameters, is missing; whoever copies a step copies it too"
                    )
                    raise CorruptCheckpointError(self.path, {step: reason})
                try:
                    found = area._read(base, items, part, then)
                except CorruptCheckpointError as error:
                    raise CorruptCheckpointError(self.path, {step: f"base {base}: {error.reasons[base]}"}) from error
            for item, one in found.items():
                arrays[item].update(one)
        return arrays

    def _read(
        self,
        step: int,
        items: Mapping[str, ItemMeta],
        targets: Mapping[str, Mapping[str, Sharding | None]],
        then: Callable[[str, str, Any], object] | None,
    ) -> dict[str, dict[str, Any]]:
        arrays: dict[str, dict[str, Any]] = {}
        reasons = []
        for item, leaves in targets.items():
            meta = items[item].leaves
            wanted = {name: (meta[name], target) for name, target in leaves.items() if not meta[name].is_empty}
            try:
                placed = None if then is None else functools.partial(_called, then, item)
                folder = f"{self._folder(step)}/{item}"
                read = array_reader.read(folder, wanted, self._traffic, placed) if wanted else {}
                arrays[item] = {
                    name: read[name] if name in read else _empty(meta[name], target) for name, target in leaves.items()
                }
            except _CallerError as error:
                raise error.error from None
            except Exception as error:  # TensorStore and the file system raise whatever they like on damaged files
                if _is_shortage(error) or (self.is_uri and gcs.is_unanswered(error)):
                    raise
                reasons.append(f"item {item}: {gcs.told(error)}")
        if reasons:
            raise CorruptCheckpointError(self.path, {step: "; ".join(reasons)})
        return arrays

    def _base_area(self) -> Storage:
        """Where frozen parameters lie, as steps with numbers of their own. It remembers what it has left behind."""
        if self._base is None:
            self._base = Storage(f"{self.path}/{BASE}", self._traffic)
        return self._base

    @answered
    def bases(self) -> set[int]:
        """The numbers of the bases there are."""
        return set(self._base_area().steps())

    def next_base(self) -> int:
        """The number of a base that is not there yet."""
        return max(self.bases(), default=-1) + 1

    @answered
    def delete_base(self, base: int) -> None:
        """Delete a base that no step needs."""
        self._base_area().delete(base)

    @contextmanager
    def _as_corrupt(self, step: int) -> Iterator[None]:
        try:
            yield
        except (CheckpointNotFoundError, CorruptCheckpointError):
            raise
        except Exception as error:  # Orbax, TensorStore and the file system raise whatever they like on damaged files
            if _is_shortage(error) or (self.is_uri and gcs.is_unanswered(error)):
                raise
            raise CorruptCheckpointError(self.path, {step: gcs.told(error)}) from error


def _attempted(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:  # raised when the other processes know
        return None, error


class _CallerError(Exception):
    """Carries an error that says nothing about what is read."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _called(then: Callable[[str, str, Any], object], item: str, name: str, array: Any) -> None:
    try:
        then(item, name, array)
    except Exception as error:
        raise _CallerError(error) from error


def _own_name(process: int) -> str:
    """The file of a process, beside the manifest."""
    return f"process_{process}"


def _by_base(
    items: Mapping[str, ItemMeta], leaves: Mapping[str, Mapping[str, T]]
) -> dict[int | None, dict[str, dict[str, T]]]:
    """`leaves` by where they lie: in the base of a number, or in the step itself, which is always there, and last."""
    parts: dict[int | None, dict[str, dict[str, T]]] = {}
    for item, one in leaves.items():
        for name, leaf in one.items():
            parts.setdefault(items[item].leaves[name].base, {}).setdefault(item, {})[name] = leaf
    step = parts.pop(None, {})
    return {**parts, None: step}


def _is_shortage(error: Exception) -> bool:
    """Is it this process that lacks something, so that the files may be good all the same?"""
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM))
        or (isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error))
    )


def _empty(meta: LeafMeta, target: Sharding | None) -> Array:
    array = np.empty(meta.shape, BY_NAME[meta.dtype])
    return array if target is None or not fits_on_device(array.dtype) else put(array, target)
