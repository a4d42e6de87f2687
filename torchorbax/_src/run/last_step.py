"""The last complete step by reference: what can still be saved when the loop does not come back from a later body.

Nothing is copied on a device, and no memory of a device is kept: arrays are immutable in JAX, so an array that still is
alive, neither donated nor let go by its owner, holds the value that it had after the step. If all are alive, no
training step has begun to change the state. What can change in place, tensors and arrays in host memory, is copied.
"""

from __future__ import annotations

import dataclasses
import datetime
import logging
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from torchorbax._src.arrays.jax_context import transfers_allowed
from torchorbax._src.state.item import Captured
from torchorbax._src.tensors.live import host_copy, live_array
from torchorbax.errors import TorchorbaxError

_logger = logging.getLogger(__name__)

_SHARE = 0.01
"""The share of the loop's time that references may cost. Where steps are too short for it, some steps have none."""
_AHEAD_S = 0.5
"""Seconds that references may cost beyond that share: a loop may begin with short steps, and stop in a long one."""
_SMALL_BYTES = 16 << 10
"""Arrays up to this size are kept alive. Random numbers and the like are made anew for each capture, and nobody else
has them."""


@dataclass(frozen=True)
class LastStep:
    """A step that is complete but was not due.

    Attributes:
        step: its number.
        time: when it was complete, in UTC.
        metrics: its metrics.
    """

    step: int
    time: datetime.datetime
    metrics: Mapping[str, Any]
    _items: Mapping[str, Captured]  # their leaves are host arrays, jax arrays and weak references to jax arrays

    def captured(self) -> dict[str, Captured] | None:
        """The state after this step; None if something has begun to change it."""
        items: dict[str, Captured] = {}
        for name, item in self._items.items():
            leaves = {leaf: ref() if isinstance(ref, weakref.ref) else ref for leaf, ref in item.leaves.items()}
            if any(array is None or (isinstance(array, jax.Array) and array.is_deleted()) for array in leaves.values()):
                return None
            items[name] = dataclasses.replace(item, leaves=leaves)
        return items


class References:
    """Takes references to the state after each step, as far as they cost the loop little.

    Args:
        most_host_bytes: how much host memory the copies may take. A state with more of it in host memory has none.
        clock: seconds, as `time.perf_counter`.
    """

    def __init__(self, most_host_bytes: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._most_host_bytes = most_host_bytes
        self._clock = clock
        self._began_s = clock()
        self._spent_s = 0.0

    def take(
        self,
        step: int,
        now: datetime.datetime,
        metrics: Mapping[str, Any],
        capture: Callable[[], Mapping[str, Captured]],
        *,
        at_any_cost: bool = False,
    ) -> LastStep | None:
        """References to the live state.

        Args:
            step: the step just finished.
            now: the time.
            metrics: its metrics.
            capture: captures the live state.
            at_any_cost: take them though it may cost too much.

        Returns:
            None if that would cost too much, or if the state cannot be saved, which is for the next save to say.
        """
        began_s = self._clock()
        # Of the time since the start, but no more than `_AHEAD_S` is saved up for later.
        self._spent_s = max(self._spent_s, _SHARE * (began_s - self._began_s))
        if not at_any_cost and self._spent_s > _SHARE * (began_s - self._began_s) + _AHEAD_S:
            return None
        try:
            with transfers_allowed():
                items = self._held(capture())
        except (TorchorbaxError, RuntimeError) as error:
            _logger.debug("no references to step %d: %s", step, error)
            items = None
        self._spent_s += self._clock() - began_s
        return None if items is None else LastStep(step, now, dict(metrics), items)

    def _held(self, captured: Mapping[str, Captured]) -> dict[str, Captured] | None:
        room = self._most_host_bytes
        items: dict[str, Captured] = {}
        for item, of_item in captured.items():
            leaves: dict[str, Any] = {}
            for name, leaf in of_item.leaves.items():
                held = live_array(f"{item}.{name}", leaf)
                if isinstance(held, jax.Array):
                    leaves[name] = held if held.nbytes <= _SMALL_BYTES else weakref.ref(held)
                    continue
                room -= held.nbytes
                if room < 0:
                    return None
                leaves[name] = host_copy(held)
            items[item] = dataclasses.replace(of_item, leaves=leaves)
        return items
