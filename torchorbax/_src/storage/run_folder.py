"""The folder of a run, on a local disk or under a URI: finds, renames and deletes whole steps.

A step must appear and disappear as a whole. On a local disk, a rename does that. Under a URI, a commit marker does,
which is written last and deleted first.

Nothing is deleted because of its name alone. A step belongs to the run if its manifest has the run's identity. What an
interrupted save or deletion has left behind has that identity in its name on a local disk, and is on the owner's list
of unfinished folders under a URI.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import time
import uuid
import weakref
from collections.abc import Callable, Sequence
from typing import TypeVar

from torchorbax._src.format import bounded_json
from torchorbax._src.storage import gcs
from torchorbax._src.storage.at_once import at_once, one_by_one
from torchorbax._src.storage.files import Entry, Files
from torchorbax._src.storage.gcs_files import GcsFiles
from torchorbax._src.storage.local_files import LocalFiles
from torchorbax._src.storage.owner_records import GcsRecord, LocalRecord
from torchorbax._src.storage.ownership import Ownership, Record
from torchorbax._src.storage.run_layout import (
    BASE,
    COMMITTED,
    DAMAGED,
    IDENTITY,
    MANIFEST_FILE,
    MOST_MANIFEST_BYTES,
    absolute,
    as_config_error,
    check_is_run,
    few,
    is_step,
    may_be_step,
)
from torchorbax.errors import CheckpointNotFoundError, ConfigError, StorageError

Result = TypeVar("Result")

_LEFTOVER = ".torchorbax-left-"
_PROBE = ".torchorbax-probe-"
_LATE = 2.0
"""How many times `timeout_s` after a save was given up its last write may arrive: TensorStore goes on with it, and with
the retries that it has begun."""
_PARTIAL = re.compile(r"\.torchorbax-[a-z]+\.\d+\.partial")

_logger = logging.getLogger(__name__)


class RunFolder:
    """The folder of a run.

    Args:
        path: a folder or a `gs://` URI. A relative path is resolved now, against the current folder.
        timeout_s: how long to wait for the storage under a URI.
        parent: for the bases of a run, the folder of the run, which has the same owner and identity.

    Raises:
        ConfigError: the path cannot name a run, or its file system needs an extra of torchorbax.

    Attributes:
        path: the absolute path or URI.
        is_uri: is the folder under a URI, and not on a local disk?
        files: the files below the path.
        objects: the same under a URI, with what only objects can do.
    """

    def __init__(self, path: str | os.PathLike[str], timeout_s: float, parent: RunFolder | None = None) -> None:
        self.path = absolute(path)
        self.is_uri = gcs.is_uri(self.path)
        self._timeout_s = timeout_s
        self._parent = parent
        self._told: set[str] = set()  # names that are no steps, of which a warning has told
        self._given_up: dict[str, float] = {}  # under a URI, by folder: `time.monotonic()` when a save of it failed
        self.files: Files
        self.objects: GcsFiles | None = None
        record: Record
        if self.is_uri:
            self.files = self.objects = objects = GcsFiles(self.path, timeout_s)
            record = GcsRecord(objects)
        else:
            self.files = folders = LocalFiles(self.path)
            record = LocalRecord(folders)
        self._ownership: Ownership = parent._ownership if parent is not None else Ownership(self.path, record)
        if parent is None:
            # A run that is dropped without being closed must not keep others out.
            weakref.finalize(self, self._ownership.release).atexit = False

    def at_once(self, actions: Sequence[Callable[[], Result]]) -> list[Result]:
        """The results of actions that do not depend on each other. Under a URI they wait for it at the same time."""
        if not actions:
            return []
        return at_once(actions) if self.is_uri else one_by_one(actions)

    # The run.

    def create(self, *, takeover: bool = False) -> None:
        """Create the folder, check that it can be written to, and become its owner.

        Args:
            takeover: also if another program is the owner, which then writes and deletes nothing more.

        Raises:
            ConfigError: it cannot be written to, is a file, or holds other things than a run.
            OwnershipError: another program is the owner.
        """
        self._check_is_run()
        with as_config_error(self.path):
            if not self.is_uri:
                os.makedirs(self.path, exist_ok=True)
            probes = [self._probe, lambda: gcs.check_access(self.path, self._timeout_s)]
            self.at_once(probes if self.is_uri else probes[:1])
        self._ownership.acquire(takeover=takeover)
        self.identity()  # raises now, and not at the first save

    def _check_is_run(self) -> None:
        """Raise ConfigError if the path is a file, or holds other things than a run."""
        with as_config_error(self.path):
            unfinished: list[str] = []
            found: list[Entry] = []
            self.at_once(
                [lambda: unfinished.extend(self._ownership.noted()), lambda: found.extend(self.files.entries())]
            )
            # Anything may be left in a folder that an owner of the run was writing or deleting.
            steps = [name for name, kind in found if is_step(name) and kind == "folder" and name not in unfinished]
            looks = self.at_once([functools.partial(may_be_step, self.files, name) for name in steps])
        strangers = {name for name, may_be in zip(steps, looks, strict=True) if not may_be}
        check_is_run(self.files, found, strangers)

    def _probe(self) -> None:
        """Raise StorageError if nothing can be written here, or not deleted again."""
        probe = f"{_PROBE}{uuid.uuid4().hex}"
        self.files.write(probe, b"")
        self.files.delete_file(probe)

    def release(self) -> None:
        """Let the run go, so that the next program need not wait. Nothing can be written afterwards."""
        self._ownership.release()

    def check_owned(self) -> None:
        """Raise OwnershipError if another program has taken the run over."""
        self._ownership.check()

    @property
    def epoch(self) -> int:
        """How many owners the run has had, this one included."""
        return self._ownership.epoch

    def identity(self) -> str:
        """A unique name of this run, the same whatever its path. It is made the first time that it is asked for."""
        return self._identity if self._parent is None else self._parent.identity()

    @functools.cached_property
    def _identity(self) -> str:
        found = self._stored_identity()
        if found:
            return found
        # Somebody may have copied the steps without the hidden files: then they say which run it is.
        runs = {run for step in self.steps() if (run := self._run_of(step))}
        identity = runs.pop() if len(runs) == 1 else uuid.uuid4().hex
        if found is None:
            try:
                self.files.create(IDENTITY, identity.encode())
            except FileExistsError:
                return self._stored_identity() or identity
        else:  # emptied by a loss of power
            self.files.write(IDENTITY, identity.encode())
        return identity

    def _stored_identity(self) -> str | None:
        """What the file of the identity says; None if there is no file, empty if it says nothing.

        Raises:
            ConfigError: it says something else.
        """
        try:
            content = self.files.read(IDENTITY, 1 << 10)
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ConfigError(f"{self.path}: {error}; delete it, and the steps will say which run it is") from error
        if content and not re.fullmatch(rb"[0-9a-f]{32}", content):
            advice = "delete it, and the steps will say which run it is"
            raise ConfigError(f"{self.path}/{IDENTITY} is not the identity of a run; {advice}")
        return content.decode()

    def check_visible(self) -> None:
        """Raise ConfigError if this process cannot see the folder that process 0 has created."""
        with as_config_error(self.path):
            if not self.is_uri and not os.path.isdir(self.path):
                raise ConfigError(
                    f"{self.path} was made by another process of this run and cannot be seen here; several processes "
                    "need a folder that all of them share, or gs://"
                )

    # Its steps.

    def steps(self) -> list[int]:
        """The committed steps, in ascending order. Damaged steps are among them: only names and markers are looked at.

        Raises:
            StorageError: the storage does not answer.
        """
        names = self._step_folders()
        while True:
            found = set(self._committed_of(sorted(names)))
            # Under a URI, one may have been deleted since it was listed, because a newer one has been committed.
            if found == names or not (again := self._step_folders()) - names:
                return sorted(map(int, found))
            names = again

    def _step_folders(self) -> set[str]:
        """The folders whose names are those of steps."""
        entries = [entry for entry in self.files.entries() if is_step(entry.name)]
        for entry in entries:
            if entry.kind == "other" and entry.name not in self._told:
                self._told.add(entry.name)
                _logger.warning("%s/%s is a link or a device, and so not taken for a step", self.path, entry.name)
        return {entry.name for entry in entries if entry.kind == "folder"}

    def _committed_of(self, names: Sequence[str]) -> list[str]:
        """Which of these folders are complete."""
        if not self.is_uri:
            return list(names)
        markers = [functools.partial(self.files.is_file, f"{name}/{COMMITTED}") for name in names]
        return [name for name, found in zip(names, self.at_once(markers), strict=True) if found]

    def existing_steps(self) -> list[int]:
        """The committed steps in ascending order, at least one.

        Raises:
            CheckpointNotFoundError: there is no step. The message says if there are runs below the path, or if the path
                is that of a step.
            StorageError: the storage does not answer.
        """
        if found := self.steps():
            return found
        entries = self.files.entries()
        below = [entry.name for entry in entries if entry.kind == "folder"]
        links = [entry.name for entry in entries if entry.kind == "other" and is_step(entry.name)]
        runs = sorted(name for name in below if RunFolder(f"{self.path}/{name}", self._timeout_s).steps())
        hint = f"; there are runs below it: {few(runs)}" if runs else ""
        parent, _, name = self.path.rpartition("/")
        if not hint and is_step(name) and parent and int(name) in RunFolder(parent, self._timeout_s).steps():
            hint = f"; it is step {name} of the run {parent}"
        if links:
            hint += f"; {few(sorted(links))} is a link, and links are never followed: put the folder itself there"
        raise CheckpointNotFoundError(self.path, hint=hint)

    def set_aside(self, step: int) -> None:
        """Rename a damaged step, so that its number is free again and it can still be repaired."""
        self._ownership.check()
        count = 1
        while True:
            aside = f"{step}{DAMAGED}{'' if count == 1 else f'-{count}'}"
            if not self.files.exists(aside):
                break
            count += 1
        self.files.move(str(step), aside)
        _logger.warning("%s: damaged step %d is now %s", self.path, step, aside)

    def has_set_aside(self) -> bool:
        """Is there a damaged step that `set_aside` has renamed?"""
        return any(DAMAGED in entry.name for entry in self.files.entries())

    def is_own(self, step: int) -> bool:
        """Was the step saved by this run? False for what somebody else has put there, under whatever name.

        Steps that were saved before manifests had the identity of the run count as its own.
        """
        return self._run_of(step) in ("", self.identity())

    def is_other_run(self, identity: str) -> bool:
        """Is an identity in a manifest that of another run? Nothing is written to find out."""
        run = self if self._parent is None else self._parent
        # To ask for `_identity` would make one where there is none, in a run that is only read, too.
        mine = run.__dict__.get("_identity") or run._stored_identity()
        return bool(identity and mine) and identity != mine

    def _run_of(self, step: int) -> str | None:
        """The identity of the run in the manifest of a step; empty if it has none, None if there is no manifest."""
        try:
            content = bounded_json.loads(self.files.read(f"{step}/{MANIFEST_FILE}", MOST_MANIFEST_BYTES).decode())
            return str(content.get("run", "")) if "format" in content else None
        except (FileNotFoundError, ValueError, AttributeError, TypeError, RecursionError):
            return None

    def delete(self, step: int) -> None:
        """Delete a step. It is never listed half deleted.

        Raises:
            OwnershipError: another program has taken the run over.
            StorageError: it could not be deleted, or not all of it; `remove_leftovers` tries again.
        """
        if self.is_uri:
            self._begin(str(step))
            self.files.delete_file(f"{step}/{COMMITTED}")
            self._delete_uncommitted(str(step))
            self._finish(str(step))
        else:
            self._ownership.check()
            hidden = self._leftover(step)
            try:
                self.files.move(str(step), hidden)
            except FileNotFoundError:
                return
            self.files.delete_folder(hidden)

    def remove_leftovers(self) -> None:
        """See `Storage.remove_leftovers`. Raises OwnershipError if another program has taken the run over."""
        self._ownership.check()
        leftovers = self._leftovers()
        if self.is_uri:
            # Gone, or committed although the answer was lost. The highest number of a base stays, so that no other base
            # gets it: its owner may have been suspended before it wrote anything.
            done = sorted(self._noted().difference(leftovers), key=int)
            for folder in done if self._parent is None else done[:-1]:
                if time.monotonic() > self._given_up.get(folder, 0.0) + _LATE * self._timeout_s:
                    self._finish(folder)
        for folder in leftovers:
            try:
                _logger.info("removing %s/%s, left behind by an interrupted save or deletion", self.path, folder)
                # Under a URI it stays on the list until no write that was given up can arrive any more.
                if self.is_uri:
                    self._delete_uncommitted(folder)
                else:
                    self.files.delete_folder(folder)
            except StorageError as error:
                _logger.warning("%s could not be removed, trying later: %s", folder, error)
                if self.is_uri:  # no answer: each further deletion would take as long to fail
                    return

    def _delete_uncommitted(self, folder: str) -> None:
        """Delete a step under a URI that is not committed. Without its manifest it cannot be, so that goes first."""
        self.files.delete_file(f"{folder}/{MANIFEST_FILE}")
        if not self._committed_of([folder]):
            self.files.delete_folder(folder)
        elif self.objects is not None:  # a program that has been suspended has committed it meanwhile, so it stays
            self.objects.copy(folder, COMMITTED, MANIFEST_FILE)

    def unfinished(self) -> list[int]:
        """See `Storage.unfinished`. A local disk has none."""
        return sorted(map(int, self._noted()))

    def _noted(self) -> set[str]:
        """Under a URI, the folders of this one that are on the owner's list of unfinished ones."""
        below = "" if self._parent is None else f"{BASE}/"
        names = (name.removeprefix(below) for name in self._ownership.unfinished if name.startswith(below))
        return {name for name in names if is_step(name)}

    def _leftovers(self) -> list[str]:
        if self.is_uri:
            noted = self._noted()
            # A marker may also have been deleted by somebody else, or by an earlier version.
            found = [entry.name for entry in self.files.entries() if is_step(entry.name)]
            half = sorted(set(found).difference(self._committed_of(found)))
            return [name for name in half if name in noted or self._run_of(int(name)) == self.identity()]
        # Probes, and files that were to become another, are empty or incomplete, whoever has left them.
        mine = (f"{_LEFTOVER}{self.identity()}-", _PROBE)
        names = [entry.name for entry in self.files.entries()]
        return [name for name in names if name.startswith(mine) or _PARTIAL.fullmatch(name)]

    def _leftover(self, step: int) -> str:
        """A new name for a folder on a local disk that is being written or deleted."""
        return f"{_LEFTOVER}{self.identity()}-{step}-{uuid.uuid4().hex[:8]}"

    def _begin(self, folder: str) -> None:
        """Note that a folder under a URI is about to be written or deleted."""
        self._ownership.begin([folder if self._parent is None else f"{BASE}/{folder}"])

    def _finish(self, folder: str) -> None:
        """Note that a folder under a URI is complete, or gone."""
        self._ownership.finish(folder if self._parent is None else f"{BASE}/{folder}")
