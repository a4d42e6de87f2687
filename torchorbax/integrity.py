"""Is what was read what was saved? Fingerprints of a step's arrays, made when it is saved, compared when it is read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from torchorbax._orbax import Storage
from torchorbax.adapter import Array
from torchorbax.errors import CorruptCheckpointError
from torchorbax.fingerprint import fingerprints
from torchorbax.manifest import ItemMeta, Manifest

Arrays = Mapping[str, Mapping[str, Array]]

_BATCH_BYTES = 256 << 20
_SHOWN = 5


def check(path: str, step: int, items: Mapping[str, ItemMeta], arrays: Arrays) -> None:
    """Compare arrays that were read with what the manifest says of them, on the devices where they are.

    Raises:
        CorruptCheckpointError: some differ; names them.
    """
    found = fingerprints({(item, name): array for item, one in arrays.items() for name, array in one.items()})
    bad = [f"{item}: {name}" for (item, name), text in found.items() if items[item].leaves[name].fingerprint != text]
    if bad:
        raise CorruptCheckpointError(path, {step: f"the data of {_listed(bad)} is not what was saved"})


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


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
    storage = Storage(path)
    steps = storage.existing_steps() if step is None else [step]
    reasons: dict[int, str] = {}
    for one in steps:
        try:
            _verify_step(storage, one)
        except CorruptCheckpointError as error:
            reasons.update(error.reasons)
    if reasons:
        raise CorruptCheckpointError(storage.path, reasons)
    return steps


def _verify_step(storage: Storage, step: int) -> None:
    manifest = storage.manifest(step)
    bad: list[str] = []
    for item, names in _batches(manifest):
        meta = manifest.items[item]
        arrays = storage.read(step, {item: meta}, {item: dict.fromkeys(names)})
        try:
            check(storage.path, step, manifest.items, arrays)
        except CorruptCheckpointError as error:
            bad += error.reasons.values()
    if bad:
        raise CorruptCheckpointError(storage.path, {step: "; ".join(bad)})


def _batches(manifest: Manifest) -> Iterator[tuple[str, list[str]]]:
    """Items and leaves of them, together no larger than fits into a bounded memory."""
    for item, meta in manifest.items.items():
        batch: list[str] = []
        size = 0
        for name, leaf in meta.leaves.items():
            if batch and size + leaf.nbytes > _BATCH_BYTES:
                yield item, batch
                batch, size = [], 0
            batch.append(name)
            size += leaf.nbytes
        if batch:
            yield item, batch
