"""Trees of arrays and plain values come back in place."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torchorbax
from hypothesis import given, settings
from hypothesis import strategies as st
from torchorbax import Checkpointer, MismatchError
from torchorbax._src.state.pytrees import PytreeItem

from tests.helpers.runs import restored, saved
from tests.helpers.tensors import bits


def test_values_with_arrays_in_them_are_compared_to_the_end(tmp_path: Path) -> None:
    live, wrong = Counter({"a": np.int64(1)}), Counter({"a": np.float32(1)})
    with (
        Checkpointer(tmp_path, {"seen": live}, rng=False) as run,
        pytest.raises(MismatchError, match="the state handed to save does not fit"),
    ):
        run.save(0, {"seen": wrong}, force=True)


def test_a_tree_handed_over_must_fit_the_live_one(tmp_path: Path) -> None:
    run = Checkpointer(tmp_path, {"moments": {"count": jnp.zeros(()), "epoch": 0}}, rng=False)
    for wrong in ({"cnt": jnp.ones(()), "epoch": 1}, {"count": jnp.ones(2), "epoch": 1}, {"count": jnp.ones(())}):
        with pytest.raises(torchorbax.MismatchError, match="the state handed to save does not fit"):
            run.save(0, {"moments": wrong}, force=True)
    assert run.save(0, {"moments": {"count": jnp.ones(()), "epoch": 1}}, force=True)
    run.wait()
    run.restore(0)
    assert (float(run.state["moments"]["count"]), run.state["moments"]["epoch"]) == (1, 1)
    run.close()


def test_plain_values_are_where_the_run_says(tmp_path: Path) -> None:
    path = saved(tmp_path, epoch=3, name="x", seen=(1, 2.5), flag=True)
    run = restored(path, epoch=0, name="", seen=(0, 0.0), flag=False)
    assert dict(run.state) == {"epoch": 3, "name": "x", "seen": (1, 2.5), "flag": True}


def test_trees_are_filled_in_place_as_far_as_they_can_be(tmp_path: Path) -> None:
    def tree(value: float) -> dict[str, Any]:
        return {
            "list": [value, jnp.full(2, value)],
            "numpy": np.full(2, value),
            "torch": torch.full((2,), value),
            "optax": optax.adam(0.1).init({"w": jnp.full(2, value)}),
            "key": jax.random.key(int(value)),
            "none": None,
        }

    path = saved(tmp_path, tree=tree(1.0))
    live = tree(2.0)
    parts = dict(live)
    run = restored(path, tree=live)
    assert run.state["tree"] is live
    for name in ("list", "numpy", "torch"):
        assert live[name] is parts[name], name
    assert parts["list"][0] == 1.0
    assert parts["numpy"].tolist() == parts["torch"].tolist() == np.asarray(live["list"][1]).tolist() == [1, 1]
    assert isinstance(live["optax"][0], optax.ScaleByAdamState)
    assert bits(jax.random.key_data(live["key"])) == bits(jax.random.key_data(jax.random.key(1)))


@jax.tree_util.register_pytree_node_class
class Scaled:
    """A node that is registered with a numpy array, which `==` says nothing about as a whole."""

    def __init__(self, array: Any, scales: np.ndarray) -> None:
        self.array = array
        self.scales = scales

    def tree_flatten(self) -> tuple[Any, Any]:
        return (self.array,), self.scales

    @classmethod
    def tree_unflatten(cls, scales: Any, children: Any) -> Scaled:
        return cls(*children, scales)


def test_a_tree_may_change_from_save_to_save(tmp_path: Path) -> None:
    """What is known of the last one is not taken for what is there."""
    trees: list[Any] = [
        {"a": jnp.ones(2), "b": jnp.zeros(3)},
        {"a": jnp.ones(2) * 2, "b": jnp.ones(3)},
        {"a": 5, "b": jnp.ones(3)},
        {"a": 7, "b": jax.random.key(3)},
        {"b": jnp.ones(3), "c": {"a": jnp.ones(1)}},
        {"b": [jnp.ones(3), jnp.ones(1)]},
        {"a": torch.ones(2), "b": np.ones(3)},
        {"a": {"of": Scaled(jnp.arange(2), np.ones(2))}},
        {"a": {"of": Scaled(jnp.arange(3), np.ones(2))}},
    ]
    holder: dict[str, Any] = {"a": {"of": Scaled(jnp.arange(2), np.ones(2))}}  # one of its kind must be there
    with Checkpointer(str(tmp_path), {"x": holder}, keep=None, rng=False) as run:
        for step, tree in enumerate(trees):
            holder.clear()
            holder.update(tree)
            run.save(step, force=True)
            run.wait()
    for step, tree in enumerate(trees):
        blank: dict[str, Any] = jax.tree.map(lambda leaf: leaf * 0 if not _is_key(leaf) else leaf, tree)
        with Checkpointer(str(tmp_path), {"x": blank}, rng=False) as run:
            run.restore(step)
        found, expected = jax.tree.leaves(blank), jax.tree.leaves(tree)
        assert [type(leaf) for leaf in found] == [type(leaf) for leaf in expected]
        for one, other in zip(found, expected, strict=True):
            assert one == other if _is_key(one) or isinstance(one, int) else bits(one) == bits(other)


def test_a_tree_that_was_refused_leaves_nothing_behind(tmp_path: Path) -> None:
    holder: dict[str, Any] = {"a": jnp.ones(2)}
    with Checkpointer(str(tmp_path), {"x": holder}, rng=False) as run:
        with pytest.raises(MismatchError) as caught:
            run.save(0, {"x": {"b": np.ones(2, np.float32)}}, force=True)
        assert [(problem.kind, problem.name) for problem in caught.value.problems] == [("missing", "a")]
        holder["b"] = holder.pop("a")
        run.save(1, force=True)
    blank = {"b": jnp.zeros(2)}
    assert restored(str(tmp_path), x=blank).step == 1
    assert bits(blank["b"]) == bits(jnp.ones(2))


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def test_trees_that_differ(tmp_path: Path) -> None:
    path = saved(tmp_path, tree={"a": 1, "b": jnp.ones(2), "c": np.ones(3)})
    state = {"tree": {"a": 0, "d": 2, "b": jnp.zeros(4), "c": np.zeros(3)}}
    with pytest.raises(MismatchError, match=r"1 shape, 1 missing\n.*b: shape.*\n.*tree: d: expected a value"):
        restored(path, **state)
    with Checkpointer(path, state) as run:
        run.restore(strict=False)
        assert {problem.name for problem in run.left_out} == {"b", "d"}
    assert (state["tree"]["a"], state["tree"]["d"], state["tree"]["c"].tolist()) == (1, 2, [1, 1, 1])
    assert (np.asarray(state["tree"]["b"]) == 0).all()


leaves = st.integers(-9, 9) | st.floats(allow_nan=False) | st.text(max_size=3) | st.booleans() | st.just("array")

trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "b", "a.b"]), inner, max_size=3)
        | st.tuples(inner, inner)
    ),
    max_leaves=8,
)


@settings(max_examples=20)
@given(tree=trees, number=st.integers(0, 99))
def test_any_tree_comes_back(tree: Any, number: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Into a tree of the same structure with other values."""

    def filled(value: int) -> Any:
        return jax.tree.map(lambda leaf: np.full(2, value) if leaf == "array" else leaf, tree)

    def other(leaf: Any) -> Any:
        return np.zeros_like(leaf) if isinstance(leaf, np.ndarray) else type(leaf)()

    path = saved(tmp_path_factory.mktemp("tree"), tree=filled(number))
    run = restored(path, tree=jax.tree.map(other, filled(0)))
    assert jax.tree.structure(run.state["tree"]) == jax.tree.structure(tree)
    assert repr(run.state["tree"]) == repr(filled(number))


def test_a_numpy_scalar_as_a_key_of_jax_arrays_is_saved_again_and_again(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, {"x": {np.int64(3): jnp.ones(2)}}, save=None) as run:
        for step in range(2):
            run.save(step, force=True)
    state = {"x": {np.int64(3): jnp.zeros(2)}}
    with Checkpointer(tmp_path, state) as run:
        run.restore()
    assert state["x"][np.int64(3)].tolist() == [1, 1]


def test_saves_of_keys_that_cannot_be_sorted_leave_python_its_depth_of_recursion() -> None:
    """JAX's error about such keys, deep in a tree, costs a level each time: a thousand saves, and nothing works."""

    def depth(level: int = 0) -> int:
        try:
            return depth(level + 1)
        except RecursionError:
            return level

    item = PytreeItem("x", {"x": [{1: jnp.ones(1), "a": jnp.ones(1)}]}, "x")
    before = depth()
    for _ in range(50):
        item.capture()
    assert depth() >= before
