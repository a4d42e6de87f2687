"""The life of a run: when a save starts, what is restored, how the loop ends. Knows no formats."""

from __future__ import annotations

import datetime
import logging
import math
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from types import TracebackType
from typing import Any, Literal

from torchorbax._src.arrays.sharding_rules import ShardingRules, Shardings
from torchorbax._src.distributed.channel import Channel
from torchorbax._src.distributed.processes import Processes
from torchorbax._src.run import at_exit
from torchorbax._src.run.loop import _ProgressBar
from torchorbax._src.run.options import preservation_policy, save_policy, step_number
from torchorbax._src.run.preemption import PreemptionNotice
from torchorbax._src.run.save_decision import Decider
from torchorbax._src.run.step_choice import Restorer
from torchorbax._src.run.step_metrics import checked, ready
from torchorbax._src.run.tier import Tier, local_path
from torchorbax._src.save.save import Save, SaveRecord
from torchorbax._src.save.staging import Staging, check_staging
from torchorbax._src.save.staging import prepare as prepare_snapshots
from torchorbax._src.save.writer import Writer
from torchorbax._src.state.item import Captured
from torchorbax._src.state.registry import items_of
from torchorbax._src.state.request import Rename, Request, request
from torchorbax._src.storage.opening import open_storage
from torchorbax._src.storage.steps import Steps
from torchorbax._src.storage.storage import Storage
from torchorbax._src.storage.traffic import Traffic, traffic
from torchorbax.errors import ConfigError, Problem, ProcessError, SaveError, TorchorbaxError
from torchorbax.policies import ContinuousPolicy, NeverPolicy, PreservationPolicy, SaveDecisionPolicy

_logger = logging.getLogger(__name__)


class Checkpointer:
    """Saves and restores live objects under a path.

    Args:
        path: the run's folder (`~` and relative paths work) or a `gs://` URI. It holds this run's steps and nothing
            else.
        state: names to modules, `torch.optim` optimizers, `OptaxOptimizer`s, objects with `state_dict` and
            `load_state_dict` (schedulers), or pytrees of tensors, arrays and plain values. Optimizers are keyed by the
            names that their parameters have in the modules given.
        save: when `save` saves: `"continuous"` (as soon as the save before is committed), a number of steps, a
            `timedelta`, None (never on its own), or any policy from `torchorbax.policies`.
        keep: which steps stay: the newest so many, None (all), or any preservation policy. The newest always stays.
        shardings: `(mesh, rules by parameter name)` to restore into; None restores every tensor to where it is.
        staging: how a snapshot is taken, see `torchorbax.snapshot.take`.
        rng: save and restore the random number generators as well (item `rng`).
        verify: compare what is restored with the fingerprints made when it was saved, before anything live changes.
        compression: `"zstd"`, or None: trained weights hardly get smaller, and it takes several times as long.
        max_host_bytes: host memory for arrays on their way to storage or back, 64 MiB at least.
        save_on_exception: when an exception leaves the `with` block, save the last step that was complete. For that a
            snapshot is taken at every call of `save`, which costs what a save costs the loop, and its memory.
        replicas: who writes what several devices hold: the first of them (over a mesh with an axis of slices, those of
            the first slice), or all of them their share.
        single_replica_restore: read what several processes hold once, by the first replica's processes, and send it to
            the others over the devices' network, instead of reading it once for each.
        storage_timeout_s: how long to try again and wait when gs:// does not answer, before a save or restore fails.
        barrier_timeout_s: with several processes, how long to wait in one phase for the others before giving up with an
            error that names them.
        local: a fast folder of each host, such as `/dev/shm/run`, for saves that are more frequent than those under
            `path`; every process uses a folder of its own below it. A restore takes the newest step that is complete on
            all hosts (or on one whole slice, whose hosts then feed the others), or under `path`.
        local_save: as `save`, for `local`. Forced saves and those on SIGTERM go to `path`.
        local_keep: as `keep`, for `local`.

    With several processes (`jax.distributed`) every one makes the same calls in the same order, with a path that all of
    them see. Process 0 decides when to save, and its metrics are those of the step.

    Raises:
        ConfigError: an argument that cannot work, a path that is a file, cannot be written to or holds something else,
            or an optimizer built for another model.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        state: Mapping[str, Any],
        *,
        save: Any = "continuous",
        keep: Any = 3,
        shardings: Shardings | None = None,
        staging: Staging = "auto",
        rng: bool = True,
        verify: bool = True,
        compression: Literal["zstd"] | None = None,
        max_host_bytes: int = 1 << 30,
        save_on_exception: bool = False,
        replicas: Literal["first", "all"] = "first",
        single_replica_restore: bool = False,
        storage_timeout_s: float = 300.0,
        barrier_timeout_s: float = 600.0,
        local: str | os.PathLike[str] | None = None,
        local_save: Any = "continuous",
        local_keep: Any = 2,
    ) -> None:
        self._processes = Processes(barrier_timeout_s)
        self._channel = Channel(self._processes, "run")
        policies = save_policy(save), preservation_policy(keep)
        local_policies = save_policy(local_save), preservation_policy(local_keep)
        self._save_on_exception = save_on_exception
        self._complete: Save | None = None  # the last step, if it was not due
        self._handed: Mapping[str, Any] = {}  # what the body of `steps` gave `save`, until the body ends
        self._staging = check_staging(staging)
        self._rules = None if shardings is None else ShardingRules(shardings)
        self._state: MutableMapping[str, Any] = dict(state)
        self._items = items_of(self._state, rng=rng)
        self._preemption = PreemptionNotice()
        how = traffic(compression, max_host_bytes, replicas, single_replica_restore, storage_timeout_s)
        storage = open_storage(path, how)
        at_exit.wait_for_saves(storage.path)
        self._main = self._open_main(storage, *policies)
        self._local = None if local is None else self._open_local(local, how, *local_policies)
        self._tiers = [self._main] if self._local is None else [self._main, self._local]
        self._restorer = Restorer(self._items, self._rules, self._main, self._local, self._channel, verify=verify)
        self._preemption_saved = False
        self._closed = False
        self._in_steps = False
        self._metrics: dict[str, Any] = {}
        self.step: int | None = None
        self.next_step = 0
        self.history: list[SaveRecord] = []
        self.left_out: tuple[Problem, ...] = ()
        at_exit.opened(self)

    def _open_main(self, storage: Storage, policy: SaveDecisionPolicy, keep: PreservationPolicy) -> Tier:
        """The run's path, which all processes share."""
        alike = [storage.path, sorted(self._items)]
        for process, other in enumerate(self._channel.everyone("open", alike)):
            if other != alike:
                raise ConfigError(
                    f"this process opens {alike[0]} with {alike[1]}, process {process} {other[0]} with {other[1]}"
                )
        self._channel.attempt("open", storage.create if self._processes.is_first else lambda: None)
        self._channel.attempt("open", storage.check_visible)
        found = self._channel.first("steps", storage.steps)
        steps = Steps(storage, found, keep)
        writer = Writer(storage, steps, self._processes)
        return Tier(storage, steps, writer, policy, Decider(self._processes, "decide", policy, self._preemption))

    def _open_local(
        self, path: str | os.PathLike[str], how: Traffic, policy: SaveDecisionPolicy, keep: PreservationPolicy
    ) -> Tier:
        """A folder that only this process uses: several may share a machine."""
        storage = open_storage(local_path(path, self._processes.index), how)
        self._channel.attempt("open local", storage.create)
        several = self._processes.count > 1
        run = self._channel.first("open local", self._main.storage.identity)
        origin = f"{run}/{self._channel.first('open local', lambda: uuid.uuid4().hex)}/{self._processes.count}"
        alone = Processes(self._processes.timeout_s, index=0, count=1)
        steps = Steps(storage, storage.steps(), keep, keep_damaged=False)
        for step in steps.good():
            if steps.origin(step).partition("/")[0] != run:
                _logger.warning("%s: step %d is of another run, and gives way to this one's", storage.path, step)
                steps.mark_damaged(step)
        writer = Writer(storage, steps, alone, origin=origin, localized=several)
        decider = Decider(self._processes, "decide local", policy, self._preemption)
        return Tier(storage, steps, writer, policy, decider, knows_frozen=not several, raises=not several)

    # ------------------------------------------------------------------------------------------------------- facts

    @property
    def path(self) -> str:
        """The absolute path or URI."""
        return self._main.storage.path

    @property
    def state(self) -> Mapping[str, Any]:
        """The live objects by name. A pytree that could not be restored in place is replaced here."""
        return self._state

    @property
    def preempted(self) -> bool:
        """Has SIGTERM arrived since `resume`, in this process or another?"""
        return self._main.decider.preempted

    def all_steps(self) -> list[int]:
        """The committed steps under `path` in ascending order, without those that turned out to be damaged."""
        return self._main.steps.good()

    def best_step(self, metric: str, mode: str = "min") -> int | None:
        """The committed step whose `metric` is lowest (`mode="min"`) or highest (`"max"`), NaN aside.

        None if no step has it.

        Raises:
            ConfigError: another mode.
        """
        if mode not in ("min", "max"):
            raise ConfigError(f"mode must be 'min' or 'max', not {mode!r}")
        on_storage = set(self.all_steps())
        infos = [info for step, info in list(self._main.steps.infos.items()) if step in on_storage]
        values = {info.step: value for info in infos if (value := (info.metrics or {}).get(metric)) is not None}
        values = {step: value for step, value in values.items() if not math.isnan(value)}
        if not values:
            return None
        return (min if mode == "min" else max)(values, key=lambda step: values[step])

    # -------------------------------------------------------------------------------------------------------- save

    def save(
        self,
        step: int,
        state: Mapping[str, Any] | None = None,
        *,
        metrics: Mapping[str, Any] | None = None,
        force: bool = False,
    ) -> bool:
        """Start to save `step` if the policy says so; call it after every step.

        It returns as soon as a consistent snapshot exists; the rest happens in the background. What is saved is what
        was live at this call, whatever the loop does next.

        Args:
            step: the step just finished.
            state: trees to save in place of live values, by item name, for loops that keep their state in local
                variables.
            metrics: numbers of this step (Python numbers, or 0-d arrays and tensors, which are read in the background).
            force: save whatever the policy says, waiting for a save in flight. Also after SIGTERM.

        Returns:
            Was a save started?

        Raises:
            SaveError: an earlier save has failed; raised once. This step's save, if due, has been started all the same.
            ConfigError: `step` is not above the newest step, an unknown item in `state`, or the checkpointer is closed.
            UnsupportedLeafError, DeletedArrayError, MismatchError: this state cannot be saved; older steps are
                untouched.
        """
        started_s = time.perf_counter()
        step = step_number(step)
        if not isinstance(state, Mapping | None) or not isinstance(metrics, Mapping | None):
            raise ConfigError("save takes state= and metrics= as mappings by name")
        if self._closed:
            raise ConfigError(f"{self.path}: this checkpointer is closed")
        metrics = self._metrics = {**self._metrics, **(metrics or {})}
        self._handed = state or {}
        now = datetime.datetime.now(datetime.UTC)
        due = self._due(step, now, force)
        captured = None
        for tier in due:
            self._check_step(tier, step)
            tier.saver.collect()  # two saves never overlap
            try:
                captured = captured or self._capture()
                save = self._take(tier, step, now, captured, metrics, started_s)
            except Exception as error:
                if self._processes.count > 1:  # the others are waiting for this one
                    self._start(tier, Save(step, now, {}, started_s, error))
                raise
            self._start(tier, save)
        if self._main in due:
            self._complete = None
        elif self._save_on_exception and step > max(self._main.steps.infos, default=-1):
            self._check_step(self._main, step)
            self._complete = self._take(self._main, step, now, captured or self._capture(), metrics, started_s)
        if not self._in_steps:
            self._handed, self._metrics = {}, {}
        self.next_step = max(self.next_step, step + 1)
        self._raise_unreported()
        return bool(due)

    def _due(self, step: int, now: datetime.datetime, force: bool) -> list[Tier]:
        """The tiers that are to save this step."""
        due = [tier for tier in self._tiers if (force and tier is self._main) or tier.due(step, now)]
        if self.preempted and not self._preemption_saved and self._main not in due:
            due.insert(0, self._main)
        # A step may be offered again, to be saved under the path after all.
        return [tier for tier in due if tier is self._main or step > max(tier.steps.infos, default=-1)]

    def _check_step(self, tier: Tier, step: int) -> None:
        tier.check_step(step)
        if unknown := [name for name in self._handed if name not in self._items]:
            raise ConfigError(f"save got state for {', '.join(unknown)}, but there is only {', '.join(self._items)}")

    def _capture(self) -> dict[str, Captured]:
        return {name: item.capture(self._handed.get(name)) for name, item in self._items.items()}

    def _take(
        self,
        tier: Tier,
        step: int,
        now: datetime.datetime,
        captured: Mapping[str, Captured],
        metrics: Mapping[str, Any],
        started_s: float,
    ) -> Save:
        numbers = checked(metrics)
        return Save(step, now, numbers, started_s, tier.take(captured, self._staging))

    def _start(self, tier: Tier, save: Save) -> None:
        if tier is self._main:
            self._preemption_saved = self.preempted
        self.history.append(tier.start(save))

    def prepare(self) -> None:
        """Compile in the background what the first save will need, so that it keeps the loop no longer than later ones.

        `resume` calls this. It helps for what is on devices by now.

        Raises:
            ConfigError: the checkpointer is closed.
        """
        if self._closed:
            raise ConfigError(f"{self.path}: this checkpointer is closed")
        for tier in self._tiers:
            tier.saver.prepare()
        try:
            captured = self._capture()
        except TorchorbaxError as error:  # a module that is lazy or still to be placed; a save says so if it stays so
            _logger.debug("%s: nothing is prepared: %s", self.path, error)
            return
        prepare_snapshots(captured, self._staging)

    def wait(self) -> None:
        """Wait until the save in flight, if any, is committed.

        Raises:
            SaveError: a save has failed that has not been reported yet.
        """
        for tier in self._tiers:
            tier.saver.collect()
        self._raise_unreported()

    def _raise_unreported(self) -> None:
        errors = [error for tier in self._tiers if (error := tier.saver.take_unreported()) is not None]
        for other in errors[1:]:
            errors[0].add_note(f"Besides: {other}")
        if errors:
            raise errors[0]

    # ----------------------------------------------------------------------------------------------------- restore

    def restore(
        self,
        step: int | None = None,
        *,
        only: str | Iterable[str] | None = None,
        strict: bool = True,
        rename: Rename | None = None,
        cast: bool = False,
    ) -> int | None:
        """Restore the live objects, in place; all or nothing.

        A run only goes forward: after restoring an older step, saves must still be of steps above the newest one.

        Args:
            step: which step; None for the newest good one. Then a damaged step is skipped with a warning that says why.
            only: what to restore: items (`"model"`) or patterns of live names with the item's in front
                (`["model.encoder.*"]`); the rest stays as it is.
            strict: raise if anything differs. False restores what fits, logs what does not and lists it in `left_out`.
            rename: `{old: new}`, from names in the checkpoint to live names (each stands for what lies below it, too),
                or a function from one to the other. Optimizer state follows its parameter.
            cast: convert where dtypes differ, within floating-point, complex and integer ones. The optimizer's state
                follows its parameter.

        Returns:
            The step restored; None if `step` is None and there is none.

        Raises:
            CheckpointNotFoundError: there is no such step.
            CorruptCheckpointError: the step asked for, or each of them, is damaged.
            MismatchError: the checkpoint does not fit the live objects; never skipped. `.problems` has all of them.
            ConfigError: `only` or `rename` names what nobody has.
        """
        for tier in self._tiers:
            tier.saver.collect()
        wanted = request(only, strict, rename, cast)
        return self._restore_from(self._main.storage, None if step is None else step_number(step), wanted)

    def start_from(self, storage: Storage, step: int | None, wanted: Request) -> int | None:
        """Restore a step of another run; None for its newest good one. `resume(init_from=...)` calls this."""
        return self._restore_from(storage, step, wanted)

    def _restore_from(self, storage: Storage, step: int | None, wanted: Request) -> int | None:
        found = self._restorer.restore(storage, step, wanted)
        if found is None:
            return None
        self._complete = None  # it is not what is live any more
        self.left_out = found.left_out
        if wanted.only is None:
            self.step = found.manifest.step
            self.next_step = self.step + 1
        return found.manifest.step

    # ---------------------------------------------------------------------------------------------------- the loop

    def steps(self, stop: int, *, progress: bool | None = None) -> Iterator[int]:
        """The steps from `next_step` to `stop - 1`, with a save after each body when the policy says so.

        A body that calls `save` itself is left to it.

        A continuous run saves its last step as well. SIGTERM ends the loop after the body it arrived in, with that step
        saved and committed.

        Args:
            stop: the number of steps of the whole run.
            progress: show a progress bar; None shows one on a terminal only.
        """
        with _ProgressBar(
            total=stop, initial=min(self.next_step, stop), disable=None if progress is None else not progress
        ) as bar:
            for step in range(self.next_step, stop):
                self._metrics, self._handed, self._in_steps = {}, {}, True
                try:
                    yield step
                finally:
                    self._in_steps = False
                shown, handed = self._metrics, self._handed
                if self.next_step <= step:  # the body has not called save itself
                    last = step == stop - 1 and isinstance(self._main.policy, ContinuousPolicy)
                    self.save(step, metrics=shown, force=last)
                bar.update()
                bar.set_postfix(ready(shown), refresh=False)
                if self.preempted:
                    if step not in self._main.steps.infos:  # the signal came after save had looked
                        self.save(step, handed, metrics=shown, force=True)
                    self.wait()
                    _logger.warning("stopped by SIGTERM. %s", self.last_line())
                    return
        newest = max(self._main.steps.infos, default=-1)
        if newest < self.next_step - 1 and not isinstance(self._main.policy, NeverPolicy):
            _logger.warning(
                "%s: the last step, %d, was not due and is not saved; the newest saved is %s. To save it: "
                "run.save(%d, force=True)",
                self.path,
                self.next_step - 1,
                "none" if newest < 0 else newest,
                self.next_step - 1,
            )

    def log(self, **metrics: Any) -> None:
        """Metrics of the current step, for the bar, the manifest and `best_step`. Never waits for the device."""
        self._metrics.update(checked(metrics))

    # --------------------------------------------------------------------------------------------------------- end

    def listen_for_preemption(self) -> None:
        """Take SIGTERM, until `close`, as notice to save the current step and end `steps()`. `resume` calls this."""
        self._preemption.install()

    def close(self) -> None:
        """Wait for the save in flight and stop listening for SIGTERM. Nothing can be saved afterwards.

        Raises:
            SaveError: a save has failed that has not been reported yet.
        """
        self._closed = True
        self._preemption.remove()
        for tier in self._tiers:
            if tier.saver.step_in_flight is not None:
                _logger.info("%s: waiting for step %d to be committed", tier.storage.path, tier.saver.step_in_flight)
        try:
            self.wait()
        except SaveError:
            self._end()
            raise
        self._end()  # not after Ctrl-C: then it is waited for at exit

    def _end(self) -> None:
        at_exit.closed(self)
        for tier in self._tiers:
            tier.saver.close()
        self._processes.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        unsaved, self._complete = self._complete, None
        try:
            if exc is not None and not self._closed:
                self._processes.fail(f"{type(exc).__name__}: {exc}")
                self._main.saver.collect()
                if unsaved is not None and self._all_have(unsaved):
                    self._start(self._main, unsaved)
            self.close()
        except SaveError as error:
            if exc is None:
                raise
            exc.add_note(f"Besides: {error}")
        if isinstance(exc, SystemExit):  # which nobody prints
            _logger.warning("%s", self.last_line())
        elif exc is not None:
            exc.add_note(self.last_line())

    def _all_have(self, unsaved: Save) -> bool:
        """Have all processes come to an end with the same step unsaved?"""
        channel = Channel(self._processes, "exception")
        try:
            steps = channel.everyone("exception", unsaved.step)
        except ProcessError as error:
            _logger.warning("%s: step %d is complete but not saved: %s", self.path, unsaved.step, error)
            return False
        if len(set(steps)) > 1:
            _logger.warning("%s: step %d is not saved: the processes ended at %s", self.path, unsaved.step, steps)
        return len(set(steps)) == 1

    def last_line(self) -> str:
        """Where the run stands, for people."""
        in_flight = self._main.saver.step_in_flight
        newest = max((step for step in self._main.steps.infos if step != in_flight), default=None)
        if newest is None:
            return f"{self.path}: no step has been committed yet"
        return f"{self.path}: the last committed step is {newest}; the same program goes on from step {newest + 1}"
