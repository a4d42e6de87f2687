"""The processes of a run, and the notes that they leave for each other in the coordination service.

The processes agree through the coordination service of `jax.distributed`, and process 0 decides (see `channel`).
Nothing here touches a device, so a background thread may use it while the training loop runs device collectives. Every
wait has a time limit, and the error names the process that did not come. Without `jax.distributed` there is a single
process.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Iterator
from typing import Protocol, TypeVar

import jax
from jax._src.distributed import global_state  # private: JAX has no public access to its coordination service

from torchorbax.errors import ConfigError, ProcessError

T = TypeVar("T")

LAST_WAIT_S = 30.0
"""How long a process that has failed with an exception still waits for others, at most."""

_runs = itertools.count()


class Service(Protocol):
    """The methods that are used of the coordination service: those of a dictionary that all processes share."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        """Set a key."""

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        """Wait until a key is set, and return its value."""

    def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
        """All keys below a key, with their values."""

    def key_value_delete(self, key: str) -> None:
        """Delete a key and all keys below it."""


class Processes:
    """The processes of one run. A program that opens several runs opens them in the same order in every process.

    Args:
        timeout_s: how long to wait for other processes in one phase.
        service: the coordination service; None takes that of `jax.distributed`.
        index: the number of this process; None takes `jax.process_index()`.
        count: the number of processes; None takes `jax.process_count()`.
        name: the prefix of the run's keys in the coordination service, the same in all processes. None makes it from
            a count of the runs of this process.

    Attributes:
        until_s: the time, by `time.monotonic()`, after which this process waits for no other.

    Raises:
        ConfigError: there are several processes and no coordination service, or `timeout_s` is not positive.
    """

    def __init__(
        self,
        timeout_s: float,
        service: Service | None = None,
        index: int | None = None,
        count: int | None = None,
        name: str | None = None,
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
        self.name = name or (f"torchorbax/{next(_runs)}" if self.count > 1 else "")

    @property
    def is_first(self) -> bool:
        """Is this process 0, which decides?"""
        return self.index == 0

    def tell(self, what: str, text: str = "") -> None:
        """Leave a note of this process for all processes, which read it with `told`.

        Args:
            what: the subject. A second note on the same subject replaces the first.
            text: the content.
        """
        if self.count > 1 and self.service is not None:
            with as_process_error(what):
                self.service.key_value_set(f"{self.name}/told/{what}/{self.index}", text, allow_overwrite=True)

    def told(self) -> Notes:
        """The notes that have been left so far, by subject and process."""
        notes: Notes = {}
        if self.count > 1 and self.service is not None:
            with as_process_error("told"):
                found = self.service.key_value_dir_get(f"{self.name}/told")
            for key, text in found:
                what, process = key.removeprefix(f"{self.name}/told/").split("/")
                notes.setdefault(what, {})[int(process)] = text
        return notes

    def fail(self, reason: str) -> None:
        """Tell the others that this process has failed with an exception.

        It still takes part in the agreements that have begun, but for a short time only: the other processes may be
        waiting in a device collective that this process will never join.
        """
        self.until_s = time.monotonic() + min(self.timeout_s, LAST_WAIT_S)
        with contextlib.suppress(ProcessError):  # the coordination service is gone, and the run with it
            self.tell(_FAILED, reason)

    def close(self) -> None:
        """Tell the others that this process takes part in no further agreement."""
        with contextlib.suppress(ProcessError):
            self.tell(_CLOSED)

    def check_failures(self, phase: str, notes: Notes) -> None:
        """Raise ProcessError if another process has failed with an exception."""
        failed = {process: why for process, why in notes.get(_FAILED, {}).items() if process != self.index}
        if failed:
            why = "; ".join(f"process {process} has left the run: {reason}" for process, reason in failed.items())
            raise ProcessError(failed, phase, why)

    def check_open(self, process: int, phase: str) -> None:
        """Raise ProcessError if a process takes part in no further agreement."""
        notes = self.told()
        if process in notes.get(_CLOSED, {}):
            reason = notes.get(_FAILED, {}).get(process, "it has closed the run")
            raise ProcessError({process}, phase, f"process {process} has left the run: {reason}")


Notes = dict[str, dict[int, str]]
"""The texts of notes, by subject and process."""
_FAILED = "failed"
_CLOSED = "closed"


@contextlib.contextmanager
def as_process_error(phase: str) -> Iterator[None]:
    """Translate errors of the coordination service. Process 0 runs it, so if it does not answer, process 0 is gone.

    Raises:
        ProcessError: the service has raised an error.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        reason = f"the coordination service of jax.distributed, which process 0 runs, says {error}"
        raise ProcessError([0], phase, reason) from error
