"""Arrays are written into live tensors in place: seen by every alias, all or nothing."""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from torch import nn
from torchorbax import ConfigError, DeletedArrayError, MismatchError, UnsupportedLeafError, assign_, to_jax
from torchorbax._src.tensors import torchax_tensors as _torchax

from tests.helpers.models import Tied
from tests.helpers.tensors import WIDE, aligned, bits, donated, torchax_tensor


def test_every_reference_to_a_torchax_tensor_sees_the_new_value() -> None:
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(torchax_tensor(np.zeros((2, 2))))
    tied = nn.Linear(2, 2)
    tied.weight = model.weight
    optimizer = torch.optim.SGD([model.weight], lr=0.1)
    with _torchax.torchax.default_env():
        view = model.weight[1:]
    weight = model.weight
    new = jnp.arange(4.0).reshape(2, 2)
    assign_({"weight": model.weight}, {"weight": new})
    for reference in (model.weight, tied.weight, weight, optimizer.param_groups[0]["params"][0]):
        assert reference is weight
        assert to_jax(reference) is new
    assert to_jax(view).tolist() == [[2, 3]]


def test_every_reference_to_a_cpu_tensor_sees_the_new_value() -> None:
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters())
    flat, numpy, state = model.embed.weight.view(-1), model.embed.weight.detach().numpy(), model.state_dict()
    new = {name: np.asarray(array) + np.ones((), array.dtype) for name, array in to_jax(model).items()}
    assert assign_(model, new) is model
    for reference in (model.head.weight, optimizer.param_groups[0]["params"][0], flat, numpy, state["head.weight"]):
        assert bits(reference) == bits(new["embed.weight"])
    assert bits(model.norm.num_batches_tracked) == bits(new["norm.num_batches_tracked"])


def test_writing_a_view_reaches_its_parent() -> None:
    tensor = torchax_tensor(np.zeros((4, 6)))
    with _torchax.torchax.default_env():
        view = tensor[1:3]
        narrower = view[:, 2:4]
    assign_([view], [np.ones((2, 6), np.float32)])
    assign_([narrower], [np.full((2, 2), 5, np.float32)])
    expected = np.zeros((4, 6))
    expected[1:3], expected[1:3, 2:4] = 1, 5
    assert to_jax(tensor).tolist() == expected.tolist()
    assert to_jax(view).tolist() == expected[1:3].tolist()


def test_a_view_of_a_donated_tensor_is_named() -> None:
    """Its parent's other values are gone, so it cannot be written."""
    with _torchax.torchax.default_env():
        parent = torchax_tensor(np.zeros((4, 6)))
        view = parent[1:3]
    _torchax.array_of(parent).delete()
    other = torch.zeros(2)
    with pytest.raises(DeletedArrayError, match="view"):
        assign_({"other": other, "view": view}, {"other": np.ones(2, np.float32), "view": np.ones((2, 6), np.float32)})
    assert other.tolist() == [0, 0]


@pytest.mark.parametrize("name", ["embed.weight", "head.weight"])
def test_a_tied_weight_needs_one_of_its_names(name: str) -> None:
    model = Tied()
    arrays = to_jax(model)
    new = jnp.ones((6, 4))
    del arrays["embed.weight"], arrays["head.weight"]
    assign_(model, {**arrays, name: new})
    assert model.head.weight is model.embed.weight
    assert bits(model.embed.weight) == bits(new)
    with pytest.raises(MismatchError, match="1 missing") as caught:
        assign_(model, arrays)
    assert [problem.name for problem in caught.value.problems] == ["embed.weight"]


def test_a_tied_weight_takes_one_value_only() -> None:
    model = Tied()
    before = bits(model.embed.weight)
    arrays = to_jax(model)
    arrays["head.weight"] = np.array(arrays["embed.weight"])  # the same values in other memory
    assign_(model, arrays)
    arrays["head.weight"][0] += 1
    with pytest.raises(MismatchError, match="1 ties") as caught:
        assign_(model, arrays)
    assert {problem.name for problem in caught.value.problems} == {"head.weight"}
    assert bits(model.embed.weight) == before


def test_live_shardings_are_kept(mesh: Mesh) -> None:
    sharded = NamedSharding(mesh, P("fsdp"))
    live = _torchax.wrap(jax.device_put(jnp.zeros((8, 2)), sharded))
    raw = {"raw": jax.device_put(jnp.zeros((8, 2)), sharded)}
    here = jax.device_put(np.arange(16, dtype=np.float32).reshape(8, 2), sharded)
    for new in (np.ones((8, 2), np.float32), jnp.full((8, 2), 2.0), here):
        assign_([live, raw], [new, {"raw": new}])
        for array in (to_jax(live), raw["raw"]):
            assert array.sharding == sharded
            assert {shard.data.shape for shard in array.addressable_shards} == {(1, 2)}
            assert bits(array) == bits(new)
    assert to_jax(live) is here


def test_a_donated_tensor_comes_back_where_it_was(mesh: Mesh) -> None:
    sharded = NamedSharding(mesh, P("fsdp"))
    live = _torchax.wrap(jax.device_put(jnp.zeros(8), sharded))
    _torchax.array_of(live).delete()
    assign_([live], [np.arange(8, dtype=np.float32)])
    assert to_jax(live).tolist() == list(range(8))
    assert to_jax(live).sharding == sharded


def test_what_was_free_to_move_stays_free() -> None:
    """An uncommitted array, as `.to('jax')` makes them, can meet arrays on any mesh; a committed one cannot."""
    live = torchax_tensor(np.zeros(4))
    assert not to_jax(live).committed
    assign_(live, np.ones(4, np.float32))
    assert not to_jax(live).committed


@pytest.mark.parametrize("live", ["torchax", "meta", "raw", "cpu", "numpy"])
def test_the_given_memory_is_not_shared(live: str) -> None:
    """JAX's CPU backend takes numpy memory as it is where it can; what was assigned must not change with it."""
    make: dict[str, Callable[[], Any]] = {
        "torchax": lambda: torchax_tensor(np.zeros(1024)),
        "meta": lambda: torch.empty(1024, device="meta"),
        "raw": lambda: jnp.zeros(1024),
        "cpu": lambda: torch.zeros(1024),
        "numpy": lambda: np.zeros(1024, np.float32),
    }
    tree = {"leaf": make[live]()}
    given_array = aligned(np.ones(1024, np.float32))
    assign_(tree, {"leaf": given_array})
    given_array[:] = 7
    assert np.all(np.asarray(to_jax(tree)["leaf"]) == 1)


def test_meta_tensors_become_torchax_tensors_and_stay_themselves(mesh: Mesh) -> None:
    model = Tied("meta")
    optimizer = torch.optim.AdamW(model.parameters())
    weight, buffer = model.embed.weight, model.norm.running_mean
    weight.my_attribute = "mine"
    model.norm.weight.requires_grad_(False)
    arrays = {name: np.ones(tensor.shape, np.float32) for name, tensor in model.state_dict().items()}
    arrays["norm.num_batches_tracked"] = np.full((), 3, np.int64)
    del arrays["head.weight"]
    replicated = NamedSharding(mesh, P())
    assign_(model, {**arrays, "embed.weight": jax.device_put(arrays["embed.weight"], replicated)})
    assert model.embed.weight is model.head.weight is optimizer.param_groups[0]["params"][0] is weight
    assert model.norm.running_mean is buffer
    assert isinstance(weight, nn.Parameter)
    assert not isinstance(buffer, nn.Parameter)
    assert weight.requires_grad
    assert not model.norm.weight.requires_grad
    assert weight.my_attribute == "mine"
    assert to_jax(weight).sharding == replicated
    assert to_jax(weight).tolist() == arrays["embed.weight"].tolist()
    assert to_jax(model.norm.num_batches_tracked) == 3  # int32 now, as in torchax; no bit was lost
    assert model.scratch.is_meta
    assert not _torchax.is_torchax(model.scratch)


@pytest.mark.parametrize("dtype", sorted(WIDE, key=str), ids=str)
def test_nothing_is_narrowed_on_its_way_to_a_device(dtype: torch.dtype) -> None:
    live = torch.empty(2, dtype=dtype, device="meta")
    new = to_jax(torch.ones(2, dtype=dtype))
    new[0] = np.iinfo(np.int64).max if dtype is torch.int64 else 0.1 if dtype.is_floating_point else 2**40
    with pytest.raises(UnsupportedLeafError, match=r"layer\.weight") as caught:
        assign_({"layer": {"weight": live}}, {"layer": {"weight": new}})
    assert caught.value.name == "layer.weight"
    assert not _torchax.is_torchax(live)


def test_numbers_and_raw_arrays_are_replaced_in_their_containers() -> None:
    inner = [jnp.zeros(2), 1]
    tree = {"count": 1, "inner": inner, "key": jax.random.key(0)}
    assign_(tree, {"count": 2, "inner": [np.ones(2, np.float32), 3], "key": jax.random.key(5)})
    assert tree["inner"] is inner
    assert (tree["count"], inner[0].tolist(), inner[1]) == (2, [1, 1], 3)
    assert jax.random.key_data(tree["key"]).tolist() == jax.random.key_data(jax.random.key(5)).tolist()


@pytest.mark.parametrize("frozen", [lambda leaf: (leaf,), lambda leaf: types.MappingProxyType({"0": leaf})])
def test_immutable_containers_hold_tensors_but_no_raw_arrays(frozen: Callable[[Any], Any]) -> None:
    live = torch.zeros(2)
    assign_({"state": frozen(live)}, {"state": frozen(np.ones(2, np.float32))})
    assert live.tolist() == [1, 1]
    with pytest.raises(UnsupportedLeafError, match=r"state\.0: .* cannot be replaced in place") as caught:
        assign_(
            {"live": live, "state": frozen(jnp.zeros(2))},
            {"live": np.zeros(2, np.float32), "state": frozen(jnp.ones(2))},
        )
    assert caught.value.name == "state.0"
    assert live.tolist() == [1, 1]


def test_every_problem_at_once_and_nothing_written() -> None:
    live = {
        "fits": torch.zeros(2),
        "torchax": torchax_tensor(np.zeros(2)),
        "shape": torch.zeros(2, 3),
        "dtype": torchax_tensor(np.zeros(2)),
        "narrow": np.zeros(2),
        "gone": torch.zeros(1),
        "layers": [torch.zeros(2), {"bias": torch.zeros(2)}],
        "list": [torch.zeros(2)],
        "mapping": {"a": torch.zeros(2)},
        "number": torch.zeros(()),
    }
    arrays = {
        "fits": np.ones(2, np.float32),
        "torchax": jnp.ones(2),
        "shape": jnp.ones((3, 2)),
        "dtype": jnp.ones(2, jnp.bfloat16),
        "narrow": np.ones(2, np.float32),
        "layers": [np.ones(3, np.float32), {"weight": np.ones(2, np.float32)}],
        "list": [],
        "mapping": np.ones(2),
        "number": 1.5,
        "new": jnp.ones(2),
    }
    before = [bits(leaf) for leaf in jax.tree.leaves(live)]
    with pytest.raises(MismatchError, match="the given tree does not fit the live objects") as caught:
        assign_(live, arrays)
    found = {(problem.kind, problem.name) for problem in caught.value.problems}
    assert found == {
        ("shape", "shape"),
        ("dtype", "dtype"),
        ("dtype", "narrow"),
        ("missing", "gone"),
        ("shape", "layers.0"),
        ("missing", "layers.1.bias"),
        ("unexpected", "layers.1.weight"),
        ("shape", "list"),
        ("missing", "mapping"),
        ("dtype", "number"),
        ("unexpected", "new"),
    }
    by_name = {problem.name: problem for problem in caught.value.problems}
    assert (by_name["shape"].expected, by_name["shape"].found) == ("(2, 3)", "(3, 2)")
    assert (by_name["dtype"].expected, by_name["dtype"].found) == ("float32", "bfloat16")
    assert [bits(leaf) for leaf in jax.tree.leaves(live)] == before


@pytest.mark.parametrize("arrays", [None, 3, "weight", [np.ones((2, 2))], np.ones(2)], ids=str)
def test_what_is_no_mapping_does_not_fit_a_module(arrays: Any) -> None:
    with pytest.raises(MismatchError, match="a mapping"):
        assign_(nn.Linear(2, 2), arrays)


def test_donated_arrays_are_all_named_and_nothing_is_written() -> None:
    live = {"a": torch.zeros(3), "b": torchax_tensor(np.zeros(3)), "c": [jnp.zeros(3), torch.zeros(3)]}
    arrays = {"a": np.ones(3, np.float32), "b": _torchax.wrap(donated()), "c": [donated(), donated()]}
    with pytest.raises(DeletedArrayError, match="3 array") as caught:
        assign_(live, arrays)
    assert set(caught.value.names) == {"b", "c.0", "c.1"}
    assert not any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(to_jax(live)))


def test_a_write_that_fails_undoes_the_others() -> None:
    with _torchax.torchax.default_env():
        parent = torchax_tensor(np.zeros((2, 2)))
        view = parent[0]
    stuck = torch.empty(2, device="meta")
    reference = weakref.ref(stuck)  # torch cannot turn it into another tensor while this exists
    moved = nn.Parameter(torch.empty(2, device="meta"))
    live = {
        "cpu": torch.zeros(2),
        "meta": moved,
        "number": 0,
        "numpy": np.zeros(2, np.float32),
        "raw": jnp.zeros(2),
        "list": [0, jnp.zeros(2)],
        "torchax": torchax_tensor(np.zeros(2)),
        "view": view,
        "z": stuck,
    }
    one = np.ones(2, np.float32)
    arrays = dict.fromkeys(live, one) | {"number": 1, "list": [1, one]}
    with pytest.raises(ConfigError, match=r"cannot move to jax in place.*weak"):
        assign_(live, arrays)
    assert reference() is live["z"] is stuck
    assert stuck.is_meta
    assert moved.is_meta
    assert isinstance(moved, nn.Parameter)
    assert not _torchax.is_torchax(moved)
    assert (live["number"], live["list"][0]) == (0, 0)
    for name in ("cpu", "numpy", "raw", "torchax", "view"):
        assert np.asarray(to_jax(live[name])).tolist() == [0, 0], name
    assert live["list"][1].tolist() == [0, 0]
    assert to_jax(parent).tolist() == [[0, 0], [0, 0]]


def test_the_counter_that_jax_narrowed_comes_back_into_a_cpu_module() -> None:
    model = nn.BatchNorm1d(2)
    arrays = to_jax(model) | {"num_batches_tracked": jnp.int32(7)}
    assign_(model, arrays)
    assert model.num_batches_tracked.dtype is torch.int64
    assert model.num_batches_tracked == 7
    with pytest.raises(MismatchError, match="dtype: expected int64, found int32"):
        assign_(model, arrays | {"num_batches_tracked": np.int32(7)})  # nobody narrowed this one
