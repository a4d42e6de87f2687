"""Whether every byte of a step is what was saved."""

from __future__ import annotations

import os

from torchorbax._src.restore.checked_read import CheckedReader, batches
from torchorbax._src.storage.opening import open_storage
from torchorbax._src.storage.storage import Storage
from torchorbax.errors import CorruptCheckpointError


def verify(path: str | os.PathLike[str], step: int | None = None) -> list[int]:
    """Read every byte of steps again and compare it with the fingerprints made when it was saved.

    Nothing is written, no live object is needed, and host memory is bounded by the largest array or 256 MiB.

    Args:
        path: the run's folder or `gs://` URI.
        step: which step; None for all of them.

    Returns:
        The steps verified, all good, in ascending order.

    Raises:
        CheckpointNotFoundError: there is no such path or step.
        CorruptCheckpointError: some are damaged; `.reasons` says for each of them what is wrong with which leaf.
    """
    storage = open_storage(path)
    steps = storage.existing_steps() if step is None else [step]
    reasons: dict[int, str] = {}
    for candidate in steps:
        try:
            _verify_step(storage, candidate)
        except CorruptCheckpointError as error:
            reasons.update(error.reasons)
    if reasons:
        raise CorruptCheckpointError(storage.path, reasons)
    return steps


def _verify_step(storage: Storage, step: int) -> None:
    manifest = storage.manifest(step)
    bad: list[str] = []
    for process in manifest.own:
        try:
            storage.as_seen_by(manifest, int(process))
        except CorruptCheckpointError as error:
            bad += error.reasons.values()
    for keys in batches(manifest):
        reader = CheckedReader(storage, manifest)
        arrays = reader.read(dict.fromkeys(keys))
        try:
            reader.check(arrays)
        except CorruptCheckpointError as error:  # what cannot even be read is raised at once
            bad += error.reasons.values()
    if bad:
        raise CorruptCheckpointError(storage.path, {step: "; ".join(bad)})
