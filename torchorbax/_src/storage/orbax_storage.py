"""The storage of a run whose steps are Orbax checkpoints, on a local disk or under gs://.

A step is an ordinary Orbax checkpoint in `CheckpointManager`'s layout: one item for each entry of the state, and the
JSON item `manifest`. The errors of Orbax, TensorStore and the file system are translated here.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import logging
import os
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, TypeVar

import numpy as np
from jax.sharding import Sharding

from torchorbax._src.arrays import fingerprint
from torchorbax._src.arrays.dtypes import BY_NAME, fits_on_device
from torchorbax._src.arrays.fingerprint import Sums
from torchorbax._src.arrays.leaves import Array, put
from torchorbax._src.format import per_process
from torchorbax._src.format.manifest import FileDigest, Key, LeafMeta, Manifest, by_base
from torchorbax._src.format.per_process import HostItem
from torchorbax._src.storage import array_reader, array_writer, gcs, inspection, orbax_commit
from torchorbax._src.storage.damage import is_proof_of_damage, reason_of
from torchorbax._src.storage.files_at import files_at
from torchorbax._src.storage.run_folder import (
    BASE,
    COMMITTED,
    MANIFEST,
    MANIFEST_FILE,
    MOST_MANIFEST_BYTES,
    RunFolder,
    few,
)
from torchorbax._src.storage.storage import Folders
from torchorbax._src.storage.traffic import Traffic
from torchorbax.errors import (
    CheckpointNotFoundError,
    CorruptCheckpointError,
    OwnershipError,
    SaveError,
    StorageError,
    TorchorbaxError,
)

Result = TypeVar("Result")

_logger = logging.getLogger(__name__)
VERSION = importlib.metadata.version("orbax-checkpoint")


class OrbaxStorage(RunFolder):
    """A run's folder, and the reading and writing of its steps; a `Storage`.

    Args:
        path: a folder or a `gs://` URI. A relative path is resolved now, against the current folder.
        traffic: how arrays are written and read.
        parent: for the bases of a run, the run.

    Raises:
        ConfigError: the path cannot name a run, or its file system needs an extra of torchorbax.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        traffic: Traffic = Traffic(),  # noqa: B008  # immutable
        parent: OrbaxStorage | None = None,
    ) -> None:
        super().__init__(path, traffic.timeout_s, parent)
        self._traffic = traffic

    @functools.cached_property
    def bases(self) -> OrbaxStorage:
        """Where the run keeps its frozen parameters. Always the same object, because it shares the run's owner."""
        return OrbaxStorage(f"{self.path}/{BASE}", self._traffic, parent=self)

    def remove_leftovers(self) -> None:
        """Delete what interrupted saves and deletions have left behind, in the run and its bases."""
        if self._parent is None:
            self.bases.remove_leftovers()
        super().remove_leftovers()

    # Writing.

    def write(self, step: int, arrays: Mapping[Key, Array], fill: Callable[[Folders], Manifest]) -> Manifest:
        """Write a step and commit it; see `Storage.write`."""
        folder = str(step) if self.is_uri else self._leftover(step)
        try:
            self._prepare(step)
            full = f"{self.path}/{folder}"
            described = orbax_commit.described(arrays)
            manifest = orbax_commit.save(full, described, self._traffic, fill, self.check_owned)
            manifest = dataclasses.replace(manifest, files=self._digests(folder))
            self.files.create(f"{folder}/{MANIFEST_FILE}", manifest.to_text().encode())
            self._commit(step, folder)
        except SaveError:
            raise
        except Exception as error:
            cause = self._loss() or error  # whoever has taken over has removed what this process was writing
            self._remove_failed(folder, cause)
            raise SaveError(step, self.path, reason_of(cause, cut=self.is_uri)) from cause
        if self._noted():  # now the storage answers
            self._remove_what_is_left()
        return manifest

    def _digests(self, folder: str) -> dict[str, FileDigest]:
        """The files that the manifest of a step lists."""
        paths = [path for path in self.files.sizes(folder) if path not in (MANIFEST_FILE, COMMITTED)]
        return dict(sorted(self.files.digests(folder, paths).items()))

    def _prepare(self, step: int) -> None:
        """Check that a step can be written, and note under a URI that it is."""
        name = str(step)
        in_the_way = self.files.exists(name)
        if in_the_way and self.is_uri and name in self._leftovers():
            self.remove_leftovers()
            in_the_way = self.files.exists(name)
        if in_the_way:
            self.check_owned()
            raise self._in_the_way(step)
        if self.is_uri:
            self._begin(name)
        else:
            self.check_owned()

    def _loss(self) -> OwnershipError | None:
        """The error that says who has taken the run over, if somebody has."""
        try:
            self.check_owned()
        except OwnershipError as error:
            return error
        except StorageError:
            return None
        return None

    def _in_the_way(self, step: int) -> SaveError:
        reason = (
            "somebody else has saved it meanwhile, or put something there; is another run writing to this path? "
            f"If not, move {self.path}/{step} away"
        )
        return SaveError(step, self.path, reason)

    def _commit(self, step: int, folder: str) -> None:
        """Make a step that is complete durable, and have it listed."""
        if self.objects is not None:
            self.check_owned()
            self.objects.copy(folder, MANIFEST_FILE, COMMITTED)
            self._finish(folder)
            return
        self.files.flush(folder)
        self.check_owned()
        try:
            self.files.move(folder, str(step))
        except FileExistsError as error:
            raise self._in_the_way(step) from error
        try:
            self.files.flush_names()
        except StorageError:  # after a loss of power it might be gone, so it must not count
            self.files.move(str(step), folder)
            raise

    def _remove_failed(self, folder: str, error: Exception) -> None:
        """Delete what a failed save has written; it may have failed because there was no space left.

        If it failed because the storage under a URI does not answer, that waits until the next deletion of leftovers:
        now it would take as long as the save did.
        """
        if isinstance(error, OwnershipError) or (self.is_uri and isinstance(error, StorageError)):
            return
        self._remove_what_is_left(folder)

    def _remove_what_is_left(self, folder: str = "") -> None:
        """Delete a folder on a local disk; under a URI, all that is left of saves and deletions."""
        try:
            if self.is_uri:
                self.remove_leftovers()
            else:
                self.files.delete_folder(folder)
        except (StorageError, OwnershipError) as failure:
            _logger.warning("%s: what failed saves have written could not be removed: %s", self.path, failure)

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
        # Never over one that is there: under a URI, a process whose program has been ousted may wake up here.
        files_at(folders[MANIFEST], self._traffic.timeout_s).create(_process_file(process), text.encode())
        return per_process.digest_of(text)

    # Reading.

    def as_seen_by(self, manifest: Manifest, process: int) -> tuple[Manifest, dict[str, HostItem]]:
        """A step from the point of view of one process; see `Source.as_seen_by`.

        Raises:
            CorruptCheckpointError: the file with the process's own state is damaged.
        """
        if str(process) not in manifest.own:
            return manifest, {}

        def read() -> tuple[Manifest, dict[str, HostItem]]:
            path = f"{manifest.step}/{MANIFEST}/{_process_file(process)}"
            text = self.files.read(path, MOST_MANIFEST_BYTES).decode()
            if per_process.digest_of(text) != manifest.own[str(process)]:
                raise ValueError(f"{_process_file(process)} is not what was written: its SHA-256 differs")
            others = functools.partial(inspection.other_bytes, f"{self.path}/{manifest.step}", len(text))
            own = per_process.from_text(text, others)
            return per_process.as_seen_by(manifest, own), own

        return self._read_twice(manifest.step, read)

    def manifest(self, step: int) -> Manifest:
        """The manifest of a step.

        Raises:
            CheckpointNotFoundError: there is no such step.
            CorruptCheckpointError: the step exists, but its manifest is missing or damaged.
            StorageError: it could not be read.
        """
        if not self._is_there(step):
            raise CheckpointNotFoundError(self.path, step, self.steps())

        def read() -> Manifest:
            try:
                content = self.files.read(f"{step}/{MANIFEST_FILE}", MOST_MANIFEST_BYTES)
            except FileNotFoundError:
                inside = sorted(entry.name for entry in self.files.entries(str(step)))
                if not inside:
                    raise ValueError("the folder is empty") from None
                raise ValueError(
                    "it has no manifest, so it is half deleted or was not written by torchorbax (there is "
                    f"{few(inside)})"
                ) from None
            others = functools.partial(inspection.other_bytes, f"{self.path}/{step}", len(content))
            manifest = Manifest.from_text(content.decode(), others)
            if manifest.step != step:
                raise ValueError(f"its manifest is that of step {manifest.step}")
            return manifest

        return self._read_twice(step, read)

    def _is_there(self, step: int) -> bool:
        """Is there a step of this number, whole or damaged?"""
        return self.files.exists(f"{step}/{COMMITTED}" if self.is_uri else str(step))

    def check_files(self, manifest: Manifest, *, digests: bool) -> None:
        """Compare the files of a step with its manifest; see `Source.check_files`."""

        def check() -> None:
            # The sizes first: a file that claims to be enormous is not read.
            expected, found = manifest.files, self.files.sizes(folder)
            wrong = [f"{path} is missing" for path in expected if path not in found]
            for path, (nbytes, _) in expected.items():
                if found.get(path, nbytes) != nbytes:
                    wrong.append(f"{path} has {found[path]} bytes, but was written with {nbytes}")
            if digests and not wrong:
                now = self.files.digests(folder, expected)
                wrong = [
                    f"{path} is not what was written: its CRC-32C differs"
                    for path in now
                    if now[path] != expected[path]
                ]
            if wrong:
                raise ValueError(few(wrong))

        folder = str(manifest.step)
        self._read_twice(manifest.step, check)

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
            if not self.bases._is_there(base):
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
            path = f"{self.path}/{step}/{item}"
            read = functools.partial(array_reader.read, path, wanted, self._traffic, then)
            try:
                found = self._translated(step, read) if wanted else {}
            except _CallerError as error:
                raise error.error from None
            except CorruptCheckpointError as error:
                reasons.append(f"item {item}: {error.reasons[step]}")
                continue
            for name, target in of_item.items():
                arrays[item, name] = found[name] if name in found else _empty(leaves[item, name], target)
        if reasons:
            raise CorruptCheckpointError(self.path, {step: "; ".join(reasons)})
        return arrays

    def _read_twice(self, step: int, read: Callable[[], Result]) -> Result:
        """Read something of a step, and again if it seems to be damaged."""
        try:
            return self._translated(step, read)
        except CorruptCheckpointError as error:
            _logger.info("%s: step %d is read again: %s", self.path, step, error.reasons[step])
            return self._translated(step, read)

    def _translated(self, step: int, read: Callable[[], Result]) -> Result:
        """Read something of a step.

        Raises:
            CorruptCheckpointError: the files are proved to be wrong.
            StorageError: they could not be read, which says nothing about them.
        """
        try:
            return read()
        except (TorchorbaxError, _CallerError):
            raise
        except Exception as error:  # on damaged files, TensorStore raises errors of many types
            if is_proof_of_damage(error):
                raise CorruptCheckpointError(self.path, {step: gcs.error_line(error)}) from error
            if isinstance(error, OSError | ValueError | RuntimeError | NotImplementedError):
                raise StorageError(self.path, f"step {step}: {gcs.error_line(error)}") from error
            raise


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


def _empty(meta: LeafMeta, target: Sharding | None) -> Array:
    """An array without elements, which is not stored."""
    array = np.empty(meta.shape, BY_NAME[meta.dtype])
    return array if target is None or not fits_on_device(array.dtype) else put(array, target)
