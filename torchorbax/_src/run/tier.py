"""One place where a run is saved, with policies of its own: the run's path, or a fast folder beside it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import re
import time
import uuid
from collections.abc import Collection, Mapping

from torchorbax import policies
from torchorbax._src.distributed.channel import Channel
from torchorbax._src.distributed.processes import Processes
from torchorbax._src.restore.in_place import Restored
from torchorbax._src.run import at_exit
from torchorbax._src.run.background_save import BackgroundSaver
from torchorbax._src.run.options import RunOptions, preservation_policy, save_policy, traffic_of
from torchorbax._src.run.preemption import PreemptionNotice
from torchorbax._src.run.save_decision import Decider, ProposedStep
from torchorbax._src.save import snapshot
from torchorbax._src.save.frozen import FrozenArrays
from torchorbax._src.save.save import Save, SaveRecord
from torchorbax._src.save.snapshot import Snapshot
from torchorbax._src.save.staging import Staging
from torchorbax._src.save.writer import Writer
from torchorbax._src.state.item import Captured, Item
from torchorbax._src.storage.opening import open_storage
from torchorbax._src.storage.steps import Steps
from torchorbax._src.storage.storage import Storage
from torchorbax._src.verification.step_check import thinned_bases
from torchorbax.errors import ConfigError
from torchorbax.policies import SaveDecisionPolicy

_logger = logging.getLogger(__name__)


def open_tiers(
    path: str | os.PathLike[str],
    items: Collection[str],
    options: RunOptions,
    channel: Channel,
    notice: PreemptionNotice,
) -> tuple[Tier, Tier | None]:
    """The tier under the run's path, and the fast tier beside it, if there is to be one.

    Args:
        path: the run's folder or URI.
        items: the names of what is saved.
        options: when to save, what to keep, how arrays travel.
        channel: to the other processes.
        notice: says whether SIGTERM has arrived in this process.

    Raises:
        ConfigError: a path cannot be used, or another process opens another path or other items.
        ProcessError: another process cannot open its part.
    """
    main = _open_main(path, items, options, channel, notice)
    return main, None if options.local is None else _open_local(options.local, main, options, channel, notice)


def _open_main(
    path: str | os.PathLike[str],
    items: Collection[str],
    options: RunOptions,
    channel: Channel,
    notice: PreemptionNotice,
) -> Tier:
    """The tier under the run's path, which all processes share."""
    storage = open_storage(path, traffic_of(options))
    at_exit.wait_for_saves(storage.path)
    # All processes must mean the same run.
    mine = [storage.path, sorted(items)]
    for process, other in enumerate(channel.everyone("open", mine)):
        if other != mine:
            raise ConfigError(
                f"this process opens {mine[0]} with {mine[1]}, process {process} {other[0]} with {other[1]}"
            )
    # Process 0 makes the folder; then all of them must see it.
    processes = channel.processes
    if not options.read_only:
        create = functools.partial(storage.create, takeover=options.takeover)
        channel.attempt("open", create if processes.is_first else lambda: None)
        channel.attempt("open", storage.check_visible)
    found = channel.first("steps", storage.steps)
    steps = Steps(storage, found, preservation_policy(options.keep))
    writer = Writer(storage, steps, processes, verify_after_save=options.verify_after_save)
    policy = save_policy(options.save)
    return Tier(storage, steps, writer, policy, Decider(processes, "decide", policy, notice))


def _open_local(
    path: str | os.PathLike[str], main: Tier, options: RunOptions, channel: Channel, notice: PreemptionNotice
) -> Tier:
    """The fast tier, in a subfolder of this run that only this process uses: several processes may share a machine."""
    processes = channel.processes
    several = processes.count > 1
    # Steps are marked with the run, this start of it, and the number of processes. Only parts that all processes have
    # saved in the same start make up a whole step.
    run = channel.first("open local", main.storage.identity)
    start = channel.first("open local", lambda: uuid.uuid4().hex)
    origin = f"{run}/{start}/{processes.count}"
    # A copy of a run has its identity, but is another run from then on.
    place = f"{run}-{hashlib.sha256(main.storage.path.encode()).hexdigest()[:8]}"
    _warn_of_other_runs(os.path.abspath(path), place)
    storage = open_storage(os.path.join(path, place, f"process_{processes.index}"), traffic_of(options))
    channel.attempt("open local", functools.partial(storage.create, takeover=options.takeover))
    steps = Steps(storage, storage.steps(), preservation_policy(options.local_keep), keep_damaged=False)
    # Each process writes as if there were no other, but all of them decide together when to save.
    writer = Writer(
        storage,
        steps,
        Processes(processes.timeout_s, index=0, count=1),
        origin=origin,
        localized=several,
        verify_after_save=options.verify_after_save,
    )
    policy = save_policy(options.local_save)
    decider = Decider(processes, "decide local", policy, notice)
    return Tier(storage, steps, writer, policy, decider, uses_bases=not several, raises=not several)


def _warn_of_other_runs(folder: str, run: str) -> None:
    """Say in the log that other runs have steps in a fast folder, which take room there until somebody deletes them."""
    with contextlib.suppress(OSError):  # not there yet; if it cannot be used, `create` says so
        if others := [
            name for name in os.listdir(folder) if re.fullmatch("[0-9a-f]{32}-[0-9a-f]{8}", name) and name != run
        ]:
            _logger.warning("%s has steps of other runs; if those are over, delete: %s", folder, ", ".join(others))


class Tier:
    """Decides when to save, takes snapshots, and has them written one after the other.

    Args:
        storage: where steps are written.
        steps: the steps that are there.
        writer: writes a step.
        policy: says when to save.
        decider: asks the policy, on behalf of all processes.
        uses_bases: write frozen parameters once, into a base, and not with every step.
        raises: keep errors for the caller. Otherwise they are logged, because the other processes do not know of them.
    """

    def __init__(
        self,
        storage: Storage,
        steps: Steps,
        writer: Writer,
        policy: SaveDecisionPolicy,
        decider: Decider,
        *,
        uses_bases: bool = True,
        raises: bool = True,
    ) -> None:
        self.storage = storage
        self.steps = steps
        self.saver = BackgroundSaver(storage.path, steps, writer, raises=raises)
        self.policy = policy
        self.decider = decider
        self._writer = writer
        self._frozen = FrozenArrays()
        self._uses_bases = uses_bases
        self._mistakes: set[type[Exception]] = set()  # of the policy, that have been warned of

    @property
    def newest(self) -> int:
        """The newest step there is, saved or being saved; -1 if there is none."""
        return max(list(self.steps.infos), default=-1)

    def standing(self) -> str:
        """Where the run stands, in a sentence for people."""
        path, uncommitted = self.storage.path, self.saver.uncommitted_step
        newest = max((step for step in list(self.steps.infos) if step != uncommitted), default=None)
        if newest is None:
            return f"{path}: no step has been committed yet"
        return f"{path}: the last committed step is {newest}; the same program goes on from step {newest + 1}"

    def due(self, step: int) -> bool:
        """Is this step to be saved, by the policy?"""
        return self.decider.due(lambda: self._ask(step))

    def _ask(self, step: int) -> bool:
        saving = self.saver.step_in_flight is not None
        context = policies.decision_context(saving=saving, preempted=self.decider.preempted)
        proposed, before = ProposedStep(step, self.steps.clock.now()), list(self.steps.infos.values())
        try:
            return policies.decision(self.policy.should_save(proposed, before, context=context))
        except Exception as error:  # the policy's mistake; the run must not go unsaved because of it
            # Processes that each ask the policy must come to the same answer, so there it cannot depend on the moment.
            due = not saving or self.decider.is_asked_everywhere
            self._warn_of_policy(error)
            return due

    def _warn_of_policy(self, mistake: Exception) -> None:
        if type(mistake) not in self._mistakes:
            self._mistakes.add(type(mistake))
            _logger.warning(
                "%s: save=%s does not say whether to save, so a step is saved whenever no save is in flight: %s: %s",
                self.storage.path,
                type(self.policy).__name__,
                type(mistake).__name__,
                mistake,
            )

    def check_step(self, step: int) -> None:
        """Raise ConfigError unless the step is above the newest one."""
        if step <= self.newest:
            raise ConfigError(
                f"{self.storage.path}: step {step} is already saved"
                if step in self.steps.infos
                else f"{self.storage.path}: step {step} is below the newest step {self.newest}; to go on from an older "
                "step, move the newer ones away or use another path"
            )

    def take(self, captured: Mapping[str, Captured], staging: Staging) -> Snapshot:
        """A snapshot of live leaves, without the frozen ones that have been saved already."""
        if self._writer.forget_frozen:
            self._frozen, self._writer.forget_frozen = FrozenArrays(), False
        if committed := self.saver.take_committed():
            self._frozen.saved(committed.manifest, committed.identities)
        return snapshot.take(captured, staging, self._frozen.observe(captured) if self._uses_bases else None)

    def start(self, save: Save) -> SaveRecord:
        """Write a save in the background. The save before it must have been collected."""
        record = self.saver.start(save)
        record.stall_s = time.monotonic() - save.started_s
        return record

    def note_restored(self, restored: Restored, items: Mapping[str, Item]) -> None:
        """Remember the frozen arrays that have just been restored from here: they need not be written again."""
        self.steps.note_manifest(restored.manifest)
        if restored.proved:
            self.steps.proved.add(restored.manifest.step)
        self.saver.take_committed()  # dropped: it is not about the arrays that are live now
        in_base = {key: leaf for key, leaf in restored.manifest.frozen_leaves.items() if key in restored.exact}
        # What a damaged base held is written again by the next step.
        self.steps.damaged_bases |= restored.damaged_bases | thinned_bases(self.storage, restored.manifest)
        in_base = {key: leaf for key, leaf in in_base.items() if leaf.base not in self.steps.damaged_bases}
        self._frozen.restored({item: items[item].capture() for item in {item for item, _ in in_base}}, in_base)
