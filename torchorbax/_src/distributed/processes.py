"""All processes of a run, which agree through the coordination service of `jax.distributed`.

Process 0 decides. Nothing here touches a device, so a background thread may agree on one thing while the training loop
runs its collectives; every wait has a limit, and whoever is waited for in vain is named. Without `jax.distributed`
there is one process, which agrees with itself.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Iterator
from typing import Protocol, TypeVar

import jax
from jax._src.distributed import global_state

from torchorbax.errors import ConfigError, ProcessError

T = TypeVar("T")

LAST_WAIT_S = 30.0
"""How long a process that ends with an exception waits for others."""

_runs = itertools.count()


class Service(Protocol):
    """What is used of the coordination service: a dictionary that all processes share."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        """Set a key."""

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        """The value of a key, when it is set."""

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        """All keys below one, with their values."""

    def key_value_delete(self, key: str) -> None:
        """Delete a key and all below it."""


class Processes:
    """The processes of one run, all of which make it in the same order.

    Args:
        timeout_s: how long to wait for the others in one phase.
        service: the coordination service; None takes that of `jax.distributed`.
        index: of this process.
        count: how many there are.

    Attributes:
        until_s: when all waiting ends, by `time.monotonic()`.

    Raises:
        ConfigError: several processes without a coordination service, or a time-out that is none.
    """

    def __init__(
        self, timeout_s: float, service: Service | None = None, index: int | None = None, count: int | None = None
    ) -> None:
        if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not timeout_s > 0:
            raise ConfigError(f"barrier_timeout_s must be a positive number of seconds, not {timeout_s!r}")
        self.index = jax.process_index() if index is None else index
        self.count = jax.process_count() if count is None else count
        self.timeout_s = float(timeout_s)
        self.service: Service | None = service or global_state.client
        if self.count > 1 and self.service is None:
            raise ConfigError(f"{self.count} processes without jax.distributed.initialize() cannot agree on anything")
        self.until_s = math.inf
        self.name = f"torchorbax/{next(_runs)}" if self.count > 1 else ""

    @property
    def is_first(self) -> bool:
        """Is this the process that decides?"""
        return self.index == 0

    def tell(self, what: str, text: str = "") -> None:
        """Leave a note for all processes, once; see `told`."""
        if self.count > 1 and self.service is not None:
            with answering(what):
                self.service.key_value_set(f"{self.name}/told/{what}/{self.index}", text, allow_overwrite=True)

    def told(self) -> Notes:
        """The notes so far, by subject and process."""
        notes: Notes = {}
        if self.count > 1 and self.service is not None:
            with answering("told"):
                found = self.service.key_value_dir_get(f"{self.name}/told")
            for key, text in found:
                what, process = key.removeprefix(f"{self.name}/told/").split("/")
                notes.setdefault(what, {})[int(process)] = text
        return notes

    def fail(self, reason: str) -> None:
        """Tell the others that this process has run into an exception.

        It still takes part in what has begun, but not for long: the others may be waiting on their devices for what it
        will never compute.
        """
        self.until_s = time.monotonic() + min(self.timeout_s, LAST_WAIT_S)
        with contextlib.suppress(ProcessError):  # then nobody is left to hear
            self.tell(_FAILED, reason)

    def close(self) -> None:
        """Tell the others, if any are left, that this process takes part in nothing any more."""
        with contextlib.suppress(ProcessError):
            self.tell(_CLOSED)

    def check_failures(self, phase: str, notes: Notes) -> None:
        """Raise ProcessError if another process has run into an exception."""
        failed = {process: why for process, why in notes.get(_FAILED, {}).items() if process != self.index}
        if failed:
            why = "; ".join(f"process {process} has left the run: {reason}" for process, reason in failed.items())
            raise ProcessError(failed, phase, why)

    def check_open(self, process: int, phase: str) -> None:
        """Raise ProcessError if a process takes part in nothing any more."""
        notes = self.told()
        if process in notes.get(_CLOSED, {}):
            reason = notes.get(_FAILED, {}).get(process, "it has closed the run")
            raise ProcessError({process}, phase, f"process {process} has left the run: {reason}")


Notes = dict[str, dict[int, str]]
_FAILED = "failed"
_CLOSED = "closed"


@contextlib.contextmanager
def answering(phase: str) -> Iterator[None]:
    """A coordination service that does not answer is a process that is gone: the first, which runs it.

    Raises:
        ProcessError: it does not.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        reason = f"the coordination service of jax.distributed, which process 0 runs, says {error}"
        raise ProcessError([0], phase, reason) from error
