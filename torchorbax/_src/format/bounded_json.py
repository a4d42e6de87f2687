"""JSON from somebody unknown: how much memory it would take, before it is parsed."""

from __future__ import annotations

import json
from collections.abc import Callable

from torchorbax._src.format.values import Json

LEAST_BYTES = 1 << 30
"""The memory that the JSON of any run may take."""
RATIO = 16
"""How many times the bytes of the run's other files it may take, if that is more. A leaf takes some 2,600 bytes of
memory, and at least `LEAF_BYTES` in Orbax's metadata."""
LEAF_BYTES = 170

# What takes the most memory for the fewest characters, on a 64-bit machine.
_OBJECT_BYTES = 240  # a dict with one entry
_ARRAY_BYTES = 72
_ELEMENT_BYTES = 64  # a short text or a large number, and its place in a list


def loads(text: str, other_bytes: Callable[[], int] = lambda: 0) -> Json:
    """The value of a JSON text.

    Args:
        text: the text.
        other_bytes: counts the bytes of the run's other files. It is only asked for a text that needs it.

    Raises:
        ValueError: the text is no JSON, or it would take more memory than such a run can need.
        RecursionError: it is nested more deeply than Python's stack allows.
    """
    check(text, other_bytes)
    return json.loads(text)


def check(text: str, other_bytes: Callable[[], int]) -> None:
    """Raise ValueError if the value of a JSON text takes more memory than such a run can need; see `loads`."""
    needed = parsed_bytes(text)
    if needed <= LEAST_BYTES or needed <= (most := LEAST_BYTES + RATIO * other_bytes()):
        return
    raise ValueError(
        f"{len(text)} characters of JSON would take about {needed} bytes of memory; a run of this "
        f"size may take {most}. Keep long lists of numbers as arrays"
    )


def parsed_bytes(text: str) -> int:
    """About how much memory the value of a JSON text takes, at most. One character can stand for a hundred bytes."""
    return (
        2 * len(text)
        + _OBJECT_BYTES * text.count("{")
        + _ARRAY_BYTES * text.count("[")
        + _ELEMENT_BYTES * (text.count(",") + text.count(":"))
    )
