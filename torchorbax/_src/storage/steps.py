"""The steps of a run: what policies get to know about them, which are good, and which are let go."""

from __future__ import annotations

import datetime
import functools
import logging
import math

from torchorbax._src.format.manifest import Manifest
from torchorbax._src.storage.storage import Storage
from torchorbax.errors import CheckpointNotFoundError, CorruptCheckpointError, StorageError
from torchorbax.policies import PreservationContext, PreservationPolicy

_logger = logging.getLogger(__name__)


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


class _Numbered:
    """A `StepInfo` with a number for every NaN; `had_nan` says if anybody has met one."""

    def __init__(self, info: StepInfo, number: float) -> None:
        self.step = info.step
        self.had_nan = False
        self._info = info
        self._number = number

    @property
    def time(self) -> datetime.datetime:
        """When it was saved."""
        return self._info.time

    @property
    def metrics(self) -> dict[str, float] | None:
        """The numbers saved with it."""
        found = self._info.metrics
        self.had_nan = found is not None and any(map(math.isnan, found.values()))
        return found and {name: self._number if math.isnan(value) else value for name, value in found.items()}


class Steps:
    """The steps under a path.

    Args:
        storage: where they are.
        found: those that are committed.
        keep: which to preserve when one has been committed; the newest always is.
        keep_damaged: damaged steps are set aside, not deleted, when they make way.

    Attributes:
        infos: the steps there are, the one in flight included, without those known to be damaged.
    """

    def __init__(
        self, storage: Storage, found: list[int], keep: PreservationPolicy, *, keep_damaged: bool = True
    ) -> None:
        self.infos = {step: StepInfo(step, storage) for step in found}
        self._storage = storage
        self._keep = keep
        self._keep_damaged = keep_damaged
        self._damaged: set[int] = set()
        self._leftovers_removed = False

    def mark_damaged(self, step: int) -> None:
        """A step that cannot be restored: it no longer counts, and gives way to a save of the same number."""
        self._damaged.add(step)
        self.infos.pop(step, None)

    def good(self) -> list[int]:
        """The steps on storage that are not known to be damaged, in ascending order."""
        return [step for step in self._storage.steps() if step not in self._damaged]

    def start(self, step: int, time: datetime.datetime) -> None:
        """A step that is about to be saved: there is no manifest to read anything from yet."""
        info = self.infos[step] = StepInfo(step, self._storage)
        info.time, info.metrics = time, None

    def commit(self, manifest: Manifest) -> None:
        """It has been saved."""
        info = self.infos[manifest.step]
        info.time, info.metrics, info.manifest = manifest.time, dict(manifest.metrics) or None, manifest

    def know(self, manifest: Manifest) -> None:
        """Its manifest has been read: nobody need ask the storage again."""
        if manifest.step in self.infos:
            self.commit(manifest)

    def origin(self, step: int) -> str:
        """Of which run and life a step of a local tier says that it is; empty if it says nothing."""
        manifest = self.infos[step].manifest if step in self.infos else None
        return "" if manifest is None else manifest.origin

    def drop(self, step: int) -> None:
        """It has not been saved, or been deleted."""
        self.infos.pop(step, None)

    def make_way(self, step: int) -> None:
        """Remove what is in the way of a save: leftovers of an interrupted run, and a damaged step of that number.

        The damaged step is set aside, or deleted if damaged steps are not kept.
        """
        if not self._leftovers_removed:
            self._storage.remove_leftovers()
            self._leftovers_removed = True
        self._dispose_of_damaged(step)

    def _dispose_of_damaged(self, step: int) -> None:
        if step in self._damaged:
            dispose = self._storage.set_aside if self._keep_damaged else self._storage.delete
            dispose(step)
            self._damaged.remove(step)

    def newest_whole_before(self, step: int) -> Manifest | None:
        """The newest other step, if its bases are all there."""
        before = [one for one in self.good() if one in self.infos and one != step]
        manifest = self.infos[before[-1]].manifest if before else None
        bases = set(self._storage.bases.steps())
        whole = manifest and all(leaf.base in bases for leaf in manifest.frozen_leaves.values())
        return manifest if whole else None

    def retain(self, newest: int) -> list[int]:
        """Delete what the policy lets go, now that the newest step is committed; returns what was deleted.

        Damaged steps below it make way, or the next process would take them for good until it tries them.
        """
        for step in sorted(self._damaged & set(self._storage.steps())):
            if step < newest or not self._keep_damaged:
                self._dispose_of_damaged(step)
        infos = [self.infos.get(step) or StepInfo(step, self._storage) for step in self.good()]
        preserved = self._preserved(infos)
        deleted: list[int] = []
        for info, keep in zip(infos, preserved, strict=True):
            if keep or info.step == newest:
                continue
            try:
                self._storage.delete(info.step)
            except OSError as error:
                _logger.warning(
                    "%s: step %d could not be deleted, trying later: %s", self._storage.path, info.step, error
                )
                if isinstance(error, StorageError):  # to ask for each of many would take as long for each
                    return deleted
            else:
                self.drop(info.step)
                deleted.append(info.step)
        self._delete_unused_bases()
        return deleted

    def _preserved(self, infos: list[StepInfo]) -> list[bool]:
        """What the policy says. A step with a NaN among its metrics is kept only if it would be for any number.

        A policy that sorts by a metric would otherwise keep what chance says, and let the best step go.
        """
        high, low = ([_Numbered(info, number) for info in infos] for number in (math.inf, -math.inf))
        preserved = list(self._keep.should_preserve(high, context=PreservationContext()))
        if not any(one.had_nan for one in high):  # or nobody has looked at metrics, which may have to be read
            return preserved
        otherwise = self._keep.should_preserve(low, context=PreservationContext())
        return [
            one and other if info.had_nan else one or other
            for info, one, other in zip(high, preserved, otherwise, strict=True)
        ]

    def _delete_unused_bases(self) -> None:
        """Delete the bases that no step needs; none as long as a step cannot say what it needs."""
        unused = set(self._storage.bases.steps())
        if not unused or self._storage.has_set_aside():
            return  # who repairs a damaged step needs its base
        for step in reversed(self._storage.steps()):  # the newest needs them all, as a rule
            if not unused:
                return
            manifest = (self.infos.get(step) or StepInfo(step, self._storage)).manifest
            if manifest is None:
                _logger.info("%s: step %d is damaged, so no base is deleted", self._storage.path, step)
                return
            unused -= {leaf.base for leaf in manifest.frozen_leaves.values()}
        for base in sorted(unused):
            self._storage.bases.delete(base)
