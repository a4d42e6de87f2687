"""Which step is restored, and from which tier: the newest step that can be restored."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torchorbax._src.arrays.jax_context import transfers_allowed
from torchorbax._src.arrays.sharding_rules import ShardingRules
from torchorbax._src.distributed.channel import Channel
from torchorbax._src.restore.in_place import Restore, Restored
from torchorbax._src.restore.local_tier import open_step
from torchorbax._src.run.tier import Tier
from torchorbax._src.run.timings import Stopwatch
from torchorbax._src.state.item import Item
from torchorbax._src.state.request import Request
from torchorbax._src.storage.storage import Source, Storage
from torchorbax.errors import CorruptCheckpointError

_logger = logging.getLogger(__name__)


class Candidate(NamedTuple):
    """A step that may be restored, in one of the tiers.

    Attributes:
        step: the number of the step.
        holders: the processes that have it in their local tiers; None if it is the step under the run's path.
    """

    step: int
    holders: frozenset[int] | None


class Restorer:
    """Restores live objects, in all processes alike.

    Args:
        items: the live objects.
        rules: the sharding rules; None keeps every live tensor's sharding.
        main: the run's path.
        local: the fast tier, if there is one.
        channel: to the other processes.
        stopwatch: measures what a restore takes.
        verify: compare what is read with its fingerprints.
    """

    def __init__(
        self,
        items: Mapping[str, Item],
        rules: ShardingRules | None,
        main: Tier,
        local: Tier | None,
        channel: Channel,
        stopwatch: Stopwatch,
        *,
        verify: bool,
    ) -> None:
        self._items = items
        self._rules = rules
        self._main = main
        self._local = local
        self._channel = channel
        self._stopwatch = stopwatch
        self._verify = verify
        self._restores = 0

    def restore(self, storage: Storage, step: int | None, wanted: Request) -> Restored | None:
        """Restore a step of this run or another.

        Args:
            storage: the run's path, or that of another run.
            step: which one; None for the newest good one, damaged ones being skipped with a warning.
            wanted: what to restore of the step.

        Returns:
            What has been restored; None if there is no step.

        Raises:
            CheckpointNotFoundError, CorruptCheckpointError, MismatchError, ConfigError: as `Checkpointer.restore`.
        """
        self._restores += 1
        self._channel.begin(f"restore{self._restores}")
        with self._stopwatch.part("find_s"):
            candidates = found = self._candidates(storage)
        if step is not None:
            candidates = [candidate for candidate in candidates if candidate.step == step] or [Candidate(step, None)]
        damaged: dict[int, str] = {}  # the reasons by step, under the path
        damaged_local: dict[int, str] = {}  # the same in the local tier of a single process
        for attempt, candidate in enumerate(candidates):
            self._channel.begin(f"restore{self._restores}.{attempt}")
            try:
                with self._stopwatch.part("read_s"):
                    restored = self._restore_step(storage, candidate, wanted)
            except CorruptCheckpointError as error:
                if candidate.holders is None:
                    damaged.update(error.reasons)
                elif self._local is not None:
                    _logger.warning("%s", error)
                    self._local.steps.mark_damaged(candidate.step)
                    # With several processes it may not be damage: some may have been killed before they saved the step.
                    if self._channel.processes.count == 1:
                        damaged_local.update(error.reasons)
                continue
            self._stopwatch.add("read_s", -restored.place_s)
            self._stopwatch.add("place_s", restored.place_s)
            self._mark_damaged(storage, damaged)
            if storage is self._main.storage:
                self._tell_of(candidate, restored, found)
                if step is None:
                    self._drop_local_after(candidate.step)
            return restored
        if damaged or damaged_local:
            raise CorruptCheckpointError(storage.path, {**damaged_local, **damaged})
        return None

    def _tell_of(self, candidate: Candidate, restored: Restored, found: Sequence[Candidate]) -> None:
        """Tell somebody who has moved steps where a step comes from that is not the newest of the run."""
        path, step = self._main.storage.path, candidate.step
        newer = sorted({one.step for one in found if one.step > step}.intersection(self._main.steps.infos))
        if newer and self._main.storage.epoch:  # this process is the one that writes
            _logger.warning(
                "%s: step %d has been restored, and step %d is newer. A run goes forward only: nothing is saved here "
                "up to step %d. To train on from step %d, start a run with another path and init_from='%s/%d'",
                path,
                step,
                newer[-1],
                newer[-1],
                step,
                path,
                step,
            )
        under_path = max((one.step for one in found if one.holders is None), default=None)
        if candidate.holders is not None and under_path is not None and under_path < step:
            _logger.info(
                "%s: step %d comes from the local tier; the newest step here is %d. To go back to it: restore(%d)",
                path,
                step,
                under_path,
                under_path,
            )
        if candidate.holders is None and self._channel.processes.is_first:
            run = restored.manifest.run
            if self._main.storage.is_other_run(run):
                _logger.warning(
                    "%s: step %d, which has been restored, was saved by another run (%s), so it is never deleted here",
                    path,
                    step,
                    run,
                )

    def _candidates(self, storage: Storage) -> list[Candidate]:
        """The steps to try: the newest first, and of the same number, first those that most processes have locally."""
        found = [Candidate(step, None) for step in self._channel.first("steps", storage.steps)]
        if self._local is not None and storage is self._main.storage:
            # By step and origin: parts that were saved by different starts of the run do not belong together.
            holders: dict[tuple[int, str], set[int]] = {}
            for process, steps in enumerate(self._channel.everyone("local steps", self._local_steps(self._local))):
                for step, origin in steps:
                    holders.setdefault((step, origin), set()).add(process)
            found += [Candidate(step, frozenset(of_step)) for (step, _), of_step in holders.items()]
        return sorted(found, key=lambda one: (one.step, one.holders is not None, len(one.holders or ())), reverse=True)

    def _local_steps(self, local: Tier) -> list[tuple[int, str]]:
        """The good steps in this process's local tier, with their origins, without those of another process count."""
        origins = {step: local.steps.origin(step) for step in local.steps.good()}
        count = str(self._channel.processes.count)
        return [(step, origin) for step, origin in origins.items() if origin.rpartition("/")[2] == count]

    def _restore_step(self, storage: Storage, candidate: Candidate, wanted: Request) -> Restored:
        step, holders = candidate
        source: Source = storage
        verify = self._verify
        if holders is not None and self._local is not None:
            source = self._local.storage
            if self._channel.processes.count > 1:
                source = open_step(self._local.storage, step, holders, self._channel, verify=verify)
                verify = False  # a `LocalStep` verifies what it reads from this host
        restore = Restore(source, step, self._items, self._rules, wanted, verify=verify, channel=self._channel)
        with transfers_allowed():
            restored = restore.run()
        for tier in (self._main, self._local):
            if tier is not None and tier.storage is source:
                tier.note_restored(restored, self._items)
        return restored

    def _mark_damaged(self, storage: Storage, damaged: Mapping[int, str]) -> None:
        """Warn of the damaged steps that were skipped, and no longer count those of this run."""
        for step, reason in damaged.items():
            if storage is self._main.storage:
                self._main.steps.mark_damaged(step)
            warnings.warn(f"{storage.path}: skipped damaged step {step}: {reason}", stacklevel=5)

    def _drop_local_after(self, restored: int) -> None:
        """No longer count the local steps that are newer than the restored one, which the run will save again."""
        if self._local is not None:
            for newer in [step for step in self._local.steps.infos if step > restored]:
                _logger.info("%s: step %d is not on all hosts", self._local.storage.path, newer)
                self._local.steps.mark_damaged(newer)
