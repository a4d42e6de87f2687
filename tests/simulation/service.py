"""A simulated coordination service: the one that process 0 of each program runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax

from tests.simulation.scheduler import NoAnswerError, Process, Scheduler

T = TypeVar("T")

_PATIENCE_S = 5.0
"""How long a request that is not about waiting is waited for."""


class SimulatedService:
    """The key-value store of one program, as `distributed.processes.Service` describes it.

    Args:
        scheduler: runs everything.
        host: process 0, which runs the service. When it ends, nobody gets an answer.
    """

    def __init__(self, scheduler: Scheduler, host: Process) -> None:
        self._scheduler = scheduler
        self._host = host
        self._values: dict[str, str] = {}
        self._waiting: dict[str, list[Callable[[], None]]] = {}

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        def act() -> None:
            if key in self._values and not allow_overwrite:
                raise jax.errors.JaxRuntimeError(f"ALREADY_EXISTS: key {key} already exists.")
            self._values[key] = value
            for wake in self._waiting.pop(key, ()):
                wake()

        self._asked(f"set {key}", act)

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        deadline = self._scheduler.now + timeout_in_ms / 1000
        late = f"DEADLINE_EXCEEDED: GetKeyValue() timed out with key: {key} and duration: {timeout_in_ms}ms"
        found = self._asked(f"get {key}", lambda: self._values.get(key), late, timeout_in_ms / 1000)
        while found is None:
            left = deadline - self._scheduler.now
            if left <= 0 or not self._scheduler.wait(self._waiting.setdefault(key, []).append, left):
                raise jax.errors.JaxRuntimeError(late)
            self._check_host()
            found = self._values.get(key)
        return found

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        below = f"{key}/"
        return self._asked(
            f"dir {key}", lambda: [(name, value) for name, value in self._values.items() if name.startswith(below)]
        )

    def key_value_delete(self, key: str) -> None:
        def act() -> None:
            for name in [name for name in self._values if name == key or name.startswith(f"{key}/")]:
                del self._values[name]

        self._asked(f"forget {key}", act)

    def _asked(self, label: str, act: Callable[[], T], late: str = "", wait_s: float = _PATIENCE_S) -> T:
        def act_if_there() -> T:
            self._check_host()
            return act()

        asking = self._scheduler.running
        if self._host.stopped_until > self._scheduler.now and asking is not self._host:
            left = self._host.stopped_until - self._scheduler.now
            self._scheduler.sleep(min(left, wait_s))
            if left > wait_s:
                raise jax.errors.JaxRuntimeError(late or "DEADLINE_EXCEEDED: the service does not answer")
        try:
            return self._scheduler.request("service", label, act_if_there, wait_s=wait_s)
        except NoAnswerError as error:
            raise jax.errors.JaxRuntimeError(late or f"UNAVAILABLE: {error}") from None

    def _check_host(self) -> None:
        if not self._host.alive:
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: the coordination service is gone")
