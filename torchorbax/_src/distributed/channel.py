"""Agreement between all processes: values that they exchange, and actions that succeed in all of them or in none.

Process 0 collects the values of the others, decides, and publishes the result. The values travel through the key-value
store of the coordination service of `jax.distributed`.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import jax

from torchorbax._src.distributed.failures import Failure, combined, described, rebuilt
from torchorbax._src.distributed.processes import Processes, Service, as_process_error
from torchorbax.errors import ProcessError

T = TypeVar("T")

_POLL_S = 1.0
"""How long to wait for a value before asking whether its process has left the run."""
_SHARE_OF_FIRST = 0.8
"""The share of the time limit that process 0 waits. The others wait longer, so that it can tell them who is missing."""


@dataclass(frozen=True)
class _Outcome(Generic[T]):
    """What an action has returned in this process, or what it has raised."""

    value: T | None = None
    failure: Exception | None = None

    @classmethod
    def of(cls, action: Callable[[], T]) -> _Outcome[T]:
        try:
            return cls(action())
        except Exception as error:  # `result` raises it, after the other processes have been told
            return cls(failure=error)

    @property
    def described_failure(self) -> Failure | None:
        """The failure as JSON, for the other processes; None if there is none."""
        return None if self.failure is None else described(self.failure)

    def result(self) -> T:
        """Return what the action has returned, or raise what it has raised."""
        if self.failure is not None:
            raise self.failure
        return self.value  # type: ignore[return-value]  # a T, which may be None


class Channel:
    """A sequence of agreements. All processes make the same calls in the same order; the values are JSON.

    An agreement succeeds in all processes, or all of them raise. The process in which an exception happened raises it
    unchanged. The other processes raise what the module `failures` makes of it.

    Args:
        processes: the processes of the run.
        name: the name of this channel, the same in all processes. Each thread needs a channel of its own.

    Attributes:
        waiting_for: the process whose value is waited for now; None if none is.
    """

    def __init__(self, processes: Processes, name: str) -> None:
        self.processes = processes
        self.waiting_for: int | None = None
        self._name = f"{processes.name}/{name}"
        self._sequence = ""
        self._counts: Counter[str] = Counter()
        self._published: list[str] = []  # keys that process 0 deletes when every process has certainly read them

    def begin(self, sequence: object) -> None:
        """Start a new sequence of agreements. The keys of a sequence that broke off do not disturb it."""
        self._sequence = f"{sequence}."
        self._counts.clear()

    # Exchanging values.

    def gather(self, phase: str, mine: Any) -> list[Any] | None:
        """In process 0, the values of all processes in their order. Other processes return None and do not wait.

        Raises:
            ProcessError: in process 0: some processes have not come in time, or have left.
        """
        if self.processes.count == 1:
            return [mine]
        prefix = self._next(phase)
        if not self.processes.is_first:
            self._set(f"{prefix}/{self.processes.index}", mine, phase)
            return None
        deadline = time.monotonic() + self.processes.timeout_s * _SHARE_OF_FIRST
        values = [mine]
        for process in range(1, self.processes.count):
            try:
                values.append(json.loads(self._wait(f"{prefix}/{process}", process, phase, deadline)))
            except TimeoutError:
                with as_process_error(phase):
                    found = self._service.key_value_dir_get(prefix)
                here = {int(key.rpartition("/")[2]) for key, _ in found}
                raise self._late(set(range(1, self.processes.count)) - here, phase) from None
        # A process reads what is published before it comes here, so the earlier keys are no longer needed.
        with as_process_error(phase):
            for key in (prefix, *self._published):
                self._service.key_value_delete(key)
        self._published.clear()
        return values

    def publish(self, phase: str, value: Any = None) -> Any:
        """The value of process 0, in all processes.

        Raises:
            ProcessError: process 0 has not come in time, or has left.
        """
        if self.processes.count == 1:
            return value
        key = self._next(f"{phase}:all")
        if self.processes.is_first:
            self._set(key, value, phase)
            self._published.append(key)
            return value
        try:
            return json.loads(self._wait(key, 0, phase, time.monotonic() + self.processes.timeout_s))
        except TimeoutError:
            raise self._late({0}, phase) from None

    # Running actions: if one fails, all processes that wait for it learn why.

    def collect(self, phase: str, action: Callable[[], T]) -> list[T] | None:
        """Run `action` in every process. In process 0, what each has returned; other processes return None at once.

        Raises:
            Exception: what `action` has raised in this process.
            ProcessError, CorruptCheckpointError: in process 0: it has failed in other processes.
        """
        outcome = _Outcome.of(action)
        reports = self.gather(phase, [outcome.described_failure, outcome.value])
        outcome.result()
        if reports is None:
            return None
        _raise_failures([failure for failure, _ in reports], phase)
        return [value for _, value in reports]

    @contextlib.contextmanager
    def announcing(self, phase: str) -> Iterator[Callable[[Any], None]]:
        """In process 0: yields a function that announces a value. The other processes wait for it in `hear`.

        If an exception leaves the `with` block before the value is announced, the exception is announced instead.
        """
        announced = False

        def announce(value: Any) -> None:
            nonlocal announced
            announced = True
            self.publish(phase, {"failure": None, "value": value})

        try:
            yield announce
        except Exception as error:
            if not announced:
                self.publish(phase, {"failure": described(error)})
            raise

    def hear(self, phase: str) -> Any:
        """In the other processes: the value that process 0 announces in `announcing`.

        Raises:
            ProcessError: process 0 has not announced anything in time, has left, or has failed.
            SaveError, CorruptCheckpointError: process 0 has raised this error.
        """
        announced = self.publish(phase)
        if announced["failure"] is not None:
            raise rebuilt(announced["failure"], 0, phase)
        return announced["value"]

    def first(self, phase: str, action: Callable[[], T]) -> T:
        """Run `action` in process 0 only. What it returns, in all processes.

        Raises:
            Exception: in process 0, what `action` has raised; in other processes, as `hear`.
        """
        if not self.processes.is_first:
            heard: T = self.hear(phase)
            return heard
        with self.announcing(phase) as announce:
            value = action()
            announce(value)
        return value

    def agree(self, phase: str, action: Callable[[], T], decide: Callable[[list[T]], Any]) -> Any:
        """Run `action` in every process, and `decide` with all results in process 0. The decision, in all processes.

        Raises:
            Exception: what `action` has raised in this process.
            ProcessError, CorruptCheckpointError, SaveError: `action` has failed in another process, or `decide` has.
        """
        if self.processes.is_first:
            return self.first(phase, lambda: decide(self.collect(phase, action) or []))
        own = _Outcome.of(lambda: self.collect(phase, action))
        decided = _Outcome.of(lambda: self.hear(phase))
        own.result()
        return decided.result()

    def everyone(self, phase: str, mine: T) -> list[T]:
        """The values of all processes in their order, in all processes.

        Raises:
            ProcessError: some processes have not come in time, or have left.
        """
        values: list[T] = self.agree(phase, lambda: mine, list)
        return values

    def attempt(self, phase: str, action: Callable[[], T]) -> T:
        """Run `action` in every process. What it returns in this process, if it succeeds in all; need not be JSON.

        Raises:
            Exception: what `action` has raised in this process.
            CorruptCheckpointError: it has failed in other processes, and in all of them because of damage.
            ProcessError: it has failed in another process for any other reason.
        """
        outcome = _Outcome.of(action)
        own = outcome.described_failure
        failures = self.everyone(phase, own)
        # Damage found here must not hide another failure elsewhere: only damage lets an older step be restored.
        other_than_damage = any(failure and failure["kind"] != "damage" for failure in failures)
        if own is None or (own["kind"] == "damage" and other_than_damage):
            _raise_failures(failures, phase)
        return outcome.result()

    # Keys, and waiting for them.

    @property
    def _service(self) -> Service:
        if self.processes.service is None:
            raise RuntimeError("a single process has no coordination service")
        return self.processes.service

    def _set(self, key: str, value: Any, phase: str) -> None:
        with as_process_error(phase):
            self._service.key_value_set(key, json.dumps(value))

    def _next(self, phase: str) -> str:
        self._counts[phase] += 1
        return f"{self._name}/{self._sequence}{phase}.{self._counts[phase]}"

    def _wait(self, key: str, process: int, phase: str, deadline: float) -> str:
        self.waiting_for = process
        try:
            return self._wait_for(key, process, phase, deadline)
        finally:
            self.waiting_for = None

    def _wait_for(self, key: str, process: int, phase: str, deadline: float) -> str:
        """Wait until a process has set a key, and return its value.

        Raises:
            TimeoutError: the key has not been set in time.
            ProcessError: the process has left the run, or the coordination service does not answer.
        """
        while True:
            left_s = min(deadline, self.processes.until_s) - time.monotonic()
            if (value := self._get(key, phase, max(0.001, min(_POLL_S, left_s)))) is not None:
                return value
            try:
                self.processes.check_open(process, phase)
            except ProcessError:
                if (value := self._get(key, phase, 0.001)) is not None:  # set just before the process left
                    return value
                raise
            if left_s <= _POLL_S:
                raise TimeoutError

    def _get(self, key: str, phase: str, wait_s: float) -> str | None:
        with as_process_error(phase):
            try:
                return self._service.blocking_key_value_get(key, math.ceil(1000 * wait_s))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
                return None

    def _late(self, missing: set[int], phase: str) -> ProcessError:
        who = ", ".join(f"process {process}" for process in sorted(missing)) or "a process"
        return ProcessError(
            dict.fromkeys(sorted(missing)),
            phase,
            f"{who} did not come within {self.processes.timeout_s:g} s (barrier_timeout_s). It hangs, is much slower, "
            "or its program does something else: every process must make the same calls in the same order",
        )


def _raise_failures(failures: list[Failure | None], phase: str) -> None:
    """Raise one exception for these failures. There is one entry for each process: None if it has not failed."""
    failed = {process: failure for process, failure in enumerate(failures) if failure is not None}
    if failed:
        raise combined(failed, phase)
