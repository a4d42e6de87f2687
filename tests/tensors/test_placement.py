"""Moving a module to jax devices: the same objects afterwards, each device with its own part, all or nothing."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from torch import nn
from torchorbax import ConfigError, DeletedArrayError, UnsupportedLeafError, place_, to_jax
from torchorbax._src.tensors import torchax_tensors as _torchax

from tests.helpers.models import Net, trained
from tests.helpers.tensors import bits, shards, tensor_of_bits


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def described(*owners: nn.Module | torch.optim.Optimizer) -> list[Any]:
    """All that a move could change: objects, types, values and places."""
    tensors = []
    for owner in owners:
        if isinstance(owner, nn.Module):
            tensors += list(tensors_of(owner).values())
        else:
            tensors += [value for state in owner.state.values() for value in state.values()]
    return [
        (
            id(tensor),
            type(tensor),
            tensor.requires_grad,
            vars(tensor).get("mine"),
            id(to_jax(tensor)) if _torchax.is_torchax(tensor) else tensor.is_meta or bits(tensor),
        )
        for tensor in tensors
    ]


def test_a_cpu_module_keeps_objects_ties_references_and_values() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    model.embed.weight.mine = {"any": "attribute"}
    before = {name: (tensor, tensor.requires_grad, bits(tensor)) for name, tensor in tensors_of(model).items()}
    place_(model)
    for name, tensor in tensors_of(model).items():
        same, requires_grad, values = before[name]
        assert tensor is same
        assert _torchax.is_torchax(tensor)
        assert isinstance(tensor, nn.Parameter) == (name in dict(model.named_parameters(remove_duplicate=False)))
        assert tensor.requires_grad == requires_grad
        assert tensor.is_leaf
        if name != "norm.num_batches_tracked":
            assert bits(tensor) == values
        assert not to_jax(tensor).committed  # free to meet arrays on a mesh, as `.to('jax')` leaves it
    assert model.head.weight is model.embed.weight is optimizer.param_groups[0]["params"][0]
    assert model.embed.weight.mine == {"any": "attribute"}
    assert set(model.state_dict()) == before.keys() - {"scratch"}


def test_a_placed_module_computes_what_it_computed() -> None:
    model = Net().eval()
    expected = model(torch.arange(16)).detach().numpy()
    place_(model)
    with _torchax.torchax.default_env():
        output = model(_torchax.wrap(jnp.arange(16)))
    np.testing.assert_allclose(to_jax(output), expected, rtol=1e-5, atol=1e-6)


def test_what_is_on_jax_stays_without_shardings_and_moves_with_them(mesh: Mesh) -> None:
    model = Net()
    place_(model, None, (mesh, {"embed.weight": P("fsdp")}))
    before = {name: (tensor, to_jax(tensor)) for name, tensor in tensors_of(model).items()}
    place_(model)
    assert all(model_tensor is before[name][0] for name, model_tensor in tensors_of(model).items())
    assert all(to_jax(tensor) is array for tensor, array in before.values())
    place_(model, None, (mesh, {"embed.weight": P(None, "fsdp")}))
    weight, array = before["embed.weight"]
    assert model.head.weight is model.embed.weight is weight
    assert shards(weight) == {(16, 1)}
    assert bits(weight) == bits(array)
    assert to_jax(model.scratch) is before["scratch"][1]


def test_a_mixture_of_cpu_meta_and_jax(mesh: Mesh) -> None:
    parts = nn.ModuleDict({"here": nn.Linear(8, 8), "new": nn.Linear(8, 8, device="meta"), "there": nn.Linear(8, 8)})
    place_(parts["there"])
    expected = {"here": bits(parts["here"].weight), "new": bytes(256), "there": bits(parts["there"].weight)}
    before = tensors_of(parts)
    place_(parts, None, (mesh, {"*.weight": P("fsdp")}))
    assert all(tensor is before[name] for name, tensor in tensors_of(parts).items())
    for name, values in expected.items():
        assert bits(parts[name].weight) == values
        assert shards(parts[name].weight) == {(1, 8)}
        assert isinstance(parts[name].weight, nn.Parameter)


def test_gradients_are_dropped(mesh: Mesh) -> None:
    """They would stay where the parameter was."""
    for on_jax in (False, True):
        model = nn.Linear(8, 8)
        if on_jax:
            place_(model)
            model.weight.grad = _torchax.wrap(jnp.ones((8, 8)))
        else:
            model.weight.grad = torch.ones(8, 8)
        place_(model, None, (mesh, {"weight": P("fsdp")}))
        assert model.weight.grad is None, f"on jax: {on_jax}"


def test_skipped_tensors_are_left_alone() -> None:
    model = Net("meta")
    place_(model, skip=["scratch", "norm.running_mean"])
    left = [name for name, tensor in tensors_of(model).items() if not _torchax.is_torchax(tensor)]
    assert sorted(left) == ["norm.running_mean", "scratch"]


def test_the_counter_of_batch_norm_follows_x64() -> None:
    model = nn.BatchNorm1d(4)
    model.num_batches_tracked.fill_(2**31 - 1)
    place_(model)
    assert to_jax(model.num_batches_tracked).dtype == np.int32
    assert to_jax(model.num_batches_tracked) == 2**31 - 1
    jax.config.update("jax_enable_x64", True)
    model = nn.BatchNorm1d(4)
    model.num_batches_tracked.fill_(2**40)
    place_(model)
    assert to_jax(model.num_batches_tracked).dtype == np.int64
    assert to_jax(model.num_batches_tracked) == 2**40


@pytest.mark.parametrize("beyond", [2**31, -(2**31) - 1])
def test_int64_values_beyond_32_bits_are_refused(beyond: int) -> None:
    model = Net()
    model.norm.num_batches_tracked.fill_(beyond)
    before = described(model)
    with pytest.raises(UnsupportedLeafError, match=r"norm\.num_batches_tracked: int64 values beyond 32 bits") as caught:
        place_(model)
    assert caught.value.name == "norm.num_batches_tracked"
    assert described(model) == before


UNPLACEABLE: dict[str, Callable[[], torch.Tensor]] = {
    "float64": lambda: torch.ones(8, dtype=torch.float64),
    "complex128": lambda: torch.ones(8, dtype=torch.complex128),
    "uint64": lambda: torch.ones(8, dtype=torch.uint64),
    "uint4": lambda: torch.empty(8, dtype=torch.uint4),
    "sparse": lambda: torch.eye(8).to_sparse(),
    "complex32": lambda: torch.zeros(8, dtype=torch.complex32),
    "float8_e4m3fnuz": lambda: tensor_of_bits(torch.float8_e4m3fnuz, (8,), b"\x01"),  # JAX can, torchax cannot
    "float8_e5m2fnuz": lambda: tensor_of_bits(torch.float8_e5m2fnuz, (8,), b"\x01"),
    "float8_e8m0fnu": lambda: tensor_of_bits(torch.float8_e8m0fnu, (8,), b"\x01"),
}


@pytest.mark.parametrize(
    ("dtype", "device"), [(dtype, "cpu") for dtype in UNPLACEABLE] + [("float64", "meta"), ("float8_e8m0fnu", "meta")]
)
def test_what_would_lose_bits_is_refused_by_name_and_nothing_moves(dtype: str, device: str) -> None:
    model = Net()
    with warnings.catch_warnings(action="ignore"):
        value = UNPLACEABLE[dtype]()
        model.norm.register_buffer("odd", value if device == "cpu" else torch.empty_like(value, device="meta"))
    rest = nn.ModuleList([model.embed, model.head])
    before = described(rest)
    with pytest.raises(UnsupportedLeafError, match=rf"norm\.odd: .*{dtype}") as caught:
        place_(model)
    assert caught.value.name == "norm.odd"
    assert described(rest) == before
    assert not _torchax.is_torchax(model.norm.odd)


def test_float64_goes_with_x64() -> None:
    jax.config.update("jax_enable_x64", True)
    model = nn.Linear(4, 4).double()
    expected = bits(model.weight)
    place_(model)
    assert to_jax(model.weight).dtype == np.float64
    assert bits(model.weight) == expected


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("kind", ["mapping", "callable"])
def test_each_device_holds_its_shard_only(device: str, kind: str, mesh: Mesh, mesh_2d: Mesh) -> None:
    one = {"embed.*": P("fsdp"), "norm.running_*": P("fsdp")}
    two = {"embed.*": P("fsdp", "tp"), "norm.running_*": P(("fsdp", "tp")), "norm.weight": P("tp")}
    expected: list[tuple[Mesh, dict[str, P], dict[str, tuple[int, ...]]]] = [
        (mesh, one, {"embed.weight": (2, 8), "norm.running_var": (1,), "norm.weight": (8,), "scratch": (2,)}),
        (mesh_2d, two, {"embed.weight": (4, 4), "norm.running_var": (1,), "norm.weight": (4,), "scratch": (2,)}),
    ]
    for where, rules, parts in expected:
        model = Net(device)
        values = None if device == "meta" else bits(model.embed.weight)

        def rule(name: str, shape: tuple[int, ...], rules: dict[str, P] = rules) -> P:
            assert shape == tuple(tensors_of(model)[name].shape)  # noqa: B023  # called at once
            return next((spec for pattern, spec in rules.items() if name.startswith(pattern.rstrip("*"))), P())

        place_(model, None, (where, rule if kind == "callable" else rules))
        for name, part in parts.items():
            assert shards(tensors_of(model)[name]) == {part}, name
        assert shards(model.norm.num_batches_tracked) == {()}
        assert model.head.weight is model.embed.weight
        assert values is None or bits(model.head.weight) == values


def test_a_meta_module_is_never_allocated_unsharded(mesh: Mesh) -> None:
    model = nn.Linear(1016, 1024, device="meta")
    known = {id(array) for array in jax.live_arrays()}
    place_(model, None, (mesh, {"weight": P("fsdp"), "bias": P("fsdp")}))
    new = [array for array in jax.live_arrays() if id(array) not in known]
    assert {array.shape for array in new} >= {(1024, 1016), (1024,)}
    for array in new:
        assert all(shard.data.nbytes * 8 == array.nbytes for shard in array.addressable_shards)
    assert not np.asarray(to_jax(model.weight)).any()


@st.composite
def _placements(draw: st.DrawFn) -> tuple[tuple[int, ...], P]:
    """A shape and a spec that divides it on four by two devices."""
    axes = draw(st.permutations(["fsdp", "tp", None, None]))
    size = {"fsdp": 4, "tp": 2, None: 1}
    rank = draw(st.integers(1, 4))
    shape = tuple(draw(st.integers(0, 2)) * size[axis] for axis in axes[:rank])
    return shape, P(*axes[: draw(st.integers(0, rank))])


@given(placement=_placements(), raw=st.binary(min_size=1, max_size=64))
def test_any_layout_keeps_every_bit(mesh_2d: Mesh, placement: tuple[tuple[int, ...], P], raw: bytes) -> None:
    shape, spec = placement
    model = nn.Module()
    model.register_buffer("leaf", tensor_of_bits(torch.bfloat16, shape, raw))
    expected = bits(model.leaf)
    place_(model, None, (mesh_2d, {"leaf": spec}))
    assert bits(model.leaf) == expected
    sharding = NamedSharding(mesh_2d, spec)
    assert to_jax(model.leaf).sharding.is_equivalent_to(sharding, len(shape))
    assert shards(model.leaf) == {sharding.shard_shape(shape)}


def test_a_weak_reference_stops_the_move_and_everything_is_put_back(mesh: Mesh) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trained(model, optimizer)
    model.embed.weight.grad = torch.ones(16, 8)
    model.embed.weight.mine = "mine"
    for stuck in (model.scratch, optimizer.state[model.norm.weight]["momentum_buffer"]):
        before = described(model, optimizer)
        reference = weakref.ref(stuck)
        with pytest.raises(ConfigError, match=r"cannot move to jax in place: .*weak.*hold no weak reference"):
            place_(model, optimizer, (mesh, {"embed.weight": P("fsdp")}))
        assert described(model, optimizer) == before
        assert model.head.weight is model.embed.weight
        assert model.embed.weight.grad.tolist() == torch.ones(16, 8).tolist()
        del reference
    place_(model, optimizer, (mesh, {"embed.weight": P("fsdp")}))
    assert shards(model.head.weight) == {(2, 8)}


def test_a_module_on_jax_is_put_back_as_well(mesh: Mesh) -> None:
    model = Net()
    place_(model)
    model.register_buffer("late", torch.zeros(8))
    before = described(model)
    reference = weakref.ref(model.late)
    with pytest.raises(ConfigError, match="cannot move to jax in place"):
        place_(model, None, (mesh, {"embed.weight": P("fsdp")}))
    assert reference() is model.late
    assert described(model) == before


def test_rules_that_do_not_fit_move_nothing(mesh: Mesh) -> None:
    model = Net()
    before = described(model)
    with pytest.raises(ConfigError, match=r"scratch: dimension 0 of \(2,\) is not divisible by 8"):
        place_(model, None, (mesh, {"*": P("fsdp")}))
    assert described(model) == before


def test_donated_tensors_are_all_named(mesh: Mesh) -> None:
    model = Net()
    place_(model)
    kept = to_jax(model.norm.weight)
    for tensor in (model.embed.weight, model.norm.running_mean):
        to_jax(tensor).delete()
    with pytest.raises(DeletedArrayError, match="2 array") as caught:
        place_(model, None, (mesh, {}))
    assert set(caught.value.names) == {"embed.weight", "norm.running_mean"}
    assert to_jax(model.norm.weight) is kept


def test_shardings_in_the_place_of_the_optimizer(mesh: Mesh) -> None:
    with pytest.raises(ConfigError, match=r"optimizer must be a torch\.optim or optax optimizer or None, not a tuple"):
        place_(nn.Linear(2, 2), (mesh, {}))  # type: ignore[arg-type]
