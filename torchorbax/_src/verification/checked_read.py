"""Reads arrays of a step and compares them with the fingerprints that were made when it was saved."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from jax.sharding import Sharding

from torchorbax._src.arrays import fingerprint
from torchorbax._src.arrays.fingerprint import Sums
from torchorbax._src.arrays.leaves import Array, is_global
from torchorbax._src.distributed.channel import Channel
from torchorbax._src.format.manifest import Key, Manifest
from torchorbax._src.storage.storage import Source
from torchorbax.errors import CorruptCheckpointError

_BATCH_BYTES = 256 << 20
"""The most bytes in one of the `leaf_batches`, except for a single larger leaf."""
_SHOWN = 5
"""The number of leaves that an error names."""


class CheckedReader:
    """Reads arrays of one step and compares them with their fingerprints, on the devices that hold them.

    Args:
        source: where the step is read from.
        manifest: the manifest of the step.
        verify: compare the arrays; otherwise `check` does nothing.
        channel: to the other processes that hold shards of the arrays; None if there are none.
    """

    def __init__(
        self, source: Source, manifest: Manifest, *, verify: bool = True, channel: Channel | None = None
    ) -> None:
        self._source = source
        self._manifest = manifest
        self._leaves = manifest.leaves
        self._verify = verify
        self._channel = channel
        self._started: dict[Key, Callable[[], Sums]] = {}

    def read(self, targets: Mapping[Key, Sharding | None]) -> dict[Key, Any]:
        """Read leaves; see `Source.read`. Their sums are started while other leaves are still being read."""
        when_read = self._start if self._verify else None
        return self._source.read(self._manifest.step, self._leaves, targets, when_read)

    def check(self, arrays: Mapping[Key, Array]) -> None:
        """Compare arrays with the fingerprints in the manifest.

        Raises:
            CorruptCheckpointError: some arrays differ; the message names them. It is raised in all processes, for
                arrays that they share.
        """
        if not self._verify:
            return
        shared = {key: array for key, array in arrays.items() if is_global(array)}
        found = self._fingerprints({key: array for key, array in arrays.items() if key not in shared})
        if self._channel is not None and self._channel.processes.count > 1:
            found |= _shared_fingerprints(shared, self._channel)
        bad = [key for key, text in found.items() if self._leaves[key].fingerprint != text]
        if bad:
            reason = f"the data of {_listed(bad)} is not what was saved"
            raise CorruptCheckpointError(self._source.path, {self._manifest.step: reason})

    def read_and_check(self, targets: Mapping[Key, Sharding | None]) -> dict[Key, Any]:
        """`read`, then `check`."""
        arrays = self.read(targets)
        self.check(arrays)
        return arrays

    def _start(self, key: Key, array: Any) -> None:
        """Start to sum an array, if all of it is in this process. Shared arrays are not complete yet."""
        if not is_global(array):
            self._started[key] = fingerprint.start(array)

    def _fingerprints(self, arrays: Mapping[Key, Array]) -> dict[Key, str]:
        rest = {key: array for key, array in arrays.items() if key not in self._started}
        started = {key: fingerprint.text(self._started.pop(key)()) for key in arrays if key in self._started}
        return fingerprint.fingerprints(rest) | started


def _shared_fingerprints(arrays: Mapping[Key, Any], channel: Channel) -> dict[Key, str]:
    """The fingerprints of arrays that several processes hold shards of.

    A fingerprint is an empty string if two processes hold different data for the same part of the array.
    """

    def sums_here() -> list[list[Any]]:
        started = {key: fingerprint.start_parts(array) for key, array in arrays.items()}
        return [
            [*key, {first: fingerprint.text(sums) for first, sums in parts().items()}] for key, parts in started.items()
        ]

    found = channel.agree("fingerprints", sums_here, added_fingerprints)
    return {(item, name): text for item, name, text in found}


def added_fingerprints(reports: Sequence[Sequence[Sequence[Any]]]) -> list[list[str]]:
    """The fingerprints of shared leaves, from the sums of their parts: a list of `[item, name, fingerprint]`.

    Args:
        reports: from each process, a list of `[item, name, {index of a part's first element: sums as text}]`.
    """
    sums: dict[Key, dict[int, set[str]]] = {}
    for item, name, parts in (leaf for report in reports for leaf in report):
        of_leaf = sums.setdefault((item, name), {})
        for first, text in parts.items():
            of_leaf.setdefault(int(first), set()).add(text)
    answer = []
    for key, of_leaf in sums.items():
        agree = all(len(texts) == 1 for texts in of_leaf.values())
        total = fingerprint.total([fingerprint.sums(text) for texts in of_leaf.values() for text in texts])
        answer.append([*key, fingerprint.text(total) if agree else ""])
    return answer


def _listed(keys: list[Key]) -> str:
    names = [f"{item}: {name}" for item, name in keys]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def leaf_batches(manifest: Manifest, *, without_bases: Collection[int] = ()) -> Iterator[list[Key]]:
    """The leaves of a step, in batches that are small enough to be in memory at once. No batch spans items.

    Args:
        manifest: the manifest of the step.
        without_bases: bases whose leaves are left out.
    """
    for item, meta in manifest.items.items():
        batch: list[Key] = []
        size = 0
        for name, leaf in meta.leaves.items():
            if leaf.base is not None and leaf.base in without_bases:
                continue
            if batch and size + leaf.nbytes > _BATCH_BYTES:
                yield batch
                batch, size = [], 0
            batch.append((item, name))
            size += leaf.nbytes
        if batch:
            yield batch
