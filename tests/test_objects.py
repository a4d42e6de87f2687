"""What goes into `state=` besides one model and one optimizer, and comes back."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torchmetrics
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from torch import nn
from torchdata.stateful_dataloader import StatefulDataLoader
from torchorbax import Checkpointer, ConfigError, MismatchError, OptaxOptimizer, place_, resume, to_jax
from torchorbax._src.tensors import torchax_tensors as _torchax

from tests.conftest import bits


def saved(path: Path, **state: Any) -> str:
    with Checkpointer(str(path), state) as run:
        run.save(0, force=True)
    return str(path)


def restored(path: str, **state: Any) -> Checkpointer:
    with Checkpointer(path, state) as run:
        run.restore()
        return run


# ------------------------------------------------------------------------------------------------- several of them


def gan(seed: int, kind: str) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    generator, critic = nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    if kind == "optax":
        optimizers: list[Any] = [OptaxOptimizer(model, optax.adam(0.1)) for model in (generator, critic)]
        for optimizer in optimizers:
            optimizer.init()
    else:
        optimizers = [torch.optim.Adam(model.parameters(), lr=0.1 * seed) for model in (generator, critic)]
        critic(generator(torch.ones(1, 2))).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    if kind == "dict":
        return {"g": generator, "c": critic}, {"g": optimizers[0], "c": optimizers[1]}
    return [generator, critic], optimizers


@pytest.mark.parametrize("kind", ["list", "dict", "optax"])
def test_lists_and_dicts_of_models_and_optimizers(kind: str, tmp_path: Path, mesh: Mesh) -> None:
    models, optimizers = gan(1, kind)
    with resume(models, optimizers, str(tmp_path), save=None) as run:
        run.save(0, force=True)
    again, others = gan(2, kind)
    shardings = (mesh, lambda name, shape: P())
    with resume(again, others, str(tmp_path), save=None, shardings=shardings) as run:
        assert run.step == 0
    keys = models if kind == "dict" else range(2)
    for key in keys:
        arrays = {name: bits(array) for name, array in to_jax(models[key]).items()}
        assert {name: bits(array) for name, array in to_jax(again[key]).items()} == arrays
        assert all(param.jax().sharding.mesh.size == 8 for param in again[key].parameters())
        if kind != "optax":
            assert others[key].param_groups[0]["lr"] == 0.1
            for one, two in zip(models[key].parameters(), again[key].parameters(), strict=True):
                assert bits(optimizers[key].state[one]["exp_avg"]) == bits(others[key].state[two]["exp_avg"])
                assert others[key].state[two]["exp_avg"].jax().sharding == two.jax().sharding
    with Checkpointer(str(tmp_path), {"model": again}) as run:
        run.restore(only="model")


def test_one_optimizer_over_several_models_knows_them_apart(tmp_path: Path) -> None:
    def objects() -> dict[str, Any]:
        models = [nn.Linear(2, 2), nn.Linear(2, 2)]
        params = [param for model in models for param in model.parameters()]
        return {"model": models, "optimizer": torch.optim.SGD(params, lr=0.1, momentum=0.9)}

    state = objects()
    for i, param in enumerate(state["optimizer"].param_groups[0]["params"]):
        param.grad = torch.full_like(param, float(i))
    state["optimizer"].step()
    path = saved(tmp_path, **state)
    other = objects()
    restored(path, **other)
    found = [other["optimizer"].state[param]["momentum_buffer"].mean() for param in other["model"][1].parameters()]
    assert found == [2, 3]


def test_labels_that_are_called_like_parameters_do_not_confuse_them(tmp_path: Path, mesh: Mesh) -> None:
    def optimizer_of(model: nn.Module) -> OptaxOptimizer:
        transforms = {"weight": optax.sgd(0.1, momentum=0.9), "bias": optax.adam(0.1)}
        return OptaxOptimizer(model, optax.multi_transform(transforms, {"weight": "bias", "bias": "weight"}))

    model = nn.Linear(8, 8)
    optimizer = optimizer_of(model)
    place_(model, None, (mesh, lambda name, shape: P("fsdp")))
    for (_, owner), leaf in zip(optimizer.leaf_names(optimizer.init()), jax.tree.leaves(optimizer.state), strict=True):
        if leaf.ndim:
            assert owner is not None
            assert (leaf.shape, leaf.sharding.spec) == (tuple(model.get_parameter(owner).shape), P("fsdp"))
    path = saved(tmp_path, model=model, optimizer=optimizer)
    other = nn.Linear(8, 8)
    restored(path, model=other, optimizer=optimizer_of(other))


def test_containers_may_be_nested_and_mixed(tmp_path: Path) -> None:
    def objects(value: float) -> dict[str, Any]:
        model = nn.Linear(2, 2)
        nn.init.constant_(model.weight, value)
        scheduler = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(model.parameters(), lr=value), 1)
        return {"both": {"models": (model, [nn.Identity()]), "schedulers": [scheduler], "epoch": value}}

    path = saved(tmp_path, **objects(3.0))
    state = objects(4.0)
    run = restored(path, **state)
    assert state["both"]["models"][0].weight.eq(3).all()
    assert state["both"]["schedulers"][0].base_lrs == [3.0]
    assert run.state["both"]["epoch"] == state["both"]["epoch"] == 3.0


def test_names_that_would_meet(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"two entries of the state would both be called 'model\.0'"):
        Checkpointer(str(tmp_path), {"model": [nn.Linear(1, 1)], "model.0": nn.Linear(1, 1)})
    with pytest.raises(ConfigError, match=r"'models\.a/b' cannot name an item"):
        Checkpointer(str(tmp_path), {"models": {"a/b": nn.Linear(1, 1)}})
    with pytest.raises(ConfigError, match=r"model must be a torch\.nn\.Module, or a list or dict of them, not a list"):
        resume([], None, str(tmp_path))


# ------------------------------------------------------------------------------------------------ trees and values


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


# ---------------------------------------------------------------------------------------------------------- objects


@pytest.mark.parametrize("collection", [False, True])
def test_metrics_come_back_without_being_made_persistent(collection: bool, tmp_path: Path) -> None:
    def metric() -> Any:
        one = torchmetrics.MeanMetric()
        return torchmetrics.MetricCollection({"mean": one, "cat": torchmetrics.CatMetric()}) if collection else one

    live = metric()
    live.update(1.0)
    live.update(4.0)
    path = saved(tmp_path, metric=live)
    again = metric()
    restored(path, metric=again)
    assert str(again.compute()) == str(live.compute())
    for one in (live, again):
        one.update(7.0)
    assert str(again.compute()) == str(live.compute())
    with pytest.raises(MismatchError, match="metric: placement: expected a state that Metrics takes"):
        restored(path, metric=torchmetrics.MaxMetric())


@pytest.mark.parametrize("workers", [0, 2])
def test_no_sample_is_seen_twice_or_skipped(workers: int, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    def loader() -> StatefulDataLoader:
        return StatefulDataLoader(list(range(24)), batch_size=2, shuffle=True, num_workers=workers)

    torch.manual_seed(3)
    live = loader()
    batches = iter(live)
    before = [next(batches).tolist() for _ in range(5)]
    path = saved(tmp_path, loader=live)
    rest = [batch.tolist() for batch in batches]
    next_epoch = [batch.tolist() for batch in live]
    torch.manual_seed(4)
    again = loader()
    restored(path, loader=again)
    assert [batch.tolist() for batch in again] == rest
    assert sorted(sample for batch in before + rest for sample in batch) == list(range(24))
    assert [batch.tolist() for batch in again] == next_epoch
    recwarn.clear()  # torchdata's, of torch, and JAX's, of the fork of workers


def test_a_failed_restore_puts_a_loader_and_an_object_back(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    class Average:
        """An average of weights that loads in place."""

        def __init__(self) -> None:
            self.shadow = {"w": torch.zeros(2)}

        def state_dict(self) -> dict[str, torch.Tensor]:
            return self.shadow

        def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
            self.shadow["w"].copy_(state["w"])

    class Refusing(Average):
        def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
            raise RuntimeError("no")

    def objects(value: float) -> dict[str, Any]:
        average = Average()
        average.shadow["w"].fill_(value)
        return {"average": average, "loader": StatefulDataLoader(range(8)), "last": Refusing()}

    state = objects(1.0)
    taken = iter(state["loader"])
    next(taken)
    path = saved(tmp_path, **state)
    state = objects(2.0)
    with pytest.raises(MismatchError, match=r"last: placement: .*RuntimeError: no"):
        restored(path, **state)
    assert state["average"].shadow["w"].tolist() == [2, 2]
    assert len(list(state["loader"])) == 8
    recwarn.clear()  # torchdata's, of torch


# ------------------------------------------------------------------------------------------------------------- rng


@pytest.mark.parametrize("form", ["typed", "raw", "other"])
def test_random_numbers_go_on_in_either_form_of_the_key(form: str, tmp_path: Path) -> None:
    keys = {"typed": jax.random.key(7), "raw": jax.random.PRNGKey(7), "other": jax.random.key(7, impl="rbg")}

    def draw() -> list[Any]:
        key, sub = jax.random.split(_torchax.rng_key())
        _torchax.set_rng_key(key)
        numbers = jax.random.normal(sub, (2,)), torch.rand(2), np.random.rand(2), random.random()
        return [bits(np.asarray(number)) for number in numbers] + [bits(np.random.randn(1)), random.gauss(0, 1)]

    _torchax.set_rng_key(keys[form])
    draw()  # leaves half of a pair of normal numbers behind
    path = saved(tmp_path, x=1)
    expected = draw()
    _torchax.set_rng_key(jax.random.PRNGKey(1) if form == "typed" else jax.random.key(1))
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    restored(path, x=0)
    assert draw() == expected
    assert str(_torchax.rng_key().dtype) == str(keys[form].dtype)


# --------------------------------------------------------------------------------------------------------- modules


def test_extra_state_that_is_a_tensor_comes_back_through_its_setter(tmp_path: Path) -> None:
    class Counting(nn.Linear):
        count = torch.zeros(())

        def get_extra_state(self) -> torch.Tensor:
            return self.count.clone()

        def set_extra_state(self, state: torch.Tensor) -> None:
            self.count = state

    model = Counting(1, 1)
    model.count = torch.tensor(5.0)
    path = saved(tmp_path, model=model)
    again = Counting(1, 1)
    restored(path, model=again)
    assert again.count == 5
    with Checkpointer(path, {"model": nn.Linear(1, 1)}) as run:
        with pytest.raises(MismatchError, match=r"model: _extra_state: found a value, but there is no such live value"):
            run.restore()
        run.restore(strict=False)
        assert [problem.name for problem in run.left_out] == ["_extra_state"]


def test_a_model_placed_on_jax_and_one_on_the_cpu_read_each_other(tmp_path: Path, mesh: Mesh) -> None:
    source = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    placed = copy.deepcopy(source)
    place_(placed, None, (mesh, lambda name, shape: P("fsdp")))
    for one, name in ((source, "cpu"), (placed, "jax")):
        path = saved(tmp_path / name, model=one)
        for sharded in (False, True):
            target = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
            if sharded:
                place_(target, None, (mesh, lambda name, shape: P("fsdp")))
            restored(path, model=target)
            assert all(bits(a) == bits(b) for a, b in zip(target.parameters(), source.parameters(), strict=True))
            assert all(_torchax.is_torchax(param) == sharded for param in target.parameters())
