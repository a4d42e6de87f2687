"""Restores a step into live objects, in place: everything is planned, read and converted before anything is written."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Sharding

from torchorbax._src.arrays import broadcast, fingerprint
from torchorbax._src.arrays.broadcast import FirstReplica
from torchorbax._src.arrays.dtypes import BY_NAME, fits_on_device
from torchorbax._src.arrays.leaves import Array, put
from torchorbax._src.arrays.sharding_rules import ShardingRules
from torchorbax._src.distributed.channel import Channel
from torchorbax._src.format.manifest import ItemMeta, Key, Manifest
from torchorbax._src.format.per_process import HostItem
from torchorbax._src.restore.plan import Plan, planned
from torchorbax._src.state.item import Item, ItemPlan
from torchorbax._src.state.request import Request
from torchorbax._src.state.sharing import Restoring, in_order
from torchorbax._src.storage.storage import Source
from torchorbax._src.tensors.live import host_copy, live_array
from torchorbax._src.verification.checked_read import CheckedReader
from torchorbax._src.verification.step_check import twice
from torchorbax.errors import CorruptCheckpointError, MismatchError, Problem, summary

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Restored:
    """The outcome of a restore.

    Attributes:
        manifest: the manifest of the step.
        left_out: the problems of everything that does not fit and was not restored; empty if the request was strict.
        exact: the leaves that now have the same names and dtypes live as in the step.
        damaged_bases: the bases that are missing or damaged, for which live frozen arrays have stood in.
        proved: the whole step has been read and compared with its fingerprints.
        place_s: seconds that it took to write what had been read into the live objects.
    """

    manifest: Manifest
    left_out: tuple[Problem, ...]
    exact: frozenset[Key]
    damaged_bases: frozenset[int]
    proved: bool
    place_s: float


class Restore:
    """One restore of a step into live objects: all of it or nothing. `run` calls a method for each phase.

    Args:
        source: where the step is read from.
        step: the number of the step.
        items: the live objects.
        rules: the sharding rules; None keeps every live tensor's sharding.
        request: what is to be restored.
        verify: compare what was read with its fingerprints.
        channel: to the other processes. Each phase succeeds in all of them, or the restore fails in all of them.
    """

    def __init__(
        self,
        source: Source,
        step: int,
        items: Mapping[str, Item],
        rules: ShardingRules | None,
        request: Request,
        *,
        verify: bool,
        channel: Channel,
    ) -> None:
        self._source = source
        self._step = step
        self._items = items
        self._rules = rules
        self._request = request
        self._verify = verify
        self._channel = channel
        self._manifest: Manifest
        self._own: Mapping[str, HostItem]  # this process's own state in the step, if it has a file of its own
        self._plan: Plan
        self._reader: CheckedReader
        self._replaced: dict[Key, Array] = {}  # frozen arrays that stand in for a base that is missing or damaged

    def run(self) -> Restored:
        """Restore what the request asks for.

        Raises:
            CheckpointNotFoundError: there is no such step.
            CorruptCheckpointError: the step cannot be read, or is not what was saved.
            MismatchError: the step does not fit the live objects.
            ConfigError: the request names an item or leaf that neither side has.
            ProcessError: another process could not restore the step.
        """
        # Plan, read and verify, again if something is wrong; then convert.
        arrays = twice(self._read_and_check)
        converted = self._channel.attempt("convert", functools.partial(self._convert, arrays))
        started = time.monotonic()
        # Write into the live objects. If it fails in any process, what was written is undone in all of them.
        with ExitStack() as undo:
            self._channel.attempt("apply", lambda: self._apply(converted, undo))
            undo.pop_all()
        place_s = time.monotonic() - started
        self._warn()
        proved = self._verify and self._request.only is None and not self._plan.left_out and not self._replaced
        bases = frozenset(base for key in self._replaced if (base := self._manifest.leaves[key].base) is not None)
        return Restored(self._manifest, self._plan.left_out, self._exact(), bases, proved, place_s)

    def _read_and_check(self) -> dict[Key, Any]:
        arrays = self._channel.attempt("read", self._read)
        arrays = self._channel.attempt("broadcast", functools.partial(_with_all_replicas, arrays))
        if self._verify:
            self._channel.attempt("check", functools.partial(self._check, arrays))
        return arrays

    def _read(self) -> dict[Key, Any]:
        """Plan, which raises every mismatch, and read what is planned. No live object is changed."""
        # Plan.
        index = self._channel.processes.index
        self._manifest, self._own = self._source.as_seen_by(self._source.manifest(self._step), index)
        self._plan = planned(self._source.path, self._manifest, self._items, self._rules, self._request)
        targets = {
            (item, name): target
            for item, plan in self._plan.items.items()
            for name, target in _loadable(self._manifest.items[item], plan).items()
        }
        # Read, from the step or from the process's own file.
        stored = {key: target for key, target in targets.items() if not self._is_own(key)}
        self._reader = CheckedReader(self._source, self._manifest, verify=self._verify, channel=self._channel)
        arrays = self._read_with_bases(stored)
        for (item, name), target in targets.items():
            if (item, name) not in stored:
                array = self._own[item].arrays[name]
                arrays[item, name] = array if target is None else put(array, target)
        return arrays

    def _read_with_bases(self, targets: Mapping[Key, Sharding | None]) -> dict[Key, Any]:
        """Read leaves. If a base is missing or damaged, live frozen arrays that have its fingerprints stand in for it.

        A model that was loaded from elsewhere has its frozen parameters before it is restored.
        """
        in_bases = self._manifest.frozen_leaves.keys() & targets.keys()
        if not in_bases or not self._verify or self._channel.processes.count > 1:
            return self._reader.read(targets)
        arrays = self._reader.read({key: target for key, target in targets.items() if key not in in_bases})
        of_bases = {key: target for key, target in targets.items() if key in in_bases}
        try:
            return arrays | twice(lambda: self._reader.read_and_check(of_bases))
        except CorruptCheckpointError as error:
            live = self._live_like(of_bases)
            if live is None:
                raise
            _logger.warning(
                "%s: the live frozen parameters, which have the same fingerprints, stand in for a base, and the next "
                "step writes them again: %s",
                self._source.path,
                error,
            )
            self._replaced = live
            return arrays | live

    def _live_like(self, targets: Mapping[Key, Sharding | None]) -> dict[Key, Array] | None:
        """The live arrays of these leaves, where they are to go; None if one is not what the manifest describes."""
        leaves = self._manifest.leaves
        captured = {item: self._items[item].capture() for item in {item for item, _ in targets}}
        live: dict[Key, Array] = {}
        for (item, name), target in targets.items():
            if name not in captured[item].leaves:
                return None
            held = live_array(name, captured[item].leaves[name])
            array: Array = held if isinstance(held, jax.Array) else host_copy(held)
            meta = leaves[item, name]
            if tuple(array.shape) != meta.shape or str(array.dtype) != meta.dtype:
                return None
            if fingerprint.text(fingerprint.start(array)()) != meta.fingerprint:
                return None
            live[item, name] = array if target is None else put(array, target)
        return live

    def _is_own(self, key: Key) -> bool:
        """Is the leaf in the file with this process's own state?"""
        item, name = key
        return item in self._own and name in self._own[item].arrays

    def _check(self, arrays: Mapping[Key, Array]) -> None:
        """Compare with the fingerprints. Own state is left out: the SHA-256 of its file has been compared already."""
        others = {key: array for key, array in arrays.items() if not self._is_own(key) and key not in self._replaced}
        self._reader.check(others)

    def _convert(self, arrays: Mapping[Key, Array]) -> dict[str, dict[str, Array]]:
        """The arrays in the planned dtypes, by item and leaf."""
        by_item: dict[str, dict[str, Array]] = {item: {} for item in self._plan.items}
        for (item, name), array in arrays.items():
            by_item[item][name] = array
        return {item: _converted(item, plan, by_item[item]) for item, plan in self._plan.items.items()}

    def _apply(self, arrays: Mapping[str, Mapping[str, Array]], undo: ExitStack) -> None:
        """Write into the live objects, and register on `undo` how to reverse it."""
        restoring = Restoring()
        for item in in_order({name: self._items[name] for name in self._plan.items}):
            saved = self._manifest.items[item]
            # An older version did not write what items share: then each is restored as if it were alone.
            known = restoring if saved.shared is not None else Restoring()
            self._items[item].apply(saved, self._plan.items[item], arrays[item], undo, known)

    def _warn(self) -> None:
        path, manifest, count = self._source.path, self._manifest, self._channel.processes.count
        if manifest.processes != count and manifest.own:
            _logger.warning(
                "%s: step %d was saved by %d processes and is restored by %d: what each had for itself (random number "
                "generators, data loaders) goes to the process of the same number; further ones take that of process 0",
                path,
                manifest.step,
                manifest.processes,
                count,
            )
        if self._plan.left_out:
            counts, lines = summary(self._plan.left_out, "`left_out`")
            _logger.warning(
                "%s: step %d: restored without what does not fit: %s\n%s", path, manifest.step, counts, lines
            )

    def _exact(self) -> frozenset[Key]:
        return frozenset(
            (item, name)
            for item, plan in self._plan.items.items()
            for live, name in plan.sources.items()
            if live == name and name not in plan.dtypes
        )


def _with_all_replicas(arrays: Mapping[Key, Array | FirstReplica]) -> dict[Key, Array]:
    """The arrays on all their devices. Those that only the first replica has read are sent to the other replicas."""
    sent = broadcast.broadcast({key: array for key, array in arrays.items() if isinstance(array, FirstReplica)})
    return {key: sent[key] if isinstance(array, FirstReplica) else array for key, array in arrays.items()}


def _loadable(saved: ItemMeta, plan: ItemPlan) -> dict[str, Sharding | None]:
    """The shardings to read into, by leaf. None, host memory, for a leaf to convert that JAX would narrow first."""
    return {
        name: None if name in plan.dtypes and not fits_on_device(BY_NAME[saved.leaves[name].dtype]) else target
        for name, target in plan.targets.items()
    }


def _converted(item: str, plan: ItemPlan, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """The arrays of one item in the planned dtypes.

    Raises:
        MismatchError: an integer does not fit into its new dtype.
    """
    converted = dict(arrays)
    for name, dtype in plan.dtypes.items():
        array, target = arrays[name], plan.targets[name]
        new = array.astype(dtype)
        if dtype.kind in "iu" and not bool((new.astype(array.dtype) == array).all()):
            problem = Problem("dtype", item, name, f"values that fit into {dtype}", f"larger ones of {array.dtype}")
            raise MismatchError("the checkpoint", [problem], "Give the live tensor the dtype that it had.")
        converted[name] = new if target is None or isinstance(new, jax.Array) else put(new, target)
    return converted
