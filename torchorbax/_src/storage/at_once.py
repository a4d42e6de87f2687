"""Runs at the same time what waits for the storage and does not depend on each other.

A request to object storage takes tens of milliseconds, however little it asks for. The number of requests in a row is
what a save or a restore takes.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")

_MOST = 32
"""The most threads, each of which waits for one request."""


def at_once(actions: Sequence[Callable[[], Result]]) -> list[Result]:
    """The results of actions, in their order. The last action runs on this thread, the others on threads of their own.

    Raises:
        Exception: what the first action in the order has raised that has failed. All actions have ended by then.
    """
    *others, last = actions
    if not others:
        return [last()]
    with ThreadPoolExecutor(min(len(others), _MOST), "torchorbax-request") as executor:
        futures = [executor.submit(action) for action in others]
        try:
            result = last()
        except BaseException:
            concurrent.futures.wait(futures)
            for future in futures:
                future.result()  # an earlier one has failed, too: that is the reason, perhaps of both
            raise
        return [*(future.result() for future in futures), result]


def one_by_one(actions: Sequence[Callable[[], Result]]) -> list[Result]:
    """The results of actions, in their order, which run one after another: on a local disk, threads cost more."""
    return [action() for action in actions]
