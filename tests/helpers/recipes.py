"""Recipes of values, of which the same value can be built several times over; and pictures of values, to compare."""

from __future__ import annotations

import enum
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from hypothesis import strategies as st
from torchorbax._src.tensors import torchax_tensors

from tests.helpers.tensors import bits, tensor_of_bits

Recipe = tuple[Any, ...]
"""A kind, and what it takes."""


class Pair(NamedTuple):
    """A node that JAX knows by itself."""

    one: Any
    other: Any


@jax.tree_util.register_pytree_node_class
class Labelled:
    """A registered node with a fixed part."""

    def __init__(self, content: Any, label: str) -> None:
        self.content = content
        self.label = label

    def tree_flatten(self) -> tuple[Any, Any]:
        return (self.content,), self.label

    @classmethod
    def tree_unflatten(cls, label: Any, children: Any) -> Labelled:
        return cls(*children, label)


class OddDict(dict[Any, Any]):
    """A subclass, which could not be rebuilt."""


class OddList(list[Any]):
    """The same of a list."""


class OddText(str):
    """The same of a text."""


class Colour(enum.IntEnum):
    RED = 1


ODD: dict[str, Callable[[], Any]] = {
    "object": object,
    "function": lambda: len,
    "dict subclass": lambda: OddDict(a=1),
    "list subclass": lambda: OddList([1]),
    "str subclass": lambda: OddText("x"),
    "enum": lambda: Colour.RED,
    "matrix": lambda: np.ma.masked_array([1.0, 2.0], [True, False]),
    "texts": lambda: np.array(["a", "b"]),
    "objects": lambda: np.array([None, 1], object),
    "big-endian": lambda: np.ones(2, ">f4"),
    "sparse": lambda: torch.eye(2).to_sparse(),
    "module": lambda: torch.nn.Identity(),
    "loader": lambda: torch.utils.data.DataLoader([1, 2]),
    "lambda factory": lambda: defaultdict(lambda: 3, a=1),
    "tensor key": lambda: {torch.ones(1): 1},
    "range": lambda: range(3),
}
"""What cannot be kept."""

# -------------------------------------------------------------------------------------------------------------- build


class Builder:
    """Builds values; what it has built can be used again, in another place.

    Args:
        old: mutable objects that were there before.
    """

    def __init__(self, old: list[Any] | None = None) -> None:
        self.made: list[Any] = []
        self._old = old or []

    def build(self, recipe: Recipe) -> Any:
        kind, *rest = recipe
        if kind == "plain":
            return rest[0]
        if kind == "huge":
            return 10 ** rest[0]
        if kind == "odd":
            return ODD[rest[0]]()
        if kind in ("again", "old"):
            among = self.made if kind == "again" else self._old
            return among[rest[0] % len(among)] if among else None
        made = self._array(*rest) if kind == "array" else self._container(kind, rest)
        if kind not in ("tuple", "frozenset", "pair"):
            self.made.append(made)
        return made

    def _container(self, kind: str, rest: list[Any]) -> Any:
        if kind == "pair":
            return Pair(*map(self.build, rest[0]))
        if kind == "labelled":
            return Labelled(self.build(rest[0]), rest[1])
        if kind in ("list", "tuple", "set", "frozenset"):
            return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind](map(self.build, rest[0]))
        if kind == "Counter":
            return Counter(dict(rest[0]))
        content = {key: self.build(value) for key, value in rest[0]}
        if kind == "defaultdict":
            return defaultdict(list, content)
        return content if kind == "dict" else OrderedDict(content)

    def _array(self, where: str, dtype: torch.dtype, shape: tuple[int, ...], raw: bytes) -> Any:
        tensor = tensor_of_bits(dtype, shape, raw)
        if where == "torch":
            return tensor
        if where == "parameter":
            return torch.nn.Parameter(tensor, requires_grad=dtype.is_floating_point)
        array = tensor.reshape(-1).view(torch.uint8).numpy().view(_numpy(dtype)).reshape(shape)
        if where == "numpy":
            return array
        if where == "scalar":
            return array.reshape(-1)[0] if array.size else np.float32(1)
        on_jax = jnp.asarray(array)
        if where == "jax":
            return on_jax
        if where == "weak":
            return jnp.full(shape, 0.25)
        if where == "key":
            return jax.random.key(len(raw))
        return (torchax_tensors.readable if where == "readable" else torchax_tensors.wrap)(on_jax)


def _numpy(dtype: torch.dtype) -> Any:
    from torchorbax._src.arrays.dtypes import TORCH_TO_NUMPY

    return TORCH_TO_NUMPY[dtype]


# --------------------------------------------------------------------------------------------------------- strategies

_WIDE = [torch.float64, torch.int64, torch.complex128]
_NARROW = [torch.float32, torch.bfloat16, torch.int32, torch.uint8, torch.bool, torch.float16, torch.complex64]
_RAW = st.sampled_from([b"\xff", b"\x00", b"\x80\x7f", b"\x01\x00\x80\x7f"]) | st.binary(min_size=1, max_size=8)
_SHAPES = st.sampled_from([(), (1,), (2,), (2, 3), (0,)])
_HOST = st.sampled_from(["torch", "numpy", "parameter", "scalar"])
_JAX = st.sampled_from(["torchax", "jax", "weak", "key", "readable"])

arrays: st.SearchStrategy[Recipe] = st.tuples(
    st.just("array"), _HOST, st.sampled_from(_NARROW + _WIDE), _SHAPES, _RAW
) | st.tuples(st.just("array"), _JAX, st.sampled_from(_NARROW), _SHAPES, _RAW)

plain_values = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | st.text(max_size=3)
    | st.binary(max_size=3)
    | st.sampled_from([torch.bfloat16, torch.Size([2, 3]), "$", "\ud800", "a.b"])
)
keys = (
    st.sampled_from(["a", "b", "a.b", "", "$", "~2", "é/\\", "_extra_state", "0", 0, 1, -1, True, None, 2.5, (1, "a")])
    | st.text(max_size=3)
    | st.sampled_from([np.int64(3), np.float32(0.5), torch.float16, b"x", frozenset({1, "a"})])
)
again: st.SearchStrategy[Recipe] = st.tuples(st.sampled_from(["again", "old"]), st.integers(0, 7))


def _containers(inner: st.SearchStrategy[Recipe]) -> st.SearchStrategy[Recipe]:
    items = st.lists(st.tuples(keys, inner), max_size=3, unique_by=lambda pair: pair[0])
    return st.tuples(st.sampled_from(["list", "tuple"]), st.lists(inner, max_size=3)) | st.tuples(
        st.sampled_from(["dict", "OrderedDict", "defaultdict"]), items
    )


def _nodes(inner: st.SearchStrategy[Recipe]) -> st.SearchStrategy[Recipe]:
    return (
        _containers(inner)
        | _containers(inner)
        | st.tuples(st.just("pair"), st.tuples(inner, inner))
        | st.tuples(st.just("labelled"), inner, st.sampled_from(["x", "y"]))
    )


_LEAVES = (
    st.tuples(st.just("plain"), plain_values)
    | st.tuples(st.just("huge"), st.integers(4000, 6000))
    | arrays
    | arrays
    | again
    | st.tuples(st.just("Counter"), st.lists(st.tuples(st.text(max_size=2), st.integers(0, 3)), max_size=2))
    | st.tuples(
        st.sampled_from(["set", "frozenset"]),
        st.lists(st.tuples(st.just("plain"), st.integers() | st.text(max_size=2)), max_size=3),
    )
)
# Deferred, for Hypothesis shows a strategy in full where something goes wrong.
values: st.SearchStrategy[Recipe] = st.deferred(lambda: st.recursive(_LEAVES, _containers, max_leaves=8))
"""What anything may hold."""
trees: st.SearchStrategy[Recipe] = st.deferred(lambda: st.recursive(_LEAVES, _nodes, max_leaves=8))
"""What a tree may hold: nodes of registered types, too."""
odd_trees: st.SearchStrategy[Recipe] = st.deferred(
    lambda: st.recursive(_LEAVES | st.tuples(st.just("odd"), st.sampled_from(sorted(ODD))), _nodes, max_leaves=5)
)
"""What a tree may not hold."""

# ------------------------------------------------------------------------------------------------------------ pictures


class Camera:
    """Takes a picture of a value: types, orders, bits, and which objects are the same."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, Any]] = {}

    def picture(self, value: Any) -> Any:
        shareable = isinstance(value, torch.Tensor | np.ndarray | list | dict | set)
        if shareable and id(value) in self._seen:
            return ("the same as", self._seen[id(value)][0])
        if shareable:
            self._seen[id(value)] = (len(self._seen), value)
        name = type(value).__name__
        if isinstance(value, torch.Tensor | np.ndarray | np.generic | jax.Array):
            return self._array(value)
        if isinstance(value, dict):
            factory = getattr(value, "default_factory", None)
            return (name, factory, [(self.picture(key), self.picture(one)) for key, one in value.items()])
        if isinstance(value, list | tuple):
            return (name, [self.picture(one) for one in value])
        if isinstance(value, set | frozenset):
            return (name, sorted(str(self.picture(one)) for one in value))
        if isinstance(value, Labelled):
            return (name, value.label, self.picture(value.content))
        return (name, repr(value) if not isinstance(value, int) else hex(value))

    def _array(self, value: Any) -> Any:
        if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            return ("key", str(value.dtype), bits(jax.random.key_data(value)))
        kind = "jax" if isinstance(value, jax.Array) else type(value).__name__
        array = torchax_tensors.array_of(value) if torchax_tensors.is_torchax(value) else value
        weak = isinstance(array, jax.Array) and array.weak_type
        return (kind, isinstance(value, torch.nn.Parameter), str(value.dtype), tuple(value.shape), weak, bits(value))
