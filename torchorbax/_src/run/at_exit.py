"""Closes the runs that a program leaves open when it ends, before the executors that a save needs refuse work."""

from __future__ import annotations

import concurrent.futures.thread
import logging
import os
import threading
import weakref
from collections.abc import Callable
from typing import Protocol

from torchorbax.errors import SaveError

_logger = logging.getLogger(__name__)


class Closable(Protocol):
    """A run that can be left open."""

    def close(self) -> None:
        """Wait for the save in flight."""


_open: weakref.WeakKeyDictionary[Closable, tuple[int, Callable[[], str]]] = weakref.WeakKeyDictionary()
"""The open runs, each with the process that it belongs to, and a function that says where it stands."""


def opened(run: Closable, standing: Callable[[], str]) -> None:
    """Close `run` when this process ends, unless `closed` is called before.

    Args:
        run: the run. It is not kept alive.
        standing: says where the run stands. It must not refer to the run.
    """
    _open[run] = os.getpid(), standing


def closed(run: Closable) -> None:
    """Note that `run` has been closed."""
    _open.pop(run, None)


_saves: dict[concurrent.futures.Future[None], tuple[int, str]] = {}
"""The saves in flight, each with the process that it belongs to and the path that it writes to."""


def saving(save: concurrent.futures.Future[None], path: str) -> None:
    """Wait for `save` when this process ends, even if its run has been dropped by then."""
    _saves[save] = os.getpid(), path
    save.add_done_callback(_saves.pop)


def wait_for_saves(path: str | None = None) -> None:
    """Wait for the saves of this process that are in flight: those under `path`, or all. The run may be dropped."""
    pid = os.getpid()
    mine = [
        save
        for save, (owner, where) in list(_saves.items())
        if owner == pid and path in (None, where) and not save.done()
    ]
    if mine and path is not None:
        _logger.warning("%s: waiting for a save of a run that was not closed", path)
    concurrent.futures.wait(mine)


def _close_all() -> None:
    for run, (pid, standing) in list(_open.items()):
        if pid != os.getpid():
            continue  # this is a forked process, and the run belongs to its parent
        try:
            run.close()
        except SaveError as error:
            _logger.error("at exit: %s", error)
        _logger.warning("the program has ended without close(). %s", standing())
    wait_for_saves()


# Orbax hands work to executors, which refuse it once `threading` shuts down. Functions of `atexit` run only after that.
# The callbacks of `threading` run in reverse order: this one runs before that of
# concurrent.futures, which has been imported above.
threading._register_atexit(_close_all)  # type: ignore[attr-defined]
