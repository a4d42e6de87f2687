"""`verify`: reads every byte of a run's steps, and says whether it is what was saved."""

from __future__ import annotations

import os

from torchorbax._src.arrays.jax_context import transfers_allowed
from torchorbax._src.restore.checked_read import CheckedReader, leaf_batches
from torchorbax._src.storage.opening import open_storage
from torchorbax._src.storage.storage import Storage
from torchorbax.errors import CorruptCheckpointError

_MOST_REASONS = 20
"""The most damaged files of processes that an error names. A manifest can claim any number of them."""


def verify(path: str | os.PathLike[str], step: int | None = None) -> list[int]:
    """Read every byte of a run's steps and compare it with the fingerprints made when they were saved.

    Nothing is written and no live object is needed. Host memory is bounded by the largest array or 256 MiB, whichever
    is more.

    Args:
        path: the run's folder or `gs://` URI.
        step: the step to verify; None for all steps.

    Returns:
        The steps that were verified, all of which are good, in ascending order.

    Raises:
        CheckpointNotFoundError: there is no such path or step.
        CorruptCheckpointError: steps are damaged; `.reasons` says for each of them what is wrong with which leaf.
    """
    storage = open_storage(path)
    steps = storage.existing_steps() if step is None else [step]
    reasons: dict[int, str] = {}
    for candidate in steps:
        try:
            with transfers_allowed():
                _verify_step(storage, candidate)
        except CorruptCheckpointError as error:
            reasons.update(error.reasons)
    if reasons:
        raise CorruptCheckpointError(storage.path, reasons)
    return steps


def _verify_step(storage: Storage, step: int) -> None:
    """Raise CorruptCheckpointError, with everything that is wrong, if a step is damaged."""
    manifest = storage.manifest(step)
    bad: list[str] = []
    # The files with the processes' own state.
    for process in manifest.own:
        if len(bad) == _MOST_REASONS:
            bad.append("and perhaps more")
            break
        try:
            storage.as_seen_by(manifest, int(process))
        except CorruptCheckpointError as error:
            bad += error.reasons.values()
    # The arrays. One that cannot be read raises at once; arrays that differ are collected.
    for keys in leaf_batches(manifest):
        reader = CheckedReader(storage, manifest)
        arrays = reader.read(dict.fromkeys(keys))
        try:
            reader.check(arrays)
        except CorruptCheckpointError as error:
            bad += error.reasons.values()
    if bad:
        raise CorruptCheckpointError(storage.path, {step: "; ".join(bad)})
