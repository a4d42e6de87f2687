"""Is what was read what was saved?."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torchorbax._src.arrays.fingerprint import Sums, fingerprints, start, start_parts, text, total
from torchorbax._src.arrays.fingerprint import sums as to_sums
from torchorbax._src.arrays.leaves import Array, is_global
from torchorbax._src.distributed.channel import Channel
from torchorbax._src.format.manifest import ItemMeta, Manifest
from torchorbax.errors import CorruptCheckpointError

Arrays = Mapping[str, Mapping[str, Array]]
Key = tuple[str, str]

_BATCH_BYTES = 256 << 20
_SHOWN = 5


class Ahead:
    """Fingerprints of arrays that are summed while others are still being read."""

    def __init__(self) -> None:
        self._started: dict[Key, Callable[[], Sums]] = {}

    def start(self, item: str, name: str, array: Array) -> None:
        """Start to sum an array, if all of it is here."""
        if not is_global(array):
            self._started[item, name] = start(array)

    def of(self, arrays: Mapping[Key, Array]) -> dict[Key, str]:
        """The fingerprints of arrays, of which those that were started are the same as then."""
        rest = {key: array for key, array in arrays.items() if key not in self._started}
        return fingerprints(rest) | {key: text(self._started[key]()) for key in arrays if key in self._started}


def check(
    path: str,
    step: int,
    items: Mapping[str, ItemMeta],
    arrays: Arrays,
    channel: Channel | None = None,
    ahead: Ahead | None = None,
) -> None:
    """Compare arrays that were read with what the manifest says of them, on the devices where they are.

    Args:
        path: of the run.
        step: which step.
        items: what the manifest says.
        arrays: by item and leaf.
        channel: to the other processes that have parts of them; None if there are none.
        ahead: what was summed of them before.

    Raises:
        CorruptCheckpointError: some differ; names them. The same in all processes.
    """
    flat = {(item, name): array for item, one in arrays.items() for name, array in one.items()}
    spread = {key: array for key, array in flat.items() if is_global(array)}
    found = (ahead or Ahead()).of({key: array for key, array in flat.items() if key not in spread})
    if channel is not None and channel.processes.count > 1:
        found |= _together(spread, channel)
    bad = [f"{item}: {name}" for (item, name), one in found.items() if items[item].leaves[name].fingerprint != one]
    if bad:
        raise CorruptCheckpointError(path, {step: f"the data of {_listed(bad)} is not what was saved"})


def _together(arrays: Mapping[Key, Any], channel: Channel) -> dict[Key, str]:
    """The fingerprints of arrays of which every process has parts; empty where two have not the same of one part."""
    started = {key: start_parts(array) for key, array in arrays.items()}
    mine = [[*key, {first: text(sums) for first, sums in parts().items()}] for key, parts in started.items()]
    answer: list[list[str]] = []
    if (theirs := channel.gather("fingerprints", mine)) is not None:
        sums: dict[Key, dict[int, set[str]]] = {}
        for item, name, parts in (one for process in theirs for one in process):
            of_leaf = sums.setdefault((item, name), {})
            for first, part in parts.items():
                of_leaf.setdefault(int(first), set()).add(part)
        for key, of_leaf in sums.items():
            alike = all(len(texts) == 1 for texts in of_leaf.values())
            added = text(total([to_sums(one) for texts in of_leaf.values() for one in texts]))
            answer.append([*key, added if alike else ""])
    return {(item, name): found for item, name, found in channel.publish("fingerprints", answer)}


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def batches(manifest: Manifest) -> Iterator[tuple[str, list[str]]]:
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
