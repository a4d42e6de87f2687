"""Plain values with arrays inside go through JSON text and come back equal, type by type and bit by bit."""

from __future__ import annotations

import enum
import json
from collections import Counter, OrderedDict, defaultdict
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchorbax import UnsupportedLeafError, to_jax
from torchorbax._src.format.encode import add_leaf
from torchorbax._src.state.values import decode, encode
from torchorbax._src.tensors import torchax_tensors as _torchax
from torchorbax._src.tensors.live import live_array

from tests.helpers.tensors import DTYPES, bits, tensors


def through_json(value: Any) -> tuple[Any, dict[str, Any]]:
    """What comes back when the JSON and the arrays take their separate ways, as through a checkpoint."""
    leaves: dict[str, Any] = {}
    text = json.dumps(encode(value, leaves), allow_nan=False)
    stored = {name: leaf if isinstance(leaf, jax.Array) else _stored(name, leaf) for name, leaf in leaves.items()}
    return decode(json.loads(text), stored), leaves


def _stored(name: str, leaf: Any) -> Any:
    held = live_array(name, leaf)
    return held if isinstance(held, jax.Array) else np.array(to_jax(held))


def same(one: Any, other: Any) -> bool:
    """Equal in type, order and bits."""
    if isinstance(one, defaultdict) and one.default_factory is not getattr(other, "default_factory", ...):
        return False
    if type(one) is not type(other) and not (isinstance(one, jax.Array) and isinstance(other, jax.Array)):
        return False
    if isinstance(one, torch.Tensor | np.ndarray | np.generic | jax.Array):
        return one.dtype == other.dtype and tuple(one.shape) == tuple(other.shape) and bits(one) == bits(other)
    if isinstance(one, dict):
        return len(one) == len(other) and all(
            same(key, key_other) and same(value, other[key_other])
            for (key, value), key_other in zip(one.items(), other, strict=True)
        )
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, set | frozenset):
        return _canonical(one) == _canonical(other)
    return repr(one) == repr(other)  # tells 1 from True, -0.0 from 0.0, and finds nan equal to nan


def _canonical(value: Any) -> str:
    """A text that does not depend on the order in which sets iterate."""
    if isinstance(value, set | frozenset):
        return f"{type(value).__name__}{sorted(map(_canonical, value))}"
    return f"({', '.join(map(_canonical, value))})" if isinstance(value, tuple) else repr(value)


plain = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.complex_numbers()
    | st.text(max_size=5)
    | st.sampled_from(["$", "leaf", "a.b", "\ud800"])
    | st.binary(max_size=5)
    | st.sampled_from(DTYPES)
)
hashable = st.recursive(plain, lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3), max_leaves=4)
numpy_scalars = st.sampled_from([np.float32(1.5), np.float64(-0.0), np.int64(2**40), np.bool_(True), np.uint8(3)])
leaves = tensors() | tensors().map(lambda tensor: np.array(to_jax(tensor))) | numpy_scalars
values = st.recursive(
    hashable | leaves | st.sets(hashable, max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(hashable, inner, max_size=3)
        | st.dictionaries(hashable, inner, max_size=3).map(OrderedDict)
        | st.dictionaries(hashable, inner, max_size=3).map(lambda pairs: defaultdict(list, pairs))
        | st.dictionaries(hashable, st.integers(), max_size=3).map(Counter)
    ),
    max_leaves=8,
)


@given(values)
def test_round_trip(value: Any) -> None:
    back, named = through_json(value)
    assert same(value, back)
    assert len(named) == len({id(leaf) for leaf in _leaves_of(value)})  # what is shared is stored once


def _leaves_of(value: Any) -> list[Any]:
    if isinstance(value, torch.Tensor | np.ndarray | np.generic | jax.Array):
        return [value]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [leaf for child in children for leaf in _leaves_of(child)]


def test_what_a_scheduler_or_a_data_loader_keeps() -> None:
    """The cases that JSON alone gets wrong, by name."""
    state = {
        "milestones": Counter({30: 1, 80: 1}),
        "base_lrs": [0.1, float("inf"), -0.0],
        "betas": (0.9, 0.999),
        1: "int key",
        "1": "str key",
        False: "bool key",
        None: None,
        (1, "a"): {"$": "dict", "name": "looks like ours"},
        "seen": {3, 1, 2},
        "frozen": frozenset({"x"}),
        "big": 2**100,
        "raw": b"\x00\xff",
        "phase": complex(float("nan"), -0.0),
        "dtype": torch.bfloat16,
    }
    back, named = through_json(state)
    assert same(state, back)
    assert not named


def test_jax_values_come_back_on_jax_and_host_values_on_the_host() -> None:
    state = {"torchax": _torchax.wrap(jnp.arange(3)), "raw": jnp.ones(2), "torch": torch.ones(2), "numpy": np.ones(2)}
    back, _ = through_json(state)
    assert _torchax.is_torchax(back["torchax"])
    assert to_jax(back["torchax"]) is to_jax(state["torchax"])
    assert back["raw"] is state["raw"]
    assert back["torch"].device.type == "cpu"
    assert same(state["torch"], back["torch"])
    assert same(state["numpy"], back["numpy"])


def test_names_tell_where_a_leaf_is_and_never_collide() -> None:
    tree = {"a.b": np.ones(1), "a": {"b": np.ones(2)}, "list": [np.ones(3), (np.ones(4),)], "a.b~2": np.ones(5)}
    named: dict[str, Any] = {}
    encode(tree, named)
    assert {name: leaf.size for name, leaf in named.items()} == {
        "a.b": 1,
        "a.b~2": 2,
        "list.0": 3,
        "list.1.0": 4,
        "a.b~2~2": 5,
    }
    assert same(tree, through_json(tree)[0])
    named = {"x": None, "x~2": None}
    assert add_leaf("x", 1, named) == "x~3"
    assert named["x~3"] == 1


def test_the_caller_names_the_leaves() -> None:
    named: dict[str, Any] = {}
    encode({"state": {"weight": [np.ones(1)]}}, named, lambda path: "/".join(path[1:]))
    assert list(named) == ["weight/0"]


def test_a_leaf_that_is_no_array_is_handed_through() -> None:
    """Planning a restore decodes with names in place of arrays."""
    named: dict[str, Any] = {}
    encoded = encode({"moment": torch.ones(2), "scalar": np.float32(1)}, named)
    marker = object()
    assert decode(encoded, dict.fromkeys(named, marker)) == {"moment": marker, "scalar": marker}


class Point(NamedTuple):
    x: int


class Colour(enum.IntEnum):
    RED = 1


class SpecialDict(dict[str, int]):
    pass


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (object(), "object"),
        (lambda: None, "function"),
        (Point(1), "Point"),
        (Colour.RED, "Colour"),
        (SpecialDict(), "SpecialDict"),
        (torch.nn.Identity(), "Identity"),
        (range(3), "range"),
        (bytearray(b"a"), "bytearray"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_could_not_be_rebuilt_is_refused_by_name(value: Any, kind: str) -> None:
    with pytest.raises(UnsupportedLeafError, match=rf"state\.0\.fn: a {kind} cannot be kept") as caught:
        encode({"state": [{"fn": value}]}, {})
    assert caught.value.name == "state.0.fn"


def test_what_a_newer_version_wrote_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown kind of value 'matrix'; written by a newer torchorbax"):
        decode({"a": None, "$": "list", "values": []} | {"$": "matrix"}, {})


@pytest.mark.parametrize("name", ["load", "hub", "nn", "Tensor", "no_such_dtype", "__builtins__"])
def test_a_dtype_is_a_dtype(name: str) -> None:
    """Decoding builds values of a fixed set of types, whatever somebody wrote into the file."""
    with pytest.raises(ValueError, match=rf"{name}"):
        decode({"$": "torch.dtype", "value": name}, {})


@pytest.mark.parametrize(
    "damaged",
    [
        {"values": []},
        {"$": "leaf", "as": "torch"},
        {"$": "leaf", "name": "gone", "as": "torch"},
        {"$": "dict", "keys": ["a"], "values": []},
        {"$": "dict", "keys": [["a"]], "values": [1]},
        {"$": "set", "values": [[1]]},
        {"$": "tuple"},
        {"$": "float", "value": "x"},
        {"$": "bytes", "value": "*"},
        {"$": ["dict"]},
    ],
    ids=str,
)
def test_damaged_json_is_a_value_error(damaged: Any) -> None:
    """So that a damaged step can be told from a bug, and skipped."""
    with pytest.raises(ValueError, match=r"\S"):
        decode([damaged], {})
