"""One save, by all processes of a run: they compare what they are about to write, each writes its part, process 0
commits it and lets older steps go, and all learn how it ended."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import torch

from torchorbax._src.arrays import fingerprint, leaves
from torchorbax._src.distributed.channel import Channel
from torchorbax._src.distributed.processes import Processes
from torchorbax._src.format import per_process
from torchorbax._src.format.manifest import ItemMeta, Manifest, in_base
from torchorbax._src.format.per_process import HostItem
from torchorbax._src.format.values import Json
from torchorbax._src.save import frozen, local_tier
from torchorbax._src.save.contribution import Key, _described, _Part, _with_bases
from torchorbax._src.save.frozen import NEW_BASE
from torchorbax._src.save.save import Committed, Save
from torchorbax._src.save.snapshot import Snapshot
from torchorbax._src.storage import store
from torchorbax._src.storage.steps import Steps
from torchorbax._src.storage.store import Storage
from torchorbax._src.tensors import torchax_tensors
from torchorbax.errors import ProcessError, SaveError


class Writer:
    """Writes snapshots, one at a time, on the thread that calls it.

    Args:
        storage: where to.
        steps: those there are.
        processes: all of the run; each writes its part.
        origin: what the manifest says of itself.
        localized: write what this process has of everything, as if there were no other.

    Attributes:
        lost_base: a base that was taken to be there is gone, so nothing frozen is known any more.
    """

    def __init__(
        self, storage: Storage, steps: Steps, processes: Processes, *, origin: str = "", localized: bool = False
    ) -> None:
        self.lost_base = False
        self._origin = origin
        self._localized = localized
        self._storage = storage
        self._steps = steps
        self._processes = processes
        self._channel = Channel(processes, "save")
        self._saves = 0
        self._leftovers_removed = False

    def write(self, save: Save, when_committed: Callable[[Committed], object]) -> None:
        """Write a step, commit it, and let older ones go.

        Args:
            save: its snapshot is taken out, so that the arrays are freed as they are written.
            when_committed: called as soon as the step is committed.

        Raises:
            SaveError: it is not saved, or what follows failed; for the same reason in all processes.
        """
        self._saves += 1
        self._channel.begin(self._saves)
        holder: list[_Part | Exception] = []
        mine: dict[str, Json] = {"step": save.step, "error": None}
        try:
            part = self._part_of(save.take_snapshot())
            mine |= _described(part) if self._processes.count > 1 else {}
            holder.append(part)
            del part
        except Exception as error:  # raised when the others know
            holder[:] = [error]
            mine["error"] = told(error)
        work = self._lead if self._processes.is_first else self._follow
        work(save, holder, mine, when_committed)

    # ----------------------------------------------------------------------------------------------------- one's part

    def _part_of(self, snapshot: Snapshot) -> _Part:
        items, arrays = snapshot.items, snapshot.arrays
        new = {
            (item, name): arrays[item][name]
            for item, meta in items.items()
            for name, leaf in meta.leaves.items()
            if leaf.base == NEW_BASE
        }
        own: dict[str, HostItem] = {}
        parts: dict[str, dict[str, Json]] = {}
        if self._localized:
            items, parts = local_tier.localized(items, arrays)
        if self._processes.count > 1:
            own = per_process.host_items(items, arrays)
            if not self._processes.is_first:
                per_process.drop_host_arrays(arrays)
                new = {key: array for key, array in new.items() if leaves.is_global(array)}
        sums = {key: sums() for key, sums in fingerprint.start_all(new).items()}
        return _Part(items, arrays, own, sums, snapshot.identities, parts)

    # ---------------------------------------------------------------------------------------------------- process 0

    def _lead(
        self,
        save: Save,
        holder: list[_Part | Exception],
        mine: dict[str, Json],
        when_committed: Callable[[Committed], object],
    ) -> None:
        step, path = save.step, self._storage.path
        try:
            written = self._write_first(save, holder, mine)
        except SaveError as error:
            outcome = {"reason": error.reason, "others": _others_in(error), "lost_base": self.lost_base}
            self._channel.publish("commit", outcome)
            raise
        # Before older steps go, which takes time: the others are waiting.
        self._channel.publish("commit", {"reason": None, "metrics": written.manifest.metrics, "nbytes": written.nbytes})
        when_committed(written)
        try:
            deleted = self._steps.retain(step)
        except Exception as failure:  # the step itself is good
            self._channel.publish("end", {"reason": told(failure), "deleted": []})
            raise SaveError(step, path, told(failure), committed=True) from failure
        self._channel.publish("end", {"reason": None, "deleted": deleted})

    def _write_first(self, save: Save, holder: list[_Part | Exception], mine: dict[str, Json]) -> Committed:
        """Come to terms with the others, write this process's part, and commit."""
        try:
            part = holder.pop()
            parts = self._channel.gather("start", mine) or []
            if isinstance(part, Exception):
                raise part
            self._check_agreement(save.step, parts)
            if not self._leftovers_removed:
                self._storage.remove_leftovers()
                self._leftovers_removed = True
            items, known = self._numbered(save.step, part, parts)
            for item, name in known:
                del part.arrays[item][name]
            metrics = {name: float(np.asarray(value)) for name, value in save.metrics.items()}
            manifest = Manifest(
                save.step, save.time, metrics, items, _versions(), parts=part.parts, origin=self._origin
            )
            self._check_bases(manifest, part.arrays)
            self._steps.make_way(save.step)
        except Exception as error:
            self._channel.publish("start", {"error": error.reason if isinstance(error, SaveError) else told(error)})
            if isinstance(error, SaveError):
                raise
            raise SaveError(save.step, self._storage.path, told(error)) from error
        bases = {
            item: {name: leaf.base for name, leaf in meta.leaves.items() if leaf.base is not None}
            for item, meta in (items.items() if self._processes.count > 1 else ())
        }
        self._channel.publish("start", {"error": None, "bases": bases, "known": known, "own": mine.get("own")})
        nbytes = part.nbytes
        manifest = self._storage.write(manifest, part.arrays, self._channel)
        self._steps.commit(manifest)
        return Committed(manifest, part.identities, nbytes)

    def _check_agreement(self, step: int, parts: list[Json]) -> None:
        path, first = self._storage.path, parts[0]
        failed = {process: part["error"] for process, part in enumerate(parts) if part["error"] is not None}
        if failed:
            raise ProcessError.of_failures(failed, "start")
        for process, part in enumerate(parts):
            if part["step"] != step:
                raise SaveError(step, path, f"process {process} saves step {part['step']} instead")
            if part.get("shared") != first.get("shared"):
                raise SaveError(
                    step, path, f"process {process} has other arrays, by name, shape or dtype, than process 0"
                )
            if part.get("frozen") != first.get("frozen"):
                self.lost_base = True
                raise SaveError(step, path, f"process {process} takes other arrays for frozen; the next save has all")

    def _numbered(self, step: int, part: _Part, parts: list[Json]) -> tuple[dict[str, ItemMeta], list[Key]]:
        """What the step says of its items, and which of the new frozen leaves a base has after all."""
        if not part.sums:
            return dict(part.items), []
        sums = {key: [own] for key, own in part.sums.items()}
        for other in parts[1:]:
            for item, name, text in other["sums"]:
                sums[item, name].append(fingerprint.sums(text))
        texts = {key: fingerprint.text(fingerprint.total(one)) for key, one in sums.items()}
        return frozen.numbered(part.items, texts, self._steps.newest_whole_before(step), self._storage.next_base())

    def _check_bases(self, manifest: Manifest, arrays: Mapping[str, Mapping[str, Any]]) -> None:
        """See that the bases are there which the step refers to and does not write itself.

        Raises:
            SaveError: one is gone.
        """
        referred = in_base(manifest)
        bases = self._storage.bases() if referred else set()
        for (item, name), leaf in referred.items():
            if name not in arrays[item] and leaf.base not in bases:
                self.lost_base = True
                reason = f"base {leaf.base}, which has its frozen parameters, is gone; the next save writes them again"
                raise SaveError(manifest.step, self._storage.path, reason)

    # --------------------------------------------------------------------------------------------- the other processes

    def _follow(
        self,
        save: Save,
        holder: list[_Part | Exception],
        mine: dict[str, Json],
        when_committed: Callable[[Committed], object],
    ) -> None:
        step, path = save.step, self._storage.path
        failure: Exception | None = None
        written: Committed | None = None
        try:
            written = self._write_part(save, holder, mine)
        except ProcessError as error:  # nobody is there who could say how it ended
            raise SaveError(step, path, told(error)) from error
        except Exception as error:  # process 0 knows, and will say so
            failure = error
        try:
            outcome = self._channel.publish("commit")
        except ProcessError as error:
            unknown = f"process 0 does not say how it ended, so it may have been saved all the same: {told(error)}"
            raise SaveError(step, path, unknown) from (failure or error)
        if outcome["reason"] is not None or written is None:
            self.lost_base = self.lost_base or bool(outcome.get("lost_base"))
            if outcome.get("others") is not None and (failure is None or isinstance(failure, SaveError)):
                failure = ProcessError(*outcome["others"])
            raise SaveError(step, path, outcome["reason"] or str(failure)) from failure
        manifest = dataclasses.replace(written.manifest, metrics=outcome["metrics"])
        written = dataclasses.replace(written, manifest=manifest, nbytes=outcome["nbytes"])
        self._steps.commit(manifest)
        when_committed(written)
        try:
            end = self._channel.publish("end")
        except ProcessError as error:
            raise SaveError(step, path, told(error), committed=True) from error
        for deleted in end["deleted"]:
            self._steps.drop(deleted)
        if end["reason"] is not None:
            raise SaveError(step, path, end["reason"], committed=True)

    def _write_part(self, save: Save, holder: list[_Part | Exception], mine: dict[str, Json]) -> Committed:
        part = holder.pop()
        self._channel.gather("start", mine)
        answer = self._channel.publish("start")
        if isinstance(part, Exception):
            raise part
        if answer["error"] is not None:
            raise SaveError(save.step, self._storage.path, answer["error"])
        items = _with_bases(part.items, answer["bases"])
        for item, name in answer["known"]:
            part.arrays[item].pop(name, None)
        own = {item: one for item, one in part.own.items() if mine["own"][item] != answer["own"].get(item)}
        self._storage.contribute(items, part.arrays, own, self._channel)
        return Committed(Manifest(save.step, save.time, {}, items), part.identities, 0)  # process 0 says how much


def told(error: Exception) -> str:
    """An error in one line, for the others."""
    return f"{type(error).__name__}: {error}"


def _others_in(error: BaseException | None) -> Json:
    """The ProcessError behind an error, for those who are to raise the same."""
    while error is not None and not isinstance(error, ProcessError):
        error = None if error.__cause__ is error else error.__cause__
    return None if error is None else [list(error.processes), error.phase, error.reason]


@functools.cache
def _versions() -> dict[str, str]:
    return {
        "torchorbax": importlib.metadata.version("torchorbax"),
        "torch": torch.__version__,
        "torchax": torchax_tensors.VERSION,
        "jax": jax.__version__,
        "orbax-checkpoint": store.VERSION,
        "numpy": np.__version__,
    }
