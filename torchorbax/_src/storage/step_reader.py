"""Reads the steps of a run, which are Orbax checkpoints on a local disk or under gs://.

The errors of Orbax, TensorStore and the file system are translated here.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar, cast

import numpy as np
from jax.sharding import Sharding

from torchorbax._src.arrays.dtypes import BY_NAME, fits_on_device
from torchorbax._src.arrays.jax_context import context_here
from torchorbax._src.arrays.leaves import Array, put
from torchorbax._src.format import per_process
from torchorbax._src.format.manifest import Key, LeafMeta, Manifest, by_base
from torchorbax._src.format.per_process import HostItem
from torchorbax._src.storage import array_reader, gcs, inspection
from torchorbax._src.storage.damage import is_proof_of_damage
from torchorbax._src.storage.run_folder import RunFolder
from torchorbax._src.storage.run_layout import BASE, MANIFEST, MANIFEST_FILE, MOST_MANIFEST_BYTES, few
from torchorbax._src.storage.traffic import Traffic
from torchorbax.errors import CheckpointNotFoundError, CorruptCheckpointError, StorageError, TorchorbaxError

Result = TypeVar("Result")

_logger = logging.getLogger(__name__)


class StepReader(RunFolder):
    """A run's folder, and the reading of its steps; a `Source`.

    Args:
        path: a folder or a `gs://` URI. A relative path is resolved now, against the current folder.
        traffic: how arrays are read.
        parent: for the bases of a run, the run.

    Raises:
        ConfigError: the path cannot name a run, or its file system needs an extra of torchorbax.
    """

    def __init__(self, path: str | os.PathLike[str], traffic: Traffic, parent: StepReader | None = None) -> None:
        super().__init__(path, traffic.timeout_s, parent)
        self._traffic = traffic

    @functools.cached_property
    def bases(self) -> StepReader:
        """Where the run keeps its frozen parameters. Always the same object, because it shares the run's owner."""
        return StepReader(f"{self.path}/{BASE}", self._traffic, parent=self)

    def as_seen_by(self, manifest: Manifest, process: int) -> tuple[Manifest, dict[str, HostItem]]:
        """A step from the point of view of one process; see `Source.as_seen_by`.

        Raises:
            CorruptCheckpointError: the file with the process's own state is damaged.
        """
        if str(process) not in manifest.own:
            return manifest, {}

        def read() -> tuple[Manifest, dict[str, HostItem]]:
            path = f"{manifest.step}/{MANIFEST}/{process_file(process)}"
            text = self.files.read(path, MOST_MANIFEST_BYTES).decode()
            if per_process.digest_of(text) != manifest.own[str(process)]:
                raise ValueError(f"{process_file(process)} is not what was written: its SHA-256 differs")
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

        _, manifest = self.at_once([lambda: self._check_there(step), lambda: self._read_twice(step, read)])
        return cast(Manifest, manifest)

    def _check_there(self, step: int) -> None:
        """Raise CheckpointNotFoundError if there is no step of this number, whole or damaged."""
        if not self._is_there(step):
            raise CheckpointNotFoundError(self.path, step, self.steps())

    def _is_there(self, step: int) -> bool:
        return bool(self._committed_of([str(step)])) if self.is_uri else self.files.exists(str(step))

    def check_files(self, manifest: Manifest, *, digests: Collection[str]) -> None:
        """Compare the files of a step with its manifest; see `Source.check_files`."""

        def check() -> None:
            # The sizes first: a file that claims to be enormous is not read.
            expected, found = manifest.files, self.files.sizes(folder)
            wrong = [f"{path} is missing" for path in expected if path not in found]
            for path, (nbytes, _) in expected.items():
                if found.get(path, nbytes) != nbytes:
                    wrong.append(f"{path} has {found[path]} bytes, but was written with {nbytes}")
            if digests and not wrong:
                now = self.files.digests(folder, digests)
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
        lock, context = threading.Lock(), context_here()
        waves = _waves(by_item, leaves, self._traffic.max_host_bytes)

        def read_item(item: str, readers: int) -> dict[Key, Any] | str:
            """What has been read; or, if the item is damaged, the reason."""
            wanted = {
                name: (leaves[item, name], target)
                for name, target in by_item[item].items()
                if not leaves[item, name].is_empty
            }
            if not wanted:
                return {}
            then = None if when_read is None else functools.partial(_called, when_read, lock, item)
            path = f"{self.path}/{step}/{item}"
            try:
                with context():
                    found = self._translated(
                        step, lambda: array_reader.read(path, wanted, self._traffic, then, readers=readers)
                    )
            except CorruptCheckpointError as error:
                return f"item {item}: {error.reasons[step]}"
            return {(item, name): array for name, array in found.items()}

        try:
            of_items = [
                found
                for wave in waves
                for found in self.at_once(
                    [functools.partial(read_item, item, len(wave) if self.is_uri else 1) for item in wave]
                )
            ]
        except _CallerError as error:
            raise error.error from None
        if reasons := [found for found in of_items if isinstance(found, str)]:
            raise CorruptCheckpointError(self.path, {step: "; ".join(reasons)})
        arrays: dict[Key, Any] = {}
        for found in of_items:
            if not isinstance(found, str):
                arrays |= found
        empty = {key: _empty(leaves[key], target) for key, target in targets.items() if leaves[key].is_empty}
        return {key: (arrays | empty)[key] for key in targets}

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


def _waves(by_item: Mapping[str, Collection[str]], leaves: Mapping[Key, LeafMeta], most_bytes: int) -> list[list[str]]:
    """Items that are read at the same time: so many that the largest leaves of all have room in the host's memory."""
    waves: list[list[str]] = []
    room = 0
    for item, names in by_item.items():
        largest = max(leaves[item, name].nbytes for name in names)
        if not waves or largest > room:
            waves.append([])
            room = most_bytes // 2
        waves[-1].append(item)
        room -= largest
    return waves


class _CallerError(Exception):
    """Carries an error of the caller's `when_read` past the handler for errors of reading."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _called(when_read: Callable[[Key, Any], object], lock: threading.Lock, item: str, name: str, array: Any) -> None:
    try:
        with lock:
            when_read((item, name), array)
    except Exception as error:
        raise _CallerError(error) from error


def process_file(process: int) -> str:
    """The name of the file with a process's own state, in the manifest's folder."""
    return f"process_{process}"


def _empty(meta: LeafMeta, target: Sharding | None) -> Array:
    """An array without elements, which is not stored."""
    array = np.empty(meta.shape, BY_NAME[meta.dtype])
    return array if target is None or not fits_on_device(array.dtype) else put(array, target)
