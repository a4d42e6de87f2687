"""Arrays of a step, read and compared with the fingerprints that were made when it was saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
_SHOWN = 5


class CheckedReader:
    """Reads arrays of one step and compares them with their fingerprints, on the devices where they are.

    Args:
        source: where the step is.
        manifest: what the step says about itself.
        verify: compare at all.
        channel: to the other processes that have parts of the arrays; None if there are none.
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
        """Read leaves; see `Source.read`. Each is summed while others are still being read."""
        when_read = self._start if self._verify else None
        return self._source.read(self._manifest.step, self._leaves, targets, when_read)

    def check(self, arrays: Mapping[Key, Array]) -> None:
        """Compare arrays with the fingerprints in the manifest.

        Raises:
            CorruptCheckpointError: some differ; names them. The same in all processes.
        """
        if not self._verify:
            return
        spread = {key: array for key, array in arrays.items() if is_global(array)}
        found = self._fingerprints({key: array for key, array in arrays.items() if key not in spread})
        if self._channel is not None and self._channel.processes.count > 1:
            found |= _shared_fingerprints(spread, self._channel)
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
        """Start to sum an array if all of it is in this process."""
        if not is_global(array):
            self._started[key] = fingerprint.start(array)

    def _fingerprints(self, arrays: Mapping[Key, Array]) -> dict[Key, str]:
        rest = {key: array for key, array in arrays.items() if key not in self._started}
        started = {key: fingerprint.text(self._started.pop(key)()) for key in arrays if key in self._started}
        return fingerprint.fingerprints(rest) | started


def _shared_fingerprints(arrays: Mapping[Key, Any], channel: Channel) -> dict[Key, str]:
    """The fingerprints of arrays that every process has parts of; empty where two processes differ in the same part."""

    def sums_here() -> list[list[Any]]:
        started = {key: fingerprint.start_parts(array) for key, array in arrays.items()}
        return [
            [*key, {first: fingerprint.text(sums) for first, sums in parts().items()}] for key, parts in started.items()
        ]

    found = channel.agree("fingerprints", sums_here, added)
    return {(item, name): text for item, name, text in found}


def added(reports: Sequence[Sequence[Sequence[Any]]]) -> list[list[str]]:
    """Item, name and fingerprint of leaves, from the sums of the parts that the processes have."""
    sums: dict[Key, dict[int, set[str]]] = {}
    for item, name, parts in (leaf for report in reports for leaf in report):
        of_leaf = sums.setdefault((item, name), {})
        for first, text in parts.items():
            of_leaf.setdefault(int(first), set()).add(text)
    answer = []
    for key, of_leaf in sums.items():
        alike = all(len(texts) == 1 for texts in of_leaf.values())
        total = fingerprint.total([fingerprint.sums(text) for texts in of_leaf.values() for text in texts])
        answer.append([*key, fingerprint.text(total) if alike else ""])
    return answer


def _listed(keys: list[Key]) -> str:
    names = [f"{item}: {name}" for item, name in keys]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def batches(manifest: Manifest) -> Iterator[list[Key]]:
    """The leaves of a step, in parts that fit into a bounded memory together. No part spans items."""
    for item, meta in manifest.items.items():
        batch: list[Key] = []
        size = 0
        for name, leaf in meta.leaves.items():
            if batch and size + leaf.nbytes > _BATCH_BYTES:
                yield batch
                batch, size = [], 0
            batch.append((item, name))
            size += leaf.nbytes
        if batch:
            yield batch
