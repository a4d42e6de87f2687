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

from torchorbax._src.arrays import fingerprint
from torchorbax._src.arrays.leaves import Array
from torchorbax._src.distributed.channel import Channel
from torchorbax._src.distributed.processes import Processes
from torchorbax._src.format.manifest import Key, Manifest, by_base
from torchorbax._src.format.per_process import HostItem
from torchorbax._src.format.values import Json
from torchorbax._src.save.contribution import Contribution, contribution, with_bases, with_frozen, with_reports
from torchorbax._src.save.decision import Decision
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

            def decide(summaries: Sequence[dict[str, Json]]) -> dict[str, Json]:
                return self._decide(summaries, origin)

            answer = self._channel.agree("start", lambda: self._contribute(localized=localized), decide)
            if answer["refusal"] is not None:  # what bases were believed to hold is written again, by all
                self.forget_frozen, refusal = True, answer["refusal"]
                answer = self._channel.agree("start", lambda: self._contribute_frozen(refusal), decide)
                if answer["refusal"] is not None:
                    raise SaveError(self._step, self._storage.path, answer["refusal"])
                self.forget_frozen = False
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

    def _contribute_frozen(self, refusal: str) -> dict[str, Json]:
        """Describe to process 0 the same with all frozen leaves, because bases do not hold them as was believed."""
        _logger.warning("%s: step %d writes all frozen parameters: %s", self._storage.path, self._step, refusal)
        count = self._processes.count
        whole = with_frozen(self._contribution, self._processes.index, count)
        if whole is None:  # the loop has dropped one since; then a later state has others
            raise SaveError(self._step, self._storage.path, f"{refusal}; the next save writes them again")
        self._contribution = whole
        return whole.summary(self._step) if count > 1 else {}

    def _decide(self, summaries: Sequence[dict[str, Json]], origin: str) -> dict[str, Json]:
        """In process 0: compare what the processes are about to write, and make the manifest."""
        with self._as_save_error():
            decision = Decision(self._save, self._storage, self._steps, self._contribution)
            answer = decision.answer(summaries, origin)
            if decision.manifest is not None:
                self._manifest = decision.manifest
            return answer

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

        It is a JSON object: `sums` of the shards by item and leaf; `own`, the SHA-256 of the file with the process's
        own state, or None; and `files`, the digests of the files of other processes than process 0.
        """
        self._save.phase = "writing arrays"
        process, alone = self._processes.index, self._processes.count == 1
        sums: dict[str, dict[str, str]] = {}
        for (item, name), of_leaf in storage.write_arrays(folders, arrays, process, alone=alone).items():
            if process == 0 or of_leaf.any():
                sums.setdefault(item, {})[name] = fingerprint.text(of_leaf)
        digest = storage.write_process_items(folders, own, process) if own else None
        files = storage.written_files(folders, process) if process > 0 else {}
        return {"sums": sums, "own": digest, "files": files}

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
