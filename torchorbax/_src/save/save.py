"""A save, from the call in the training loop to the commit: what is to be saved, its record, and its outcome."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torchorbax._src.format.manifest import Manifest
from torchorbax._src.save.frozen import Identities
from torchorbax._src.save.snapshot import Snapshot
from torchorbax.errors import SaveError


@dataclass
class SaveRecord:
    """One save of this process.

    Attributes:
        step: the step saved.
        time: when `save` was called, in UTC.
        stall_s: seconds that `save` kept the loop, waiting for an earlier save included.
        commit_s: seconds from the call until the step was committed; None while in flight or if it failed.
        nbytes: bytes of the arrays written, each counted once, without frozen parameters that a base has already.
        metrics: the metrics given to `save`; complete once the step is committed.
        error: the error, if the save failed.
        path: the run's folder or URI.
    """

    step: int
    time: datetime.datetime
    stall_s: float = 0.0
    commit_s: float | None = None
    nbytes: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    error: SaveError | None = None
    path: str = ""


@dataclass
class Save:
    """A step to be saved, with its snapshot.

    Attributes:
        step: the number of the step.
        time: when `save` was called, in UTC.
        metrics: the metrics given to `save`: numbers and 0-d arrays, which are read on the saving thread.
        started_s: `time.monotonic()` when `save` was called.
        snapshot: what to write; or the error because of which this process could not take a snapshot; None after
            `take_snapshot` has handed it over.
        phase: what the saving thread is doing for it, for people: "writing arrays".
    """

    step: int
    time: datetime.datetime
    metrics: Mapping[str, Any]
    started_s: float
    snapshot: Snapshot | Exception | None = field(repr=False)
    phase: str = "waiting for the saving thread"

    def take_snapshot(self) -> Snapshot:
        """Hand over the snapshot and forget it, so that its arrays are freed as they are written.

        Raises:
            Exception: the error because of which there is no snapshot.
            RuntimeError: the snapshot has been handed over before.
        """
        snapshot, self.snapshot = self.snapshot, None
        if snapshot is None:
            raise RuntimeError(f"the snapshot of step {self.step} has been taken before")
        if isinstance(snapshot, Exception):
            raise snapshot
        return snapshot


@dataclass(frozen=True)
class Committed:
    """The outcome of a save that has been committed.

    Attributes:
        manifest: the manifest of the step. In processes other than process 0, most fingerprints are missing.
        identities: the frozen arrays of the step.
        nbytes: bytes of the arrays written, by all processes together.
    """

    manifest: Manifest
    identities: Identities
    nbytes: int
