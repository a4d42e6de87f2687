"""The life of a run's checkpoints: when a save starts, how it ends, what is restored and what is kept. Knows no
formats."""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401  # see _finish_saves
import datetime
import functools
import importlib.metadata
import logging
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import jax
import numpy as np
import torch
from tqdm.auto import tqdm

from torchorbax import _orbax, _torchax, snapshot
from torchorbax._orbax import Storage
from torchorbax.errors import ConfigError, CorruptCheckpointError, MismatchError, Problem, SaveError
from torchorbax.items import RNG, items_of
from torchorbax.manifest import Manifest
from torchorbax.optimizers import Optimizer
from torchorbax.placement import meta_tensors, place_
from torchorbax.policies import ContinuousPolicy, PreservationContext, preservation_policy, save_policy
from torchorbax.preemption import PreemptionNotice
from torchorbax.sharding import ShardingRules, Shardings

_logger = logging.getLogger(__name__)


@dataclass
class SaveRecord:
    """One save of this process.

    Attributes:
        step: the step saved.
        time: when `save` was called, in UTC.
        stall_s: seconds that `save` kept the loop, waiting for an earlier save included.
        commit_s: seconds from the call until the step was committed; None while in flight or if it failed.
        nbytes: bytes of arrays saved, each counted once.
        metrics: the numbers given with it; complete once it is committed.
        error: why it failed, if it did.
    """

    step: int
    time: datetime.datetime
    stall_s: float = 0.0
    commit_s: float | None = None
    nbytes: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    error: SaveError | None = None


class _StepInfo:
    """What policies get to know about a step; read from its manifest when a policy asks."""

    def __init__(self, step: int, storage: Storage) -> None:
        self.step = step
        self._storage = storage

    @functools.cached_property
    def _manifest(self) -> Manifest | None:
        try:
            return self._storage.manifest(self.step)
        except CorruptCheckpointError as error:
            _logger.warning("%s", error)
            return None

    @functools.cached_property
    def time(self) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(0, datetime.UTC) if self._manifest is None else self._manifest.time

    @functools.cached_property
    def metrics(self) -> dict[str, float] | None:
        return dict(self._manifest.metrics) or None if self._manifest is not None else None


class _Save:
    """A save in the background."""

    def __init__(self, record: SaveRecord, work: Callable[[], None]) -> None:
        self.record = record
        self._thread = threading.Thread(target=work, name=f"torchorbax-save-{record.step}")
        self._thread.start()

    @property
    def finished(self) -> bool:
        return not self._thread.is_alive()

    def join(self) -> None:
        self._thread.join()


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

    Raises:
        ConfigError: an argument that cannot work, a path that is a file, cannot be written to or holds something else,
            or an optimizer built for another model.
    """

    def __init__(
        self,
        path: str,
        state: Mapping[str, Any],
        *,
        save: Any = "continuous",
        keep: Any = 3,
        shardings: Shardings | None = None,
        staging: snapshot.Staging = "auto",
        rng: bool = True,
    ) -> None:
        if jax.process_count() > 1:
            raise ConfigError("several jax processes are not supported yet")
        self._save_policy = save_policy(save)
        self._keep_policy = preservation_policy(keep)
        self._staging = snapshot.check_staging(staging)
        self._rules = None if shardings is None else ShardingRules(shardings)
        self._state: MutableMapping[str, Any] = dict(state)
        self._items = items_of(self._state, rng=rng)
        self._storage = Storage(path)
        self._storage.check()
        self._storage.create()
        self._infos = {step: _StepInfo(step, self._storage) for step in self._storage.steps()}
        self._in_flight: _Save | None = None
        self._unreported: SaveError | None = None
        self._preemption = PreemptionNotice()
        self._preemption_saved = False
        self._leftovers_removed = False
        self._closed = False
        self._metrics: dict[str, Any] = {}
        self.step: int | None = None
        self.next_step = 0
        self.history: list[SaveRecord] = []
        _open_checkpointers.add(self)

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
        """Has SIGTERM arrived since `resume`?"""
        return self._preemption.received

    def all_steps(self) -> list[int]:
        """The committed steps in ascending order."""
        return self._storage.steps()

    def best_step(self, metric: str, mode: str = "min") -> int | None:
        """The committed step whose `metric` is lowest (`mode="min"`) or highest (`"max"`); None if no step has it.

        Raises:
            ConfigError: another mode.
        """
        if mode not in ("min", "max"):
            raise ConfigError(f"mode must be 'min' or 'max', not {mode!r}")
        known = {step: self._info(step).metrics or {} for step in self.all_steps()}
        values = {step: metrics[metric] for step, metrics in known.items() if metric in metrics}
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
        if self._closed:
            raise ConfigError(f"{self.path}: this checkpointer is closed")
        if self._in_flight is not None and self._in_flight.finished:
            self._collect()
        now = datetime.datetime.now(datetime.UTC)
        due = force or (self.preempted and not self._preemption_saved) or self._due(step, now)
        if due:
            self._start(step, now, state or {}, metrics or {}, started_s)
        self.next_step = max(self.next_step, step + 1)
        self._raise_unreported()
        return due

    def _due(self, step: int, now: datetime.datetime) -> bool:
        candidate = _Candidate(step, now)
        context = _orbax.decision_context(saving=self._in_flight is not None, preempted=self.preempted)
        return bool(self._save_policy.should_save(candidate, list(self._infos.values()), context=context))

    def _start(
        self, step: int, now: datetime.datetime, state: Mapping[str, Any], metrics: Mapping[str, Any], started_s: float
    ) -> None:
        newest = max(self._infos, default=None)
        if newest is not None and step <= newest:
            raise ConfigError(
                f"{self.path}: step {step} is already saved"
                if step in self._infos
                else f"{self.path}: step {step} is below the newest step {newest}; to go on from an older step, move "
                "the newer ones away or use another path"
            )
        if unknown := [name for name in state if name not in self._items]:
            raise ConfigError(
                f"save got state for {', '.join(unknown)}, but this checkpointer has {', '.join(self._items)}"
            )
        numbers = {name: _array_or_number(name, value) for name, value in metrics.items()}
        if self._in_flight is not None:
            self._collect()  # two saves never overlap
        snap = snapshot.take({name: item.capture(state.get(name)) for name, item in self._items.items()}, self._staging)
        record = SaveRecord(step, now, nbytes=snap.nbytes)
        info = _StepInfo(step, self._storage)
        info.time = now  # known, so the manifest need not be read
        self._infos[step] = info
        self.history.append(record)
        self._preemption_saved = self.preempted
        self._in_flight = _Save(record, functools.partial(self._write, record, [snap], numbers, started_s))
        record.stall_s = time.perf_counter() - started_s

    def _write(
        self, record: SaveRecord, holder: list[snapshot.Snapshot], metrics: Mapping[str, Any], started_s: float
    ) -> None:
        """Runs on the background thread: no torchax mode, no device collective."""
        try:
            if not self._leftovers_removed:
                self._storage.remove_leftovers()
                self._leftovers_removed = True
            record.metrics.update({name: float(np.asarray(value)) for name, value in metrics.items()})
            snap = holder.pop()  # the only reference, so that the copies are freed when they are written
            manifest = Manifest(record.step, record.time, dict(record.metrics), snap.items, _versions())
            self._storage.write(manifest, snap.arrays)
            record.commit_s = time.perf_counter() - started_s
        except SaveError as error:
            record.error = error
        except Exception as error:  # it is raised where the caller can see it
            record.error = SaveError(record.step, self.path, f"{type(error).__name__}: {error}")
            record.error.__cause__ = error
        else:
            self._infos[record.step].metrics = dict(record.metrics) or None
            self._retain(record.step)

    def _retain(self, newest: int) -> None:
        """Delete what the policy lets go, now that the newest step is committed."""
        infos = [self._info(step) for step in self._storage.steps()]
        preserved = self._keep_policy.should_preserve(infos, context=PreservationContext())
        for info, keep in zip(infos, preserved, strict=True):
            if keep or info.step == newest:
                continue
            try:
                self._storage.delete(info.step)
            except OSError as error:
                _logger.warning("%s: step %d could not be deleted, trying again later: %s", self.path, info.step, error)
            else:
                self._infos.pop(info.step, None)

    def _info(self, step: int) -> _StepInfo:
        return self._infos.get(step) or _StepInfo(step, self._storage)

    def _collect(self) -> None:
        """Wait for the save in flight, and take note of how it ended."""
        if self._in_flight is None:
            return
        self._in_flight.join()
        record = self._in_flight.record
        self._in_flight = None
        if record.error is not None:
            self._infos.pop(record.step, None)
            if self._unreported is not None:
                _logger.error("%s", self._unreported)  # the caller never asked
            self._unreported = record.error

    def _raise_unreported(self) -> None:
        if self._unreported is not None:
            error, self._unreported = self._unreported, None
            raise error

    def wait(self) -> None:
        """Wait until the save in flight, if any, is committed.

        Raises:
            SaveError: a save has failed that has not been reported yet.
        """
        self._collect()
        self._raise_unreported()

    # ----------------------------------------------------------------------------------------------------- restore

    def restore(self, step: int | None = None) -> int | None:
        """Restore the live objects, in place; all or nothing.

        Args:
            step: which step; None for the newest good one. Then a damaged step is skipped with a warning that says why.

        Returns:
            The step restored; None if `step` is None and there is none.

        Raises:
            CheckpointNotFoundError: there is no such step.
            CorruptCheckpointError: the step asked for, or each of them, is damaged.
            MismatchError: the checkpoint does not fit the live objects; never skipped.
        """
        self._collect()
        if step is not None:
            self._restore_step(step)
            return step
        reasons: dict[int, str] = {}
        for candidate in reversed(self._storage.steps()):
            try:
                self._restore_step(candidate)
            except CorruptCheckpointError as error:
                reasons.update(error.reasons)
                continue
            for skipped, reason in reasons.items():
                warnings.warn(f"{self.path}: skipped damaged step {skipped}: {reason}", stacklevel=2)
            return candidate
        if reasons:
            raise CorruptCheckpointError(self.path, reasons)
        return None

    def _restore_step(self, step: int) -> None:
        manifest = self._storage.manifest(step)
        saved = {name: item for name, item in manifest.items.items() if name != RNG or RNG in self._items}
        items = {name: item for name, item in self._items.items() if name != RNG or RNG in saved}
        problems = [Problem("missing", name, "the whole item", items[name].kind) for name in items if name not in saved]
        plans = {}
        for name, meta in saved.items():
            if name not in items or items[name].kind != meta.kind:
                problems.append(Problem("unexpected", name, "the whole item", "", f"a {meta.kind} item"))
            else:
                plans[name] = items[name].plan(meta, self._rules)
                problems += plans[name].problems
        if problems:
            raise MismatchError(
                f"{self.path}: step {step}",
                problems,
                "Build the model, the optimizer and `state` as they were when it was saved, or use another path.",
            )
        arrays = self._storage.read(step, saved, {name: plan.targets for name, plan in plans.items()})
        with ExitStack() as undo:
            for name, item in items.items():
                item.apply(saved[name], arrays[name], undo)
            undo.pop_all()
        self.step = step
        self.next_step = step + 1

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
        with tqdm(
            total=stop, initial=min(self.next_step, stop), disable=None if progress is None else not progress
        ) as bar:
            for step in range(self.next_step, stop):
                self._metrics = {}
                yield step
                if self.next_step <= step:  # the body has not called save itself
                    last = step == stop - 1 and isinstance(self._save_policy, ContinuousPolicy)
                    self.save(step, metrics=self._metrics, force=last)
                bar.update()
                bar.set_postfix(_ready(self._metrics), refresh=False)
                if self.preempted:
                    self.wait()
                    return

    def log(self, **metrics: Any) -> None:
        """Metrics of the current step, for the bar, the manifest and `best_step`. Never waits for the device."""
        self._metrics.update(metrics)

    # --------------------------------------------------------------------------------------------------------- end

    def close(self) -> None:
        """Wait for the save in flight and stop listening for SIGTERM. Nothing can be saved afterwards.

        Raises:
            SaveError: a save has failed that has not been reported yet.
        """
        self._preemption.remove()
        self._closed = True
        _open_checkpointers.discard(self)
        if self._in_flight is not None and not self._in_flight.finished:
            _logger.info("%s: waiting for step %d to be committed", self.path, self._in_flight.record.step)
        self.wait()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.close()
        except SaveError as error:
            if exc is None:
                raise
            exc.add_note(f"Besides: {error}")


@dataclass(frozen=True)
class _Candidate:
    """The step that a save policy decides about."""

    step: int
    time: datetime.datetime
    metrics: dict[str, float] | None = None


def resume(
    model: torch.nn.Module,
    optimizer: Optimizer | None,
    path: str,
    *,
    state: Mapping[str, Any] | None = None,
    save: Any = "continuous",
    keep: Any = 3,
    shardings: Shardings | None = None,
    staging: snapshot.Staging = "auto",
    rng: bool = True,
) -> Checkpointer:
    """Restore the newest good step under `path` into live objects if there is one, and keep saving them there.

    With `shardings` the model and the optimizer's state are on jax devices afterwards, laid out by the rules, whether
    there was a checkpoint or not (see `place_`). Until `close`, SIGTERM saves the current step and ends `steps()`.

    Args:
        model: the module; on CPU, on meta (if there is a checkpoint) or on jax.
        optimizer: a `torch.optim` optimizer of its parameters, an `OptaxOptimizer`, or None.
        state: further objects to save and restore by name.
        path: see `Checkpointer`.
        save: see `Checkpointer`.
        keep: see `Checkpointer`.
        shardings: see `Checkpointer`.
        staging: see `Checkpointer`.
        rng: see `Checkpointer`.

    Returns:
        The run. `run.step` is the step restored, None if it starts fresh.

    Raises:
        ConfigError: as `Checkpointer`; also a model on meta without a checkpoint to give it values.
        MismatchError, CorruptCheckpointError: as `Checkpointer.restore`. The live objects are as they were.
    """
    further = dict(state or {})
    if taken := {"model", "optimizer"} & further.keys():
        raise ConfigError(f"state must not name {' or '.join(sorted(taken))}: resume takes them as arguments")
    objects = {"model": model} if optimizer is None else {"model": model, "optimizer": optimizer}
    run = Checkpointer(
        path, {**objects, **further}, save=save, keep=keep, shardings=shardings, staging=staging, rng=rng
    )
    try:
        restored = run.restore()
        on_meta = meta_tensors(model)
        if on_meta and restored is None:
            raise ConfigError(
                f"{len(on_meta)} tensors of the model are on meta ({on_meta[0]}, ...) and {run.path} has no checkpoint "
                "to give them values; build the model on the CPU for the first start"
            )
        if on_meta:
            warnings.warn(
                f"still on meta after the restore, because buffers that are not persistent are in no checkpoint: "
                f"{', '.join(on_meta)}. Build them again before training.",
                stacklevel=2,
            )
        if shardings is not None:
            place_(model, optimizer, shardings, skip=on_meta)
        run._preemption.install()
    except BaseException:
        run.close()
        raise
    return run


def _array_or_number(name: str, value: Any) -> Any:
    if _torchax.is_torchax(value):
        value = _torchax.array_of(value)
    elif isinstance(value, torch.Tensor):
        value = value.detach().clone().numpy()
    if isinstance(value, bool | int | float | np.number) or (hasattr(value, "shape") and value.shape == ()):
        return value
    raise ConfigError(f"metric {name} must be a number or a 0-d array or tensor, not {value!r}")


def _ready(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics that can be shown without waiting for the device."""
    shown = {}
    for name, value in metrics.items():
        array = _torchax.array_of(value) if _torchax.is_torchax(value) else value
        if not isinstance(array, jax.Array) or array.is_ready():  # type: ignore[attr-defined]
            shown[name] = f"{float(array):.4g}"
    return shown


@functools.cache
def _versions() -> dict[str, str]:
    return {
        "torchorbax": importlib.metadata.version("torchorbax"),
        "torch": torch.__version__,
        "torchax": _torchax.VERSION,
        "jax": jax.__version__,
        "orbax-checkpoint": _orbax.VERSION,
        "numpy": np.__version__,
    }


_open_checkpointers: weakref.WeakSet[Checkpointer] = weakref.WeakSet()


def _finish_saves() -> None:
    """Close what a program left open when it ends, so that the save in flight is committed."""
    for run in list(_open_checkpointers):
        try:
            run.close()
        except SaveError as error:
            _logger.error("at exit: %s", error)


# Orbax hands work to executors, which refuse it as soon as `threading` winds down; `atexit` functions run later than
# that. Callbacks run in reverse order, so this one comes before that of concurrent.futures, which is imported above.
threading._register_atexit(_finish_saves)  # type: ignore[attr-defined]
