"""The compiled programs of one step, bounded in number."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

_MANY = 8
_MOST = 32
"""Programs kept; the one that was used longest ago goes first. Enough for the lengths that batches are padded to."""

_logger = logging.getLogger(__name__)
P = TypeVar("P")


@dataclass(frozen=True)
class Part:
    """One part of what a program is compiled for.

    Attributes:
        name: what it is, for messages.
        value: hashable.
        labels: what the entries of `value` are, if it is a tuple whose entries have names.
    """

    name: str
    value: Any
    labels: Sequence[str] = ()


class Programs(Generic[P]):
    """Programs by what they were compiled for.

    Args:
        what: the function, for the warning that it is compiled again and again.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._programs: OrderedDict[Any, P] = OrderedDict()
        self._compiled = 0
        self._last: Sequence[Part] = ()
        self._newest: tuple[Any, P | None] = None, None

    def __len__(self) -> int:
        return len(self._programs)

    def get(self, parts: Sequence[Part]) -> P | None:
        """The program that was compiled for these, if it is still here."""
        key = _key(parts)
        if key == self._newest[0]:  # mostly the very same objects, which compare faster than they can be hashed
            return self._newest[1]
        program = self._programs.get(key)
        if program is not None:
            self._programs.move_to_end(key)
            self._newest = key, program
        return program

    def put(self, parts: Sequence[Part], program: P) -> None:
        """Keep a new program."""
        key = _key(parts)
        if key not in self._programs:
            self._compiled += 1
            if self._compiled > _MANY and self._compiled & (self._compiled - 1) == 0:
                _logger.warning(
                    "%s has been compiled %d times: %s keeps changing", self._what, self._compiled, self._changes(parts)
                )
            self._last = parts
        self._programs[key] = program
        self._programs.move_to_end(key)
        self._newest = key, program
        if len(self._programs) > _MOST:
            self._programs.popitem(last=False)

    def _changes(self, parts: Sequence[Part]) -> str:
        """What differs from what the last program was compiled for."""
        found: list[str] = []
        for old, new in zip(self._last, parts, strict=True):
            if old.value == new.value:
                continue
            named = [
                label
                for label, one, other in zip(new.labels, old.value, new.value, strict=False)
                if one != other and len(old.value) == len(new.value)
            ]
            found += named or [new.name]
        return ", ".join(found[:5]) or "something"


def _key(parts: Sequence[Part]) -> tuple[Any, ...]:
    return tuple(part.value for part in parts)
