"""Calls of one run by several threads take turns; a call that could only wait for itself is an error."""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from torchorbax.errors import ConfigError

P = ParamSpec("P")
R = TypeVar("R")
Self = TypeVar("Self", bound="_HasTurns")


class Turns:
    """Who may use a run now.

    Args:
        path: the path of the run, for messages.
        is_saving_thread: is the current thread one of those that write the saves of this run?
    """

    def __init__(self, path: str, is_saving_thread: Callable[[], bool]) -> None:
        # A lock of the interpreter itself: Ctrl-C cannot come between the ends of a plain `with` and its lock.
        self._lock = threading.RLock()
        self._path = path
        self._is_saving_thread = is_saving_thread
        self._pid = os.getpid()

    @property
    def is_forked(self) -> bool:
        """Is this a forked process, while the run, its threads and its files belong to the parent?"""
        return os.getpid() != self._pid

    def check(self, call: str) -> None:
        """Raise ConfigError if this call of the run would wait for itself, or if the run is that of another process."""
        if self.is_forked:
            raise ConfigError(
                f"{self._path}: {call} was called in process {os.getpid()}, which was forked from process {self._pid}, "
                "to which this run belongs. Call it there, or start this process with 'spawn' and have it open a run "
                "on a path of its own"
            )
        if self._is_saving_thread() or self._lock._is_owned():  # type: ignore[attr-defined]  # not declared
            raise ConfigError(
                f"{self._path}: {call} was called while this run is busy with another call or save of the same thread. "
                "A policy, hook or signal handler must not call save, wait, restore or close; set a flag instead, and "
                "call it from the training loop"
            )

    def take(self, action: Callable[[], R]) -> R:
        """Wait until no other thread is at it, and do something."""
        with self._lock:
            return action()


class _HasTurns(Protocol):
    @property
    def _turns(self) -> Turns: ...


def in_turn(method: Callable[Concatenate[Self, P], R]) -> Callable[Concatenate[Self, P], R]:
    """A decorator for methods that one thread after the other may run.

    Raises:
        ConfigError: see `Turns.check`.
    """

    @functools.wraps(method)
    def call(self: Self, /, *args: P.args, **kwargs: P.kwargs) -> R:
        self._turns.check(method.__name__)
        return self._turns.take(lambda: method(self, *args, **kwargs))

    return call
