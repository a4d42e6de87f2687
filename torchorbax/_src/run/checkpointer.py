"""The life of a run: opened, restored, saved step by step, closed."""

from __future__ import annotations

import functools
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from types import TracebackType
from typing import Any, Unpack

from torchorbax._src.distributed.channel import Channel
from torchorbax._src.distributed.processes import Processes
from torchorbax._src.distributed.torch_processes import refuse_torch_processes
from torchorbax._src.run import at_exit
from torchorbax._src.run.compile_cache import use_compile_cache
from torchorbax._src.run.loop import StepInput, run_steps
from torchorbax._src.run.options import (
    RunKeywords,
    check_save_arguments,
    rules_of,
    run_options,
    step_number,
    takes_run_options,
)
from torchorbax._src.run.preemption import PreemptionNotice
from torchorbax._src.run.programs_ahead import load_ahead
from torchorbax._src.run.saves import Saves
from torchorbax._src.run.step_choice import Restorer
from torchorbax._src.run.tier import open_tiers
from torchorbax._src.run.timings import Stopwatch, Timings
from torchorbax._src.run.turns import Turns, in_turn
from torchorbax._src.save.save import SaveRecord
from torchorbax._src.state.registry import items_of
from torchorbax._src.state.request import Rename, Request, request
from torchorbax._src.storage.storage import Storage
from torchorbax.errors import ConfigError, OwnershipError, Problem, SaveError

_logger = logging.getLogger(__name__)


class Checkpointer:
    """Saves and restores live objects under a path.

    Args:
        path: the run's folder (`~` and relative paths work) or a `gs://` URI. It holds the steps of this run and
            nothing else.
        state: names to modules, `torch.optim` optimizers, `OptaxOptimizer`s, objects with `state_dict` and
            `load_state_dict` (schedulers), or pytrees of tensors, arrays and plain values. Optimizers are keyed by the
            names that their parameters have in the modules given. A mapping that can be written to is the run's
            `state` itself: what it holds at a save is saved, and a restore writes into it.
        **options: the attributes of `RunOptions`, each as a keyword.

    Attributes:
        step: the step that was restored; None if none was.
        next_step: the step to run next; 0 in a fresh run.
        left_out: what did not fit when it was restored with `strict=False`.

    Several threads may use it: their calls take turns. A forked process may not; a call there is an error, `close` and
    the end of the `with` block do nothing. A policy, hook or signal handler that runs during a call cannot call `save`,
    `wait`, `restore` or `close`: that is an error, too.

    With several processes (`jax.distributed`) every process makes the same calls in the same order, with a path that
    all of them see. Process 0 decides when to save, and its metrics are those of the step.

    Raises:
        ConfigError: an argument that cannot work, a path that is a file, cannot be written to or holds something else,
            or an optimizer built for another model.
        TypeError: an option that does not exist.
    """

    @takes_run_options
    def __init__(self, path: str | os.PathLike[str], state: Mapping[str, Any], **options: Unpack[RunKeywords]) -> None:
        settings = run_options(Checkpointer, options)
        self._stopwatch = Stopwatch()
        refuse_torch_processes()
        use_compile_cache(settings.compile_cache)
        self._processes = Processes(settings.barrier_timeout_s)
        # The live objects by name, and as items.
        self._state: MutableMapping[str, Any] = state if isinstance(state, MutableMapping) else dict(state)
        self._items = items_of(self._state, rng=settings.rng)
        # Where they are saved, and what does the work.
        channel = Channel(self._processes, "run")
        self._preemption = PreemptionNotice(
            settings.preemption_patience_s, self._save_overdue, settings.preemption_notice
        )
        with self._stopwatch.part("open_s"):
            self._main, self._local = open_tiers(path, self._items, settings, channel, self._preemption)
        self._programs = load_ahead(self._main.storage.path)
        self._tiers = [self._main] if self._local is None else [self._main, self._local]
        self._saves = Saves(self._tiers, self._items, self._processes, settings)
        self._turns = Turns(self._main.storage.path, lambda: self._saves.is_saving_thread)
        rules, verify = rules_of(settings), settings.verify
        self._restorer = Restorer(self._items, rules, self._main, self._local, channel, self._stopwatch, verify=verify)
        # Where the run stands.
        self._read_only = settings.read_only
        self._given = StepInput()
        self._closed = False
        self.step: int | None = None
        self.next_step = 0
        self.left_out: tuple[Problem, ...] = ()
        if not self._read_only:
            at_exit.opened(self, self._main.standing)
        self._preemption.start()

    @property
    def path(self) -> str:
        """The absolute path or URI."""
        return self._main.storage.path

    @property
    def state(self) -> MutableMapping[str, Any]:
        """The live objects by name: the very mapping that was given, if it can be written to.

        A tree that could not be restored in place is replaced here, and so in the mapping that was given.
        """
        return self._state

    @property
    def timings(self) -> Timings:
        """How long it has taken to come back: opening, restoring, compiling, the first step. Also in the log, then."""
        return self._stopwatch.timings

    @property
    def preempted(self) -> bool:
        """Has SIGTERM arrived since `resume`, in this process or another?"""
        return self._main.decider.preempted

    @property
    def history(self) -> list[SaveRecord]:
        """A record of every save that this checkpointer has started in this process, in order."""
        return self._saves.history

    def all_steps(self) -> list[int]:
        """The committed steps under `path` in ascending order, without those found to be damaged."""
        return self._main.steps.good()

    def best_step(self, metric: str, mode: str = "min") -> int | None:
        """The committed step whose `metric` is lowest (`mode="min"`) or highest (`"max"`). NaN does not count.

        None if no step has the metric.

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

    @in_turn
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
                What is none is left out, with a warning.
            force: save whatever the policy says, waiting for a save in flight. Also after SIGTERM.

        Returns:
            Was a save started?

        Raises:
            SaveError: an earlier save has failed; raised once. This step's save, if due, has been started all the same.
            ConfigError: `step` is not above the newest step, an unknown item in `state`, the checkpointer is closed, or
                it is called from a policy or hook, or in a forked process.
            UnsupportedLeafError, DeletedArrayError, MismatchError: this state cannot be saved; older steps are
                untouched.
        """
        started_s = time.monotonic()
        step = step_number(step)
        check_save_arguments(state, metrics)
        self._check_open()
        if self._stopwatch.step_done(self.path, step) and self._programs is not None:
            self._programs.finish()
        self.next_step = max(self.next_step, step + 1)  # it has been run, whatever comes of its save
        given = self._given
        given.metrics |= self._saves.checked(metrics or {})
        given.state = state or {}
        started = self._saves.offer(step, given.state, given.metrics, force=force, started_s=started_s)
        if not given.in_body:
            given.clear()
        self._saves.raise_unreported()
        return started

    def wait(self) -> None:
        """Wait until the save in flight, if there is one, is committed.

        Raises:
            SaveError: a save has failed that has not been reported yet.
            ConfigError: it is called from a policy or hook, or in a forked process.
        """
        self._turns.check("wait")
        self._turns.take(self._saves.attend)
        self._saves.wait()  # other threads may go on meanwhile
        self._turns.take(self._saves.take_note)

    @in_turn
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
            CheckpointNotFoundError: there is no such step; or there is none at all, with `read_only=True`.
            CorruptCheckpointError: the step asked for, or each of them, is damaged.
            MismatchError: the checkpoint does not fit the live objects; never skipped. `.problems` has all of them.
            ConfigError: `only` or `rename` has a name that neither the step nor the live objects have; or it is called
                from a policy or hook, or in a forked process.
        """
        self._saves.collect()
        wanted = request(only, strict, rename, cast)
        found = restore_from(self, self._main.storage, None if step is None else step_number(step), wanted)
        if found is None and self._read_only:
            self._main.storage.existing_steps()  # raises: who only reads has no use for a fresh start
        return found

    def steps(self, stop: int, *, progress: bool | None = None, save_last: bool = True) -> Iterator[int]:
        """The steps from `next_step` to `stop - 1`, with a save after each body when the policy says so.

        A body that calls `save` itself is left to it. The last step is saved whatever the policy, unless `save` is
        None. SIGTERM ends the loop after the body that it arrived in, with that step saved and committed.

        Args:
            stop: the number of steps of the whole run.
            progress: show a progress bar; None shows one on a terminal only.
            save_last: save the last step also if it is not due.
        """
        return run_steps(self, self._given, self._main, stop, progress=progress, save_last=save_last)

    def log(self, **metrics: Any) -> None:
        """Metrics of the current step, for the bar, the manifest and `best_step`. Never waits for the device.

        What is no real number, nor a 0-d array or tensor of one, is left out, with a warning.
        """
        self._given.metrics.update(self._saves.checked(metrics))

    def close(self) -> None:
        """Wait for the save in flight and stop listening for SIGTERM. Nothing can be saved afterwards.

        If SIGTERM has arrived, and the last complete step is not saved and still there, it is saved, too.
        In a forked process it does nothing.

        Raises:
            SaveError: a save has failed that has not been reported yet.
            ConfigError: it is called from a policy or hook.
        """
        if self._turns.is_forked:
            return
        self._turns.check("close")
        self._closed = True
        for tier in self._tiers:
            if tier.saver.step_in_flight is not None:
                _logger.info("%s: waiting for step %d to be committed", tier.storage.path, tier.saver.step_in_flight)
        try:
            self.wait()
            # Other processes, if there are any, need not have heard the signal, so they would not take part.
            if self._preemption.received and self._processes.count == 1:
                self._turns.take(functools.partial(self._saves.save_unsaved, preempted=True))
            self.wait()
        except SaveError:
            self._end()
            raise
        # After Ctrl-C in `wait`, this is not reached: the run stays open, and the save is waited for at exit.
        self._end()

    def _end(self) -> None:
        at_exit.closed(self)
        self._saves.close()
        for tier in self._tiers:
            tier.storage.release()
        self._preemption.remove()
        self._processes.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ConfigError(f"{self.path}: this checkpointer is closed")
        if self._read_only:
            raise ConfigError(f"{self.path} was opened with read_only=True, so nothing can be saved there")

    def _save_overdue(self) -> None:
        self._turns.take(self._saves.save_overdue)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._turns.is_forked:
            return
        try:
            if exc is not None and not self._closed:
                self._processes.fail(f"{type(exc).__name__}: {exc}")
                save = functools.partial(self._saves.save_unsaved, preempted=self._preemption.received)
                self._turns.take(save)
            self.close()
        except SaveError as error:
            if exc is None:
                raise
            exc.add_note(f"Besides: {error}")
        if exc is None or self._read_only or _is_about_owner(exc):  # then this program is not the one that goes on
            return
        if isinstance(exc, SystemExit):  # the interpreter does not print its notes
            _logger.warning("%s", self._main.standing())
        else:
            exc.add_note(self._main.standing())


def _is_about_owner(error: BaseException | None) -> bool:
    """Does an error come from another program having taken the run over?"""
    while error is not None and not isinstance(error, OwnershipError):
        error = error.__cause__
    return error is not None


# What only `resume` does with a run.


def restore_from(run: Checkpointer, storage: Storage, step: int | None, wanted: Request) -> int | None:
    """Restore a step of this run or of another; None for its newest good one. Returns the step, if there is one."""
    found = run._restorer.restore(storage, step, wanted)
    if found is None:
        return None
    run._saves.drop_unsaved()  # the last complete step is no longer what is live
    run.left_out = found.left_out
    if wanted.only is None:
        run.step = found.manifest.step
        run.next_step = run.step + 1
    return found.manifest.step


def get_ready(run: Checkpointer) -> None:
    """Prepare the first save before the loop starts, as far as the state is on devices by now.

    Raises:
        ConfigError: the checkpointer is closed.
    """
    if not run._read_only:
        run._check_open()
        run._saves.prepare()
    run._stopwatch.ready()


def listen_for_preemption(run: Checkpointer) -> None:
    """Take SIGTERM, until `close`, as notice to save the current step and to end `steps`."""
    run._preemption.install()
