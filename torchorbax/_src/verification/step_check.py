"""Reads a whole step again, and says whether it is what was saved."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection
from typing import TypeVar

from torchorbax._src.format.manifest import Key, Manifest
from torchorbax._src.storage.storage import Storage
from torchorbax._src.verification.checked_read import CheckedReader, leaf_batches
from torchorbax.errors import CheckpointNotFoundError, CorruptCheckpointError

Result = TypeVar("Result")

_MOST_REASONS = 20
"""The most reasons that an error has. A manifest can claim any number of files of processes."""

_logger = logging.getLogger(__name__)


def twice(read: Callable[[], Result]) -> Result:
    """Read something, and read it again if it seems to be damaged: a wrong byte on the way is no damage.

    Raises:
        CorruptCheckpointError: it is wrong both times.
    """
    try:
        return read()
    except CorruptCheckpointError:
        return read()


def check_step(
    storage: Storage, manifest: Manifest, *, skipped_bases: Collection[int] = (), share: tuple[int, int] = (0, 1)
) -> None:
    """Read every file of a step, and the arrays that bases hold for it, and compare them with the manifest.

    Args:
        storage: where the step is.
        manifest: its manifest.
        skipped_bases: bases of which only the sizes of the files are compared.
        share: the number of this process and how many there are, if several processes check a part of the step each.

    Raises:
        CorruptCheckpointError: the step is damaged; the reason has everything that is wrong.
        StorageError: it could not be read, which says nothing about it.
    """
    checks: list[Callable[[], object]] = [
        functools.partial(storage.as_seen_by, manifest, int(process)) for process in manifest.own
    ]
    checks += [
        functools.partial(check_base, storage, base, digests=base not in skipped_bases)
        for base in sorted(manifest.bases)
    ]
    checks += [
        functools.partial(check_arrays, storage, manifest, keys)
        for keys in leaf_batches(manifest, without_bases=skipped_bases)
    ]
    index, count = share
    bad: list[str] = []
    for check in checks[index::count]:
        if len(bad) == _MOST_REASONS:
            bad.append("and perhaps more")
            break
        try:
            twice(check)
        except CorruptCheckpointError as error:
            bad += error.reasons.values()
    if not bad:  # the names of files would say less than those of leaves
        storage.check_files(manifest, digests=list(manifest.files)[index::count])
    if bad:
        raise CorruptCheckpointError(storage.path, {manifest.step: "; ".join(bad)})


def check_base(storage: Storage, base: int, *, digests: bool) -> None:
    """Compare the files of a base with its manifest: what is in them, or their sizes alone.

    Raises:
        CorruptCheckpointError: the base is missing or damaged.
    """
    try:
        manifest = storage.bases.manifest(base)
        storage.bases.check_files(manifest, digests=manifest.files if digests else ())
    except CheckpointNotFoundError as error:
        raise CorruptCheckpointError(storage.path, {base: f"base {base} is missing"}) from error
    except CorruptCheckpointError as error:
        raise CorruptCheckpointError(storage.path, {base: f"base {base}: {error.reasons[base]}"}) from error


def thinned_bases(storage: Storage, manifest: Manifest) -> set[int]:
    """The bases that a step needs and that are gone, or lack a file, or have one of another size."""
    found = set()
    for base in manifest.bases:
        try:
            check_base(storage, base, digests=False)
        except CorruptCheckpointError as error:
            _logger.warning("%s", error)
            found.add(base)
    return found


def check_arrays(storage: Storage, manifest: Manifest, keys: list[Key]) -> None:
    """Read arrays of a step into host memory, and compare them with their fingerprints.

    Raises:
        CorruptCheckpointError: some are missing or differ.
    """
    CheckedReader(storage, manifest).read_and_check(dict.fromkeys(keys))
