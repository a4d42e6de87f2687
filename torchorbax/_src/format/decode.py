"""Decodes values from JSON, and puts the arrays back; see `values`."""

from __future__ import annotations

import base64
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from torchorbax._src.format.values import BY_NAME, FACTORIES, MAPPINGS, Json, LayoutError, Node, Tensors


def decode(
    json: Json,
    leaves: Mapping[str, Any],
    tensors: Tensors | None = None,
    containers: Mapping[int, Any] | None = None,
    objects: dict[str | int, Any] | None = None,
) -> Any:
    """The value that `encode` took apart.

    Args:
        json: what `encode` has returned.
        leaves: the arrays by name. Objects of other types, such as names, are put in their places unchanged.
        tensors: makes tensors of those arrays that were tensors; None leaves them arrays.
        containers: what to put in the place of mutable containers, by number.
        objects: what has been made of the leaves, by name, and the mutable containers, by number, are added to it.

    Raises:
        LayoutError: `json` is not what `encode` writes.
    """
    try:
        decoder = _Decoder(leaves, tensors, containers or {})
        value = decoder.value(json)
        if objects is not None:
            objects |= decoder.rebuilt | dict(enumerate(decoder.containers))
        return value
    except (KeyError, TypeError, IndexError, ValueError) as error:
        raise LayoutError(f"damaged values: {type(error).__name__}: {error}") from error


class _Decoder:
    def __init__(self, leaves: Mapping[str, Any], tensors: Tensors | None, given: Mapping[int, Any]) -> None:
        self._leaves = leaves
        self._tensors = tensors
        self._given = given  # what is put in the place of containers, by number
        self.rebuilt: dict[str, Any] = {}
        self._typed: set[str] = set()  # the names of the tensors that have been made parameters or readable
        self.containers: list[Any] = []  # the mutable ones, in the order in which the encoder met them

    def value(self, json: Json) -> Any:
        if isinstance(json, list):
            return self._numbered(lambda: [self.value(one) for one in json])
        if not isinstance(json, dict):
            return json
        kind = json["$"]
        if kind == "leaf":
            return self._leaf(json["name"], json["as"])
        if kind == "built":
            if "how" not in json:
                raise ValueError("a note on how a value was built is missing")
            return self.value(json["value"])
        if kind == "same":
            return self.containers[json["number"]]
        if BY_NAME.get(kind) in MAPPINGS:
            return self._numbered(lambda: self._mapping(BY_NAME[kind], json))
        if kind == "set":
            return self._numbered(lambda: set(map(self.value, json["values"])))
        if kind in BY_NAME:
            return BY_NAME[kind](map(self.value, json["values"]))
        if kind == "node":
            return Node(json["type"], dict(zip(json["keys"], map(self.value, json["values"]), strict=True)))
        if kind in ("key", "parameter", "readable"):
            return self._wrapped(kind, json)
        return _plain(kind, json)

    def _numbered(self, build: Callable[[], Any]) -> Any:
        number = len(self.containers)
        self.containers.append(None)
        built = build()
        self.containers[number] = self._given.get(number, built)
        return self.containers[number]

    def _mapping(self, kind: Any, json: Mapping[str, Json]) -> Any:
        keys = [self.value(key) for key in json["keys"]]
        pairs = zip(keys, [self.value(one) for one in json["values"]], strict=True)
        if kind is defaultdict:
            if "factory" not in json:  # written by a version that did not record factories
                return dict(pairs)
            factory = json["factory"]
            return defaultdict(None if factory is None else FACTORIES[factory], pairs)
        return Counter(dict(pairs)) if kind is Counter else kind(pairs)

    def _leaf(self, name: str, kind: str) -> Any:
        if kind not in ("torch", "array", "scalar"):
            raise ValueError(f"unknown kind of array {kind!r}; written by a newer torchorbax?")
        if name not in self.rebuilt:
            array = self._leaves[name]
            if kind == "torch" and _is_array(array) and self._tensors is not None:
                array = self._tensors.tensor(array)
            self.rebuilt[name] = array[()] if kind == "scalar" and isinstance(array, np.ndarray) else array
        return self.rebuilt[name]

    def _wrapped(self, kind: str, json: Mapping[str, Json]) -> Any:
        data = self.value(json["data"])
        if kind == "key":
            return jax.random.wrap_key_data(jnp.asarray(data), impl=json["impl"]) if _is_array(data) else data
        name = json["data"]["name"]
        is_tensor_already = isinstance(self._leaves[name], torch.Tensor)
        if self._tensors is None or not isinstance(data, torch.Tensor) or name in self._typed or is_tensor_already:
            return data
        self._typed.add(name)
        if kind == "readable":
            self.rebuilt[name] = self._tensors.readable(data)
        else:
            self.rebuilt[name] = self._tensors.parameter(data, requires_grad=json["requires_grad"])
        return self.rebuilt[name]


def _is_array(value: Any) -> bool:
    """Is it an array, and not a name that stands for one?"""
    return isinstance(value, jax.Array | np.ndarray)


def _plain(kind: str, json: Mapping[str, Json]) -> Any:
    value = json.get("value")
    if kind == "int":
        return int(value, 16)  # type: ignore[arg-type]  # `decode` reports a value that is not a text
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
