"""Which step is restored, and from which tier: the newest that is good."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping

from torchorbax._orbax import Storage
from torchorbax.errors import CorruptCheckpointError
from torchorbax.localtier import open_step
from torchorbax.plan import Request
from torchorbax.processes import Channel
from torchorbax.restoring import Restored, Source, restore_step
from torchorbax.sharding import ShardingRules
from torchorbax.state import Item
from torchorbax.tier import Tier

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
        for candidate, having in candidates:
            try:
                restored = self._restore_step(storage, candidate, having, wanted)
            except CorruptCheckpointError as error:
                if having is None:
                    reasons.update(error.reasons)
                elif self._local is not None:
                    _logger.warning("%s", error)
                    self._local.steps.mark_damaged(candidate)
                    unusable.update(error.reasons)
                continue
            self._note(storage, candidate, reasons)
            return restored
        if reasons or unusable:
            raise CorruptCheckpointError(storage.path, {**unusable, **reasons})
        return None

    def _candidates(self, storage: Storage) -> list[Candidate]:
        """The steps to try, the newest first, and of the same number that of the local tier first."""
        shared = self._channel.publish("steps", storage.steps() if self._channel.processes.is_first else None)
        found: dict[tuple[int, bool], frozenset[int] | None] = {(step, False): None for step in shared}
        if self._local is not None and storage is self._main.storage:
            for process, steps in enumerate(self._channel.everyone("local steps", self._local.steps.good())):
                for step in steps:
                    found[step, True] = (found.get((step, True)) or frozenset()) | {process}
        return [(step, found[step, local]) for step, local in sorted(found, reverse=True)]

    def _restore_step(self, storage: Storage, step: int, having: frozenset[int] | None, wanted: Request) -> Restored:
        source: Source = storage
        verify = self._verify
        if having is not None and self._local is not None:
            source = self._local.storage
            if self._channel.processes.count > 1:
                source = open_step(self._local.storage, step, having, self._channel, verify=verify)
                verify = False  # it verifies itself what is on this host
        restored = restore_step(source, step, self._items, self._rules, wanted, verify=verify, channel=self._channel)
        for tier in (self._main, self._local):
            if tier is not None and tier.storage is source:
                tier.note_restored(restored, self._items)
        return restored

    def _note(self, storage: Storage, restored: int, skipped: Mapping[int, str]) -> None:
        """Damaged steps no longer count, nor does what local tiers have beyond the step that the run goes on from."""
        for step, reason in skipped.items():
            if storage is self._main.storage:
                self._main.steps.mark_damaged(step)
            warnings.warn(f"{storage.path}: skipped damaged step {step}: {reason}", stacklevel=5)
        if self._local is not None and storage is self._main.storage:
            for newer in [step for step in self._local.steps.infos if step > restored]:
                _logger.info("%s: step %d is not on all hosts", self._local.storage.path, newer)
                self._local.steps.mark_damaged(newer)
