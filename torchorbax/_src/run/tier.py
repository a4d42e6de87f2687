"""One place where a run is saved, with policies of its own: the run's path, or a fast folder beside it."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Mapping

from torchorbax import policies
from torchorbax._src.restore.in_place import Restored
from torchorbax._src.run.background_save import BackgroundSaver
from torchorbax._src.run.save_decision import Candidate, Decider
from torchorbax._src.save import snapshot
from torchorbax._src.save.frozen import FrozenArrays
from torchorbax._src.save.save import Save, SaveRecord
from torchorbax._src.save.snapshot import Snapshot
from torchorbax._src.save.staging import Staging
from torchorbax._src.save.writer import Writer
from torchorbax._src.state.item import Captured, Item
from torchorbax._src.storage.steps import Steps
from torchorbax._src.storage.storage import Storage
from torchorbax.errors import ConfigError
from torchorbax.policies import SaveDecisionPolicy


def local_path(path: str | os.PathLike[str], process: int) -> str:
    """A process's folder below the one given.

    Raises:
        ConfigError: it is no local folder.
    """
    if "://" in os.fspath(path):
        raise ConfigError(f"local must be a folder on each host, not {os.fspath(path)}")
    return os.path.join(path, f"process_{process}")


class Tier:
    """Decides, takes snapshots, and saves them one after the other.

    Args:
        storage: where to.
        steps: those there are.
        writer: writes one.
        policy: when to save.
        decider: asks it, for all processes.
        knows_frozen: frozen parameters are written once.
        raises: errors are for the caller; else they are logged, for the other processes know nothing of them.
    """

    def __init__(
        self,
        storage: Storage,
        steps: Steps,
        writer: Writer,
        policy: SaveDecisionPolicy,
        decider: Decider,
        *,
        knows_frozen: bool = True,
        raises: bool = True,
    ) -> None:
        self.storage = storage
        self.steps = steps
        self.saver = BackgroundSaver(storage.path, steps, writer, raises=raises)
        self.policy = policy
        self.decider = decider
        self._writer = writer
        self._frozen = FrozenArrays()
        self._knows_frozen = knows_frozen

    def due(self, step: int, now: datetime.datetime) -> bool:
        """Does the policy say so?"""
        if self.saver.step_in_flight is None:
            self.saver.collect()
        return self.decider.due(lambda: self._ask(step, now))

    def _ask(self, step: int, now: datetime.datetime) -> bool:
        saving = self.saver.step_in_flight is not None
        context = policies.decision_context(saving=saving, preempted=self.decider.preempted)
        return bool(self.policy.should_save(Candidate(step, now), list(self.steps.infos.values()), context=context))

    def check_step(self, step: int) -> None:
        """Raise ConfigError if the step cannot follow those there are."""
        newest = max(self.steps.infos, default=None)
        if newest is not None and step <= newest:
            raise ConfigError(
                f"{self.storage.path}: step {step} is already saved"
                if step in self.steps.infos
                else f"{self.storage.path}: step {step} is below the newest step {newest}; to go on from an older "
                "step, move the newer ones away or use another path"
            )

    def take(self, captured: Mapping[str, Captured], staging: Staging) -> Snapshot:
        """A snapshot of live leaves, without the frozen ones that are saved already."""
        if self._writer.lost_base:
            self._frozen, self._writer.lost_base = FrozenArrays(), False
        if committed := self.saver.take_committed():
            self._frozen.saved(committed.manifest, committed.identities)
        return snapshot.take(captured, staging, self._frozen.look(captured) if self._knows_frozen else None)

    def start(self, save: Save) -> SaveRecord:
        """Write a save in the background. The save before it must have been collected."""
        record = self.saver.start(save)
        record.stall_s = time.perf_counter() - save.started_s
        return record

    def note_restored(self, restored: Restored, items: Mapping[str, Item]) -> None:
        """Frozen arrays that have just been restored from here need not be written again."""
        self.steps.know(restored.manifest)
        self.saver.take_committed()  # it says nothing about the arrays that are live now
        in_base = {key: leaf for key, leaf in restored.manifest.frozen_leaves.items() if key in restored.exact}
        self._frozen.restored({item: items[item].capture() for item in {item for item, _ in in_base}}, in_base)
