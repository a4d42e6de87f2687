"""A tree of plain Python values and arrays as JSON, with the arrays taken out under names of their own; and back.

JSON alone would turn tuples into lists, int keys into strings and lose inf, bytes and complex numbers. Here None, bool,
str, int and finite float stand for themselves, a list is a list, and everything else is `{"$": kind, ...}`. There is no
pickle, and decoding builds values of a fixed set of types only.

What comes back is what was there, types included; a value for which that is impossible is refused when it is encoded.
An array, a list, a mapping or a set that is in two places comes back as one object in two places.
"""

from __future__ import annotations

import base64
import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import torch

from torchorbax._src.arrays.leaves import ARRAY_TYPES, Array, is_key, without_key_type
from torchorbax.errors import UnsupportedLeafError

Json = Any
Path = tuple[str, ...]

MAPPINGS: dict[type, str] = {
    dict: "dict",
    OrderedDict: "OrderedDict",
    Counter: "Counter",
    defaultdict: "defaultdict",
}
"""Mappings that can be kept, and their names."""
_SEQUENCES: dict[type, str] = {tuple: "tuple", set: "set", frozenset: "frozenset", torch.Size: "torch.Size"}
_MUTABLE = frozenset((list, set, *MAPPINGS))
_BY_NAME: dict[str, type] = {name: kind for kind, name in (MAPPINGS | _SEQUENCES).items()}
_FACTORIES: dict[str, Callable[[], Any]] = {
    kind.__name__: kind for kind in (bool, int, float, str, list, tuple, set, dict, OrderedDict, Counter)
}
"""What a `defaultdict` may make its values with."""
_DEEPEST = 100
"""Levels of nesting. Python's stack would overflow at some ten times as many, in saving or, worse, in restoring."""
_LARGEST_BITS = 4096
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


# ------------------------------------------------------------------------------------------------------------- encode


def encode(
    value: Any,
    leaves: dict[str, Any],
    name_of: Callable[[Path], str] = ".".join,
    path: Path = (),
    node_of: Callable[[Any, Path], Node | None] = lambda value, path: None,
    *,
    tensors: Tensors,
) -> Json:
    """`value` as JSON, with its arrays and tensors added to `leaves`.

    Args:
        value: what to encode.
        leaves: gets the arrays.
        name_of: makes their names of their paths; a name that is taken gets a suffix.
        path: of `value`, for names and errors.
        node_of: what is below a value of an unknown type, if that can be told.
        tensors: tells kinds of tensors apart.

    Raises:
        UnsupportedLeafError: a value of a type that could not be rebuilt, or one that contains itself; names it.
    """
    return _Encoder(leaves, name_of, node_of, tensors).json(value, path)


class _Encoder:
    def __init__(
        self,
        leaves: dict[str, Any],
        name_of: Callable[[Path], str],
        node_of: Callable[[Any, Path], Node | None],
        tensors: Tensors,
    ) -> None:
        self._leaves = leaves
        self._tensors = tensors
        self._name_of = name_of
        self._node_of = node_of
        self._names: dict[int, str] = {}  # of arrays that have been met, by id
        self._numbers: dict[int, int] = {}  # of mutable containers that have been met, by id
        self._open: set[int] = set()  # ids of the containers around the value at hand
        self._met: list[Any] = []  # the containers themselves: the id of one that is gone would be given to another

    def json(self, value: Any, path: Path) -> Json:
        if value is None or type(value) in (bool, str):
            return value
        if type(value) is int:
            return value if value.bit_length() <= _LARGEST_BITS else {"$": "int", "value": hex(value)}
        if type(value) is float:
            return value if math.isfinite(value) else {"$": "float", "value": repr(value)}
        if isinstance(value, ARRAY_TYPES):
            return self._array(value, path)
        if type(value) in _MUTABLE:
            if id(value) in self._numbers:
                return self._same(value, path)
            self._numbers[id(value)] = len(self._numbers)
            self._met.append(value)
        if id(value) in self._open or len(path) > _DEEPEST:
            reason = "contains itself" if id(value) in self._open else f"is nested more than {_DEEPEST} levels deep"
            raise UnsupportedLeafError(".".join(path[:5]), f"a {type(value).__qualname__} below it {reason}")
        self._open.add(id(value))
        encoded = self._container(value, path)
        self._open.discard(id(value))
        return encoded

    def _same(self, value: Any, path: Path) -> Json:
        if id(value) in self._open:
            raise UnsupportedLeafError(".".join(path[:5]), f"a {type(value).__qualname__} below it contains itself")
        return {"$": "same", "number": self._numbers[id(value)]}

    def _container(self, value: Any, path: Path) -> Json:
        kind = type(value)
        if kind is list:
            return [self.json(one, (*path, str(index))) for index, one in enumerate(value)]
        if kind in MAPPINGS:
            keys = [key if type(key) is str else self._key(key, path) for key in value]
            values = [self.json(one, (*path, key_name(key))) for key, one in value.items()]
            factory = {"factory": self._factory(value, path)} if kind is defaultdict else {}
            return {"$": MAPPINGS[kind], "keys": keys, "values": values, **factory}
        if kind in _SEQUENCES:
            ordered = sorted(value, key=_text) if kind in (set, frozenset) else value
            return {
                "$": _SEQUENCES[kind],
                "values": [self.json(one, (*path, str(index))) for index, one in enumerate(ordered)],
            }
        if kind is bytes:
            return {"$": "bytes", "value": base64.b64encode(value).decode()}
        if kind is complex:
            return {"$": "complex", "value": [repr(value.real), repr(value.imag)]}
        if kind is torch.dtype:
            return {"$": "torch.dtype", "value": str(value).removeprefix("torch.")}
        if (node := self._node_of(value, path)) is not None:
            children = [self.json(child, (*path, name)) for name, child in node.children.items()]
            return {"$": "node", "type": node.type, "keys": list(node.children), "values": children}
        raise UnsupportedLeafError(
            ".".join(path), f"a {kind.__qualname__} cannot be kept in a checkpoint; {_cure(value)}"
        )

    def _key(self, key: Any, path: Path) -> Json:
        if not _is_key_of_mapping(key):
            # Found by its identity, which another process does not have.
            raise UnsupportedLeafError(
                ".".join(path), f"a {type(key).__qualname__} as a key of a mapping cannot be kept in a checkpoint"
            )
        return self.json(key, (*path, "key"))

    @staticmethod
    def _factory(value: defaultdict[Any, Any], path: Path) -> str | None:
        factory = value.default_factory
        if factory is not None and factory not in _FACTORIES.values():
            raise UnsupportedLeafError(
                ".".join(path),
                f"a defaultdict that makes its values with {factory!r} cannot be kept in a checkpoint; use a dict and "
                f"setdefault, or one of {', '.join(_FACTORIES)}",
            )
        return None if factory is None else factory.__name__

    def _array(self, value: Any, path: Path) -> Json:
        if type(value) is torch.Tensor:  # most of them; to ask the other questions takes microseconds
            return self._leaf(value, path, "torch")
        if is_key(value):
            data = self._array(without_key_type(value), path)
            return {"$": "key", "impl": str(jax.random.key_impl(value)), "data": data}
        if isinstance(value, np.generic):
            return self._leaf(value, path, "scalar")
        if isinstance(value, torch.Tensor):
            kind = self._tensors.kind(value)
            if kind is None:
                raise _type_refused(value, path)
            leaf = self._leaf(value, path, "torch")
            if kind == "readable":
                return {"$": "readable", "data": leaf}
            if kind == "parameter":
                return {"$": "parameter", "requires_grad": value.requires_grad, "data": leaf}
            return leaf
        if isinstance(value, np.ndarray) and type(value) is not np.ndarray:
            raise _type_refused(value, path)
        return self._leaf(value, path, "array")

    def _leaf(self, value: Any, path: Path, kind: str) -> Json:
        name = self._names.get(id(value))
        if name is None:
            name = self._names[id(value)] = add_leaf(self._name_of(path), value, self._leaves)
        return {"$": "leaf", "name": name, "as": kind}


def key_name(key: object) -> str:
    """What a key of a mapping is called in the names of leaves; the same in all processes."""
    return key if type(key) is str else _text(key)


def _text(value: object) -> str:
    """As `repr`, but the same for equal sets, and for integers of any size."""
    if type(value) is frozenset:
        return f"frozenset({{{', '.join(sorted(map(_text, value)))}}})"
    if type(value) is tuple:
        return f"({', '.join(map(_text, value))}{',' if len(value) == 1 else ''})"
    if type(value) is int and value.bit_length() > _LARGEST_BITS:
        return hex(value)
    return str(value) if isinstance(value, np.generic) else repr(value)


def _cure(value: object) -> str:
    """What to do about a value that cannot be kept."""
    if isinstance(value, torch.utils.data.DataLoader):
        return "use torchdata.stateful_dataloader.StatefulDataLoader, which can say where it stands"
    if isinstance(value, dict | list | tuple | set | str | int | float):
        return "what comes back would have another type, so convert it to a built-in one"
    return "leave it out, or give what holds it a state_dict and a load_state_dict that do without it"


def _is_key_of_mapping(key: Any) -> bool:
    if type(key) in (tuple, frozenset):
        return all(map(_is_key_of_mapping, key))
    plain = (bool, str, int, float, complex, bytes, torch.dtype)
    return key is None or type(key) in plain or isinstance(key, np.generic)


def _type_refused(value: object, path: Path) -> UnsupportedLeafError:
    return UnsupportedLeafError(".".join(path), f"a {type(value).__qualname__} cannot be kept in a checkpoint")


def add_leaf(name: str, leaf: Any, leaves: dict[str, Any]) -> str:
    """Add `leaf` under `name`, or under a variation of it if that is taken; returns the name used."""
    unique, count = name, 1
    while unique in leaves:  # {"a.b": x, "a": {"b": y}}: Orbax would store one value for both
        count += 1
        unique = f"{name}~{count}"
    leaves[unique] = leaf
    return unique


def built(how: Json, value: Json) -> Json:
    """An encoded value with a note, in JSON, on how the program had been built that saved it."""
    return {"$": "built", "how": how, "value": value}


# ------------------------------------------------------------------------------------------------------------- decode


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


def decode(json: Json, leaves: Mapping[str, Any], tensors: Tensors | None = None) -> Any:
    """The value that `encode` took apart, with the arrays that `leaves` has under their names.

    What was a tensor is one again, made by `tensors`; without it, arrays stay arrays. Other objects in `leaves`, such
    as names, come back as they are.

    Raises:
        LayoutError: not what `encode` writes.
    """
    try:
        return _Decoder(leaves, tensors).value(json)
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise LayoutError(f"damaged values: {type(error).__name__}: {error}") from error


class _Decoder:
    def __init__(self, leaves: Mapping[str, Any], tensors: Tensors | None) -> None:
        self._leaves = leaves
        self._tensors = tensors
        self._rebuilt: dict[str, Any] = {}
        self._typed: set[str] = set()  # the names of those tensors that have been made parameters or readable
        self._containers: list[Any] = []  # the mutable ones, in the order in which the encoder has met them

    def value(self, json: Json) -> Any:
        if isinstance(json, list):
            return self._numbered(lambda: [self.value(one) for one in json])
        if not isinstance(json, dict):
            return json
        kind = json["$"]
        if kind == "leaf":
            return self._leaf(json["name"], json["as"])
        if kind == "built":
            return self.value(json["value"])
        if kind == "same":
            return self._containers[json["number"]]
        if _BY_NAME.get(kind) in MAPPINGS:
            return self._numbered(lambda: self._mapping(_BY_NAME[kind], json))
        if kind == "set":
            return self._numbered(lambda: set(map(self.value, json["values"])))
        if kind in _BY_NAME:
            return _BY_NAME[kind](map(self.value, json["values"]))
        if kind == "node":
            return Node(json["type"], dict(zip(json["keys"], map(self.value, json["values"]), strict=True)))
        if kind in ("key", "parameter", "readable"):
            return self._wrapped(kind, json)
        return _plain(kind, json)

    def _numbered(self, build: Callable[[], Any]) -> Any:
        number = len(self._containers)
        self._containers.append(None)
        self._containers[number] = built = build()
        return built

    def _mapping(self, kind: Any, json: Mapping[str, Json]) -> Any:
        keys = [self.value(key) for key in json["keys"]]
        pairs = zip(keys, [self.value(one) for one in json["values"]], strict=True)
        if kind is defaultdict:
            if "factory" not in json:  # as steps had it that did not know the factory
                return dict(pairs)
            factory = json["factory"]
            return defaultdict(None if factory is None else _FACTORIES[factory], pairs)
        return Counter(dict(pairs)) if kind is Counter else kind(pairs)

    def _leaf(self, name: str, kind: str) -> Any:
        if kind not in ("torch", "array", "scalar"):
            raise ValueError(f"unknown kind of array {kind!r}; written by a newer torchorbax?")
        if name not in self._rebuilt:
            array = self._leaves[name]
            if kind == "torch" and _is_array(array) and self._tensors is not None:
                array = self._tensors.tensor(array)
            self._rebuilt[name] = array[()] if kind == "scalar" and isinstance(array, np.ndarray) else array
        return self._rebuilt[name]

    def _wrapped(self, kind: str, json: Mapping[str, Json]) -> Any:
        data = self.value(json["data"])
        if kind == "key":
            return jax.random.wrap_key_data(jnp.asarray(data), impl=json["impl"]) if _is_array(data) else data
        name = json["data"]["name"]
        if self._tensors is None or not isinstance(data, torch.Tensor) or name in self._typed:
            return data
        self._typed.add(name)
        if kind == "readable":
            self._rebuilt[name] = self._tensors.readable(data)
        else:
            self._rebuilt[name] = self._tensors.parameter(data, requires_grad=json["requires_grad"])
        return self._rebuilt[name]


def _is_array(value: Any) -> bool:
    """Is it an array, and not a name that stands for one?"""
    return isinstance(value, jax.Array | np.ndarray)


def _plain(kind: str, json: Mapping[str, Json]) -> Any:
    value = json.get("value")
    if kind == "int":
        return int(value, 16)  # type: ignore[arg-type]  # decode tells what is no text
    if kind == "float":
        return float(json["value"])
    if kind == "bytes":
        return base64.b64decode(json["value"], validate=True)
    if kind == "complex":
        return complex(*map(float, json["value"]))
    if kind == "torch.dtype":
        dtype = getattr(torch, json["value"], None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{value!r} is no torch dtype")
        return dtype
    raise ValueError(f"unknown kind of value {kind!r}; written by a newer torchorbax?")
