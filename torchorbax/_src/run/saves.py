"""The saves of a run: which tiers save a step, the snapshot they share, and how each save ended."""

from __future__ import annotations

import datetime
import functools
import logging
import operator
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torchorbax._src.arrays.jax_context import transfers_allowed
from torchorbax._src.distributed.channel import Channel
from torchorbax._src.distributed.processes import Processes
from torchorbax._src.run.last_step import LastStep, References
from torchorbax._src.run.options import RunOptions
from torchorbax._src.run.step_metrics import MetricReader
from torchorbax._src.run.tier import Tier
from torchorbax._src.save.save import Save, SaveRecord
from torchorbax._src.save.staging import prepare as prepare_snapshots
from torchorbax._src.state.capture import capture_all
from torchorbax._src.state.item import Captured, Item, NotReadyError
from torchorbax.errors import ConfigError, ProcessError, TorchorbaxError

_logger = logging.getLogger(__name__)


class Saves:
    """Starts the saves of a run, and collects their outcomes.

    Args:
        tiers: where the run is saved; the first is the run's path.
        items: the live objects.
        processes: all processes of the run, which call this in the same order.
        options: how snapshots are taken, and whether the last complete step is kept for an exception.

    One thread at a time calls its methods, but for `wait`.
    """

    def __init__(
        self, tiers: Sequence[Tier], items: Mapping[str, Item], processes: Processes, options: RunOptions
    ) -> None:
        self._tiers = tiers
        self._main = tiers[0]
        self._items = items
        self._processes = processes
        self._staging = options.staging
        self._save_on_exception = options.save_on_exception
        # The last complete step, if it was not due: its snapshot, or references to what may still be its state.
        self._unsaved: Save | LastStep | None = None
        self._references: References | None = None
        if processes.count == 1:  # several would have to agree on a step, on threads that their loops know nothing of
            self._references = References(options.max_host_bytes)
        self._preemption_saved = False
        self._metrics = MetricReader(self._main.storage.path)

    @property
    def history(self) -> list[SaveRecord]:
        """A record of every save that has been started, in order."""
        started = [entry for tier in self._tiers for entry in tier.saver.started]
        return [record for _, record in sorted(started, key=operator.itemgetter(0))]

    @property
    def is_saving_thread(self) -> bool:
        """Is the current thread writing a save?"""
        return any(tier.saver.is_this_thread for tier in self._tiers)

    def checked(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """The metrics as floats and 0-d arrays, without those that cannot be used, of which a warning tells."""
        return self._metrics.checked(metrics)

    def offer(
        self, step: int, state: Mapping[str, Any], metrics: Mapping[str, Any], *, force: bool, started_s: float
    ) -> bool:
        """Start to save a step in each tier that is due. Returns whether any is.

        Args:
            step: the step just finished.
            state: trees to save in place of live values, by item name.
            metrics: numbers of this step, as `checked`.
            force: save under the run's path, whatever the policy says.
            started_s: `time.monotonic()` when the caller called `save`.

        Raises:
            ConfigError, UnsupportedLeafError, DeletedArrayError, MismatchError: as `Checkpointer.save`.
        """
        self.attend()
        now = self._main.steps.clock.now()
        try:
            return self._offer(step, now, state, metrics, force=force, started_s=started_s)
        except BaseException:
            if step > self._main.newest:
                self._keep_references(step, now, metrics, state)
            raise

    def _offer(
        self,
        step: int,
        now: datetime.datetime,
        state: Mapping[str, Any],
        metrics: Mapping[str, Any],
        *,
        force: bool,
        started_s: float,
    ) -> bool:
        """What `offer` does."""
        capture = functools.cache(functools.partial(self._capture, state))  # once for all tiers

        def save_for(tier: Tier) -> Save:
            with transfers_allowed():
                numbers = self._metrics.protected(metrics)
                return Save(step, now, numbers, started_s, tier.take(capture(), self._staging))

        due = self._due(step, force)
        for tier in due:
            self._check(tier, step, state)
            tier.saver.collect()  # two saves never overlap
            try:
                save = save_for(tier)
            except Exception as error:
                refused = _is_refusal(error)
                if not refused or self._processes.count > 1:  # others, if any, have started this save, and learn of it
                    self._start(tier, Save(step, now, {}, started_s, _without_locals(error)))
                if refused:
                    raise
                self._keep_references(step, now, metrics, state)
            else:
                self._start(tier, save)
        # Keep a step that is not saved, in case an exception makes it the last one.
        if self._main not in due and self._save_on_exception and step > self._main.newest:
            self._check(self._main, step, state)
            self._unsaved = self._kept_for_exception(functools.partial(save_for, self._main), step)
        elif step > self._main.newest:
            self._unsaved = None
            if self._references is not None and self._main.decider.watched and not self._preemption_saved:
                self._unsaved = self._references.take(step, now, metrics, capture)
        return bool(due)

    def _keep_references(
        self, step: int, now: datetime.datetime, metrics: Mapping[str, Any], state: Mapping[str, Any]
    ) -> None:
        """Keep references to a step that could not be saved, for the case that it is the last one.

        A signal handler may raise anywhere: torch's does when a DataLoader worker dies. The step is complete.
        """
        if self._references is not None and self._main.decider.watched:
            capture = functools.partial(self._capture, state)
            self._unsaved = self._references.take(step, now, metrics, capture, at_any_cost=True)

    def _kept_for_exception(self, save: Callable[[], Save], step: int) -> Save | None:
        """A save that is not due, for the case that an exception comes; None if there is no room for it."""
        try:
            return save()
        except Exception as error:
            if _is_refusal(error):
                raise
            _logger.warning(
                "%s: step %d could not be kept for the case of an exception: %s: %s",
                self._main.storage.path,
                step,
                type(error).__name__,
                _without_locals(error),
            )
            return None

    def prepare(self) -> None:
        """Start the saving threads, and compile what the first snapshot will need."""
        for tier in self._tiers:
            tier.saver.prepare()
        try:
            with transfers_allowed():
                captured = self._capture({})
        except TorchorbaxError as error:  # lazy, or not placed yet; a save reports it if that has not changed by then
            _logger.debug("%s: nothing is prepared: %s", self._main.storage.path, error)
            return
        prepare_snapshots(captured, self._staging)

    def attend(self) -> None:
        """Do what the saves in flight need of the caller's thread, without waiting for them."""
        for tier in self._tiers:
            tier.saver.attend()

    def wait(self) -> None:
        """Wait for the saves in flight. Call `attend` before and after; several threads may wait at once."""
        for tier in self._tiers:
            tier.saver.wait()

    def collect(self) -> None:
        """Wait for the saves in flight, and take note of how they ended."""
        for tier in self._tiers:
            tier.saver.collect()

    def take_note(self) -> None:
        """Take note of the saves that have ended, and raise an error that has not been reported.

        Raises:
            SaveError: see `raise_unreported`.
        """
        self.attend()
        self.raise_unreported()

    def raise_unreported(self) -> None:
        """Raise the error of a collected save, once.

        Raises:
            SaveError: the first one; notes of it name the others.
        """
        errors = [error for tier in self._tiers if (error := tier.saver.take_unreported()) is not None]
        for other in errors[1:]:
            errors[0].add_note(f"Besides: {other}")
        if errors:
            raise errors[0]

    def drop_unsaved(self) -> None:
        """Forget the last complete step, which is no longer to be saved if an exception comes."""
        self._unsaved = None

    def save_unsaved(self, *, preempted: bool) -> None:
        """Save the last complete step, if it was not due and all processes have ended after it.

        Args:
            preempted: save it also without `save_on_exception`, if nothing has begun to change it.
        """
        if not (preempted or self._save_on_exception):
            return
        self._main.saver.collect()
        unsaved = self._take_unsaved()
        if unsaved is None or not self._all_ended_after(unsaved.step):
            return
        if unsaved.step > self._main.newest:  # Ctrl-C may have come when a later step had just been started
            self._start(self._main, unsaved)

    def save_overdue(self) -> None:
        """After SIGTERM, the loop has not come back in time: save the last complete step, as far as it is known.

        Called on the watching thread. If the loop comes back later, it saves its own step as well.
        """
        what = f"{self._main.storage.path}: {self._main.decider.reason}, and the loop does not come back"
        if self._processes.count > 1:
            if not self._preemption_saved:
                _logger.warning("%s: one of several processes cannot save alone", what)
            return
        if self._unsaved is None:  # the last complete step is saved, or being saved
            return
        step = self._unsaved.step
        self._main.saver.collect()
        save = self._take_unsaved()
        if save is not None:
            self._main.start(save)
        # Only now: the loop may hang because stderr is full.
        outcome = "it is being saved" if save is not None else "it is not saved, because its state has begun to change"
        _logger.warning("%s: step %d is the last complete one, and %s", what, step, outcome)

    def close(self) -> None:
        """End the saving threads, once all saves have been collected."""
        self._unsaved = None
        for tier in self._tiers:
            tier.saver.close()

    def _take_unsaved(self) -> Save | None:
        """The last complete step to be saved, if it was not due and its state is still there."""
        unsaved, self._unsaved = self._unsaved, None
        if not isinstance(unsaved, LastStep):
            return unsaved
        for _ in range(2):  # a signal handler may raise in the first attempt
            captured = unsaved.captured()
            if captured is None:
                return None
            started_s = time.monotonic()
            try:
                with transfers_allowed():
                    numbers = self._metrics.protected(unsaved.metrics)
                    snapshot = self._main.take(captured, self._staging)
                return Save(unsaved.step, unsaved.time, numbers, started_s, snapshot)
            except (TorchorbaxError, RuntimeError, MemoryError) as error:  # such as: the loop has just donated an array
                _logger.debug("%s: no snapshot of step %d: %s", self._main.storage.path, unsaved.step, error)
        return None

    def _due(self, step: int, force: bool) -> list[Tier]:
        """The tiers that are to save this step."""
        due = [tier for tier in self._tiers if (force and tier is self._main) or tier.due(step)]
        if self._main.decider.preempted and not self._preemption_saved and self._main not in due:
            due.insert(0, self._main)
        # A step may be offered twice: it may be in the local tier already, and now be saved under the path as well.
        return [tier for tier in due if tier is self._main or step > tier.newest]

    def _check(self, tier: Tier, step: int, state: Mapping[str, Any]) -> None:
        tier.check_step(step)
        if unknown := [name for name in state if name not in self._items]:
            raise ConfigError(f"save got state for {', '.join(unknown)}, but there is only {', '.join(self._items)}")

    def _capture(self, state: Mapping[str, Any]) -> dict[str, Captured]:
        return capture_all(self._items, state)

    def _start(self, tier: Tier, save: Save) -> None:
        preempted = tier.decider.preempted
        tier.start(save)
        if tier is self._main:
            first, self._preemption_saved = preempted and not self._preemption_saved, preempted
            self._unsaved = None
            if first:
                reason = tier.decider.reason
                _logger.warning("%s: %s: saving step %d, then stopping", tier.storage.path, reason, save.step)

    def _all_ended_after(self, step: int) -> bool:
        """Have all processes come to an end with the same step unsaved?"""
        path = self._main.storage.path
        channel = Channel(self._processes, "exception")
        try:
            steps = channel.everyone("exception", step)
        except ProcessError as error:
            _logger.warning("%s: step %d is complete but not saved: %s", path, step, error)
            return False
        if len(set(steps)) > 1:
            _logger.warning("%s: step %d is not saved: the processes ended at %s", path, step, steps)
        return len(set(steps)) == 1


def _is_refusal(error: Exception) -> bool:
    """Does an error say that the state cannot be saved? All others may pass: no memory, code of the user's that raises.

    They make a save that fails like any other, and never end the loop from within `save`.
    """
    return isinstance(error, TorchorbaxError) and not isinstance(error, NotReadyError)


def _without_locals(error: Exception) -> Exception:
    """An error that is kept, without the local variables of its traceback: they hold what has been copied so far."""
    traceback.clear_frames(error.__traceback__)
    return error
