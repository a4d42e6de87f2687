"""One restore: planned as a whole, loaded and converted, and only then written into the live objects."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import jax
from jax.sharding import Sharding

from torchorbax._src.arrays.broadcast import FirstReplica, broadcast
from torchorbax._src.arrays.dtypes import BY_NAME, fits_on_device
from torchorbax._src.arrays.leaves import Array, put
from torchorbax._src.arrays.sharding_rules import ShardingRules
from torchorbax._src.distributed.channel import Channel
from torchorbax._src.format.manifest import ItemMeta, Manifest
from torchorbax._src.format.per_process import HostItem
from torchorbax._src.restore import fingerprint_check
from torchorbax._src.restore.plan import Plan, planned
from torchorbax._src.state.item import Item, ItemPlan
from torchorbax._src.state.request import Request
from torchorbax.errors import CorruptCheckpointError, MismatchError, Problem, ProcessError, summary

_logger = logging.getLogger(__name__)

T = TypeVar("T")


class Source(Protocol):
    """What a step is read from: a `Storage`, as a rule."""

    @property
    def path(self) -> str:
        """Where it is, for messages."""

    def manifest(self, step: int) -> Manifest:
        """What the step says about itself."""

    def as_seen_by(self, manifest: Manifest, process: int) -> tuple[Manifest, Mapping[str, HostItem]]:
        """The step as a process finds it, and what that process has of it for itself."""

    def read(
        self,
        step: int,
        items: Mapping[str, ItemMeta],
        targets: Mapping[str, Mapping[str, Sharding | None]],
        then: Callable[[str, str, Any], object] | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Leaves of the step, into these shardings."""


@dataclass(frozen=True)
class Restored:
    """What a restore has done.

    Attributes:
        manifest: of the step.
        left_out: what does not fit and was not restored; nothing if the request was strict.
        exact: items and leaves that live under the names and in the dtypes that they have on storage.
    """

    manifest: Manifest
    left_out: tuple[Problem, ...]
    exact: frozenset[tuple[str, str]]


def restore_step(
    storage: Source,
    step: int,
    items: Mapping[str, Item],
    rules: ShardingRules | None,
    request: Request,
    *,
    verify: bool,
    channel: Channel,
) -> Restored:
    """Restore what is asked for of a step into the live objects; all or nothing.

    Args:
        storage: the run.
        step: which step.
        items: the live objects.
        rules: where they go.
        request: what is asked for.
        verify: compare what was read with its fingerprints.
        channel: to the other processes; all restore the same, or none does.

    Raises:
        CheckpointNotFoundError: there is no such step.
        CorruptCheckpointError: it cannot be read, or is not what was saved.
        MismatchError: it does not fit the live objects.
        ConfigError: the request names what nobody has.
        ProcessError: another process cannot restore it.
    """

    def loaded() -> tuple[Manifest, Plan, dict[str, dict[str, Any]], set[tuple[str, str]]]:
        manifest, own = storage.as_seen_by(storage.manifest(step), channel.processes.index)
        plan = planned(storage.path, manifest, items, rules, request)
        targets = {name: _loadable(manifest.items[name], one) for name, one in plan.items.items()}
        here = {
            name: {leaf for leaf in own[name].arrays if leaf in targets[name]} for name in plan.items if name in own
        }
        stored = {
            name: {leaf: target for leaf, target in one.items() if leaf not in here.get(name, ())}
            for name, one in targets.items()
        }
        then = ahead.start if verify else None
        arrays = storage.read(step, {name: manifest.items[name] for name in plan.items}, stored, then)
        for name, leaves in here.items():
            for leaf in leaves:
                array, target = own[name].arrays[leaf], targets[name][leaf]
                arrays[name][leaf] = array if target is None else put(array, target)
        return manifest, plan, arrays, {(name, leaf) for name, leaves in here.items() for leaf in leaves}

    def applied() -> None:
        for name, one in plan.items.items():
            items[name].apply(manifest.items[name], one, converted[name], undo)

    ahead = fingerprint_check.Ahead()
    manifest, plan, arrays, own = _together(channel, "read", storage.path, step, loaded)
    arrays = _together(channel, "broadcast", storage.path, step, lambda: _whole(arrays))
    if verify:
        to_check = {
            name: {leaf: array for leaf, array in one.items() if (name, leaf) not in own}  # their file has a SHA-256
            for name, one in arrays.items()
        }
        check = functools.partial(fingerprint_check.check, storage.path, step, manifest.items, to_check, channel, ahead)
        _together(channel, "check", storage.path, step, check)
    converted = _together(
        channel,
        "convert",
        storage.path,
        step,
        lambda: {name: _converted(name, one, arrays[name]) for name, one in plan.items.items()},
    )
    with ExitStack() as undo:
        _together(channel, "apply", storage.path, step, applied)
        undo.pop_all()
    _tell_of_other_processes(storage.path, manifest, channel.processes.count)
    if plan.left_out:
        counts, lines = summary(plan.left_out, "`left_out`")
        _logger.warning("%s: step %d: restored without what does not fit: %s\n%s", storage.path, step, counts, lines)
    exact = {
        (name, leaf)
        for name, one in plan.items.items()
        for live, leaf in one.sources.items()
        if live == leaf and leaf not in one.dtypes
    }
    return Restored(manifest, plan.left_out, frozenset(exact))


def _together(channel: Channel, phase: str, path: str, step: int, action: Callable[[], T]) -> T:
    """What `action` gives, if it succeeds in all processes.

    Raises:
        CorruptCheckpointError: it found the step damaged, here or elsewhere.
        ProcessError: it failed otherwise elsewhere. What it raises here is raised as it is.
    """
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:  # raised below, when the others know
        failure = error
    damage = failure.reasons.get(step) if isinstance(failure, CorruptCheckpointError) else None
    mine = None if failure is None else {"damage": damage, "error": f"{type(failure).__name__}: {failure}"}
    failed = {process: told for process, told in enumerate(channel.everyone(phase, mine)) if told is not None}
    worse = {process: told["error"] for process, told in failed.items() if told["damage"] is None}
    if failure is not None and (damage is None or not worse):
        raise failure
    if worse:
        raise ProcessError.of_failures(worse, phase)
    if failed:
        found = "; ".join(f"process {process} found: {told['damage']}" for process, told in failed.items())
        raise CorruptCheckpointError(path, {step: found})
    return result


def _whole(arrays: Mapping[str, Mapping[str, Array | FirstReplica]]) -> dict[str, dict[str, Array]]:
    """The arrays with all their replicas."""
    flat = {(item, name): array for item, one in arrays.items() for name, array in one.items()}
    spread = broadcast({key: array for key, array in flat.items() if isinstance(array, FirstReplica)})
    whole: dict[str, dict[str, Array]] = {item: {} for item in arrays}
    for key, array in flat.items():
        whole[key[0]][key[1]] = spread[key] if isinstance(array, FirstReplica) else array
    return whole


def _tell_of_other_processes(path: str, manifest: Manifest, count: int) -> None:
    if manifest.processes != count and manifest.own:
        _logger.warning(
            "%s: step %d was saved by %d processes and is restored by %d: what each had for itself (random number "
            "generators, data loaders) goes to the process of the same number; further ones take that of process 0",
            path,
            manifest.step,
            manifest.processes,
            count,
        )


def _loadable(saved: ItemMeta, plan: ItemPlan) -> dict[str, Any]:
    """The targets, but host memory for what JAX would narrow before it could be converted."""
    return {
        name: None if name in plan.dtypes and not fits_on_device(BY_NAME[saved.leaves[name].dtype]) else target
        for name, target in plan.targets.items()
    }


def _converted(item: str, plan: ItemPlan, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """The arrays in the dtypes planned.

    Raises:
        MismatchError: an integer does not fit into the new dtype.
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
