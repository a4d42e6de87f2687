"""The steps of a run: which there are, which are good, and which are deleted after a save."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Sequence

from torchorbax._src.format.manifest import Manifest
from torchorbax._src.storage.preservation import preserved
from torchorbax._src.storage.step_info import RunClock, StepInfo
from torchorbax._src.storage.storage import Storage
from torchorbax.errors import OwnershipError
from torchorbax.policies import PreservationPolicy

_logger = logging.getLogger(__name__)

_LONGEST_FAILING_S = 60.0
"""Seconds that failing deletions may take, of one save. A storage that does not answer lets each take minutes."""


class Steps:
    """The steps of a run.

    Args:
        storage: where the steps are.
        found: the numbers of the committed steps.
        keep: which steps to preserve after a step has been committed; the newest step always is.
        keep_damaged: when a damaged step is in the way, set it aside; otherwise delete it.

    Attributes:
        clock: the time as policies see it.
        damaged_bases: the bases that are known to be damaged; new steps do without them.
        proved: the steps that have been read back, or restored and compared, in this life.
        infos: the steps by number, with the one that is being saved, without those that are known to be damaged.
    """

    def __init__(
        self, storage: Storage, found: list[int], keep: PreservationPolicy, *, keep_damaged: bool = True
    ) -> None:
        self.clock = RunClock()
        self.infos = {step: StepInfo(step, storage, self.clock) for step in found}
        self._storage = storage
        self._keep = keep
        self._keep_damaged = keep_damaged
        self._others: set[int] = set()  # steps of other runs, of which a warning has told
        self.damaged_bases: set[int] = set()
        self.proved: set[int] = set()
        self._damaged: set[int] = set()
        self._failing_s = 0.0  # seconds that failing deletions have taken, of this save
        # What has been seen after the newest commit: the steps, and whether those that may go are the run's own.
        self._found_after: tuple[int, list[int]] | None = None
        self._own_after: dict[int, bool] = {}
        self._leftovers = True  # may there be leftovers, of an earlier life or of a deletion that has failed?

    def mark_damaged(self, step: int) -> None:
        """Note that a step is damaged: it no longer counts, and a save of the same number replaces it."""
        self._damaged.add(step)
        self.proved.discard(step)
        self.infos.pop(step, None)

    def good(self) -> list[int]:
        """The steps on storage that are not known to be damaged, in ascending order."""
        return [step for step in self._storage.steps() if step not in self._damaged]

    def to_be_saved(self, step: int, saved_s: float) -> StepInfo:
        """What is known of a step that is about to be saved. Its manifest does not exist yet.

        Args:
            step: the number of the step.
            saved_s: `time.monotonic()` when `save` was called.
        """
        info = StepInfo(step, self._storage, self.clock, saved_s)
        info.metrics = None
        return info

    def found_after(self, newest: int) -> list[int]:
        """The steps on storage after the newest has been committed. They are looked for once after each commit."""
        if self._found_after is None or self._found_after[0] != newest:
            self._found_after = newest, self._storage.steps()
        return list(self._found_after[1])

    def commit(self, manifest: Manifest) -> None:
        """Note that a step has been committed, with its manifest."""
        self._found_after = None
        self._own_after.clear()
        info = self.infos[manifest.step]
        info.metrics, info.manifest = dict(manifest.metrics) or None, manifest

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
        """Remove what is in the way of a save: leftovers of an interrupted run, and a damaged step of that number.

        Leftovers that cannot be removed cost no save: each retention tries again.
        """
        self._failing_s = 0.0
        self._remove_leftovers()
        self._dispose_of_damaged(step)

    def _remove_leftovers(self) -> None:
        def remove() -> None:
            with contextlib.suppress(OwnershipError):  # whoever has taken the run over removes them
                self._storage.remove_leftovers()

        if self._leftovers and self._cleaned_up("what is left of interrupted saves", remove):
            self._leftovers = False

    def _dispose_of_damaged(self, step: int) -> None:
        """If a step is damaged, set it aside; or delete it, if damaged steps are not kept."""
        if step in self._damaged:
            dispose = self._storage.set_aside if self._keep_damaged else self._storage.delete
            dispose(step)
            self._damaged.remove(step)

    def good_bases(self) -> set[int]:
        """The bases on storage that are not known to be damaged."""
        return set(self._storage.bases.steps()) - self.damaged_bases

    def newest_with_bases(self, saving: int) -> Manifest | None:
        """The manifest of the newest good step, apart from the one that is being saved; None if it lacks a base."""
        others = [other for other in self.good() if other in self.infos and other != saving]
        manifest = self.infos[others[-1]].manifest if others else None
        bases = self.good_bases()
        has_all = manifest and all(leaf.base in bases for leaf in manifest.frozen_leaves.values())
        return manifest if has_all else None

    def retain(self, newest: int) -> list[int]:
        """Delete the steps that the policy does not preserve, after the newest step has been committed.

        A mistake of the policy, or a deletion that fails, is a warning. The next retention tries again.

        Returns:
            The steps that have been deleted.
        """
        self._failing_s = 0.0
        try:
            found = self.found_after(newest)
        except Exception as error:  # of the storage, of any type
            _logger.warning("%s: no step can be deleted now: %s", self._storage.path, _error_line(error))
            return []
        for step in set(self.infos).difference(found):  # half deleted, or deleted by somebody else
            self.drop(step)
        unpreserved = self.unpreserved(newest, found)
        self._remove_leftovers()
        # Damaged steps go first: the next process does not know yet that they are damaged, and would list them.
        for step in sorted(self._damaged.intersection(found)):
            if step < newest or not self._keep_damaged:
                self._cleaned_up(f"damaged step {step}", functools.partial(self._dispose_of_damaged, step))
        deleted = [step for step in unpreserved if self._deleted(step)]
        self._cleaned_up("frozen parameters that no step needs", self._delete_unused_bases)
        return deleted

    def unpreserved(self, newest: int, found: Sequence[int] | None = None) -> list[int]:
        """All steps of this run that the policy does not preserve. If it makes a mistake, it preserves all.

        Args:
            newest: the newest step, which always stays.
            found: the steps on storage; None to look.
        """
        self.clock.now()
        steps = [step for step in (self.found_after(newest) if found is None else found) if step not in self._damaged]
        infos = [self.infos.get(step) or StepInfo(step, self._storage, self.clock) for step in steps]
        try:
            keep = preserved(self._keep, infos)
        except Exception as error:  # it must not cost the step that has just been committed
            _logger.warning(
                "%s: keep=%s does not say which steps to keep after step %d, so all stay: %s",
                self._storage.path,
                type(self._keep).__name__,
                newest,
                _error_line(error),
            )
            return []
        unkept = [step for step, kept in zip(steps, keep, strict=True) if not kept and step != newest]
        for step in set(unkept).difference(self._own_after):
            self._own_after[step] = self._storage.is_own(step)
        own = [step for step in unkept if self._own_after[step]]
        if others := set(unkept).difference(own, self._others):
            self._others |= others
            _logger.warning(
                "%s: steps %s were saved by another run, so they are never deleted; move away what is not wanted",
                self._storage.path,
                ", ".join(map(str, sorted(others))),
            )
        return own

    def _deleted(self, step: int) -> bool:
        """Delete a step. Returns whether it is deleted."""
        if not self._cleaned_up(f"step {step}", functools.partial(self._storage.delete, step)):
            self._leftovers = True  # it may be half deleted, and then no longer be listed
            return False
        self.drop(step)
        return True

    def _cleaned_up(self, what: str, clean_up: Callable[[], object]) -> bool:
        """Delete something that is no longer needed. Returns whether it worked; if it did not, that is a warning.

        When failures have taken a minute, nothing else is tried until the next retention.
        """
        if self._failing_s > _LONGEST_FAILING_S:
            return False
        began_s = time.monotonic()
        try:
            clean_up()
        except Exception as error:  # of the storage, of any type; it must cost no save and stop no other deletion
            self._failing_s += time.monotonic() - began_s
            _logger.warning(
                "%s: %s could not be deleted, trying later: %s", self._storage.path, what, _error_line(error)
            )
            return False
        return True

    def _delete_unused_bases(self) -> None:
        """Delete the bases that no step refers to. If the manifest of any step cannot be read, delete none."""
        unused = set(self._storage.bases.steps())
        if not unused or self._storage.has_set_aside():
            return  # a damaged step that was set aside can only be repaired with its base
        for step in reversed(self._storage.steps()):  # the newest step usually refers to all bases
            if not unused:
                return
            manifest = (self.infos.get(step) or StepInfo(step, self._storage, self.clock)).manifest
            if manifest is None:
                _logger.info("%s: step %d is damaged, so no base is deleted", self._storage.path, step)
                return
            unused -= {leaf.base for leaf in manifest.frozen_leaves.values()}
        for base in sorted(unused):
            self._cleaned_up(f"base {base}", functools.partial(self._storage.bases.delete, base))


def _error_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
