"""The storage of a run whose steps are Orbax checkpoints, on a local disk or under gs://.

A step is an ordinary Orbax checkpoint in `CheckpointManager`'s layout: one item for each entry of the state, and the
JSON item `manifest`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import logging
import os
import time
from collections.abc import Callable, Mapping, MutableMapping

from torchorbax._src.arrays import fingerprint
from torchorbax._src.arrays.fingerprint import Sums
from torchorbax._src.arrays.leaves import Array
from torchorbax._src.format import per_process
from torchorbax._src.format.manifest import FileDigest, Key, Manifest
from torchorbax._src.format.per_process import HostItem
from torchorbax._src.storage import array_writer, orbax_layout
from torchorbax._src.storage.at_once import at_once, one_by_one
from torchorbax._src.storage.damage import reason_of
from torchorbax._src.storage.files_at import files_at
from torchorbax._src.storage.run_layout import BASE, COMMITTED, MANIFEST, MANIFEST_FILE
from torchorbax._src.storage.step_reader import StepReader, process_file
from torchorbax._src.storage.storage import Folders
from torchorbax._src.storage.traffic import Traffic
from torchorbax.errors import OwnershipError, SaveError, StorageError

_logger = logging.getLogger(__name__)
VERSION = importlib.metadata.version("orbax-checkpoint")


class OrbaxStorage(StepReader):
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
        super().__init__(path, traffic, parent)

    @functools.cached_property
    def bases(self) -> OrbaxStorage:
        """Where the run keeps its frozen parameters. Always the same object, because it shares the run's owner."""
        return OrbaxStorage(f"{self.path}/{BASE}", self._traffic, parent=self)

    def remove_leftovers(self) -> None:
        """Delete what interrupted saves and deletions have left behind, in the run and its bases."""
        if self._parent is None:
            self.bases.remove_leftovers()
        super().remove_leftovers()

    def write(self, step: int, arrays: Mapping[Key, Array], fill: Callable[[Folders], Manifest]) -> Manifest:
        """Write a step and commit it; see `Storage.write`."""
        folder = str(step) if self.is_uri else self._leftover(step)
        items = orbax_layout.items_of(arrays.items())
        folders = {item: f"{self.path}/{folder}/{item}" for item in (*items, MANIFEST)}
        try:
            self._prepare(step)
            metadata = orbax_layout.files(items, markers=self.is_uri)
            # Metadata and arrays, also on a local disk at the same time: each of them waits for the disk. Nothing is
            # written over what is there: a request of a program that has been taken over may come late.
            manifests: list[Manifest] = []
            writes: list[Callable[[], object]] = [
                functools.partial(self.files.create, f"{folder}/{path}", text) for path, text in metadata.items()
            ]
            others = writes if self.is_uri else [lambda: one_by_one(writes)]
            at_once([*others, lambda: manifests.append(fill(folders))])
            manifest = manifests[0]
            # The manifest, with all files in it.
            manifest = dataclasses.replace(manifest, files=self._merged(folders, folder, manifest.files))
            self.files.create(f"{folder}/{MANIFEST_FILE}", manifest.to_text().encode())
            self._commit(step, folder)
        except SaveError:
            raise
        except Exception as error:
            if isinstance(error, FileExistsError):  # a write that was given up has arrived now
                error = StorageError(self.path, f"step {step}: something has come in the way meanwhile: {error}")
            cause = self._loss() or error  # whoever has taken over has removed what this process was writing
            self._remove_failed(folder, cause)
            raise SaveError(step, self.path, reason_of(cause, cut=self.is_uri)) from cause
        if self._noted():  # now the storage answers
            self._remove_what_is_left()
        return manifest

    def _merged(self, folders: Folders, folder: str, known: Mapping[str, FileDigest]) -> dict[str, FileDigest]:
        """Merge what several processes have written. The files of the step, of which some may be known already."""
        found = self._found(folder)
        written: dict[str, set[str]] = {}
        for path in found:
            item, _, below = path.partition("/")
            if array_writer.is_of_process(below):
                written.setdefault(item, set()).add(below.partition("/")[0])
        if written:
            self.check_owned()
            array_writer.merge(folders, {item: sorted(names) for item, names in written.items()}, self._traffic)
            found = self._found(folder)
        return self._digests(folder, found, known)

    def _found(self, folder: str) -> dict[str, FileDigest]:
        """The files of a step that is being written. On a local disk, where it takes long, without their digests."""
        if self.is_uri:
            return self.files.digests(folder)
        return {path: (nbytes, "") for path, nbytes in self.files.sizes(folder).items()}

    def _digests(
        self, folder: str, found: Mapping[str, FileDigest], known: Mapping[str, FileDigest]
    ) -> dict[str, FileDigest]:
        """The files that the manifest of a step lists. Of those that are known, only the sizes are looked at."""
        for path, (nbytes, _) in known.items():
            seen = found[path][0] if path in found else "none"
            if seen != nbytes:
                raise StorageError(
                    self.path,
                    f"{folder}/{path} was written by another process with {nbytes} bytes, but process 0 sees {seen}; "
                    "all processes need one file system that shows each what others write",
                )
        others = [path for path in found if path not in (MANIFEST_FILE, COMMITTED) and path not in known]
        digests = {path: found[path] for path in others} if self.is_uri else self.files.digests(folder, others)
        return dict(sorted({**known, **digests}.items()))

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
            self.check_owned()  # not beside the manifest, which may take so long that this is no longer true
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
        if self.is_uri:
            self._given_up[folder] = time.monotonic()
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

    def write_arrays(
        self, folders: Folders, arrays: MutableMapping[Key, Array], process: int, *, alone: bool
    ) -> dict[Key, Sums]:
        """Write one process's shards of the arrays of a step; see `Storage.write_arrays`."""
        # Without elements: Orbax cannot store them, and the manifest has their shapes and dtypes.
        empty = [key for key, array in arrays.items() if not array.size]
        sums = {key: fingerprint.start(arrays.pop(key))() for key in empty}
        return sums | array_writer.write(folders, arrays, self._traffic, process, alone=alone)

    def written_files(self, folders: Folders, process: int) -> dict[str, FileDigest]:
        """See `Storage.written_files`."""
        if self.is_uri:
            return {}
        found: dict[str, FileDigest] = {}
        for item, folder in folders.items():
            files = files_at(folder, self._traffic.timeout_s)
            if item == MANIFEST:
                paths = [path for path in files.sizes("") if path == process_file(process)]
            else:
                own = array_writer.folder_of(process)
                paths = [f"{own}/{path}" for path in files.sizes(own)]
            found |= {f"{item}/{path}": digest for path, digest in files.digests("", paths).items()}
        return found

    def write_process_items(self, folders: Folders, items: Mapping[str, HostItem], process: int) -> str:
        """Write the file with one process's own state; returns its SHA-256, for the manifest."""
        text = per_process.to_text(items)
        # Never over one that is there: under a URI, a process whose program has been ousted may wake up here.
        files_at(folders[MANIFEST], self._traffic.timeout_s).create(process_file(process), text.encode())
        return per_process.digest_of(text)
