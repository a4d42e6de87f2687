"""The jitted step computes what torch computes, and leaves everything live."""

from __future__ import annotations

import copy
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

from tests.models import RULES, TiedNet, batch_of, bits, loss_fn, seeded

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1),
    "SGD momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "SGD dampening": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.5),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.01, weight_decay=0.01),
    "Adam amsgrad": lambda params: torch.optim.Adam(params, lr=0.01, amsgrad=True),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01),
    "AdamW maximize": lambda params: torch.optim.AdamW(params, lr=0.001, maximize=True),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.01),
    "RMSprop momentum": lambda params: torch.optim.RMSprop(params, lr=0.01, momentum=0.5),
    "RMSprop centered": lambda params: torch.optim.RMSprop(params, lr=0.01, centered=True, weight_decay=0.01),
    "RAdam": lambda params: torch.optim.RAdam(params, lr=0.01),
    "Adadelta": lambda params: torch.optim.Adadelta(params, lr=0.5),
    "NAdam": lambda params: torch.optim.NAdam(params, lr=0.01),
}


def train_in_torch(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for step in range(steps):
        loss = loss_fn(model, batch_of(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_torch_optimizers_train_as_in_torch(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    model = seeded(dropout=0.0)
    reference = copy.deepcopy(model)
    expected = train_in_torch(reference, make(reference.parameters()), 5)

    step = torchorbax.train_step(model, make(model.parameters()), loss_fn)
    losses = [float(step(batch_of(i))) for i in range(5)]

    assert losses == pytest.approx(expected, rel=2e-4)
    for name, tensor in reference.state_dict().items():
        np.testing.assert_allclose(to_jax(model)[name], tensor.numpy(), rtol=2e-3, atol=2e-4, err_msg=name)


@pytest.mark.parametrize(
    "tx",
    [optax.sgd(0.1, momentum=0.9), optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))],
    ids=["sgd", "chain"],
)
def test_optax_trains_as_by_hand(tx: optax.GradientTransformation) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    weights = {"weight": jnp.asarray(model.weight.detach().numpy()), "bias": jnp.asarray(model.bias.detach().numpy())}
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    state, losses = tx.init(weights), []
    for _ in range(3):
        loss, grads = jax.value_and_grad(lambda w: ((x @ w["weight"].T + w["bias"]) ** 2).mean())(weights)
        updates, state = tx.update(grads, state, weights)
        weights = optax.apply_updates(weights, updates)
        losses.append(loss.item())

    optimizer = torchorbax.OptaxOptimizer(model, tx)
    step = torchorbax.train_step(model, optimizer, lambda model, batch: (model(batch) ** 2).mean())
    assert [float(step(x)) for _ in range(3)] == pytest.approx(losses, rel=1e-5)
    np.testing.assert_allclose(to_jax(model)["weight"], weights["weight"], rtol=1e-5)
    jax.tree.map(lambda live, by_hand: np.testing.assert_allclose(live, by_hand, rtol=1e-4), optimizer.state, state)


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


def test_batchnorm_statistics_follow_torch() -> None:
    for dimensions in (1, 2):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.BatchNorm1d(3) if dimensions == 1 else nn.BatchNorm2d(3), nn.Flatten(), nn.LazyLinear(1)
        )
        x = torch.randn(6, 3) if dimensions == 1 else torch.randn(4, 3, 5, 5)
        model(x)
        model[0].reset_running_stats()
        reference = copy.deepcopy(model)
        for _ in range(3):
            reference(x).mean().backward()
        step = torchorbax.train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), lambda m, b: m(b).mean())
        for _ in range(3):
            step(x)
        for name, buffer in reference.named_buffers():
            np.testing.assert_allclose(to_jax(model)[name], buffer.numpy(), rtol=1e-5, err_msg=name)


def test_instance_norm_statistics_follow_torch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.InstanceNorm2d(3, affine=True, track_running_stats=True))
    x = torch.randn(4, 3, 5, 5)
    reference = copy.deepcopy(model)
    reference(x)
    torchorbax.train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), lambda m, b: (m(b) ** 2).mean())(x)
    for name in ("running_mean", "running_var"):
        np.testing.assert_allclose(to_jax(model)[f"0.{name}"], reference[0].get_buffer(name).numpy(), rtol=1e-5)


def test_eval_mode_leaves_statistics_alone_and_is_noticed() -> None:
    model = seeded(dropout=0.0)
    step = torchorbax.train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), loss_fn)
    step(batch_of(0))
    after_training = bits(to_jax(model)["norm.running_mean"])
    model.eval()
    step(batch_of(1))
    assert bits(to_jax(model)["norm.running_mean"]) == after_training
    model.train()
    step(batch_of(1))
    assert bits(to_jax(model)["norm.running_mean"]) != after_training


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


@pytest.mark.parametrize("name", ["SGD momentum", "AdamW"])
def test_schedulers_change_the_rate_without_compiling_again(name: str, compilations: list[str]) -> None:
    def scheduled(model: nn.Module) -> tuple[torch.optim.Optimizer, Any]:
        optimizer = OPTIMIZERS[name](model.parameters())
        return optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    model = seeded(dropout=0.0)
    reference = copy.deepcopy(model)
    expected = []
    optimizer, scheduler = scheduled(reference)
    for i in range(4):
        expected += train_in_torch(reference, optimizer, 1) if i == 0 else []
        if i:
            loss = loss_fn(reference, batch_of(0))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            expected.append(loss.item())
        scheduler.step()

    optimizer, scheduler = scheduled(model)
    step = torchorbax.train_step(model, optimizer, loss_fn)
    losses = []
    for _ in range(4):
        losses.append(float(step(batch_of(0))))
        scheduler.step()
    assert losses == pytest.approx(expected, rel=2e-4)
    assert compilations.count("step") == 1


def test_other_hyperparameters_and_frozen_parameters_are_noticed() -> None:
    model = seeded(dropout=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = torchorbax.train_step(model, optimizer, loss_fn)
    step(batch_of(0))
    before = to_jax({"w": model.hidden.weight, "b": model.hidden.bias})
    before = jax.tree.map(np.asarray, before)
    model.hidden.weight.requires_grad_(False)
    step(batch_of(1))
    assert bits(model.hidden.weight.jax()) == bits(before["w"])
    assert bits(model.hidden.bias.jax()) != bits(before["b"])
    optimizer.param_groups[0]["momentum"] = 0.0
    buffer = bits(optimizer.state[model.hidden.bias]["momentum_buffer"].jax())
    step(batch_of(2))
    assert bits(optimizer.state[model.hidden.bias]["momentum_buffer"].jax()) == buffer


def test_frozen_parameters_keep_their_very_array() -> None:
    model = seeded()
    model.hidden.requires_grad_(False)
    step = torchorbax.train_step(model, torchorbax.OptaxOptimizer(model, optax.sgd(0.1)), loss_fn)
    step(batch_of(0))
    held = model.hidden.weight.jax()
    step(batch_of(1))
    assert model.hidden.weight.jax() is held


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


# ------------------------------------------------------------------------------------------------------- bad input


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


def test_optimizers_that_cannot_be_traced() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(
        model.parameters(), lr=0.1, betas=(torch.tensor(0.9), torch.tensor(0.99)), foreach=False
    )
    with pytest.raises(torchorbax.ConfigError, match="hyperparameter 'betas'"):
        torchorbax.train_step(model, optimizer, lambda m, b: m(b).mean())(np.ones((2, 2), np.float32))
    with pytest.raises(torchorbax.ConfigError, match="tx must be an optax gradient transformation"):
        torchorbax.OptaxOptimizer(model, object())


@pytest.mark.parametrize("kind", ["Adagrad", "Rprop", "Adamax", "ASGD", "LBFGS"])
def test_optimizers_whose_step_cannot_be_traced_are_named(kind: str) -> None:
    model = seeded()
    step = torchorbax.train_step(model, getattr(torch.optim, kind)(model.parameters()), loss_fn)
    with pytest.raises(ConfigError, match=rf"the step of {kind} cannot be traced: .*or optax with"):
        step(batch_of(0))


def test_a_batch_that_cannot_be_split_evenly_is_named(mesh: Mesh) -> None:
    model = seeded()
    step = torchorbax.train_step(model, torch.optim.SGD(model.parameters()), loss_fn, batch_sharding=P("fsdp"))
    torchorbax.place_(model, shardings=(mesh, RULES))
    tokens = torch.zeros(6, dtype=torch.int32)
    with pytest.raises(ConfigError, match=r"batch\.0 of shape \(6,\) cannot be laid out by .*evenly divide"):
        step((tokens, tokens))


class Target(nn.Linear):
    @torch.no_grad()
    def target(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self(x)


def with_no_grad(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    out = model(batch)
    with torch.no_grad():
        target = 2 * model(batch)
    return ((out - target) ** 2).mean()


NO_GRADIENT: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "no_grad": with_no_grad,
    "decorated": lambda model, batch: ((model(batch) - model.target(batch)) ** 2).mean(),
    "detach": lambda model, batch: ((model(batch) - (2 * model(batch)).detach()) ** 2).mean(),
}


@pytest.mark.parametrize("how", NO_GRADIENT)
def test_what_has_no_gradient_in_torch_has_none_here(how: str) -> None:
    torch.manual_seed(0)
    model, x = Target(2, 2), torch.ones(3, 2)
    before = model.weight.detach().numpy().copy()
    NO_GRADIENT[how](model, x).backward()
    expected = model.weight.grad
    assert expected is not None
    torchorbax.train_step(model, torch.optim.SGD(model.parameters(), lr=1.0), NO_GRADIENT[how])(x)
    np.testing.assert_allclose(before - np.asarray(to_jax(model.weight)), expected, rtol=1e-5)


def test_spectral_norm_trains_as_in_torch() -> None:
    """Its power iteration runs under no_grad, in place."""
    torch.manual_seed(0)
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    reference, x = copy.deepcopy(model), torch.ones(3, 4)
    step = torchorbax.train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda m, b: m(b).square().mean())
    other = torch.optim.SGD(reference.parameters(), lr=0.1)
    for _ in range(3):
        loss = reference(x).square().mean()
        other.zero_grad()
        loss.backward()
        other.step()
        assert float(step(x)) == pytest.approx(loss.item(), rel=1e-4)
    for name, value in reference.state_dict().items():
        np.testing.assert_allclose(to_jax(model)[name], value, rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_custom_gradient_is_refused_instead_of_ignored() -> None:
    class StraightThrough(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.round()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad

    model = nn.Linear(2, 2)
    step = torchorbax.train_step(
        model, torch.optim.SGD(model.parameters()), lambda m, b: StraightThrough.apply(m(b)).mean()
    )
    with pytest.raises(NotImplementedError, match=r"StraightThrough: a torch\.autograd\.Function has no gradient"):
        step(torch.ones(1, 2))
    on_cpu = torch.full((2,), 0.7, requires_grad=True)
    StraightThrough.apply(on_cpu).sum().backward()
    assert on_cpu.grad is not None


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


def test_an_optax_optimizer_of_another_model() -> None:
    one, other = nn.Linear(3, 3), nn.Linear(3, 3)
    with pytest.raises(ConfigError, match="the OptaxOptimizer was built for another model"):
        torchorbax.train_step(one, torchorbax.OptaxOptimizer(other, optax.sgd(0.1)), loss_fn)


def test_optax_state_of_other_parameters() -> None:
    model = seeded()
    step = torchorbax.train_step(model, torchorbax.OptaxOptimizer(model, optax.adam(0.1)), loss_fn)
    step(batch_of(0))
    model.hidden.bias.requires_grad_(False)
    with pytest.raises(ConfigError, match="does not fit the parameters that require a gradient"):
        step(batch_of(1))


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
