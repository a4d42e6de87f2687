"""The only module that imports Orbax: one run's folder, its steps, and reading and writing them.

A step is an ordinary Orbax checkpoint (`CheckpointManager`'s layout): one item per entry of the state and the JSON item
`manifest`. Orbax's errors are translated here.
"""

from __future__ import annotations

import errno
import functools
import importlib.metadata
import json
import logging
import math
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Sharding
from orbax.checkpoint import checkpoint_managers as orbax_policies
from orbax.checkpoint.path import step as orbax_steps

from torchorbax import _gcs, _orbax_arrays, _orbax_save, fingerprint, hoststate
from torchorbax._orbax_arrays import LEAST_HOST_BYTES, Traffic
from torchorbax._orbax_save import MANIFEST
from torchorbax.adapter import Array, put
from torchorbax.dtypes import BY_NAME, fits_on_device
from torchorbax.errors import CheckpointNotFoundError, ConfigError, CorruptCheckpointError, ProcessError, SaveError
from torchorbax.hoststate import HostItem
from torchorbax.manifest import ItemMeta, LeafMeta, Manifest
from torchorbax.processes import Channel, Processes
from torchorbax.values import Json

__all__ = ["MANIFEST", "Storage", "Traffic", "decision_context", "orbax_policies", "traffic"]

BASE = "base"
VERSION = importlib.metadata.version("orbax-checkpoint")

_NAMES = orbax_steps.standard_name_format()
_COMMITTED = "commit_success.txt"
_IDENTITY = ".torchorbax-run"
_DAMAGED = ".torchorbax-damaged"
_DELETED = ".torchorbax-deleted"
_TEMPORARY = ".orbax-checkpoint-tmp"
_MOST_METADATA_BYTES = 1 << 30  # a million leaves take less than half of that

_LONGEST_TIMEOUT_S = 86_400

_logger = logging.getLogger(__name__)

T = TypeVar("T")


def decision_context(*, saving: bool, preempted: bool) -> orbax_policies.DecisionContext:
    """What Orbax's save policies get to know besides the steps."""
    return orbax_policies.DecisionContext(
        is_saving_in_progress=saving, reached_preemption=preempted, multiprocessing_options=_one_process()
    )


@functools.cache
def _one_process() -> ocp.options.MultiprocessingOptions:
    return ocp.options.MultiprocessingOptions()


def traffic(
    compression: str | None,
    max_host_bytes: int,
    replicas: str = "first",
    single_replica_restore: bool = False,
    storage_timeout_s: float = Traffic.timeout_s,
) -> Traffic:
    """How arrays travel, in a user's words.

    Raises:
        ConfigError: a word that is not known, or too little memory.
    """
    if compression not in (None, "zstd"):
        raise ConfigError(f"compression must be 'zstd' or None, not {compression!r}")
    if isinstance(max_host_bytes, bool) or not isinstance(max_host_bytes, int) or max_host_bytes < LEAST_HOST_BYTES:
        raise ConfigError(f"max_host_bytes must be an int of at least {LEAST_HOST_BYTES}, not {max_host_bytes!r}")
    if replicas not in ("first", "all"):
        raise ConfigError(f"replicas must be 'first' or 'all', not {replicas!r}")
    if (
        isinstance(storage_timeout_s, bool)
        or not isinstance(storage_timeout_s, int | float)
        or not 0 < storage_timeout_s <= _LONGEST_TIMEOUT_S
    ):
        raise ConfigError(
            f"storage_timeout_s must be a positive number of seconds, {_LONGEST_TIMEOUT_S} at most, "
            f"not {storage_timeout_s!r}"
        )
    all_write = replicas == "all"
    return Traffic(compression is not None, max_host_bytes, all_write, single_replica_restore, float(storage_timeout_s))


Method = TypeVar("Method", bound=Callable[..., Any])


def _answered(method: Method) -> Method:
    """The method, which raises StorageError if the storage does not answer."""

    @functools.wraps(method)
    def asked(self: Storage, *args: Any, **kwargs: Any) -> Any:
        with _gcs.answering(self.path):
            return method(self, *args, **kwargs)

    return asked  # type: ignore[return-value]


class Storage:
    """The folder of one run, on local disk or under a URI that Orbax knows (`gs://`).

    Args:
        path: relative paths are taken from the current folder, now.
        traffic: how arrays are written and read.

    Raises:
        ConfigError: the path is a file, or holds something that is no run, or its file system needs an extra.
    """

    def __init__(self, path: str | os.PathLike[str], traffic: Traffic = Traffic()) -> None:  # noqa: B008  # immutable
        self.path = _absolute(path)
        self._traffic = traffic
        self._root = epath.Path(self.path)
        self._unremoved: set[int] = set()  # what may be half written or half deleted, as the storage did not answer
        self._base: Storage | None = None
        if _gcs.is_uri(self.path):
            _gcs.prepare(self.path, traffic.timeout_s)

    def check(self) -> None:
        """Raise ConfigError if the path is a file or holds something that is no run."""
        with _as_config_error(self.path):
            if not self._root.exists():
                return
            if not self._root.is_dir():
                raise ConfigError(f"{self.path} is a file; a run needs a folder")
            entries = [entry for entry in self._root.iterdir() if not entry.name.startswith(".")]
        if entries and not any(_belongs_to_run(entry) for entry in entries):
            names = sorted(entry.name for entry in entries)
            raise ConfigError(
                f"{self.path} holds no run but other things ({_few(names)}); choose a folder that is new or empty"
            )

    def create(self) -> None:
        """Make the folder and see that it can be written to.

        Raises:
            ConfigError: it cannot, or it is a file or holds something that is no run.
        """
        self.check()
        with _as_config_error(self.path):
            self._root.mkdir(parents=True, exist_ok=True)
            probe = self._root / _gcs.PROBE
            probe.write_text("")
            probe.unlink()
        if _gcs.is_uri(self.path):
            _gcs.check_access(self.path, self._traffic.timeout_s)

    def identity(self) -> str:
        """What tells this run from any other, whatever its path; made when it is first asked for."""
        file = self._root / _IDENTITY
        if not file.exists():
            file.write_text(uuid.uuid4().hex)
        return str(file.read_text())

    def check_visible(self) -> None:
        """Raise ConfigError if the folder, which process 0 has made, is not there."""
        with _as_config_error(self.path):
            if not _gcs.is_uri(self.path) and not self._root.is_dir():
                raise ConfigError(
                    f"{self.path} was made by another process of this run and cannot be seen here; several processes "
                    "need a folder that all of them share, or gs://"
                )

    @_answered
    def remove_leftovers(self) -> None:
        """Delete what interrupted saves and deletions left behind. Call it before the first save."""
        if not self._root.exists():
            return
        if (self._root / BASE).exists():
            self._base_area().remove_leftovers()
        for entry in self._root.iterdir():
            if _TEMPORARY in entry.name or entry.name.startswith(_DELETED) or self._is_half_written(entry):
                _logger.info("removing %s, left behind by an interrupted run", entry)
                entry.rmtree(missing_ok=True)

    def _is_half_written(self, entry: Any) -> bool:
        """Without an atomic rename, a step that is being written or deleted lies where a committed one would."""
        return _gcs.is_uri(self.path) and entry.name.isdecimal() and not (entry / _COMMITTED).exists()

    @_answered
    def steps(self) -> list[int]:
        """The committed steps, in ascending order. A folder with a number for a name counts even if it is damaged."""
        if _gcs.is_uri(self.path):
            return sorted(self._steps_of_uri())
        if not self._root.exists():
            return []
        return sorted(found.step for found in _NAMES.find_all(self._root) if self._is_step(found))

    def _steps_of_uri(self) -> Iterator[int]:
        """Orbax's own way asks for the bucket, which needs a permission of its own, and waits for that for ever."""
        try:
            names = [entry.name for entry in self._root.iterdir()]
        except FileNotFoundError:
            return
        for name in names:
            if name.isdecimal() and name == str(int(name)) and (self._root / name / _COMMITTED).exists():
                yield int(name)

    @_answered
    def existing_steps(self) -> list[int]:
        """`steps`, of which there must be some.

        Raises:
            CheckpointNotFoundError: there is none.
        """
        if found := self.steps():
            return found
        hint = ""
        if self._root.exists() and self._root.is_dir():
            runs = sorted(entry.name for entry in self._root.iterdir() if Storage(str(entry)).steps())
            hint = f"; there are runs below it: {_few(runs)}" if runs else ""
        if not hint and self._root.name.isdecimal() and self.path.removesuffix(f"/{self._root.name}") != self.path:
            parent = self.path.removesuffix(f"/{self._root.name}")
            if int(self._root.name) in Storage(parent).steps():
                hint = f"; it is step {self._root.name} of the run {parent}"
        raise CheckpointNotFoundError(self.path, hint=hint)

    def _is_step(self, found: Any) -> bool:
        """Not a file, nor a name in other digits, which Orbax takes as well."""
        return bool(found.path.name == _NAMES.build_name(found.step) and found.path.is_dir())

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
        channel = channel or Processes(math.inf, index=0, count=1).channel("write")
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
            if step in self._unremoved:
                self._delete_from_uri(self._folder(step))
                self._unremoved.remove(step)
            if self._folder(step).exists():
                reason = "somebody else has saved it meanwhile; is another run writing to this path?"
                raise SaveError(step, self.path, reason)
            leaves = {item: {name: one for name, one in part.items() if one.size} for item, part in arrays.items()}
            stamped = _orbax_save.save(self._folder(step), leaves, self._traffic, fill)
            self._make_durable(self._folder(step))
        except Exception as error:
            if not announced:
                channel.publish("write", {"error": f"{type(error).__name__}: {error}"})
            if isinstance(error, SaveError):
                raise
            self._remove_failed(step, error)
            reason = _gcs.told(error) if _gcs.is_uri(self.path) else f"{type(error).__name__}: {error}"
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
                sums[item].update(_orbax_arrays.write(folders[item], one, self._traffic))
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
        text = hoststate.to_text(own)
        (epath.Path(folder) / _own_name(process)).write_text(text)
        return hoststate.digest_of(text)

    @_answered
    def as_seen_by(self, manifest: Manifest, process: int) -> tuple[Manifest, dict[str, HostItem]]:
        """A step as a process finds it, and what that process has of it for itself.

        Raises:
            CorruptCheckpointError: the process's own file is damaged.
        """
        if str(process) not in manifest.own:
            return manifest, {}
        with self._as_corrupt(manifest.step):
            text = (self._folder(manifest.step) / MANIFEST / _own_name(process)).read_text()
            if hoststate.digest_of(text) != manifest.own[str(process)]:
                raise ValueError(f"{_own_name(process)} is not what was written: its SHA-256 differs")
            own = hoststate.from_text(text)
            return hoststate.as_seen_by(manifest, own), own

    def _make_durable(self, folder: Any) -> None:
        """Flush a step and its name to the disk, since older ones may be deleted next.

        TensorStore flushes its own files; Orbax does not flush its metadata, nor anybody the folders. Object storage
        needs none of it.
        """
        if _gcs.is_uri(self.path):
            return
        for place, _, files in os.walk(folder):
            for path in (*(os.path.join(place, file) for file in files), place):
                _flush(path)
        _flush(self.path)

    def _remove_failed(self, step: int, error: Exception) -> None:
        """Give back the space of a save that has failed, which may have failed for want of space.

        Of a storage that does not answer it is not asked now, which would take as long again.
        """
        if _gcs.is_uri(self.path):
            self._unremoved.add(step)
            if not _gcs.is_unanswered(error):
                self._remove_unremoved()
            return
        try:
            for entry in self._root.iterdir():
                if entry.name == _NAMES.build_name(step) or entry.name.startswith(f"{step}{_TEMPORARY}"):
                    entry.rmtree()
        except OSError as failure:
            _logger.warning("%s: what was written of step %d could not be removed: %s", self.path, step, failure)

    def _remove_unremoved(self) -> None:
        """Delete what failed saves and deletions have left behind under a URI.

        A step whose commit was acknowledged too late is whole, and stays. What is deleted is looked for again the next
        time: a write that nobody waits for any more may arrive later.
        """
        for step in sorted(self._unremoved):
            folder = self._folder(step)
            try:
                if folder.exists() and self._is_half_written(folder):
                    self._delete_from_uri(folder)
                else:
                    self._unremoved.remove(step)
            except Exception as error:  # of gcsfs, which has its own; the next process removes it
                _logger.warning(
                    "%s: what is left of step %d could not be removed: %s", self.path, step, _gcs.told(error)
                )

    @_answered
    def manifest(self, step: int) -> Manifest:
        """What the step says about itself.

        Raises:
            CheckpointNotFoundError: there is no such step.
            CorruptCheckpointError: there is, but its manifest is missing or unreadable.
        """
        folder = self._folder(step)
        if not ((folder / _COMMITTED) if _gcs.is_uri(self.path) else folder).exists():
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
                f"it has no manifest, so it is half deleted or was not written by torchorbax (there is {_few(inside)})"
            )
        for name in (f"{MANIFEST}/metadata", *(f"{item.name}/_METADATA" for item in folder.iterdir())):
            file = folder / name
            if file.exists() and file.stat().length > _MOST_METADATA_BYTES:
                raise ValueError(f"{name} has {file.stat().length} bytes; metadata has {_MOST_METADATA_BYTES} at most")

    @_answered
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
                folder, placed = f"{self._folder(step)}/{item}", None if then is None else functools.partial(then, item)
                read = _orbax_arrays.read(folder, wanted, self._traffic, placed) if wanted else {}
                arrays[item] = {
                    name: read[name] if name in read else _empty(meta[name], target) for name, target in leaves.items()
                }
            except Exception as error:  # TensorStore and the file system raise whatever they like on damaged files
                if _is_shortage(error) or (_gcs.is_uri(self.path) and _gcs.is_unanswered(error)):
                    raise
                reasons.append(f"item {item}: {_gcs.told(error)}")
        if reasons:
            raise CorruptCheckpointError(self.path, {step: "; ".join(reasons)})
        return arrays

    @_answered
    def set_aside(self, step: int) -> None:
        """Rename a damaged step, so that another can take its place and nothing is lost that might be repaired."""
        folder = self._folder(step)
        count = 1
        while (aside := self._root / f"{folder.name}{_DAMAGED}{'' if count == 1 else f'-{count}'}").exists():
            count += 1
        folder.rename(aside)
        _logger.warning("%s: damaged step %d is now %s", self.path, step, aside.name)

    @_answered
    def has_set_aside(self) -> bool:
        """Is there a damaged step that was renamed?"""
        return any(_DAMAGED in entry.name for entry in self._root.iterdir())

    @_answered
    def delete(self, step: int) -> None:
        """Delete a step so that it is never listed half deleted."""
        folder = self._folder(step)
        if _gcs.is_uri(self.path):
            self._unremoved.add(step)
            self._delete_from_uri(folder)
            self._unremoved.remove(step)
        else:
            hidden = self._root / f"{_DELETED}-{step}"
            folder.rename(hidden)
            hidden.rmtree()

    def _delete_from_uri(self, folder: Any) -> None:
        """There is no atomic rename: take the commit marker away first."""
        (folder / _COMMITTED).unlink(missing_ok=True)
        folder.rmtree(missing_ok=True)  # and what was deleted without an acknowledgement is missing

    def _base_area(self) -> Storage:
        """Where frozen parameters lie, as steps with numbers of their own. It remembers what it has left behind."""
        if self._base is None:
            self._base = Storage(f"{self.path}/{BASE}", self._traffic)
        return self._base

    @_answered
    def bases(self) -> set[int]:
        """The numbers of the bases there are."""
        return set(self._base_area().steps())

    def next_base(self) -> int:
        """The number of a base that is not there yet."""
        return max(self.bases(), default=-1) + 1

    @_answered
    def delete_base(self, base: int) -> None:
        """Delete a base that no step needs."""
        self._base_area().delete(base)

    def _folder(self, step: int) -> Any:
        return self._root / _NAMES.build_name(step)

    @contextmanager
    def _as_corrupt(self, step: int) -> Iterator[None]:
        try:
            yield
        except (CheckpointNotFoundError, CorruptCheckpointError):
            raise
        except Exception as error:  # Orbax, TensorStore and the file system raise whatever they like on damaged files
            if _is_shortage(error) or (_gcs.is_uri(self.path) and _gcs.is_unanswered(error)):
                raise
            raise CorruptCheckpointError(self.path, {step: _gcs.told(error)}) from error


def _attempted(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:  # raised when the other processes know
        return None, error


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


def _flush(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_shortage(error: Exception) -> bool:
    """Is it this process that lacks something, so that the files may be good all the same?"""
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM))
        or (isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error))
    )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _empty(meta: LeafMeta, target: Sharding | None) -> Array:
    array = np.empty(meta.shape, BY_NAME[meta.dtype])
    return array if target is None or not fits_on_device(array.dtype) else put(array, target)


def _absolute(path: str | os.PathLike[str]) -> str:
    if not isinstance(path, str | os.PathLike) or not str(path) or "\0" in str(path):
        raise ConfigError(f"a path must be a string or a Path, not {path!r}")
    path = str(path)
    if not _gcs.is_uri(path):
        if re.match(r"[a-z0-9]+:/", path):
            raise ConfigError(f"{path}: a URI has two slashes: {path.replace(':/', '://', 1)}")
        try:
            return str(Path(path).expanduser().absolute())
        except RuntimeError as error:
            raise ConfigError(f"{path}: {error}") from error
    _gcs.check_supported(path)
    return path.rstrip("/")


@contextmanager
def _as_config_error(path: str) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # gcsfs and google-auth have errors of their own
        if _gcs.is_uri(path):
            raise _gcs.refused(path, error) from error
        if not isinstance(error, OSError):
            raise
        raise ConfigError(f"{path} cannot be used for a run: {type(error).__name__}: {error}") from error


def _belongs_to_run(entry: Any) -> bool:
    if _TEMPORARY in entry.name:
        return True
    if entry.name == BASE and entry.is_dir():
        return any(_belongs_to_run(one) for one in entry.iterdir())
    return entry.name.isdigit() and entry.is_dir() and (_is_checkpoint(entry) or not any(entry.iterdir()))


def _is_checkpoint(folder: Any) -> bool:
    return any((folder / name).exists() for name in ("_CHECKPOINT_METADATA", MANIFEST, _COMMITTED))
