"""The steps of a run: what policies are told about them, which are good, and which are deleted after a save."""

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
    """What a policy can ask about a step. It is read from the manifest when a policy asks for it.

    Args:
        step: the number of the step.
        storage: where its manifest is.
    """

    def __init__(self, step: int, storage: Storage) -> None:
        self.step = step
        self._storage = storage

    @functools.cached_property
    def manifest(self) -> Manifest | None:
        """The step's manifest; None if it cannot be read."""
        try:
            return self._storage.manifest(self.step)
        except (CorruptCheckpointError, CheckpointNotFoundError) as error:  # damaged, or deleted by another program
            _logger.warning("%s", error)
            return None

    @functools.cached_property
    def time(self) -> datetime.datetime:
        """When the step was saved; the start of 1970 if its manifest cannot be read."""
        return datetime.datetime.fromtimestamp(0, datetime.UTC) if self.manifest is None else self.manifest.time

    @functools.cached_property
    def metrics(self) -> dict[str, float] | None:
        """The metrics saved with the step; None if there are none."""
        return None if self.manifest is None else dict(self.manifest.metrics) or None


class _WithoutNaN:
    """A `StepInfo` in which a number replaces every metric that is NaN.

    Attributes:
        had_nan: has a NaN been replaced? False until the metrics are asked for.
    """

    def __init__(self, info: StepInfo, number: float) -> None:
        self.step = info.step
        self.had_nan = False
        self._info = info
        self._number = number

    @property
    def time(self) -> datetime.datetime:
        """When the step was saved."""
        return self._info.time

    @property
    def metrics(self) -> dict[str, float] | None:
        """The metrics saved with the step."""
        found = self._info.metrics
        self.had_nan = found is not None and any(map(math.isnan, found.values()))
        return found and {name: self._number if math.isnan(value) else value for name, value in found.items()}


class Steps:
    """The steps of a run.

    Args:
        storage: where the steps are.
        found: the numbers of the committed steps.
        keep: which steps to preserve after a step has been committed; the newest step always is.
        keep_damaged: when a damaged step is in the way, set it aside; otherwise delete it.

    Attributes:
        infos: the steps by number, with the one that is being saved, without those that are known to be damaged.
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
        """Note that a step is damaged: it no longer counts, and a save of the same number replaces it."""
        self._damaged.add(step)
        self.infos.pop(step, None)

    def good(self) -> list[int]:
        """The steps on storage that are not known to be damaged, in ascending order."""
        return [step for step in self._storage.steps() if step not in self._damaged]

    def start(self, step: int, time: datetime.datetime) -> None:
        """Note that a step is about to be saved. Its manifest does not exist yet."""
        info = self.infos[step] = StepInfo(step, self._storage)
        info.time, info.metrics = time, None

    def commit(self, manifest: Manifest) -> None:
        """Note that a step has been committed, with its manifest."""
        info = self.infos[manifest.step]
        info.time, info.metrics, info.manifest = manifest.time, dict(manifest.metrics) or None, manifest

    def note_manifest(self, manifest: Manifest) -> None:
        """Note a manifest that has been read, so that it is not read again."""
        if manifest.step in self.infos:
            self.commit(manifest)

    def origin(self, step: int) -> str:
        """The origin in the manifest of a step of a local tier (see `Manifest`); empty if there is none."""
        manifest = self.infos[step].manifest if step in self.infos else None
        return "" if manifest is None else manifest.origin

    def drop(self, step: int) -> None:
        """Note that a step could not be saved, or has been deleted."""
        self.infos.pop(step, None)

    def make_way(self, step: int) -> None:
        """Remove what is in the way of a save: leftovers of an interrupted run, and a damaged step of that number."""
        if not self._leftovers_removed:
            self._storage.remove_leftovers()
            self._leftovers_removed = True
        self._dispose_of_damaged(step)

    def _dispose_of_damaged(self, step: int) -> None:
        """If a step is damaged, set it aside; or delete it, if damaged steps are not kept."""
        if step in self._damaged:
            dispose = self._storage.set_aside if self._keep_damaged else self._storage.delete
            dispose(step)
            self._damaged.remove(step)

    def newest_with_bases(self, saving: int) -> Manifest | None:
        """The manifest of the newest good step, apart from the one that is being saved; None if it lacks a base."""
        others = [other for other in self.good() if other in self.infos and other != saving]
        manifest = self.infos[others[-1]].manifest if others else None
        bases = set(self._storage.bases.steps())
        has_all = manifest and all(leaf.base in bases for leaf in manifest.frozen_leaves.values())
        return manifest if has_all else None

    def retain(self, newest: int) -> list[int]:
        """Delete the steps that the policy does not preserve, after the newest step has been committed.

        Returns:
            The steps that have been deleted.
        """
        # Damaged steps go first: the next process does not know yet that they are damaged, and would list them.
        for step in sorted(self._damaged & set(self._storage.steps())):
            if step < newest or not self._keep_damaged:
                self._dispose_of_damaged(step)
        infos = [self.infos.get(step) or StepInfo(step, self._storage) for step in self.good()]
        preserved = self._preserved(infos)
        deleted: list[int] = []
        for info, keep in zip(infos, preserved, strict=True):
            if keep or info.step == newest or not self._storage.is_own(info.step):
                continue
            try:
                self._storage.delete(info.step)
            except OSError as error:
                _logger.warning(
                    "%s: step %d could not be deleted, trying later: %s", self._storage.path, info.step, error
                )
                if isinstance(error, StorageError):  # no answer: each further deletion would take as long to fail
                    return deleted
            else:
                self.drop(info.step)
                deleted.append(info.step)
        self._delete_unused_bases()
        return deleted

    def _preserved(self, infos: list[StepInfo]) -> list[bool]:
        """For each step, whether the policy preserves it.

        NaN has no place in an order, so a policy that sorts by a metric would keep random steps and might delete the
        best one. The policy is therefore asked twice, with every NaN replaced by infinity and by minus infinity. A step
        with a NaN is preserved if both answers preserve it; any other step if one of them does.
        """
        high, low = ([_WithoutNaN(info, number) for info in infos] for number in (math.inf, -math.inf))
        with_high = list(self._keep.should_preserve(high, context=PreservationContext()))
        if not any(info.had_nan for info in high):  # no NaN, or the policy has not asked for metrics
            return with_high
        with_low = self._keep.should_preserve(low, context=PreservationContext())
        return [
            by_high and by_low if info.had_nan else by_high or by_low
            for info, by_high, by_low in zip(high, with_high, with_low, strict=True)
        ]

    def _delete_unused_bases(self) -> None:
        """Delete the bases that no step refers to. If the manifest of any step cannot be read, delete none."""
        unused = set(self._storage.bases.steps())
        if not unused or self._storage.has_set_aside():
            return  # a damaged step that was set aside can only be repaired with its base
        for step in reversed(self._storage.steps()):  # the newest step usually refers to all bases
            if not unused:
                return
            manifest = (self.infos.get(step) or StepInfo(step, self._storage)).manifest
            if manifest is None:
                _logger.info("%s: step %d is damaged, so no base is deleted", self._storage.path, step)
                return
            unused -= {leaf.base for leaf in manifest.frozen_leaves.values()}
        for base in sorted(unused):
            self._storage.bases.delete(base)
