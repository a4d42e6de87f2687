"""A tree of plain Python values and arrays as JSON, with the arrays taken out under names of their own; and back.

JSON alone would turn tuples into lists, int keys into strings and lose inf, bytes and complex numbers. Here None, bool,
str, int and finite float stand for themselves, a list is a list, and everything else is `{"$": kind, ...}`. There is no
pickle, and decoding builds values of a fixed set of types only.
"""

from __future__ import annotations

import base64
import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from torchorbax._src.arrays.leaves import ARRAY_TYPES, is_key, without_key_type
from torchorbax._src.tensors.live import tensor_of
from torchorbax.errors import UnsupportedLeafError

Json = Any
Path = tuple[str, ...]

_MAPPINGS: dict[str, Callable[[list[tuple[Any, Any]]], Any]] = {
    "dict": dict,
    "OrderedDict": OrderedDict,
    "Counter": lambda pairs: Counter(dict(pairs)),
    # The factory of a defaultdict cannot be kept; its owner's load_state_dict gets an ordinary dict.
    "defaultdict": dict,
}
_MAPPING_TYPES: dict[type, str] = {
    dict: "dict",
    OrderedDict: "OrderedDict",
    Counter: "Counter",
    defaultdict: "defaultdict",
}
_SEQUENCES: dict[str, Callable[[list[Any]], Any]] = {"tuple": tuple, "set": set, "frozenset": frozenset}


def encode(value: Any, leaves: dict[str, Any], name_of: Callable[[Path], str] = ".".join, path: Path = ()) -> Json:
    """`value` as JSON; its arrays and tensors are added to `leaves`, under unique names that `name_of` gives for their
    paths.

    Raises:
        UnsupportedLeafError: a value of a type that could not be rebuilt; names it.
    """
    if value is None or isinstance(value, bool | str) or type(value) is int:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$": "float", "value": repr(value)}
    if is_key(value):
        data = encode(without_key_type(value), leaves, name_of, path)
        return {"$": "key", "impl": str(jax.random.key_impl(value)), "data": data}
    if isinstance(value, ARRAY_TYPES):
        return {"$": "leaf", "name": add_leaf(name_of(path), value, leaves), "as": _leaf_type(value)}
    if type(value) is list:
        return [encode(one, leaves, name_of, (*path, str(index))) for index, one in enumerate(value)]
    if type(value) in _MAPPING_TYPES:
        keys = [key if isinstance(key, str) else encode(key, leaves, name_of, (*path, "key")) for key in value]
        values = [encode(one, leaves, name_of, (*path, str(key))) for key, one in value.items()]
        return {"$": _MAPPING_TYPES[type(value)], "keys": keys, "values": values}
    if type(value).__name__ in _SEQUENCES and type(value) in (tuple, set, frozenset):
        ordered = value if isinstance(value, tuple) else sorted(value, key=repr)
        return {
            "$": type(value).__name__,
            "values": [encode(one, leaves, name_of, (*path, str(index))) for index, one in enumerate(ordered)],
        }
    if type(value) is bytes:
        return {"$": "bytes", "value": base64.b64encode(value).decode()}
    if type(value) is complex:
        return {"$": "complex", "value": [repr(value.real), repr(value.imag)]}
    if isinstance(value, torch.dtype):
        return {"$": "torch.dtype", "value": str(value).removeprefix("torch.")}
    raise UnsupportedLeafError(".".join(path), f"a {type(value).__qualname__} cannot be kept in a checkpoint")


def _leaf_type(value: object) -> str:
    return "torch" if isinstance(value, torch.Tensor) else "scalar" if isinstance(value, np.generic) else "array"


def add_leaf(name: str, leaf: Any, leaves: dict[str, Any]) -> str:
    """Add `leaf` under `name`, or under a variation of it if that is taken; returns the name used."""
    unique, count = name, 1
    while unique in leaves:  # {"a.b": x, "a": {"b": y}}: Orbax would store one value for both
        count += 1
        unique = f"{name}~{count}"
    leaves[unique] = leaf
    return unique


def decode(json: Json, leaves: Mapping[str, Any]) -> Any:
    """The value that `encode` took apart, with the arrays that `leaves` has under their names.

    What was a tensor is one again: a CPU tensor of a numpy array, a torchax tensor of a `jax.Array`. Other objects in
    `leaves`, such as names, come back as they are.

    Raises:
        ValueError: not what `encode` writes.
    """
    try:
        return _decode(json, leaves)
    except (KeyError, TypeError) as error:
        raise ValueError(f"damaged values: {type(error).__name__}: {error}") from error


def _decode(json: Json, leaves: Mapping[str, Any]) -> Any:
    if isinstance(json, list):
        return [_decode(one, leaves) for one in json]
    if not isinstance(json, dict):
        return json
    kind = json["$"]
    if kind == "leaf":
        return _rebuild_leaf(leaves[json["name"]], json["as"])
    if kind in _MAPPINGS:
        keys = [_decode(key, leaves) for key in json["keys"]]
        return _MAPPINGS[kind](list(zip(keys, [_decode(one, leaves) for one in json["values"]], strict=True)))
    if kind in _SEQUENCES:
        return _SEQUENCES[kind]([_decode(one, leaves) for one in json["values"]])
    if kind == "key":
        data = _decode(json["data"], leaves)
        if not isinstance(data, jax.Array | np.ndarray):  # only its name is known
            return data
        return jax.random.wrap_key_data(jnp.asarray(data), impl=json["impl"])
    if kind == "float":
        return float(json["value"])
    if kind == "bytes":
        return base64.b64decode(json["value"], validate=True)
    if kind == "complex":
        return complex(*map(float, json["value"]))
    if kind == "torch.dtype":
        dtype = getattr(torch, json["value"], None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{json['value']!r} is no torch dtype")
        return dtype
    raise ValueError(f"unknown kind of value {kind!r}; written by a newer torchorbax?")


def _rebuild_leaf(array: Any, kind: str) -> Any:
    if not isinstance(array, jax.Array | np.ndarray):
        return array
    if kind == "torch":
        return tensor_of(array)
    return array[()] if kind == "scalar" and isinstance(array, np.ndarray) else array
