"""The life of a run: when a save starts, what is restored, how the loop ends. Knows no formats."""

from __future__ import annotations

import datetime
import logging
import math
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

from tqdm.auto import tqdm

from torchorbax import _orbax, at_exit, frozen, snapshot
from torchorbax._orbax import Storage, traffic
from torchorbax.deciding import Decider
from torchorbax.errors import ConfigError, CorruptCheckpointError, Problem, ProcessError, SaveError
from torchorbax.frozen import FrozenArrays
from torchorbax.items import items_of
from torchorbax.metrics import checked, ready
from torchorbax.plan import Rename, Request, request
from torchorbax.policies import Candidate, ContinuousPolicy, NeverPolicy, preservation_policy, save_policy, step_number
from torchorbax.preemption import PreemptionNotice
from torchorbax.processes import Processes
from torchorbax.restoring import Restored, restore_step
from torchorbax.saver import Saver, SaveRecord
from torchorbax.sharding import ShardingRules, Shardings
from torchorbax.steps import Steps
from torchorbax.writing import Writer

_logger = logging.getLogger(__name__)


class _ProgressBar(tqdm):  # type: ignore[misc]  # tqdm is untyped
    monitor_interval = 0  # no thread that outlives the run


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
        staging: snapshot.Staging = "auto",
        rng: bool = True,
        verify: bool = True,
        compression: Literal["zstd"] | None = None,
        max_host_bytes: int = 1 << 30,
        save_on_exception: bool = False,
        replicas: Literal["first", "all"] = "first",
        single_replica_restore: bool = False,
        storage_timeout_s: float = 300.0,
        barrier_timeout_s: float = 600.0,
    ) -> None:
        self._processes = Processes(barrier_timeout_s)
        self._channel = self._processes.channel("run")
        self._save_policy = save_policy(save)
        keep_policy = preservation_policy(keep)
        self._verify = verify
        self._save_on_exception = save_on_exception
        self._complete: _Taken | None = None  # the last step, if it was not due
        self._handed: Mapping[str, Any] = {}  # what the body of `steps` gave `save`, until the body ends
        self._staging = snapshot.check_staging(staging)
        self._rules = None if shardings is None else ShardingRules(shardings)
        self._state: MutableMapping[str, Any] = dict(state)
        self._items = items_of(self._state, rng=rng)
        how = traffic(compression, max_host_bytes, replicas, single_replica_restore, storage_timeout_s)
        self._storage = Storage(path, how)
        self._steps = Steps(self._storage, self._open(), keep_policy)
        self._writer = Writer(self._storage, self._steps, self._processes)
        self._saver = Saver(self._storage.path, self._steps, self._writer)
        self._frozen = FrozenArrays()
        self._preemption = PreemptionNotice()
        self._decider = Decider(self._processes, self._save_policy, self._preemption)
        self._preemption_saved = False
        self._closed = False
        self._restores = 0
        self._in_steps = False
        self._metrics: dict[str, Any] = {}
        self.step: int | None = None
        self.next_step = 0
        self.history: list[SaveRecord] = []
        self.left_out: tuple[Problem, ...] = ()
        at_exit.opened(self)

    def _open(self) -> list[int]:
        """See that the folder can be used, by all processes; the steps there are."""
        alike = [self._storage.path, sorted(self._items)]
        for process, other in enumerate(self._channel.everyone("open", alike)):
            if other != alike:
                raise ConfigError(
                    f"this process opens {alike[0]} with {alike[1]}, process {process} {other[0]} with {other[1]}"
                )
        if self._processes.is_first:
            self._channel.attempt("open", self._create)
        else:
            self._channel.attempt("open", lambda: None)
        self._channel.attempt("open", self._storage.check_visible)
        found: list[int] = self._channel.publish("steps", self._storage.steps() if self._processes.is_first else None)
        return found

    def _create(self) -> None:
        self._storage.check()
        self._storage.create()

    # ------------------------------------------------------------------------------------------------------- facts

    @property
    def path(self) -> str:
        """The absolute path or URI."""
        return self._storage.path

    @property
    def state(self) -> Mapping[str, Any]:
        """The live objects by name. A pytree that could not be restored in place is replaced here."""
        return self._state

    @property
    def preempted(self) -> bool:
        """Has SIGTERM arrived since `resume`, in this process or another?"""
        return self._decider.preempted

    def all_steps(self) -> list[int]:
        """The committed steps in ascending order, without those that turned out to be damaged."""
        return self._steps.good()

    def best_step(self, metric: str, mode: str = "min") -> int | None:
        """The committed step whose `metric` is lowest (`mode="min"`) or highest (`"max"`), NaN aside.

        None if no step has it.

        Raises:
            ConfigError: another mode.
        """
        if mode not in ("min", "max"):
            raise ConfigError(f"mode must be 'min' or 'max', not {mode!r}")
        on_storage = set(self.all_steps())
        infos = [info for step, info in list(self._steps.infos.items()) if step in on_storage]
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
        if self._saver.step_in_flight is None:
            self._saver.collect()
        metrics = self._metrics = {**self._metrics, **(metrics or {})}
        self._handed = state or {}
        now = datetime.datetime.now(datetime.UTC)
        due = (
            force or self._decider.due(lambda: self._due(step, now)) or (self.preempted and not self._preemption_saved)
        )
        if due:
            self._check_step(step, self._handed)
            self._saver.collect()  # two saves never overlap
            try:
                taken = self._take(step, now, self._handed, metrics, started_s)
            except Exception as error:
                if self._processes.count > 1:  # the others are waiting for this one
                    self._start(_Taken(step, now, error, {}, started_s))
                raise
            self._start(taken)
            self._complete = None
        elif self._save_on_exception and step > max(self._steps.infos, default=-1):
            self._check_step(step, self._handed)
            self._complete = self._take(step, now, self._handed, metrics, started_s)
        if not self._in_steps:
            self._handed, self._metrics = {}, {}
        self.next_step = max(self.next_step, step + 1)
        self._saver.raise_unreported()
        return due

    def _due(self, step: int, now: datetime.datetime) -> bool:
        saving = self._saver.step_in_flight is not None
        context = _orbax.decision_context(saving=saving, preempted=self.preempted)
        previous = list(self._steps.infos.values())
        return bool(self._save_policy.should_save(Candidate(step, now), previous, context=context))

    def _check_step(self, step: int, state: Mapping[str, Any]) -> None:
        newest = max(self._steps.infos, default=None)
        if newest is not None and step <= newest:
            raise ConfigError(
                f"{self.path}: step {step} is already saved"
                if step in self._steps.infos
                else f"{self.path}: step {step} is below the newest step {newest}; to go on from an older step, move "
                "the newer ones away or use another path"
            )
        if unknown := [name for name in state if name not in self._items]:
            raise ConfigError(f"save got state for {', '.join(unknown)}, but there is only {', '.join(self._items)}")

    def _take(
        self, step: int, now: datetime.datetime, state: Mapping[str, Any], metrics: Mapping[str, Any], started_s: float
    ) -> _Taken:
        numbers = checked(metrics)
        if self._writer.lost_base:
            self._frozen, self._writer.lost_base = FrozenArrays(), False
        if committed := self._saver.take_committed():
            self._frozen.saved(*committed)
        captured = {name: item.capture(state.get(name)) for name, item in self._items.items()}
        taken = snapshot.take(captured, self._staging, self._frozen.look(captured))
        return _Taken(step, now, taken, numbers, started_s)

    def _start(self, taken: _Taken) -> None:
        record = SaveRecord(taken.step, taken.time)
        self.history.append(record)
        self._preemption_saved = self.preempted
        self._saver.start(record, taken.snapshot, taken.metrics, taken.started_s)
        record.stall_s = time.perf_counter() - taken.started_s

    def wait(self) -> None:
        """Wait until the save in flight, if any, is committed.

        Raises:
            SaveError: a save has failed that has not been reported yet.
        """
        self._saver.collect()
        self._saver.raise_unreported()

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
        self._saver.collect()
        return self._restore_from(self._storage, step, request(only, strict, rename, cast))

    def start_from(self, storage: Storage, step: int | None, wanted: Request) -> int | None:
        """Restore a step of another run; None for its newest good one. `resume(init_from=...)` calls this."""
        return self._restore_from(storage, step, wanted)

    def _restore_from(self, storage: Storage, step: int | None, wanted: Request) -> int | None:
        """Restore a step of this run or another; None for the newest good one."""
        self._restores += 1
        self._channel.begin(f"restore{self._restores}")
        if step is not None:
            step = step_number(step)
            self._restore_step(storage, step, wanted)
            return step
        reasons: dict[int, str] = {}
        for candidate in reversed(
            self._channel.publish("steps", storage.steps() if self._processes.is_first else None)
        ):
            try:
                self._restore_step(storage, candidate, wanted)
            except CorruptCheckpointError as error:
                reasons.update(error.reasons)
                continue
            for skipped, reason in reasons.items():
                if storage is self._storage:
                    self._steps.mark_damaged(skipped)
                warnings.warn(f"{storage.path}: skipped damaged step {skipped}: {reason}", stacklevel=3)
            return int(candidate)
        if reasons:
            raise CorruptCheckpointError(storage.path, reasons)
        return None

    def _restore_step(self, storage: Storage, step: int, wanted: Request) -> None:
        restored = restore_step(
            storage, step, self._items, self._rules, wanted, verify=self._verify, channel=self._channel
        )
        self.left_out = restored.left_out
        self._complete = None  # it is not what is live any more
        if storage is self._storage:
            self._note_frozen(restored)
        if wanted.only is None:
            self.step = step
            self.next_step = step + 1

    def _note_frozen(self, restored: Restored) -> None:
        """Frozen arrays that have just been restored need not be written again."""
        self._saver.take_committed()  # it says nothing about the arrays that are live now
        in_base = {key: leaf for key, leaf in frozen.in_base(restored.manifest).items() if key in restored.exact}
        self._frozen.restored({item: self._items[item].capture() for item in {item for item, _ in in_base}}, in_base)

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
                    last = step == stop - 1 and isinstance(self._save_policy, ContinuousPolicy)
                    self.save(step, metrics=shown, force=last)
                bar.update()
                bar.set_postfix(ready(shown), refresh=False)
                if self.preempted:
                    if step not in self._steps.infos:  # the signal came after save had looked
                        self.save(step, handed, metrics=shown, force=True)
                    self.wait()
                    _logger.warning("stopped by SIGTERM. %s", self.last_line())
                    return
        newest = max(self._steps.infos, default=-1)
        if newest < self.next_step - 1 and not isinstance(self._save_policy, NeverPolicy):
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
        if self._saver.step_in_flight is not None:
            _logger.info("%s: waiting for step %d to be committed", self.path, self._saver.step_in_flight)
        try:
            self.wait()
        except SaveError:
            self._end()
            raise
        self._end()  # not after Ctrl-C: then it is waited for at exit

    def _end(self) -> None:
        at_exit.closed(self)
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
                self._saver.collect()
                if unsaved is not None and self._all_have(unsaved):
                    self._start(unsaved)
            self.close()
        except SaveError as error:
            if exc is None:
                raise
            exc.add_note(f"Besides: {error}")
        if isinstance(exc, SystemExit):  # which nobody prints
            _logger.warning("%s", self.last_line())
        elif exc is not None:
            exc.add_note(self.last_line())

    def _all_have(self, unsaved: _Taken) -> bool:
        """Have all processes come to an end with the same step unsaved?"""
        channel = self._processes.channel("exception")
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
        newest = max((step for step in self._steps.infos if step != self._saver.step_in_flight), default=None)
        if newest is None:
            return f"{self.path}: no step has been committed yet"
        return f"{self.path}: the last committed step is {newest}; the same program goes on from step {newest + 1}"


@dataclass(frozen=True)
class _Taken:
    """A snapshot of a step, and what else a save of it takes."""

    step: int
    time: datetime.datetime
    snapshot: snapshot.Snapshot | Exception
    metrics: dict[str, Any]
    started_s: float
