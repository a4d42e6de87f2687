"""Which step is restored, and from which tier: the newest that is good."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping

from torchorbax._src.arrays.jax_context import transfers_allowed
from torchorbax._src.arrays.sharding_rules import ShardingRules
from torchorbax._src.distributed.channel import Channel
from torchorbax._src.restore.in_place import Restore, Restored
from torchorbax._src.restore.local_tier import open_step
from torchorbax._src.run.tier import Tier
from torchorbax._src.state.item import Item
from torchorbax._src.state.request import Request
from torchorbax._src.storage.storage import Source, Storage
from torchorbax.errors import CorruptCheckpointError

_logger = logging.getLogger(__name__)

Candidate = tuple[int, frozenset[int] | None]
"""A step, and the processes that have it in their local tiers; None for the one under the run's path."""


class Restorer:
    """Restores live objects, in all processes alike.

    Args:
        items: the live objects.
        rules: where they go.
        main: the run's path.
        local: the fast tier, if there is one.
        channel: to the other processes.
        verify: compare what is read with its fingerprints.
    """

    def __init__(
        self,
        items: Mapping[str, Item],
        rules: ShardingRules | None,
        main: Tier,
        local: Tier | None,
        channel: Channel,
        *,
        verify: bool,
    ) -> None:
        self._items = items
        self._rules = rules
        self._main = main
        self._local = local
        self._channel = channel
        self._verify = verify
        self._restores = 0

    def restore(self, storage: Storage, step: int | None, wanted: Request) -> Restored | None:
        """Restore a step of this run or another.

        Args:
            storage: the run's path, or that of another run.
            step: which one; None for the newest good one, damaged ones being skipped with a warning.
            wanted: what of it.

        Returns:
            What has been restored; None if there is no step.

        Raises:
            CheckpointNotFoundError, CorruptCheckpointError, MismatchError, ConfigError: as `Checkpointer.restore`.
        """
        self._restores += 1
        self._channel.begin(f"restore{self._restores}")
        candidates = self._candidates(storage)
        if step is not None:
            candidates = [one for one in candidates if one[0] == step] or [(step, None)]
        reasons: dict[int, str] = {}
        unusable: dict[int, str] = {}
        for attempt, (candidate, having) in enumerate(candidates):
            self._channel.begin(f"restore{self._restores}.{attempt}")
            try:
                restored = self._restore_step(storage, candidate, having, wanted)
            except CorruptCheckpointError as error:
                if having is None:
                    reasons.update(error.reasons)
                elif self._local is not None:
                    _logger.warning("%s", error)
                    self._local.steps.mark_damaged(candidate)
                    if self._channel.processes.count == 1:  # of several, some may just have been killed before the rest
                        unusable.update(error.reasons)
                continue
            self._note(storage, reasons)
            if step is None and storage is self._main.storage:
                self._drop_local_after(candidate)
            return restored
        if reasons or unusable:
            raise CorruptCheckpointError(storage.path, {**unusable, **reasons})
        return None

    def _candidates(self, storage: Storage) -> list[Candidate]:
        """The steps to try, the newest first, and of the same number that of the local tier first."""
        found: list[Candidate] = [(step, None) for step in self._channel.first("steps", storage.steps)]
        if self._local is not None and storage is self._main.storage:
            saves: dict[tuple[int, str], set[int]] = {}  # those of one number in two lives of the run are not the same
            for process, steps in enumerate(self._channel.everyone("local steps", self._saves(self._local))):
                for saved, origin in steps:
                    saves.setdefault((saved, origin), set()).add(process)
            found += [(saved, frozenset(having)) for (saved, _), having in saves.items()]
        return sorted(found, key=lambda one: (one[0], one[1] is not None, len(one[1] or ())), reverse=True)

    def _saves(self, local: Tier) -> list[tuple[int, str]]:
        """What this process has in its local tier that as many processes have saved: the steps, and of which life."""
        origins = {step: local.steps.origin(step) for step in local.steps.good()}
        count = str(self._channel.processes.count)
        return [(step, origin) for step, origin in origins.items() if origin.rpartition("/")[2] == count]

    def _restore_step(self, storage: Storage, step: int, having: frozenset[int] | None, wanted: Request) -> Restored:
        source: Source = storage
        verify = self._verify
        if having is not None and self._local is not None:
            source = self._local.storage
            if self._channel.processes.count > 1:
                source = open_step(self._local.storage, step, having, self._channel, verify=verify)
                verify = False  # it verifies itself what is on this host
        restore = Restore(source, step, self._items, self._rules, wanted, verify=verify, channel=self._channel)
        with transfers_allowed():
            restored = restore.run()
        for tier in (self._main, self._local):
            if tier is not None and tier.storage is source:
                tier.note_restored(restored, self._items)
        return restored

    def _note(self, storage: Storage, skipped: Mapping[int, str]) -> None:
        """Damaged steps no longer count."""
        for step, reason in skipped.items():
            if storage is self._main.storage:
                self._main.steps.mark_damaged(step)
            warnings.warn(f"{storage.path}: skipped damaged step {step}: {reason}", stacklevel=5)

    def _drop_local_after(self, restored: int) -> None:
        """Nor does what local tiers have beyond the step that the run goes on from."""
        if self._local is not None:
            for newer in [step for step in self._local.steps.infos if step > restored]:
                _logger.info("%s: step %d is not on all hosts", self._local.storage.path, newer)
                self._local.steps.mark_damaged(newer)
