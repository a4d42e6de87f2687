"""What a program leaves open when it ends is closed, before the interpreter takes away what a save in flight needs."""

from __future__ import annotations

import concurrent.futures.thread
import logging
import os
import threading
import weakref
from typing import Protocol

from torchorbax.errors import SaveError

_logger = logging.getLogger(__name__)


class Run(Protocol):
    """What can be left open."""

    def close(self) -> None:
        """Wait for the save in flight."""

    def last_line(self) -> str:
        """Where the run stands, for people."""


_open: weakref.WeakKeyDictionary[Run, int] = weakref.WeakKeyDictionary()
"""The open runs, and the processes that they belong to."""


def opened(run: Run) -> None:
    """From now on, `run` is closed when this process ends."""
    _open[run] = os.getpid()


def closed(run: Run) -> None:
    """It has been closed."""
    _open.pop(run, None)


_saves: dict[concurrent.futures.Future[None], tuple[int, str]] = {}
"""Those in flight, with the processes that they belong to and where to."""


def saving(save: concurrent.futures.Future[None], path: str) -> None:
    """It is waited for when this process ends, though nobody may have its run any more."""
    _saves[save] = os.getpid(), path
    save.add_done_callback(_saves.pop)


def wait_for_saves(path: str | None = None) -> None:
    """Wait for the saves of this process that are in flight, of a run's path or all, and whoever has that run."""
    pid = os.getpid()
    mine = [save for save, (owner, where) in list(_saves.items()) if owner == pid and path in (None, where)]
    if mine and path is not None:
        _logger.warning("%s: waiting for a save of a run that was not closed", path)
    concurrent.futures.wait(mine)


def _close_all() -> None:
    for run, pid in list(_open.items()):
        if pid != os.getpid():
            continue  # a forked worker: the run belongs to its parent
        try:
            run.close()
        except SaveError as error:
            _logger.error("at exit: %s", error)
        _logger.warning("the program has ended without close(). %s", run.last_line())
    wait_for_saves()


# Orbax hands work to executors, which refuse it as soon as `threading` winds down; `atexit` functions run later than
# that. Callbacks run in reverse order, so this one comes before that of concurrent.futures, which is imported above.
threading._register_atexit(_close_all)  # type: ignore[attr-defined]
