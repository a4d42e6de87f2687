"""Agreements, one after another."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax

from torchorbax._src.distributed.processes import _LOOK_S, Processes, Service, T, answering
from torchorbax._src.format.values import Json
from torchorbax.errors import ProcessError


class Channel:
    """Agreements, one after another, that all processes make in the same order. Values are JSON."""

    def __init__(self, processes: Processes, name: str) -> None:
        self.processes = processes
        self._name = f"{processes.name}/{name}"
        self._sequence = ""
        self._counts: Counter[str] = Counter()
        self._read_by_all: list[str] = []  # what process 0 has published and will delete when all have come further

    def begin(self, sequence: object) -> None:
        """Start a sequence of its own, so that one that has broken off does not matter to it."""
        self._sequence = f"{sequence}."
        self._counts.clear()

    def gather(self, phase: str, mine: Json) -> list[Json] | None:
        """Everybody's value at process 0, in order; None elsewhere, at once.

        Raises:
            ProcessError: some have not come in time, or have left. At process 0.
        """
        if self.processes.count == 1:
            return [mine]
        prefix = self._next(phase)
        if not self.processes.is_first:
            self._service.key_value_set(f"{prefix}/{self.processes.index}", json.dumps(mine))
            return None
        # Before the others' time is up, so that they hear from here who is missing.
        deadline = time.monotonic() + self.processes.timeout_s * _FIRST_WAITS
        values = [mine]
        for process in range(1, self.processes.count):
            try:
                values.append(json.loads(self._wait(f"{prefix}/{process}", process, phase, deadline)))
            except TimeoutError:
                here = {int(key.rpartition("/")[2]) for key, _ in self._service.key_value_dir_get(prefix)}
                raise self._late(set(range(1, self.processes.count)) - here, phase) from None
        for key in (prefix, *self._read_by_all):
            self._service.key_value_delete(key)
        self._read_by_all.clear()
        return values

    def publish(self, phase: str, value: Json = None) -> Any:
        """The value of process 0, everywhere.

        Raises:
            ProcessError: it has not come in time, or has left.
        """
        if self.processes.count == 1:
            return value
        key = self._next(f"{phase}:all")
        if self.processes.is_first:
            self._service.key_value_set(key, json.dumps(value))
            self._read_by_all.append(key)
            return value
        try:
            return json.loads(self._wait(key, 0, phase, time.monotonic() + self.processes.timeout_s))
        except TimeoutError:
            raise self._late({0}, phase) from None

    def everyone(self, phase: str, mine: Json) -> list[Json]:
        """Everybody's value, everywhere, in order.

        Raises:
            ProcessError: some have not come in time, or have left.
        """
        if self.processes.count == 1:
            return [mine]
        try:
            values: Any = {"values": self.gather(phase, mine)}
        except ProcessError as error:
            self.publish(phase, {"missing": list(error.processes), "reason": str(error)})
            raise
        values = self.publish(phase, values)
        if "missing" in values:
            raise ProcessError(dict.fromkeys(values["missing"]), phase, values["reason"])
        found: list[Json] = values["values"]
        return found

    def first(self, phase: str, action: Callable[[], T]) -> T:
        """What `action` gives in process 0, everywhere. A JSON value.

        Raises:
            ProcessError: it has failed there. What it raises is raised there as it is.
        """
        if not self.processes.is_first:
            told = self.publish(phase)
            if told["error"] is not None:
                raise ProcessError([0], phase, f"process 0: {told['error']}")
            value: T = told["value"]
            return value
        try:
            value = action()
        except Exception as error:
            self.publish(phase, {"error": f"{type(error).__name__}: {error}"})
            raise
        self.publish(phase, {"error": None, "value": value})
        return value

    def attempt(self, phase: str, action: Callable[[], T]) -> T:
        """What `action` gives here, if it succeeds everywhere.

        Raises:
            ProcessError: it has failed elsewhere. What it raises here is raised as it is.
        """
        failure: Exception | None = None
        try:
            result = action()
        except Exception as error:  # raised below, when the others know
            failure = error
        told = self.everyone(phase, None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        failed = {process: text for process, text in enumerate(told) if text is not None}
        if failed:
            raise ProcessError.of_failures(failed, phase)
        return result

    @property
    def _service(self) -> Service:
        if self.processes.service is None:
            raise RuntimeError("one process has nobody to talk to")
        return self.processes.service

    def _next(self, phase: str) -> str:
        self._counts[phase] += 1
        return f"{self._name}/{self._sequence}{phase}.{self._counts[phase]}"

    def _wait(self, key: str, process: int, phase: str, deadline: float) -> str:
        """The value of a key that a process sets.

        Raises:
            TimeoutError: it has not been set in time.
            ProcessError: that process has left, or the coordination service does not answer.
        """
        while True:
            left_s = min(deadline, self.processes.until_s) - time.monotonic()
            if (value := self._get(key, phase, max(0.001, min(_LOOK_S, left_s)))) is not None:
                return value
            try:
                self.processes.check_open(process, phase)
            except ProcessError:
                if (value := self._get(key, phase, 0.001)) is not None:  # it was the last that it said
                    return value
                raise
            if left_s <= _LOOK_S:
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


_FIRST_WAITS = 0.8
