"""Agreements of all processes, one after another."""

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
from torchorbax._src.distributed.processes import Processes, Service, answering
from torchorbax.errors import ProcessError

T = TypeVar("T")

_POLL_S = 1.0
"""How long to wait for a value before looking whether its process has left the run."""
_SHARE_OF_FIRST = 0.8
"""Process 0 waits this share of the time limit, so that the others hear from it who is missing."""


@dataclass(frozen=True)
class _Outcome(Generic[T]):
    """What an action has given in this process, or what it has raised."""

    value: T | None = None
    failure: Exception | None = None

    @classmethod
    def of(cls, action: Callable[[], T]) -> _Outcome[T]:
        try:
            return cls(action())
        except Exception as error:  # raised when the other processes know
            return cls(failure=error)

    @property
    def described_failure(self) -> Failure | None:
        """The failure as the other processes get to know it."""
        return None if self.failure is None else described(self.failure)

    def result(self) -> T:
        """What the action has given, or the exception that it has raised."""
        if self.failure is not None:
            raise self.failure
        return self.value  # type: ignore[return-value]  # a T, which may be None


class Channel:
    """Agreements that all processes make in the same order. What they say to each other is JSON.

    Whatever is agreed on succeeds in all processes, or all of them raise. An exception is raised as it is in the
    process in which it happened; the others raise what `failures` makes of it.

    Args:
        processes: all of them.
        name: tells this channel from others. Every thread that agrees has a channel of its own.
    """

    def __init__(self, processes: Processes, name: str) -> None:
        self.processes = processes
        self._name = f"{processes.name}/{name}"
        self._sequence = ""
        self._counts: Counter[str] = Counter()
        self._published: list[str] = []  # what process 0 deletes once all processes must have read it

    def begin(self, sequence: object) -> None:
        """Start a new sequence, which is not disturbed by one that has broken off."""
        self._sequence = f"{sequence}."
        self._counts.clear()

    # Values of one process or all.

    def gather(self, phase: str, mine: Any) -> list[Any] | None:
        """The values of all processes at process 0, in order; None elsewhere, at once.

        Raises:
            ProcessError: some have not come in time, or have left. At process 0.
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
                here = {int(key.rpartition("/")[2]) for key, _ in self._service.key_value_dir_get(prefix)}
                raise self._late(set(range(1, self.processes.count)) - here, phase) from None
        for key in (prefix, *self._published):
            self._service.key_value_delete(key)
        self._published.clear()
        return values

    def publish(self, phase: str, value: Any = None) -> Any:
        """The value of process 0, everywhere.

        Raises:
            ProcessError: it has not come in time, or process 0 has left.
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

    # Actions that succeed, or of which all learn why they have not.

    def collect(self, phase: str, action: Callable[[], T]) -> list[T] | None:
        """What `action` gives in each process, at process 0, in order; None elsewhere, at once.

        Raises:
            Exception: what `action` has raised here.
            ProcessError, CorruptCheckpointError: it has failed in other processes. At process 0.
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
        """For process 0: gives a function that announces a value, for which the others wait in `hear`.

        An exception that leaves the `with` block before that is announced instead.
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
        """For the other processes: what process 0 announces.

        Raises:
            ProcessError: process 0 has not announced anything in time, or has left; or it has failed.
            SaveError, CorruptCheckpointError: what process 0 has raised.
        """
        announced = self.publish(phase)
        if announced["failure"] is not None:
            raise rebuilt(announced["failure"], 0, phase)
        return announced["value"]

    def first(self, phase: str, action: Callable[[], T]) -> T:
        """What `action` gives in process 0, everywhere. It runs in no other process.

        Raises:
            Exception: what it has raised, in process 0; elsewhere as `hear`.
        """
        if not self.processes.is_first:
            heard: T = self.hear(phase)
            return heard
        with self.announcing(phase) as announce:
            value = action()
            announce(value)
        return value

    def agree(self, phase: str, action: Callable[[], T], decide: Callable[[list[T]], Any]) -> Any:
        """What process 0 decides, everywhere, when it knows what `action` gives in each process.

        Raises:
            Exception: what `action` has raised here.
            ProcessError, CorruptCheckpointError, SaveError: it has failed elsewhere, or `decide` has.
        """
        if self.processes.is_first:
            return self.first(phase, lambda: decide(self.collect(phase, action) or []))
        own = _Outcome.of(lambda: self.collect(phase, action))
        decided = _Outcome.of(lambda: self.hear(phase))
        own.result()
        return decided.result()

    def everyone(self, phase: str, mine: T) -> list[T]:
        """The values of all processes, everywhere, in order.

        Raises:
            ProcessError: some have not come in time, or have left.
        """
        values: list[T] = self.agree(phase, lambda: mine, list)
        return values

    def attempt(self, phase: str, action: Callable[[], T]) -> T:
        """What `action` gives here, if it succeeds everywhere. It may be anything, not only JSON.

        Raises:
            Exception: what `action` has raised here.
            CorruptCheckpointError: it has failed elsewhere, and wherever it has failed it has found damage.
            ProcessError: it has failed elsewhere in another way.
        """
        outcome = _Outcome.of(action)
        own = outcome.described_failure
        failures = self.everyone(phase, own)
        if own is None or (own["kind"] == "damage" and any(one and one["kind"] != "damage" for one in failures)):
            _raise_failures(failures, phase)  # what others have met, if it is worse than damage
        return outcome.result()

    # Keys and waiting.

    @property
    def _service(self) -> Service:
        if self.processes.service is None:
            raise RuntimeError("one process has nobody to talk to")
        return self.processes.service

    def _set(self, key: str, value: Any, phase: str) -> None:
        with answering(phase):
            self._service.key_value_set(key, json.dumps(value))

    def _next(self, phase: str) -> str:
        self._counts[phase] += 1
        return f"{self._name}/{self._sequence}{phase}.{self._counts[phase]}"

    def _wait(self, key: str, process: int, phase: str, deadline: float) -> str:
        """The value of a key, when its process has set it.

        Raises:
            TimeoutError: it has not been set in time.
            ProcessError: that process has left, or the coordination service does not answer.
        """
        while True:
            left_s = min(deadline, self.processes.until_s) - time.monotonic()
            if (value := self._get(key, phase, max(0.001, min(_POLL_S, left_s)))) is not None:
                return value
            try:
                self.processes.check_open(process, phase)
            except ProcessError:
                if (value := self._get(key, phase, 0.001)) is not None:  # it may have set it just before it left
                    return value
                raise
            if left_s <= _POLL_S:
                raise TimeoutError

    def _get(self, key: str, phase: str, wait_s: float) -> str | None:
        with answering(phase):
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
    """Raise what the processes have failed with, if any has."""
    failed = {process: failure for process, failure in enumerate(failures) if failure is not None}
    if failed:
        raise combined(failed, phase)
