"""A tree of plain Python values and arrays as JSON, with the arrays taken out under names of their own; and back.

JSON alone would turn tuples into lists, int keys into strings and lose inf, bytes and complex numbers. Here None, bool,
str, int and finite float stand for themselves, a list is a list, and everything else is `{"$": kind, ...}`. There is no
pickle, and decoding builds values of a fixed set of types only.

What comes back is what was there, types included; a value for which that is impossible is refused when it is encoded.
An array, a list, a mapping or a set that is in two places comes back as one object in two places.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch

from torchorbax._src.arrays.leaves import Array

Json = Any
Path = tuple[str, ...]

MAPPINGS: dict[type, str] = {
    dict: "dict",
    OrderedDict: "OrderedDict",
    Counter: "Counter",
    defaultdict: "defaultdict",
}
"""Mappings that can be kept, and their names."""
SEQUENCES: dict[type, str] = {tuple: "tuple", set: "set", frozenset: "frozenset", torch.Size: "torch.Size"}
MUTABLE = frozenset((list, set, *MAPPINGS))
BY_NAME: dict[str, type] = {name: kind for kind, name in (MAPPINGS | SEQUENCES).items()}
FACTORIES: dict[str, Callable[[], Any]] = {
    kind.__name__: kind for kind in (bool, int, float, str, list, tuple, set, dict, OrderedDict, Counter)
}
"""What a `defaultdict` may make its values with."""
DEEPEST = 100
"""Levels of nesting. Python's stack would overflow at some ten times as many, in saving or, worse, in restoring."""
LARGEST_BITS = 4096
"""Integers beyond are written in hexadecimal: Python refuses to read thousands of decimal digits."""


class LayoutError(ValueError):
    """JSON that is not laid out as this package writes it, so somebody else has written or changed it."""


@dataclass(frozen=True)
class Node:
    """Stands for a node of a tree whose type only the program knows: what is below it.

    Attributes:
        type: the name of its type.
        children: by name.
    """

    type: str
    children: Mapping[str, Any]


class Tensors(Protocol):
    """The tensors of a stack: how they are told apart, and made of arrays."""

    def kind(self, tensor: torch.Tensor) -> Literal["tensor", "parameter", "readable"] | None:
        """What a tensor is to be again; None if its type cannot be kept."""

    def tensor(self, array: Array) -> torch.Tensor:
        """A new tensor with the values of an array."""

    def parameter(self, tensor: torch.Tensor, *, requires_grad: bool) -> torch.Tensor:
        """A new tensor as a parameter."""

    def readable(self, tensor: torch.Tensor) -> torch.Tensor:
        """A new tensor as one that can be read anywhere."""


def text_of(value: object) -> str:
    """As `repr`, but the same for equal sets, and for integers of any size."""
    if type(value) is frozenset:
        return f"frozenset({{{', '.join(sorted(map(text_of, value)))}}})"
    if type(value) is tuple:
        return f"({', '.join(map(text_of, value))}{',' if len(value) == 1 else ''})"
    if type(value) is int and value.bit_length() > LARGEST_BITS:
        return hex(value)
    return str(value) if isinstance(value, np.generic) else repr(value)


def key_name(key: object) -> str:
    """What a key of a mapping is called in the names of leaves; the same in all processes."""
    return key if type(key) is str else text_of(key)


def built(how: Json, value: Json) -> Json:
    """An encoded value with a note, in JSON, on how the program had been built that saved it."""
    return {"$": "built", "how": how, "value": value}


@dataclass(frozen=True)
class StoredLeaf:
    """Stands for a stored array where only its name is known."""

    name: str


def how_built(json: Json) -> Json:
    """The note that `built` has made; None if there is none."""
    return json["how"] if isinstance(json, dict) and json.get("$") == "built" else None


def leaves_in(json: Json) -> Iterator[str]:
    """The names of the arrays that an encoded value refers to, in order; one in two places twice."""
    if isinstance(json, list):
        for one in json:
            yield from leaves_in(one)
    elif isinstance(json, dict):
        if json.get("$") == "leaf":
            yield json["name"]
        else:
            yield from leaves_in(list(json.values()))
