"""Encodes values as JSON, and takes the arrays out; see `values`."""

from __future__ import annotations

import base64
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch

from torchorbax._src.arrays.leaves import ARRAY_TYPES, is_key, without_key_type
from torchorbax._src.format.values import (
    DEEPEST,
    FACTORIES,
    LARGEST_BITS,
    MAPPINGS,
    MUTABLE,
    SEQUENCES,
    Json,
    Node,
    Path,
    Tensors,
    key_name,
    text_of,
)
from torchorbax.errors import UnsupportedLeafError


def encode(
    value: Any,
    leaves: dict[str, Any],
    name_of: Callable[[Path], str] = ".".join,
    path: Path = (),
    node_of: Callable[[Any, Path], Node | None] = lambda value, path: None,
    *,
    tensors: Tensors,
    containers: list[Any] | None = None,
) -> Json:
    """`value` as JSON, with its arrays and tensors added to `leaves`.

    Args:
        value: what to encode.
        leaves: the arrays are added to it, by name.
        name_of: makes the name of an array from its path. A name that is taken gets a suffix.
        path: the path of `value`, for names and errors.
        node_of: describes a value of a type that is not built in; None if such a value cannot be kept.
        tensors: tells the kinds of tensors apart.
        containers: the mutable containers are added to it, in the order in which they are numbered.

    Raises:
        UnsupportedLeafError: a value has a type that could not be rebuilt, or contains itself. The error names it.
    """
    encoder = _Encoder(leaves, name_of, node_of, tensors)
    json = encoder.json(value, path)
    if containers is not None:
        containers += encoder.containers
    return json


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
        # All ids are those of objects that have been met.
        self._names: dict[int, str] = {}  # the names of arrays, by id
        self._numbers: dict[int, int] = {}  # the numbers of mutable containers, by id
        self._open: set[int] = set()  # the ids of the containers around the current value
        # The containers by number. They are kept alive, because the id of a freed one may be given to another.
        self.containers: list[Any] = []

    def json(self, value: Any, path: Path) -> Json:
        if value is None or type(value) in (bool, str):
            return value
        if type(value) is int:
            return value if value.bit_length() <= LARGEST_BITS else {"$": "int", "value": hex(value)}
        if type(value) is float:
            return value if math.isfinite(value) else {"$": "float", "value": repr(value)}
        if isinstance(value, ARRAY_TYPES):
            return self._array(value, path)
        if type(value) in MUTABLE:
            if id(value) in self._numbers:
                return self._same(value, path)
            self._numbers[id(value)] = len(self._numbers)
            self.containers.append(value)
        if id(value) in self._open or len(path) > DEEPEST:
            reason = "contains itself" if id(value) in self._open else f"is nested more than {DEEPEST} levels deep"
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
        if kind in SEQUENCES:
            ordered = sorted(value, key=text_of) if kind in (set, frozenset) else value
            return {
                "$": SEQUENCES[kind],
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
            ".".join(path), f"a {kind.__qualname__} cannot be kept in a checkpoint; {_advice(value)}"
        )

    def _key(self, key: Any, path: Path) -> Json:
        if not _is_key_of_mapping(key):
            # Such a key may be found by its identity alone, which differs in another process.
            raise UnsupportedLeafError(
                ".".join(path), f"a {type(key).__qualname__} as a key of a mapping cannot be kept in a checkpoint"
            )
        return self.json(key, (*path, "key"))

    @staticmethod
    def _factory(value: defaultdict[Any, Any], path: Path) -> str | None:
        factory = value.default_factory
        if factory is not None and factory not in FACTORIES.values():
            raise UnsupportedLeafError(
                ".".join(path),
                f"a defaultdict that makes its values with {factory!r} cannot be kept in a checkpoint; use a dict and "
                f"setdefault, or one of {', '.join(FACTORIES)}",
            )
        return None if factory is None else factory.__name__

    def _array(self, value: Any, path: Path) -> Json:
        if type(value) is torch.Tensor:  # most leaves; the other checks take microseconds
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


def _advice(value: object) -> str:
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
    while unique in leaves:  # as in {"a.b": x, "a": {"b": y}}, for which Orbax would store one value
        count += 1
        unique = f"{name}~{count}"
    leaves[unique] = leaf
    return unique
