"""How far the loop may run ahead of CPU devices."""

from __future__ import annotations

import threading
from collections import deque

import jax

_MOST = 16

_lock = threading.Lock()
_unread: deque[jax.Array] = deque()


def limit(result: jax.Array) -> None:
    """Wait for an older program if many whose results nobody has read are under way on several CPU devices.

    XLA's collectives on CPU devices need a thread a device and program. With more than some thirty programs under way
    there are too few, those that have one wait for the others, and after a while XLA ends the process. All steps of a
    process share the threads, and so the limit. Accelerators have queues of their own.
    """
    first: jax.Device = next(iter(result.sharding.device_set))
    if len(result.sharding.device_set) == 1 or first.platform != "cpu":
        return
    with _lock:
        _unread.append(result)
        oldest = _unread.popleft() if len(_unread) > _MOST else None
    if oldest is not None:
        oldest.block_until_ready()
