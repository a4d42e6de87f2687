"""Live tensors to arrays and back in place, bit for bit."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchorbax import assign_, to_jax
from torchorbax._src.tensors import torchax_tensors as _torchax
from torchorbax._src.tensors.live import overwrite

from tests.helpers.tensors import DTYPES, NO_TORCHAX, WIDE, bits, tensor_of_bits, tensors


@pytest.mark.parametrize("x64", [False, True])
@given(tensor=tensors())
def test_cpu_round_trip_is_bit_for_bit(x64: bool, tensor: torch.Tensor) -> None:
    jax.config.update("jax_enable_x64", x64)
    array = to_jax(tensor)
    on_host = tensor.dtype in WIDE and not x64
    assert isinstance(array, np.ndarray if on_host else jax.Array)
    assert (tuple(array.shape), str(array.dtype)) == (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
    assert bits(array) == bits(tensor)
    fresh = torch.empty_like(tensor)
    memory = fresh.data_ptr()
    assert assign_(fresh, array) is fresh
    assert bits(fresh) == bits(tensor)
    assert fresh.data_ptr() == memory


@given(tensor=tensors([dtype for dtype in DTYPES if dtype not in NO_TORCHAX | WIDE]))
def test_torchax_round_trip_is_bit_for_bit(tensor: torch.Tensor) -> None:
    array = to_jax(tensor)
    live = _torchax.wrap(jnp.zeros(array.shape, array.dtype))
    assign_(live, array)
    assert bits(live) == bits(tensor)
    assert to_jax(live) is array


class Pair(NamedTuple):
    first: Any
    second: Any


def trees(leaves: st.SearchStrategy[Any], changeable: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Trees of dicts, lists and (named) tuples; `changeable` leaves are in dicts and lists only."""
    names = st.sampled_from(["weight", "bias", "a.b", "0"])

    def containers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        entry = inner | changeable
        dicts = st.dictionaries(names, entry, max_size=3) | st.dictionaries(st.integers(0, 3), entry, max_size=3)
        return dicts | st.lists(entry, max_size=3) | st.tuples(inner, inner) | st.builds(Pair, inner, inner)

    return containers(st.recursive(leaves, containers, max_leaves=6))


small = [dtype for dtype in DTYPES if dtype not in NO_TORCHAX | WIDE]

torchax_leaves = tensors(small).map(lambda tensor: _torchax.wrap(to_jax(tensor)))

numpy_leaves = tensors().map(lambda tensor: np.array(to_jax(tensor)))

changeable_leaves = tensors(small).map(to_jax) | st.integers() | st.none() | st.text(max_size=3)


@given(tree=trees(tensors() | torchax_leaves | numpy_leaves, changeable_leaves))
def test_trees_round_trip(tree: Any) -> None:
    arrays = to_jax(tree)
    assert jax.tree.structure(arrays) == jax.tree.structure(tree)
    described = [
        (type(leaf), bits(leaf) if hasattr(leaf, "dtype") else leaf, getattr(leaf, "dtype", None))
        for leaf in jax.tree.leaves(tree)
    ]
    tensors_before = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, torch.Tensor | np.ndarray)]
    wiped = jax.tree.map(_wiped, tree)
    assert assign_(wiped, arrays) is wiped
    after = jax.tree.leaves(wiped)
    for (kind, expected, dtype), leaf in zip(described, after, strict=True):
        assert isinstance(leaf, jax.Array) if issubclass(kind, jax.Array) else type(leaf) is kind
        assert (bits(leaf) if hasattr(leaf, "dtype") else leaf, getattr(leaf, "dtype", None)) == (expected, dtype)
    assign_(tree, arrays)
    kept = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, torch.Tensor | np.ndarray)]
    assert all(one is other for one, other in zip(tensors_before, kept, strict=True))


def _wiped(leaf: Any) -> Any:
    """A leaf of the same kind with other bits."""
    if isinstance(leaf, torch.Tensor) and not _torchax.is_torchax(leaf):
        return tensor_of_bits(leaf.dtype, tuple(leaf.shape), b"\x01")
    if isinstance(leaf, torch.Tensor):
        return _torchax.wrap(jnp.ones_like(_torchax.array_of(leaf)))
    if isinstance(leaf, np.ndarray):
        return np.ones_like(leaf)
    return jnp.ones_like(leaf) if isinstance(leaf, jax.Array) else "wiped"


@pytest.mark.parametrize("stride", [0, 1, 2, 5])
@pytest.mark.parametrize("length", [0, 1, 2])
def test_only_the_values_of_a_tensor_are_overwritten_and_come_back(stride: int, length: int) -> None:
    stride = stride or (1 if length > 1 else 0)
    whole = torch.arange(12.0)
    part = whole.as_strided((length,), (stride,), 2)
    expected = np.arange(12.0, dtype=np.float32)
    expected[2 : 2 + length * max(stride, 1) : max(stride, 1)] = 99
    with ExitStack() as undo:
        overwrite(part, np.full(length, 99, np.float32), undo)
        assert whole.tolist() == expected.tolist()
    assert whole.tolist() == list(range(12))


def test_a_graph_notices_that_what_it_needs_was_overwritten() -> None:
    weight = torch.ones(3, requires_grad=True)
    loss = (weight * weight).sum()
    overwrite(weight, np.zeros(3, np.float32), ExitStack())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
