"""Reads steps again after their commit: a step counts as proved when what is stored is what was saved.

Without that, a machine that writes wrong bytes acknowledges one bad step after the other, and lets the good ones go.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Literal

from torchorbax._src.distributed.channel import Channel
from torchorbax._src.format.manifest import Manifest
from torchorbax._src.storage.steps import Steps
from torchorbax._src.storage.storage import Storage
from torchorbax._src.verification.step_check import check_step
from torchorbax.errors import CheckpointNotFoundError, CorruptCheckpointError, StorageError

_logger = logging.getLogger(__name__)

VerifyAfterSave = Literal["first"] | bool
"""Which steps are read again after their commit: all (True), none (False), or the first of a life, every
`EVERY`-th, and whenever older steps would go and no step that has been read again would be left ("first")."""

EVERY = 10
"""With "first", each step of this number since the last one that was read again is read again, too."""
SCRUB_AFTER_S = 86_400.0
"""A kept step that was saved, or last read again, longer ago than this is read again after a save: disks forget."""


class ReadBack:
    """Reads the steps of one run again.

    Args:
        storage: where they are.
        steps: the steps of the run.
        channel: to the other processes, each of which reads a part.
        which: which steps are read.
    """

    def __init__(self, storage: Storage, steps: Steps, channel: Channel, which: VerifyAfterSave) -> None:
        self._storage = storage
        self._steps = steps
        self._channel = channel
        self._which = which
        self._scrubbed: dict[int, float] = {}  # when a step was last scrubbed in this life, in seconds since 1970
        self._unproved: int | None = None  # saves since the last one that was read again; None if none was

    def is_due(self, step: int) -> bool:
        """Is a step that has just been committed to be read again? Process 0 decides."""
        return bool(self._channel.first("read back?", lambda: self._is_due(step)))

    def _is_due(self, step: int) -> bool:
        self._unproved = None if self._unproved is None else self._unproved + 1
        if isinstance(self._which, bool):
            return self._which
        if self._unproved is None or self._unproved >= EVERY:
            return True
        try:
            going = set(self._steps.unpreserved(step))
            return bool(going) and not (set(self._steps.found_after(step)) - going) & self._steps.proved
        except StorageError:  # then no step can be deleted either
            return False

    def read(self, manifest: Manifest, new_bases: Collection[int]) -> None:
        """Read a step again, in all processes, each a part of its arrays.

        Args:
            manifest: its manifest, in process 0 with its fingerprints.
            new_bases: the bases that have been written with it. Of others, only the sizes of the files are compared.

        Raises:
            CorruptCheckpointError: what is stored is not what was saved.
            StorageError: it could not be read.
            ProcessError: another process could not read its part.
        """
        self._channel.attempt("read back", lambda: self._read_part(manifest, new_bases))
        self._unproved = 0
        self._steps.proved.add(manifest.step)

    def scrub(self, newest: int) -> None:
        """Read the kept step again that has not been read for the longest time, if that is longer than `SCRUB_AFTER_S`.

        One step a save, in all processes. A step that is damaged no longer counts.
        """
        step = self._channel.first("scrub?", lambda: None if self._which is False else self._oldest(newest))
        if step is None:
            return
        self._scrubbed[step] = self._steps.clock.now().timestamp()
        try:
            self._channel.attempt("scrub", lambda: self._read_part(self._storage.manifest(step), ()))
        except CorruptCheckpointError as error:
            self._steps.mark_damaged(step)
            _logger.warning("%s", error)
        except (StorageError, CheckpointNotFoundError) as error:  # it says nothing about the step just saved
            _logger.warning("%s: old step %d could not be read again: %s", self._storage.path, step, error)

    def _oldest(self, newest: int) -> int | None:
        """The step to scrub; None if there is none. The newest step has just been saved."""
        # Of the steps that were read at the same time, or never, the lowest is the oldest. Only its manifest is read.
        infos = {step: info for step, info in list(self._steps.infos.items()) if step != newest}
        oldest = min(infos, key=lambda step: (self._scrubbed.get(step, 0.0), step), default=None)
        if oldest is None:
            return None
        read_at = max(infos[oldest].time.timestamp(), self._scrubbed.get(oldest, 0.0))
        return oldest if self._steps.clock.now().timestamp() - read_at >= SCRUB_AFTER_S else None

    def _read_part(self, manifest: Manifest, new_bases: Collection[int]) -> None:
        processes = self._channel.processes
        if not processes.is_first:  # only process 0 has the fingerprints
            manifest = self._storage.manifest(manifest.step)
        old_bases = manifest.bases.difference(new_bases)
        check_step(self._storage, manifest, skipped_bases=old_bases, share=(processes.index, processes.count))
