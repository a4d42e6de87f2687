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
"""The mappings that can be kept, and their names in JSON."""
SEQUENCES: dict[type, str] = {tuple: "tuple", set: "set", frozenset: "frozenset", torch.Size: "torch.Size"}
"""The other containers that can be kept, apart from lists, and their names in JSON."""
MUTABLE = frozenset((list, set, *MAPPINGS))
"""The containers that are numbered, so that one in two places comes back as one object."""
BY_NAME: dict[str, type] = {name: kind for kind, name in (MAPPINGS | SEQUENCES).items()}
FACTORIES: dict[str, Callable[[], Any]] = {
    kind.__name__: kind for kind in (bool, int, float, str, list, tuple, set, dict, OrderedDict, Counter)
}
"""What a `defaultdict` may make its values with."""
DEEPEST = 100
"""The most levels of nesting. Python's stack would overflow at about ten times as many, perhaps only in a restore."""
LARGEST_BITS = 4096
"""Integers with more bits are written in hexadecimal: Python refuses to read thousands of decimal digits."""


class LayoutError(ValueError):
    """JSON that is not laid out as this package writes it, so somebody else has written or changed it."""


@dataclass(frozen=True)
class Node:
    """Stands for a node of a tree whose type only the program knows.

    Attributes:
        type: the name of the node's type.
        children: what is below the node, by name.
    """

    type: str
    children: Mapping[str, Any]


class Tensors(Protocol):
    """How the kinds of tensors are told apart, and how tensors are made from arrays."""

    def kind(self, tensor: torch.Tensor) -> Literal["tensor", "parameter", "readable"] | None:
        """The kind of tensor that a restore must make again; None if the tensor's type cannot be kept."""

    def tensor(self, array: Array) -> torch.Tensor:
        """A new tensor with the values of an array."""

    def parameter(self, tensor: torch.Tensor, *, requires_grad: bool) -> torch.Tensor:
        """A new tensor as a parameter."""

    def readable(self, tensor: torch.Tensor) -> torch.Tensor:
        """A new tensor as one that can be read anywhere."""


def text_of(value: object) -> str:
    """Like `repr`, but equal for equal sets, and without a limit on the size of integers."""
    if type(value) is frozenset:
        return f"frozenset({{{', '.join(sorted(map(text_of, value)))}}})"
    if type(value) is tuple:
        return f"({', '.join(map(text_of, value))}{',' if len(value) == 1 else ''})"
    if type(value) is int and value.bit_length() > LARGEST_BITS:
        return hex(value)
    return str(value) if isinstance(value, np.generic) else repr(value)


def key_name(key: object) -> str:
    """What stands for a key of a mapping in the names of leaves. It is the same in all processes."""
    return key if type(key) is str else text_of(key)


def built(how: Json, value: Json) -> Json:
    """An encoded value with a note, as JSON, on how the saving program had built the live object."""
    return {"$": "built", "how": how, "value": value}


@dataclass(frozen=True)
class StoredLeaf:
    """Stands for a stored array where only its name is known."""

    name: str


def how_built(json: Json) -> Json:
    """The note that `built` has made; None if there is none."""
    return json["how"] if isinstance(json, dict) and json.get("$") == "built" else None


def leaves_in(json: Json) -> Iterator[str]:
    """The names of the arrays that an encoded value refers to, in order. An array in two places is named twice."""
    if isinstance(json, list):
        for one in json:
            yield from leaves_in(one)
    elif isinstance(json, dict):
        if json.get("$") == "leaf":
            yield json["name"]
        else:
            yield from leaves_in(list(json.values()))
