"""The jitted step computes what torch computes, and leaves everything live."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torchorbax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from torch import nn
from torchorbax import ConfigError, to_jax
from torchorbax._src.tensors import torchax_tensors as _torchax

from tests.helpers.models import RULES, TiedNet, batch_of, loss_fn, seeded
from tests.helpers.tensors import bits


@pytest.mark.parametrize("kind", ["torch", "optax"])
def test_everything_stays_live_under_donation(kind: str, mesh: Mesh) -> None:
    model = seeded()
    optimizer = (
        torch.optim.AdamW(model.parameters(), lr=0.01)
        if kind == "torch"
        else torchorbax.OptaxOptimizer(model, optax.adamw(0.01))
    )
    torchorbax.place_(model, optimizer, (mesh, RULES))
    step = torchorbax.train_step(model, optimizer, loss_fn, batch_sharding=P("fsdp"))
    identities = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    old = to_jax(model)
    losses = [step(batch_of(i)) for i in range(3)]

    assert old["embed.weight"].is_deleted(), "nothing was donated, so this test shows nothing"
    assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == identities
    assert model.head.weight is model.embed.weight
    arrays = to_jax(model)
    assert not any(array.is_deleted() for array in arrays.values())
    assert arrays["embed.weight"].sharding == NamedSharding(mesh, P("fsdp"))
    moments = (
        optimizer.state[model.hidden.weight]["exp_avg"].jax()
        if isinstance(optimizer, torch.optim.Optimizer)
        else optimizer.state[0].mu["hidden.weight"]
    )
    assert moments.sharding == NamedSharding(mesh, P(None, "fsdp"))
    assert float(jnp.abs(moments).max()) > 0
    assert [loss.item() for loss in losses] == [float(loss) for loss in losses]
    assert f"{losses[0]:.3f}" == f"{float(losses[0]):.3f}"


def test_dropout_masks_differ_at_every_step_and_depend_on_the_key_alone() -> None:
    model = seeded()
    step = torchorbax.train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), loss_fn)
    key = jax.random.key(7)
    _torchax.set_rng_key(key)
    first = [float(step(batch_of(0))) for _ in range(4)]
    assert len(set(first)) == 4
    _torchax.set_rng_key(key)
    assert [float(step(batch_of(0))) for _ in range(4)] == first
    assert not isinstance(_torchax.rng_key(), jax.core.Tracer)


def test_raw_keys_of_manual_seed_work_too() -> None:
    _torchax.torchax.default_env().manual_seed(3)
    model = seeded()
    step = torchorbax.train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), loss_fn)
    assert len({float(step(batch_of(0))) for _ in range(3)}) == 3
    assert _torchax.rng_key().dtype == jnp.uint32


def test_one_compilation_on_a_mesh(compilations: list[str], mesh: Mesh) -> None:
    model = seeded()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    torchorbax.place_(model, optimizer, (mesh, RULES))
    step = torchorbax.train_step(model, optimizer, loss_fn, batch_sharding=P("fsdp"))
    for i in range(3):
        step(batch_of(i))
    assert compilations.count("step") == 1


def test_half_precision_stays_half() -> None:
    model = seeded().bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    step = torchorbax.train_step(model, optimizer, loss_fn)
    first = float(step(batch_of(0)))
    for _ in range(5):
        last = float(step(batch_of(0)))
    assert last < first
    floats = {name: array.dtype for name, array in to_jax(model).items() if name != "norm.num_batches_tracked"}
    assert set(floats.values()) == {jnp.dtype(jnp.bfloat16)}


def test_batches_of_any_kind() -> None:
    torch.manual_seed(0)
    model = nn.Linear(2, 1)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        return (model(batch["x"]) * batch["scale"]).sum() + batch["more"][0].sum()

    step = torchorbax.train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), loss)
    x = np.ones((3, 2), np.float32)
    more = [torch.ones(2, dtype=torch.int64)]
    results = {
        float(step({"x": form, "scale": scale, "more": more}))
        for form in (x, torch.from_numpy(x), jnp.asarray(x), _torchax.wrap(jnp.asarray(x)))
        for scale in (2.0, np.float32(2.0))
    }
    assert len(results) == 1


def test_a_batch_changed_after_the_call_does_not_matter() -> None:
    torch.manual_seed(0)
    model = nn.Linear(256, 256)
    step = torchorbax.train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), lambda m, b: (m(b) ** 2).mean())
    x = torch.ones(256, 256)
    expected = float(step(x))
    loss = step(x)
    x.zero_()
    assert float(loss) == expected


def test_no_donation_on_request() -> None:
    model = seeded()
    step = torchorbax.train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn, donate=False)
    step(batch_of(0))
    held = to_jax(model)
    step(batch_of(1))
    assert not any(array.is_deleted() for array in held.values())


def test_two_names_for_one_array_can_be_donated() -> None:
    array = jnp.ones((2, 2))
    model = nn.Module()
    model.a, model.b = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    torchorbax.place_(model)
    for param in (model.a, model.b):
        _torchax.set_array(param, array)
    step = torchorbax.train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda m, b: (m.a * m.b * b).sum())
    step(np.float32(1.0))
    assert float(step(np.float32(1.0))) == pytest.approx(4 * 0.9**2)


def test_a_failing_loss_leaves_everything_as_it_was() -> None:
    model = seeded()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=False)
    step = torchorbax.train_step(model, optimizer, loss_fn)
    step(batch_of(0))
    before = jax.tree.map(np.asarray, to_jax(model))
    with pytest.raises(RuntimeError, match="on purpose"):
        torchorbax.train_step(model, optimizer, _failing)(batch_of(1))
    for name, array in to_jax(model).items():
        assert bits(array) == bits(before[name]), name
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert optimizer.param_groups[0]["capturable"] is False
    assert model.hidden.weight.grad is None
    step(batch_of(1))


def _failing(model: nn.Module, batch: Any) -> torch.Tensor:
    loss_fn(model, batch)
    raise RuntimeError("on purpose")


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda m, b: m(b), r"real scalar, not float32\(2, 1\)"),
        (lambda m, b: 1.0, "not a float"),
        (lambda m, b: (m(b).mean(), 3, 4), "not a tuple"),
        (lambda m, b: m(b).argmax(), "real scalar, not int"),
    ],
)
def test_losses_that_are_none(loss: Callable[[nn.Module, Any], Any], message: str) -> None:
    model = nn.Linear(2, 1)
    step = torchorbax.train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), loss)
    with pytest.raises(torchorbax.ConfigError, match=message):
        step(np.ones((2, 2), np.float32))


def test_models_without_values_and_optimizers_without_parameters() -> None:
    with torch.device("meta"):
        on_meta = TiedNet()
    step = torchorbax.train_step(on_meta, torch.optim.SGD(on_meta.parameters(), lr=0.1), loss_fn)
    with pytest.raises(torchorbax.ConfigError, match="on meta and have no values yet"):
        step(batch_of(0))

    model, other = seeded(), seeded()
    with pytest.raises(torchorbax.ConfigError, match="not the model's"):
        torchorbax.train_step(model, torch.optim.SGD(other.parameters(), lr=0.1), loss_fn)(batch_of(0))
    model.requires_grad_(False)
    with pytest.raises(torchorbax.ConfigError, match="nothing to train"):
        torchorbax.train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn)(batch_of(0))


def test_donated_elsewhere() -> None:
    model = seeded()
    step = torchorbax.train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn)
    step(batch_of(0))
    jax.jit(lambda w: w + 1, donate_argnums=0)(model.hidden.weight.jax())
    with pytest.raises(torchorbax.DeletedArrayError, match=r"hidden\.weight") as caught:
        step(batch_of(0))
    assert caught.value.names == ("hidden.weight",)


def test_batches_that_are_none(mesh: Mesh) -> None:
    model = nn.Linear(2, 1)
    step = torchorbax.train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda m, b: m(b["x"]).mean())
    with pytest.raises(torchorbax.UnsupportedLeafError, match=r"batch\.x: a str is neither"):
        step({"x": "text"})
    spec = torchorbax.train_step(
        model, torch.optim.SGD(model.parameters(), lr=0.1), lambda m, b: m(b).mean(), batch_sharding=P("fsdp")
    )
    with pytest.raises(torchorbax.ConfigError, match="needs parameters on a mesh"):
        spec(np.ones((8, 2), np.float32))


def test_a_batch_that_cannot_be_split_evenly_is_named(mesh: Mesh) -> None:
    model = seeded()
    step = torchorbax.train_step(model, torch.optim.SGD(model.parameters()), loss_fn, batch_sharding=P("fsdp"))
    torchorbax.place_(model, shardings=(mesh, RULES))
    tokens = torch.zeros(6, dtype=torch.int32)
    with pytest.raises(ConfigError, match=r"batch\.0 of shape \(6,\) cannot be laid out by .*evenly divide"):
        step((tokens, tokens))


class Counting(nn.Module):
    """Replaces its buffer, as `self.ema = 0.9 * self.ema + ...` does."""

    def __init__(self, grow: bool = False) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.grow = grow
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count = torch.stack([self.count, self.count]) if self.grow else self.count + 1
        return self.fc(x)


def test_a_buffer_that_forward_replaces() -> None:
    model, x = Counting(), torch.ones(1, 3)
    step = torchorbax.train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda m, b: m(b).square().mean())
    step(x)
    buffer = model.count
    for _ in range(2):
        step(x)
    assert model.count is buffer
    assert float(to_jax(model.count)) == 3
    model.eval()
    step(x)
    assert float(to_jax(model.count)) == 4

    growing = Counting(grow=True)
    step = torchorbax.train_step(growing, torch.optim.SGD(growing.parameters()), lambda m, b: m(b).mean())
    with pytest.raises(ConfigError, match=r"replaces 'count' of shape \(\) by one of shape \(2,\)"):
        step(x)
    assert float(to_jax(growing.count)) == 0


def test_whole_numbers_in_a_batch_are_never_narrowed() -> None:
    model = nn.Linear(1, 1)
    step = torchorbax.train_step(
        model, torch.optim.SGD(model.parameters()), lambda m, b: m.weight.sum() * 0 + (b["n"] > 0).float().sum()
    )
    assert float(step({"n": torch.tensor([2**31 - 1])})) == 1
    with pytest.raises(torchorbax.UnsupportedLeafError, match=r"batch\.n: int64 values beyond 32 bits"):
        step({"n": torch.tensor([2**40])})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": 3}, "model must be a torch.nn.Module, not a int"),
        ({"optimizer": 3}, "optimizer must be a torch.optim optimizer or an OptaxOptimizer, not 3"),
        ({"loss_fn": None}, "loss_fn must be a function"),
        ({"batch_sharding": "x"}, "batch_sharding must be a Sharding, a PartitionSpec or None, not 'x'"),
    ],
    ids=str,
)
def test_arguments_of_other_types(arguments: dict[str, Any], message: str) -> None:
    model = nn.Linear(1, 1)
    usual = {"model": model, "optimizer": torch.optim.SGD(model.parameters()), "loss_fn": loss_fn}
    with pytest.raises(ConfigError, match=message):
        torchorbax.train_step(**{**usual, **arguments})
