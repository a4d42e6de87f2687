"""Runs at the same time what waits for the storage and does not depend on each other.

A request to object storage takes tens of milliseconds, however little it asks for. The number of requests in a row is
what a save or a restore takes.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")

_MOST = 32
"""The most threads, each of which waits for one request."""


def at_once(actions: Sequence[Callable[[], Result]]) -> list[Result]:
    """The results of actions, in their order. The last action runs on this thread, the others on threads of their own.

    Ctrl-C is not kept waiting: it leaves the other actions to themselves.

    Raises:
        Exception: what the first action in the order has raised that has failed. All actions have ended by then.
    """
    *others, last = actions
    if not others:
        return [last()]
    futures: list[Future[Result]] = [Future() for _ in actions]
    numbers = itertools.count()  # `next` is atomic

    def work() -> None:
        while (number := next(numbers)) < len(others):
            _run(others[number], futures[number])

    for _ in range(min(len(others), _MOST)):
        # Daemons, which an interpreter that ends does not wait for.
        threading.Thread(target=work, name="torchorbax-request", daemon=True).start()
    _run(last, futures[-1])
    errors = [future.exception() for future in futures]
    for error in errors:
        if error is not None:
            raise error
    return [future.result() for future in futures]


def _run(action: Callable[[], Result], future: Future[Result]) -> None:
    try:
        future.set_result(action())
    except Exception as error:  # `at_once` raises it
        future.set_exception(error)
    except BaseException as error:
        if threading.current_thread() is threading.main_thread():  # such as Ctrl-C
            raise
        future.set_exception(error)


def one_by_one(actions: Sequence[Callable[[], Result]]) -> list[Result]:
    """The results of actions, in their order, which run one after another: on a local disk, threads cost more."""
    return [action() for action in actions]
