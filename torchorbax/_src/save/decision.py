"""What process 0 decides before a step is written: whether all processes write the same, and where frozen leaves go."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from torchorbax._src.arrays import fingerprint
from torchorbax._src.format.manifest import ItemMeta, Key, Manifest, by_base
from torchorbax._src.format.values import Json
from torchorbax._src.save import frozen
from torchorbax._src.save.contribution import Contribution, versions
from torchorbax._src.save.save import Save
from torchorbax._src.storage.steps import Steps
from torchorbax._src.storage.storage import Storage
from torchorbax.errors import SaveError

_logger = logging.getLogger(__name__)


class Decision:
    """The decision on one step, in process 0.

    Args:
        save: what is to be saved.
        storage: where the step is written.
        steps: the steps of the run.
        contribution: what process 0 is about to write.

    Attributes:
        manifest: the manifest of the step, without fingerprints; None until it is known that it can be written.
    """

    def __init__(self, save: Save, storage: Storage, steps: Steps, contribution: Contribution) -> None:
        self.manifest: Manifest | None = None
        self._save = save
        self._step = save.step
        self._storage = storage
        self._steps = steps
        self._mine = contribution

    def answer(self, summaries: Sequence[dict[str, Json]], origin: str) -> dict[str, Json]:
        """Compare what the processes are about to write, and make the manifest. The answer goes to all processes.

        It is a JSON object: `refusal`, why nothing can be written, or None; `bases`, the numbers of bases by item and
        leaf; `new_bases`, the bases that this step writes; `known`, the leaves that a base has already; and `own`, the
        digests of process 0's own state by item.

        Args:
            summaries: what the processes are about to write, as `Contribution.summary` describes it.
            origin: in a local tier, the run and its start, for the manifest.

        Raises:
            SaveError: the processes do not agree on what they write.
        """
        mine = self._mine
        answer: dict[str, Json] = {"refusal": self._disagreement(summaries)}
        if answer["refusal"] is not None:
            return answer
        # The manifest, with the numbers of bases.
        self._save.phase = "removing what is in its way"
        self._steps.make_way(self._step)
        self._save.phase = "describing its arrays"
        items, known = self._numbered(summaries)
        self.manifest = manifest = Manifest(
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
        bases = {
            item: {name: leaf.base for name, leaf in meta.leaves.items() if leaf.base is not None}
            for item, meta in (items.items() if len(summaries) > 1 else ())
        }
        return {
            "refusal": self._missing_base(manifest, written),
            "bases": bases,
            "new_bases": [base for base in by_base(manifest.leaves, written) if base is not None],
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
                    f"{type(error).__name__}: {error}",
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
                return f"process {process} has other frozen leaves than process 0"
        return None

    def _numbered(self, summaries: Sequence[dict[str, Json]]) -> tuple[dict[str, ItemMeta], list[Key]]:
        """The items with the numbers of bases, and those new frozen leaves that a base has already after all."""
        mine = self._mine
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

    def _missing_base(self, manifest: Manifest, written: Sequence[Key]) -> str | None:
        """The reason if a base is gone that the step refers to and does not write itself; None if all are there."""
        referred = manifest.frozen_leaves
        bases = self._steps.good_bases() if referred else set()
        for key, leaf in referred.items():
            if leaf.base not in bases and key not in set(written):
                return f"base {leaf.base}, which has its frozen parameters, is gone"
        return None
