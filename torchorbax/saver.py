"""One save at a time, in the background: written, committed, older steps let go, errors kept for the caller."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
import torch

from torchorbax import _orbax, _torchax, frozen
from torchorbax._orbax import Storage
from torchorbax.errors import CheckpointNotFoundError, CorruptCheckpointError, SaveError
from torchorbax.frozen import Identities
from torchorbax.manifest import Manifest
from torchorbax.policies import PreservationContext, PreservationPolicy
from torchorbax.snapshot import Snapshot

_logger = logging.getLogger(__name__)


@dataclass
class SaveRecord:
    """One save of this process.

    Attributes:
        step: the step saved.
        time: when `save` was called, in UTC.
        stall_s: seconds that `save` kept the loop, waiting for an earlier save included.
        commit_s: seconds from the call until the step was committed; None while in flight or if it failed.
        nbytes: bytes of arrays written, each counted once; frozen parameters that a base has are not.
        metrics: the numbers given with it; complete once it is committed.
        error: why it failed, if it did.
    """

    step: int
    time: datetime.datetime
    stall_s: float = 0.0
    commit_s: float | None = None
    nbytes: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    error: SaveError | None = None


class StepInfo:
    """What policies get to know about a step; read from its manifest when a policy asks."""

    def __init__(self, step: int, storage: Storage) -> None:
        self.step = step
        self._storage = storage

    @functools.cached_property
    def manifest(self) -> Manifest | None:
        """What it says about itself; None if that cannot be read."""
        try:
            return self._storage.manifest(self.step)
        except (CorruptCheckpointError, CheckpointNotFoundError) as error:  # damaged, or deleted by somebody
            _logger.warning("%s", error)
            return None

    @functools.cached_property
    def time(self) -> datetime.datetime:
        """When it was saved; the start of 1970 if its manifest cannot be read."""
        return datetime.datetime.fromtimestamp(0, datetime.UTC) if self.manifest is None else self.manifest.time

    @functools.cached_property
    def metrics(self) -> dict[str, float] | None:
        """The numbers saved with it; None if there are none."""
        return None if self.manifest is None else dict(self.manifest.metrics) or None


class Saver:
    """Writes snapshots, never two at a time.

    Args:
        storage: where to.
        keep: which steps to preserve when one has been committed; the newest always is.

    Attributes:
        infos: the steps there are, the one in flight included.
        lost_base: a base that was taken to be there is gone.
    """

    def __init__(self, storage: Storage, keep: PreservationPolicy) -> None:
        self.infos = {step: StepInfo(step, storage) for step in storage.steps()}
        self._storage = storage
        self._keep = keep
        self._thread: threading.Thread | None = None
        self._done = threading.Event()  # Ctrl-C in Thread.join makes Python take the thread for ended
        self._record: SaveRecord | None = None
        self._unreported: SaveError | None = None
        self._damaged: set[int] = set()
        self._leftovers_removed = False
        self.lost_base = False
        self._committed: tuple[Manifest, Identities] | None = None

    def mark_damaged(self, step: int) -> None:
        """A step that cannot be restored: it no longer counts, and gives way to a save of the same number."""
        self._damaged.add(step)
        self.infos.pop(step, None)

    def good_steps(self) -> list[int]:
        """The steps on storage that are not known to be damaged, in ascending order."""
        return [step for step in self._storage.steps() if step not in self._damaged]

    @property
    def step_in_flight(self) -> int | None:
        """The step that is being written now."""
        if self._record is None or self._done.is_set():
            return None
        return self._record.step

    def start(self, record: SaveRecord, snapshot: Snapshot, metrics: Mapping[str, Any], started_s: float) -> None:
        """Write `snapshot` in the background. The save before must have been collected.

        Args:
            record: filled in as the save goes on.
            snapshot: what to write; let go as soon as it is written.
            metrics: numbers or 0-d arrays, read on the background thread.
            started_s: `time.perf_counter()` at the call of `save`.
        """
        info = self.infos[record.step] = StepInfo(record.step, self._storage)
        info.time, info.metrics = record.time, None  # there is no manifest to read them from yet
        self._record = record
        self._done.clear()
        work = functools.partial(self._work, record, [snapshot], metrics, started_s)
        self._thread = threading.Thread(target=work, name=f"torchorbax-save-{record.step}")
        self._thread.start()

    def collect(self) -> None:
        """Wait for the save in flight, if any, and take note of how it ended."""
        if self._record is None or self._thread is None:
            return
        self._done.wait()
        self._thread.join()
        error, self._record, self._thread = self._record.error, None, None
        if error is not None:
            if not error.committed:
                self.infos.pop(error.step, None)
            if self._unreported is not None:
                _logger.error("%s", self._unreported)  # the caller never asked
            self._unreported = error

    def raise_unreported(self) -> None:
        """Raise the error of a collected save, once."""
        if self._unreported is not None:
            error, self._unreported = self._unreported, None
            raise error

    def _work(self, record: SaveRecord, holder: list[Snapshot], metrics: Mapping[str, Any], started_s: float) -> None:
        """Runs on the background thread: no torchax mode, no device collective."""
        try:
            self._write(record, holder, metrics)
            record.commit_s = time.perf_counter() - started_s
            self._retain(record.step)
        except SaveError as error:
            record.error = error
        except Exception as error:  # it is raised where the caller can see it
            committed = record.commit_s is not None
            reason = f"{type(error).__name__}: {error}"
            record.error = SaveError(record.step, self._storage.path, reason, committed=committed)
            record.error.__cause__ = error
        finally:
            self._done.set()

    def _write(self, record: SaveRecord, holder: list[Snapshot], metrics: Mapping[str, Any]) -> None:
        if not self._leftovers_removed:
            self._storage.remove_leftovers()
            self._leftovers_removed = True
        record.metrics.update({name: float(np.asarray(value)) for name, value in metrics.items()})
        snapshot = holder.pop()  # the only reference, so that its copies are freed on return
        items, arrays = frozen.numbered(
            snapshot.items, snapshot.arrays, self._newest_before(record.step), self._storage.next_base()
        )
        identities = snapshot.identities
        del snapshot  # so that each array can be let go as soon as it is written
        record.nbytes = sum(array.nbytes for one in arrays.values() for array in one.values())
        manifest = Manifest(record.step, record.time, dict(record.metrics), items, _versions())
        self._check_bases(manifest, arrays)
        if record.step in self._damaged:
            self._storage.set_aside(record.step)
            self._damaged.remove(record.step)
        manifest = self._storage.write(manifest, arrays)
        self.infos[record.step].metrics = dict(record.metrics) or None
        self.infos[record.step].manifest = manifest
        self._committed = manifest, identities

    def _check_bases(self, manifest: Manifest, arrays: Mapping[str, Mapping[str, Any]]) -> None:
        """See that the bases are there which the step refers to and does not write itself.

        Raises:
            SaveError: one is gone.
        """
        bases = self._storage.bases()
        for (item, name), leaf in frozen.in_base(manifest).items():
            if name not in arrays[item] and leaf.base not in bases:
                self.lost_base = True
                reason = f"base {leaf.base}, which has its frozen parameters, is gone; the next save writes them again"
                raise SaveError(manifest.step, self._storage.path, reason)

    def _newest_before(self, step: int) -> Manifest | None:
        """The newest other step whose bases are all there."""
        before = [one for one in self.good_steps() if one in self.infos and one != step]
        manifest = self.infos[before[-1]].manifest if before else None
        bases = self._storage.bases()
        whole = manifest and all(leaf.base in bases for leaf in frozen.in_base(manifest).values())
        return manifest if whole else None

    def take_committed(self) -> tuple[Manifest, Identities] | None:
        """The step that has been committed since the last call, and which its frozen arrays are."""
        committed, self._committed = self._committed, None
        return committed

    def _retain(self, newest: int) -> None:
        """Delete what the policy lets go, now that the newest step is committed.

        Damaged steps below it make way, or the next process would take them for good until it tries them.
        """
        for step in sorted(self._damaged & set(self._storage.steps())):
            if step < newest:
                self._storage.set_aside(step)
                self._damaged.remove(step)
        infos = [self.infos.get(step) or StepInfo(step, self._storage) for step in self.good_steps()]
        preserved = self._keep.should_preserve(infos, context=PreservationContext())
        for info, keep in zip(infos, preserved, strict=True):
            if keep or info.step == newest:
                continue
            try:
                self._storage.delete(info.step)
            except OSError as error:
                _logger.warning(
                    "%s: step %d could not be deleted, trying later: %s", self._storage.path, info.step, error
                )
            else:
                self.infos.pop(info.step, None)
        self._delete_unused_bases()

    def _delete_unused_bases(self) -> None:
        """Delete the bases that no step needs; none as long as a step cannot say what it needs."""
        if self._storage.has_set_aside():
            return  # who repairs a damaged step needs its base
        unused = self._storage.bases()
        for step in reversed(self._storage.steps()):  # the newest needs them all, as a rule
            if not unused:
                return
            manifest = (self.infos.get(step) or StepInfo(step, self._storage)).manifest
            if manifest is None:
                _logger.info("%s: step %d is damaged, so no base is deleted", self._storage.path, step)
                return
            unused -= {leaf.base for leaf in frozen.in_base(manifest).values()}
        for base in sorted(unused):
            self._storage.delete_base(base)


@functools.cache
def _versions() -> dict[str, str]:
    return {
        "torchorbax": importlib.metadata.version("torchorbax"),
        "torch": torch.__version__,
        "torchax": _torchax.VERSION,
        "jax": jax.__version__,
        "orbax-checkpoint": _orbax.VERSION,
        "numpy": np.__version__,
    }
