"""The storage of a run whose steps are Orbax checkpoints, on a local disk or under gs://.

A step is an ordinary Orbax checkpoint in `CheckpointManager`'s layout: one item for each entry of the state, and the
JSON item `manifest`. The errors of Orbax, TensorStore and the file system are translated here.
"""

from __future__ import annotations

import errno
import functools
import importlib.metadata
import os
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Sharding

from torchorbax._src.arrays import fingerprint
from torchorbax._src.arrays.dtypes import BY_NAME, fits_on_device
from torchorbax._src.arrays.fingerprint import Sums
from torchorbax._src.arrays.leaves import Array, put
from torchorbax._src.format import per_process
from torchorbax._src.format.manifest import Key, LeafMeta, Manifest, by_base
from torchorbax._src.format.per_process import HostItem
from torchorbax._src.storage import array_reader, array_writer, gcs, inspection, orbax_commit
from torchorbax._src.storage.run_folder import BASE, COMMITTED, MANIFEST, RunFolder, few, with_storage_errors
from torchorbax._src.storage.storage import Folders
from torchorbax._src.storage.traffic import Traffic
from torchorbax.errors import CheckpointNotFoundError, CorruptCheckpointError, SaveError

VERSION = importlib.metadata.version("orbax-checkpoint")

_MOST_METADATA_BYTES = 1 << 30  # a million leaves take less than half of that


class OrbaxStorage(RunFolder):
    """A run's folder, and the reading and writing of its steps; a `Storage`.

    Args:
        path: a folder or a `gs://` URI. A relative path is resolved now, against the current folder.
        traffic: how arrays are written and read.

    Raises:
        ConfigError: the path cannot name a run, or its file system needs an extra of torchorbax.
    """

    def __init__(self, path: str | os.PathLike[str], traffic: Traffic = Traffic()) -> None:  # noqa: B008  # immutable
        super().__init__(path, traffic.timeout_s)
        self._traffic = traffic

    @functools.cached_property
    def bases(self) -> OrbaxStorage:
        """Where the run keeps its frozen parameters. Always the same object, because it remembers failed deletions."""
        return OrbaxStorage(f"{self.path}/{BASE}", self._traffic)

    def remove_leftovers(self) -> None:
        """Delete what interrupted saves and deletions have left behind, in the run and its bases."""
        if (self._root / BASE).exists():
            self.bases.remove_leftovers()
        super().remove_leftovers()

    # Writing.

    def write(self, step: int, arrays: Mapping[Key, Array], fill: Callable[[Folders], Manifest]) -> Manifest:
        """Write a step and commit it; see `Storage.write`."""
        folder = self._folder(step)
        try:
            self._remove_remains(step)
            if folder.exists():
                reason = "somebody else has saved it meanwhile; is another run writing to this path?"
                raise SaveError(step, self.path, reason)
            manifest = orbax_commit.save(folder, orbax_commit.described(arrays), self._traffic, fill)
            self._make_durable(folder)
        except SaveError:
            raise
        except Exception as error:
            self._remove_failed(step, error)
            reason = gcs.error_line(error) if self.is_uri else f"{type(error).__name__}: {error}"
            raise SaveError(step, self.path, reason) from error
        self._remove_unremoved()
        return manifest

    def write_arrays(self, folders: Folders, arrays: MutableMapping[Key, Array], process: int) -> dict[Key, Sums]:
        """Write one process's shards of the arrays of a step; see `Storage.write_arrays`."""
        # By item. No reference to an array is kept here, so that each is freed as soon as it is written.
        by_item: dict[str, dict[str, Array]] = {}
        sums: dict[Key, Sums] = {}
        for item, name in list(arrays):
            array = arrays.pop((item, name))
            if array.size:
                by_item.setdefault(item, {})[name] = array
            else:  # no elements: Orbax cannot store it, and the manifest has its shape and dtype
                sums[item, name] = fingerprint.start(array)()
            del array
        for item, of_item in by_item.items():
            written = array_writer.write(folders[item], of_item, self._traffic, process)
            sums |= {(item, name): sums_of_leaf for name, sums_of_leaf in written.items()}
        return sums

    def write_process_items(self, folders: Folders, items: Mapping[str, HostItem], process: int) -> str:
        """Write the file with one process's own state; returns its SHA-256, for the manifest."""
        text = per_process.to_text(items)
        (epath.Path(folders[MANIFEST]) / _process_file(process)).write_text(text)
        return per_process.digest_of(text)

    # Reading.

    @with_storage_errors
    def as_seen_by(self, manifest: Manifest, process: int) -> tuple[Manifest, dict[str, HostItem]]:
        """A step from the point of view of one process; see `Source.as_seen_by`.

        Raises:
            CorruptCheckpointError: the file with the process's own state is damaged.
        """
        if str(process) not in manifest.own:
            return manifest, {}
        with self._as_corrupt(manifest.step):
            if not self.is_uri:
                inspection.check_file(str(self._folder(manifest.step)), f"{MANIFEST}/{_process_file(process)}")
            text = (self._folder(manifest.step) / MANIFEST / _process_file(process)).read_text()
            if per_process.digest_of(text) != manifest.own[str(process)]:
                raise ValueError(f"{_process_file(process)} is not what was written: its SHA-256 differs")
            own = per_process.from_text(text)
            return per_process.as_seen_by(manifest, own), own

    @with_storage_errors
    def manifest(self, step: int) -> Manifest:
        """The manifest of a step.

        Raises:
            CheckpointNotFoundError: there is no such step.
            CorruptCheckpointError: the step exists, but its manifest is missing or unreadable.
        """
        folder = self._folder(step)
        if not ((folder / COMMITTED) if self.is_uri else folder).exists():
            raise CheckpointNotFoundError(self.path, step, self.steps())
        with self._as_corrupt(step):
            self._check_whole(folder)
            text = (folder / MANIFEST / "metadata").read_text()
            manifest = Manifest.from_text(text, functools.partial(inspection.other_bytes, folder, len(text)))
            if manifest.step != step:
                raise ValueError(f"its manifest is that of step {manifest.step}")
            return manifest

    def _check_whole(self, folder: Any) -> None:
        """Raise ValueError if the folder has no manifest, or metadata that is too large to be read."""
        if not self.is_uri:
            inspection.check_file(str(folder), f"{MANIFEST}/metadata")
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

    @with_storage_errors
    def read(
        self,
        step: int,
        leaves: Mapping[Key, LeafMeta],
        targets: Mapping[Key, Sharding | None],
        when_read: Callable[[Key, Any], object] | None = None,
    ) -> dict[Key, Any]:
        """Read leaves of a step; see `Source.read`."""
        arrays: dict[Key, Any] = {}
        for base, keys in by_base(leaves, targets).items():
            part = {key: targets[key] for key in keys}
            if base is None:
                arrays |= self._read(step, leaves, part, when_read)
                continue
            if not self.bases._folder(base).exists():
                reason = f"base/{base}, which has its frozen parameters, is missing; copy it together with the step"
                raise CorruptCheckpointError(self.path, {step: reason})
            try:
                arrays |= self.bases._read(base, leaves, part, when_read)
            except CorruptCheckpointError as error:
                raise CorruptCheckpointError(self.path, {step: f"base {base}: {error.reasons[base]}"}) from error
        return arrays

    def _read(
        self,
        step: int,
        leaves: Mapping[Key, LeafMeta],
        targets: Mapping[Key, Sharding | None],
        when_read: Callable[[Key, Any], object] | None,
    ) -> dict[Key, Any]:
        """Read leaves that the step itself holds, item by item. The error names every item that is damaged."""
        by_item: dict[str, dict[str, Sharding | None]] = {}
        for (item, name), target in targets.items():
            by_item.setdefault(item, {})[name] = target
        arrays: dict[Key, Any] = {}
        reasons = []
        for item, of_item in by_item.items():
            wanted = {
                name: (leaves[item, name], target)
                for name, target in of_item.items()
                if not leaves[item, name].is_empty
            }
            then = None if when_read is None else functools.partial(_called, when_read, item)
            try:
                read = array_reader.read(f"{self._folder(step)}/{item}", wanted, self._traffic, then) if wanted else {}
            except _CallerError as error:
                raise error.error from None
            except Exception as error:  # on damaged files, TensorStore and the file system raise errors of any type
                if _is_shortage(error) or (self.is_uri and gcs.is_unanswered(error)):
                    raise
                reasons.append(f"item {item}: {gcs.error_line(error)}")
                continue
            for name, target in of_item.items():
                arrays[item, name] = read[name] if name in read else _empty(leaves[item, name], target)
        if reasons:
            raise CorruptCheckpointError(self.path, {step: "; ".join(reasons)})
        return arrays

    @contextmanager
    def _as_corrupt(self, step: int) -> Iterator[None]:
        """Translate errors into CorruptCheckpointError, except those that say nothing about the step's files."""
        try:
            yield
        except (CheckpointNotFoundError, CorruptCheckpointError):
            raise
        except Exception as error:  # on damaged files, Orbax, TensorStore and the file system raise errors of any type
            if _is_shortage(error) or (self.is_uri and gcs.is_unanswered(error)):
                raise
            raise CorruptCheckpointError(self.path, {step: gcs.error_line(error)}) from error


class _CallerError(Exception):
    """Carries an error of the caller's `when_read` past the handler for errors of reading."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _called(when_read: Callable[[Key, Any], object], item: str, name: str, array: Any) -> None:
    try:
        when_read((item, name), array)
    except Exception as error:
        raise _CallerError(error) from error


def _process_file(process: int) -> str:
    """The name of the file with a process's own state, in the manifest's folder."""
    return f"process_{process}"


def _is_shortage(error: Exception) -> bool:
    """Is the reason that this process lacks memory or file descriptors? Then the files may be good."""
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM))
        or (isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error))
    )


def _empty(meta: LeafMeta, target: Sharding | None) -> Array:
    """An array without elements, which is not stored."""
    array = np.empty(meta.shape, BY_NAME[meta.dtype])
    return array if target is None or not fits_on_device(array.dtype) else put(array, target)
