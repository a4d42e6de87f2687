"""`verify`: reads every byte of a run's steps, and says whether it is what was saved."""

from __future__ import annotations

import os

from torchorbax._src.arrays.jax_context import transfers_allowed
from torchorbax._src.storage.opening import open_storage
from torchorbax._src.verification.step_check import check_step
from torchorbax.errors import CheckpointNotFoundError, CorruptCheckpointError


def verify(path: str | os.PathLike[str], step: int | None = None) -> list[int]:
    """Read every file of a run's steps, and compare arrays and files with what was noted when they were saved.

    All files are read but the commit marker, whose content means nothing, and every array is compared with its
    fingerprint. Steps of versions that did not yet list their files are compared by their arrays and manifest alone.

    Nothing is written and no live object is needed. Host memory is bounded by the largest array or 256 MiB, whichever
    is more.

    Args:
        path: the run's folder or `gs://` URI.
        step: the step to verify; None for all steps.

    Returns:
        The steps that were verified, all of which are good, in ascending order. Steps that a program which writes there
        has deleted meanwhile are not among them.

    Raises:
        CheckpointNotFoundError: there is no such path or step.
        CorruptCheckpointError: steps are damaged; `.reasons` says for each of them what is wrong with which leaf.
    """
    storage = open_storage(path)
    steps = storage.existing_steps() if step is None else [step]
    reasons: dict[int, str] = {}
    gone: list[int] = []
    for candidate in steps:
        try:
            with transfers_allowed():
                check_step(storage, storage.manifest(candidate))
        except (CorruptCheckpointError, CheckpointNotFoundError) as error:
            if candidate not in storage.steps():  # the run that writes there has let it go meanwhile
                gone.append(candidate)
            elif isinstance(error, CorruptCheckpointError):
                reasons.update(error.reasons)
            else:
                raise
    if reasons:
        raise CorruptCheckpointError(storage.path, reasons)
    if step in gone:
        raise CheckpointNotFoundError(storage.path, step, storage.steps())
    return [candidate for candidate in steps if candidate not in gone]
