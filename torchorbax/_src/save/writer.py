"""Writes a save, by all processes of a run together. For Orbax, process 0 is the only process.

The phases of a save:

start    every process reports what it is about to write; process 0 compares, and numbers the bases of frozen leaves
write    process 0 has the folders created; every process writes its arrays; process 0 writes the manifest and commits
commit   all processes learn whether the step was committed, and raise the same error or none
read     if it is due, the processes read the step again and compare it
end      process 0 deletes older steps; all processes learn which ones
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from torchorbax._src.arrays import fingerprint
from torchorbax._src.arrays.leaves import Array
from torchorbax._src.distributed.channel import Channel
from torchorbax._src.distributed.processes import Processes
from torchorbax._src.format.manifest import ItemMeta, Key, Manifest, by_base
from torchorbax._src.format.per_process import HostItem
from torchorbax._src.format.values import Json
from torchorbax._src.save import frozen
from torchorbax._src.save.contribution import Contribution, contribution, versions, with_bases, with_reports
from torchorbax._src.save.read_back import ReadBack, VerifyAfterSave
from torchorbax._src.save.save import Committed, Save
from torchorbax._src.storage.steps import Steps
from torchorbax._src.storage.storage import Folders, Storage
from torchorbax.errors import CorruptCheckpointError, ProcessError, SaveError

_logger = logging.getLogger(__name__)


class Writer:
    """Writes saves, one at a time, on the thread that calls it.

    Args:
        storage: where the steps are written.
        steps: the steps of the run.
        processes: the processes of the run; each writes its own shards.
        origin: in a local tier, the run and its start, for the manifest (see `Manifest`).
        localized: write this process's part of the state as a step of its own (see `save.local_tier`).
        verify_after_save: which steps are read again after their commit (see `save.read_back`).

    Attributes:
        forget_frozen: the caller must forget which frozen leaves have been written, so that the next save writes all of
            them. A base that the step needed is gone, or the processes do not agree on the frozen leaves.
    """

    def __init__(
        self,
        storage: Storage,
        steps: Steps,
        processes: Processes,
        *,
        origin: str = "",
        localized: bool = False,
        verify_after_save: VerifyAfterSave = "first",
    ) -> None:
        self.forget_frozen = False
        self._storage = storage
        self._steps = steps
        self._channel = Channel(processes, "save")
        self._read_back = ReadBack(storage, steps, self._channel, verify_after_save)
        self._origin = origin
        self._localized = localized
        self._saves = 0

    @property
    def waiting_for(self) -> int | None:
        """The process that this one is waiting for in a save; None if it is not waiting."""
        return self._channel.waiting_for

    def write(self, save: Save, when_committed: Callable[[Committed], object]) -> None:
        """Write a step, commit it, and delete the steps that the policy does not preserve.

        Args:
            save: what to save. Its snapshot is handed over, so that the arrays are freed as they are written.
            when_committed: called as soon as the step is committed.

        Raises:
            SaveError: the step has not been saved, or something failed after its commit. The reason is the same in all
                processes.
        """
        self._saves += 1
        self._channel.begin(self._saves)
        writing = _StepWriting(self._storage, self._steps, self._channel, save)
        try:
            writing.start(self._origin, localized=self._localized)
        finally:
            self.forget_frozen = self.forget_frozen or writing.forget_frozen
        committed = writing.commit()
        when_committed(committed)
        try:
            writing.read_back(self._read_back)
        finally:
            self.forget_frozen = self.forget_frozen or writing.forget_frozen
        writing.end(self._read_back)


class _StepWriting:
    """The writing of one step, with one method for each phase."""

    def __init__(self, storage: Storage, steps: Steps, channel: Channel, save: Save) -> None:
        self.forget_frozen = False
        self._storage = storage
        self._steps = steps
        self._channel = channel
        self._processes = channel.processes
        self._save = save
        self._step = save.step
        self._contribution: Contribution
        self._manifest: Manifest
        self._bases: list[int] = []  # the numbers of the bases that this step writes
        self._own: dict[str, HostItem] = {}  # this process's own state, where it differs from that of process 0

    # Start.

    def start(self, origin: str, *, localized: bool) -> None:
        """Agree on what is written, and on the numbers of bases."""
        self._save.phase = "describing its arrays"
        # Every process reports, process 0 decides.
        with self._as_save_error():
            answer = self._channel.agree(
                "start", lambda: self._contribute(localized=localized), lambda found: self._decide(found, origin)
            )
            if answer["refusal"] is not None:
                self.forget_frozen = True
                raise SaveError(self._step, self._storage.path, answer["refusal"])
        # Apply the decision: process 0 has its manifest already, the others get the numbers of bases.
        mine = self._contribution
        if not self._processes.is_first:
            items = with_bases(mine.items, answer["bases"])
            self._manifest = Manifest(self._step, self._save.time, {}, items)
            self._own = {item: own for item, own in mine.own.items() if own.digest() != answer["own"].get(item)}
        for item, name in answer["known"]:
            mine.arrays.pop((item, name), None)
        self._bases = answer["new_bases"]

    def _contribute(self, *, localized: bool) -> dict[str, Json]:
        """Take over the snapshot, and describe to process 0 what this process is about to write."""
        count = self._processes.count
        with self._as_save_error() if self._processes.is_first else contextlib.nullcontext():
            snapshot = self._save.take_snapshot()
            self._contribution = contribution(snapshot, self._processes.index, count, localized=localized)
        return self._contribution.summary(self._step) if count > 1 else {}

    def _decide(self, summaries: Sequence[dict[str, Json]], origin: str) -> dict[str, Json]:
        """In process 0: compare what the processes are about to write, and make the manifest."""
        with self._as_save_error():
            return self._answer(summaries, origin)

    def _answer(self, summaries: Sequence[dict[str, Json]], origin: str) -> dict[str, Json]:
        """The decision that is published to all processes.

        It is a JSON object: `refusal`, why nothing can be written, or None; `bases`, the numbers of bases by item and
        leaf; `new_bases`, the bases that this step writes; `known`, the leaves that a base has already; and `own`, the
        digests of process 0's own state by item.
        """
        mine = self._contribution
        answer: dict[str, Json] = {"refusal": self._disagreement(summaries)}
        if answer["refusal"] is not None:
            return answer
        # The manifest, with the numbers of bases.
        self._save.phase = "removing what is in its way"
        self._steps.make_way(self._step)
        self._save.phase = "describing its arrays"
        items, known = self._numbered(summaries)
        self._manifest = Manifest(
            self._step,
            self._save.time,
            self._metrics(),
            items,
            versions(),
            parts=mine.parts,
            origin=origin,
            run=self._storage.identity(),
            epoch=self._storage.epoch,
        )
        # What the other processes need to know of the manifest.
        written = [key for key in mine.arrays if key not in known]
        missing = self._missing_base(written)
        bases = {
            item: {name: leaf.base for name, leaf in meta.leaves.items() if leaf.base is not None}
            for item, meta in (items.items() if self._processes.count > 1 else ())
        }
        return {
            "refusal": missing,
            "bases": bases,
            "new_bases": [base for base in by_base(self._manifest.leaves, written) if base is not None],
            "known": known,
            "own": summaries[0].get("own"),
        }

    def _metrics(self) -> dict[str, float]:
        """The metrics as numbers. One that cannot be read must not cost the step, which is saved without it."""
        metrics: dict[str, float] = {}
        for name, value in self._save.metrics.items():
            try:
                metrics[name] = float(np.asarray(value))
            except Exception as error:  # of the computation that the value comes from, of any type
                _logger.warning(
                    "%s: step %d is saved without metric %s, which cannot be read: %s",
                    self._storage.path,
                    self._step,
                    name,
                    _error_line(error),
                )
        return metrics

    def _disagreement(self, summaries: Sequence[dict[str, Json]]) -> str | None:
        """The reason if the processes do not agree on which frozen leaves have been written; None if they do.

        Raises:
            SaveError: they do not agree on something else.
        """
        path, first = self._storage.path, summaries[0]
        for process, summary in enumerate(summaries[1:], start=1):
            if summary["step"] != self._step:
                raise SaveError(self._step, path, f"process {process} saves step {summary['step']} instead")
            if summary["shared"] != first["shared"]:
                reason = f"process {process} has other arrays, by name, shape or dtype, than process 0"
                raise SaveError(self._step, path, reason)
            if summary["frozen"] != first["frozen"]:
                return f"process {process} has other frozen leaves than process 0; the next save writes all of them"
        return None

    def _numbered(self, summaries: Sequence[dict[str, Json]]) -> tuple[dict[str, ItemMeta], list[Key]]:
        """The items with the numbers of bases, and those new frozen leaves that a base has already after all."""
        mine = self._contribution
        if not mine.sums:
            return dict(mine.items), []
        sums = {key: [own] for key, own in mine.sums.items()}
        for summary in summaries[1:]:
            for item, name, text in summary["sums"]:
                sums[item, name].append(fingerprint.sums(text))
        texts = {key: fingerprint.text(fingerprint.total(parts)) for key, parts in sums.items()}
        taken = [*self._storage.bases.steps(), *self._storage.bases.unfinished()]
        next_base = max(taken, default=-1) + 1
        return frozen.numbered(mine.items, texts, self._steps.newest_with_bases(self._step), next_base)

    def _missing_base(self, written: Sequence[Key]) -> str | None:
        """The reason if a base is gone that the step refers to and does not write itself; None if all are there."""
        referred = self._manifest.frozen_leaves
        bases = self._steps.good_bases() if referred else set()
        for key, leaf in referred.items():
            if leaf.base not in bases and key not in set(written):
                return f"base {leaf.base}, which has its frozen parameters, is gone; the next save writes them again"
        return None

    # Write and commit.

    def commit(self) -> Committed:
        """Write everything and commit it. When this returns or raises, all processes know the outcome."""
        nbytes = self._contribution.nbytes
        if self._processes.is_first:
            with self._as_save_error(), self._channel.announcing("commit") as announce:
                self._manifest = self._write()
                self._steps.commit(self._manifest)
                with self._as_save_error(committed=True):  # the others may have heard it, even if no answer comes back
                    announce({"metrics": self._manifest.metrics, "nbytes": nbytes})
        else:
            outcome = self._write_and_hear()
            self._manifest = dataclasses.replace(self._manifest, metrics=outcome["metrics"])
            self._steps.commit(self._manifest)
            nbytes = outcome["nbytes"]
        return Committed(self._manifest, self._contribution.identities, nbytes)

    def _write_and_hear(self) -> dict[str, Any]:
        """In other processes than process 0: write, and hear from process 0 whether the step was committed."""
        failure: Exception | None = None
        try:
            self._write()
        except Exception as error:  # `collect` has reported it to process 0, which announces the outcome
            if isinstance(error, ProcessError) and error.phase != "write":  # no report, so process 0 does not commit
                raise SaveError(self._step, self._storage.path, _error_line(error)) from error
            failure = error  # if it is a ProcessError, the report may have arrived all the same
        try:
            outcome: dict[str, Any] = self._channel.hear("commit")
        except ProcessError as error:
            unknown = "process 0 does not say how the save ended, so the step may have been saved all the same"
            raise SaveError(self._step, self._storage.path, f"{unknown}: {_error_line(error)}") from (failure or error)
        except SaveError as error:
            raise error from (error.__cause__ if failure is None or isinstance(failure, SaveError) else failure)
        if failure is not None and not isinstance(failure, ProcessError):
            raise SaveError(self._step, self._storage.path, _error_line(failure)) from failure
        return outcome

    def _write(self) -> Manifest:
        """Write the arrays of this process: first the new bases, then the step."""
        self._save.phase = "making its folders"
        manifest, arrays = self._manifest, self._contribution.arrays
        keys = by_base(manifest.leaves, arrays)
        for base in self._bases:
            part = {key: arrays.pop(key) for key in keys.get(base, [])}
            try:
                self._write_step(self._storage.bases, manifest.of_base(base), part, {})
            except SaveError as error:
                reason = f"base {base}: {error}"
                raise SaveError(self._step, self._storage.path, reason) from error.__cause__ or error
        return self._write_step(self._storage, manifest, arrays, self._own)

    def _write_step(
        self, storage: Storage, manifest: Manifest, arrays: dict[Key, Array], own: dict[str, HostItem]
    ) -> Manifest:
        """Write one step or base, in all processes. Process 0 commits it.

        Returns:
            In process 0, the manifest with fingerprints; in other processes, the manifest unchanged.
        """
        if not self._processes.is_first:
            folders = self._channel.hear("folders")
            self._channel.collect("write", lambda: self._write_part(storage, folders, arrays, own))
            self._save.phase = "committing"
            return manifest
        with self._channel.announcing("folders") as announce:

            def fill(folders: Folders) -> Manifest:
                announce(folders)
                parts = self._channel.collect("write", lambda: self._write_part(storage, folders, arrays, own))
                self._save.phase = "committing and flushing"
                return with_reports(manifest, parts or [])

            return storage.write(manifest.step, arrays, fill)

    def _write_part(
        self, storage: Storage, folders: Folders, arrays: dict[Key, Array], own: dict[str, HostItem]
    ) -> dict[str, Json]:
        """Write this process's shards and own state. The result is its report to process 0.

        It is a JSON object: `sums` of the shards by item and leaf, and `own`, the SHA-256 of the file with the
        process's own state, or None.
        """
        self._save.phase = "writing arrays"
        process = self._processes.index
        sums: dict[str, dict[str, str]] = {}
        for (item, name), of_leaf in storage.write_arrays(folders, arrays, process).items():
            if process == 0 or of_leaf.any():
                sums.setdefault(item, {})[name] = fingerprint.text(of_leaf)
        return {"sums": sums, "own": storage.write_process_items(folders, own, process) if own else None}

    # Read back.

    def read_back(self, read_back: ReadBack) -> None:
        """Read the step again if that is due. A step that is not what was saved no longer counts."""
        self._save.phase = "reading it again"
        try:
            if read_back.is_due(self._step):
                read_back.read(self._manifest, self._bases)
        except CorruptCheckpointError as error:
            self._steps.mark_damaged(self._step)
            self._steps.damaged_bases |= self._manifest.bases
            self.forget_frozen = True
            reason = f"what is read back is not what was saved: {'; '.join(error.reasons.values())}"
            raise SaveError(self._step, self._storage.path, reason) from error
        except Exception as error:  # it may be good all the same; but no older step goes for it
            unread = f"it could not be read back: {_error_line(error)}"
            raise SaveError(self._step, self._storage.path, unread, committed=True) from error

    # End.

    def end(self, read_back: ReadBack) -> None:
        """Delete the steps that the policy does not preserve, and read an old one again if that is due."""
        self._save.phase = "deleting older steps"
        with self._as_save_error(committed=True):
            deleted = self._channel.first("end", self._retain)
            read_back.scrub(self._step)
        if not self._processes.is_first:
            for step in deleted:
                self._steps.drop(step)

    def _retain(self) -> list[int]:
        with self._as_save_error(committed=True):  # here too, so that all processes raise the same error
            return self._steps.retain(self._step)

    @contextlib.contextmanager
    def _as_save_error(self, *, committed: bool = False) -> Iterator[None]:
        try:
            yield
        except SaveError as error:
            if error.step == self._step:
                raise
            # Process 0 has failed, and is saving another step than this process. Its reason holds for this step, too.
            reason = error.reason
            raise SaveError(self._step, self._storage.path, reason, committed=error.committed) from error.__cause__
        except Exception as error:
            raise SaveError(self._step, self._storage.path, _error_line(error), committed=committed) from error


def _error_line(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}"
