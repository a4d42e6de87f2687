"""A coordination service without processes: what `jax.distributed` has, as far as torchorbax uses it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
from torchorbax._src.distributed.channel import Channel
from torchorbax._src.distributed.processes import Processes
from torchorbax.errors import ProcessError


class FakeService:
    """A dictionary shared by threads.

    Attributes:
        values: what is there.
        calls: how often each method has been called.
        broken: what every call raises from now on, if it is not empty.
    """

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.calls: Counter[str] = Counter()
        self.broken = ""
        self._changed = threading.Condition()

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        with self._counted("set"):
            if key in self.values and not allow_overwrite:
                raise jax.errors.JaxRuntimeError(f"ALREADY_EXISTS: key {key} already exists.")
            self.values[key] = value
            self._changed.notify_all()

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        deadline = time.monotonic() + timeout_in_ms / 1000
        with self._counted("get"):
            if not self._changed.wait_for(lambda: key in self.values, max(0.0, deadline - time.monotonic())):
                raise jax.errors.JaxRuntimeError(
                    f"DEADLINE_EXCEEDED: GetKeyValue() timed out with key: {key} and duration: {timeout_in_ms}ms"
                )
            return self.values[key]

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        with self._counted("dir"):
            below = f"{key.rstrip('/')}/"
            return sorted((name, value) for name, value in self.values.items() if name.startswith(below))

    def key_value_delete(self, key: str) -> None:
        with self._counted("delete"):
            for name in [name for name in self.values if name == key or name.startswith(f"{key}/")]:
                del self.values[name]

    def _counted(self, what: str) -> threading.Condition:
        self.calls[what] += 1
        if self.broken:
            raise jax.errors.JaxRuntimeError(self.broken)
        return self._changed


def contract(service: Any) -> list[Any]:
    """What a service answers to everything that matters to torchorbax; errors by their first word."""

    def answer(action: Callable[[], Any]) -> Any:
        try:
            return action()
        except jax.errors.JaxRuntimeError as error:
            return str(error).partition(":")[0]

    def later() -> Any:
        thread = threading.Timer(0.05, service.key_value_set, ("run/later", "now"))
        thread.start()
        value = service.blocking_key_value_get("run/later", 30_000)
        thread.join()
        return value

    actions: list[Callable[[], Any]] = [
        lambda: service.key_value_dir_get("run"),
        lambda: service.key_value_set("run/a", "1"),
        lambda: service.key_value_set("run/a", "2"),
        lambda: service.key_value_set("run/a", "3", allow_overwrite=True),
        lambda: service.key_value_set("run/empty", ""),
        lambda: service.key_value_set("run", "itself"),
        lambda: service.key_value_set("running", "another"),
        lambda: service.key_value_set("run/b/c", "deep"),
        lambda: sorted(map(list, service.key_value_dir_get("run"))),
        lambda: service.key_value_dir_get("run/a"),
        lambda: service.blocking_key_value_get("run/a", 10),
        lambda: service.blocking_key_value_get("run/empty", 10),
        lambda: service.blocking_key_value_get("nothing", 10),
        lambda: service.blocking_key_value_get("nothing", 1),
        later,
        lambda: service.key_value_delete("nothing"),
        lambda: service.key_value_delete("run"),
        lambda: service.key_value_dir_get("run"),
        lambda: service.blocking_key_value_get("run", 10),
        lambda: service.blocking_key_value_get("running", 10),
    ]
    return [answer(action) for action in actions]


LONG_S = 60.0
"""More than any test takes: who waits for so long hangs."""


class World:
    """Some processes of one run, each with its own `Processes`."""

    def __init__(self, service: FakeService, count: int, timeout_s: float) -> None:
        self.processes = [Processes(timeout_s, service, index, count, name="test") for index in range(count)]

    def channels(self, name: str = "run") -> list[Channel]:
        return [Channel(one, name) for one in self.processes]

    def run(self, body: Callable[[int], Any], *, only: tuple[int, ...] | None = None) -> list[Any]:
        """What `body(index)` gives in each process, or the error that it raises."""
        results: list[Any] = [None] * len(self.processes)

        def work(index: int) -> None:
            try:
                results[index] = body(index)
            except Exception as error:
                results[index] = error

        indices = range(len(self.processes)) if only is None else only
        threads = [threading.Thread(target=work, args=(index,), daemon=True) for index in indices]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG_S / 2)
            assert not thread.is_alive(), "a process hangs"
        return results


def three(service: FakeService, timeout_s: float = LONG_S) -> World:
    return World(service, 3, timeout_s)


def error_of(result: Any, match: str, processes: tuple[int, ...], phase: str) -> ProcessError:
    assert isinstance(result, ProcessError), result
    assert match in str(result)
    assert (result.processes, result.phase) == (processes, phase)
    return result
