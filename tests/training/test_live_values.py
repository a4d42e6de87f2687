"""Whatever a loss reads besides model and batch is read anew at every step: several networks train as in torch."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchorbax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from torch import nn
from torch.nn import functional as F
from torchax.interop import torch_view
from torchorbax import to_jax
from torchorbax._src.tensors import torchax_tensors as _torchax

STEPS = 4
Step = Callable[[Any], Any]


def batches(*shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=generator) for _ in range(STEPS)]


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, loss_fn: Callable[[Any, Any], Any]) -> Step:
    """What `train_step` has to compute, in plain torch."""

    def step(batch: Any) -> Any:
        loss = loss_fn(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def compiled_step(model: nn.Module, optimizer: torch.optim.Optimizer, loss_fn: Callable[[Any, Any], Any]) -> Step:
    return torchorbax.train_step(model, optimizer, loss_fn)


def same_state(live: nn.Module, reference: nn.Module) -> None:
    for name, tensor in reference.state_dict().items():
        found = np.asarray(to_jax(live.state_dict()[name]))
        np.testing.assert_allclose(found, tensor.numpy(), rtol=1e-3, atol=1e-4, err_msg=name)


def mlp(*sizes: int, norm: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for n, m in itertools.pairwise(sizes):
        layers += [nn.Linear(n, m), *([nn.BatchNorm1d(m)] if norm else []), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def gan(make: Callable[..., Step], placed: str = "none") -> tuple[list[float], nn.Module, nn.Module]:
    torch.manual_seed(0)
    generator, critic = mlp(4, 8, 4, norm=True), mlp(4, 8, 1)
    for module in (generator, critic):
        if placed == "both" or (placed == "critic" and module is critic):
            torchorbax.place_(module)
    critic_step = make(
        critic,
        torch.optim.SGD(critic.parameters(), lr=0.5),
        lambda model, batch: model(generator(batch[1]).detach()).mean() - model(batch[0]).mean(),
    )
    generator_step = make(
        generator, torch.optim.SGD(generator.parameters(), lr=0.5), lambda model, z: -critic(model(z)).mean()
    )
    losses = []
    for real, z in zip(batches(8, 4), batches(6, 4), strict=True):
        losses += [float(critic_step((real, z))), float(generator_step(z))]
    return losses, generator, critic


@pytest.mark.parametrize("placed", ["none", "critic", "both"])
def test_a_gan_trains_as_in_torch(placed: str) -> None:
    expected, generator, critic = gan(plain_step)
    losses, live_generator, live_critic = gan(compiled_step, placed)
    assert losses == pytest.approx(expected, rel=1e-3, abs=1e-4)
    same_state(live_generator, generator)
    same_state(live_critic, critic)


def test_a_gan_compiles_each_step_once(compilations: list[str]) -> None:
    gan(compiled_step, "both")
    assert compilations.count("step") == 2


def test_a_partner_on_the_cpu_joins_the_model_on_its_mesh(mesh: Mesh) -> None:
    torch.manual_seed(0)
    student, teacher = nn.Linear(8, 8), nn.Linear(8, 8)
    torchorbax.place_(student, shardings=(mesh, {"weight": P("fsdp")}))
    step = torchorbax.train_step(
        student,
        torch.optim.SGD(student.parameters(), lr=0.1),
        lambda model, x: F.mse_loss(model(x), teacher(x).detach()),
        batch_sharding=P("fsdp"),
    )
    first = float(step(torch.ones(8, 8)))
    assert set(to_jax(teacher.weight).sharding.device_set) == set(mesh.devices.flat)
    _torchax.set_array(teacher.weight, to_jax(teacher.weight) + 1)
    assert float(step(torch.ones(8, 8))) > first


def distillation(make: Callable[..., Step]) -> tuple[list[float], nn.Module]:
    torch.manual_seed(0)
    student, teacher = mlp(4, 8, 3), mlp(4, 8, 3, norm=True)
    teacher.eval()
    temperature = torch.tensor(2.0)

    def loss_fn(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            target = F.softmax(teacher(x) / temperature, dim=-1)
        return F.kl_div(F.log_softmax(model(x) / temperature, dim=-1), target, reduction="batchmean")

    step = make(student, torch.optim.SGD(student.parameters(), lr=0.5), loss_fn)
    losses = []
    for index, x in enumerate(batches(8, 4)):
        losses.append(float(step(x)))
        temperature.fill_(2.0 - 0.3 * index)
        if index == 1:
            teacher.train()  # its statistics now follow the batches
    return losses, teacher


def test_distillation_follows_the_teacher_its_mode_and_the_temperature() -> None:
    expected, teacher = distillation(plain_step)
    losses, live_teacher = distillation(compiled_step)
    assert losses == pytest.approx(expected, rel=1e-3)
    same_state(live_teacher, teacher)


class MoCo(nn.Module):
    """The loss of momentum contrast, with a queue of negatives and a key encoder that it updates itself."""

    def __init__(self, query: nn.Module) -> None:
        super().__init__()
        self.key = copy.deepcopy(query).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(4, 16), dim=0))

    def forward(self, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        q = F.normalize(model(batch[0]), dim=1)
        with torch.no_grad():
            for mine, theirs in zip(self.key.parameters(), model.parameters(), strict=True):
                mine.mul_(0.9).add_(theirs, alpha=0.1)
            k = F.normalize(self.key(batch[1]), dim=1)
        positive = (q * k).sum(dim=1, keepdim=True)
        negative = q @ self.queue.clone().detach()
        loss = F.cross_entropy(torch.cat([positive, negative], dim=1) / 0.2, torch.zeros_like(positive[:, 0]).long())
        self.queue = torch.cat([k.T, self.queue[:, : -len(k)]], dim=1)
        return loss


@pytest.mark.parametrize("placed", [False, True])
def test_a_contrastive_queue_and_its_momentum_encoder_train_as_in_torch(placed: bool) -> None:
    def run(make: Callable[..., Step]) -> tuple[list[float], nn.Module]:
        torch.manual_seed(0)
        query = mlp(4, 8, 4)
        loss = MoCo(query)
        if placed and make is compiled_step:
            torchorbax.place_(loss)
        step = make(query, torch.optim.SGD(query.parameters(), lr=0.5), loss)
        return [float(step(pair)) for pair in zip(batches(4, 4), batches(4, 4), strict=True)], loss

    expected, reference = run(plain_step)
    losses, live = run(compiled_step)
    assert losses == pytest.approx(expected, rel=1e-3)
    same_state(live, reference)


class Trainer:
    """A loss that is a method, with state and settings as attributes."""

    def __init__(self) -> None:
        self.center = torch.zeros(3)
        self.weight = 1.0
        self.steps_done = 0

    def loss(self, model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        out = model(x)
        self.center = 0.9 * self.center + 0.1 * out.detach().mean(dim=0)
        return self.weight * (out - self.center).square().mean()


def test_state_and_settings_of_a_trainer_are_live(compilations: list[str]) -> None:
    def run(make: Callable[..., Step]) -> tuple[list[float], Trainer]:
        torch.manual_seed(0)
        model, trainer = nn.Linear(4, 3), Trainer()
        step = make(model, torch.optim.SGD(model.parameters(), lr=0.1), trainer.loss)
        losses = []
        for index, x in enumerate(batches(8, 4)):
            trainer.weight = 1.0 if index < 2 else 0.5
            losses.append(float(step(x)))
            trainer.steps_done += 1  # which the loss does not read
        return losses, trainer

    expected, reference = run(plain_step)
    losses, live = run(compiled_step)
    assert losses == pytest.approx(expected, rel=1e-4)
    np.testing.assert_allclose(to_jax(live.center), reference.center.numpy(), rtol=1e-4)
    assert compilations.count("step") == 2, "one program for each weight"


SCALE = 1.0


def test_numbers_arrays_and_tensors_that_a_closure_reads_are_live(compilations: list[str]) -> None:
    global SCALE
    weights = np.ones(2, np.float32)
    on_cpu, on_jax = torch.ones(2), _torchax.wrap(jnp.ones(2))
    raw = jnp.ones(2)
    settings = {"power": 1.0}

    def loss_fn(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        factors = on_cpu * on_jax * torch_view(raw) * torch.from_numpy(weights).to("jax")
        return (0.0 * model(x)).sum() + settings["power"] * SCALE * factors.sum()

    model = nn.Linear(2, 2)
    step = torchorbax.train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn)
    x = torch.ones(1, 2)
    assert float(step(x)) == 2
    on_cpu[0] = 3
    assert float(step(x)) == 4
    _torchax.set_array(on_jax, jnp.asarray([3.0, 1.0]))
    assert float(step(x)) == 10
    raw = jnp.asarray([1.0, 2.0])
    assert float(step(x)) == 11
    assert compilations.count("step") == 1, "tensors and jax arrays are inputs"
    weights[1] = 3
    assert float(step(x)) == 15
    settings["power"] = 2.0
    assert float(step(x)) == 30
    try:
        SCALE = 0.5
        assert float(step(x)) == 15
    finally:
        SCALE = 1.0


def test_another_teacher_under_the_same_name_is_noticed() -> None:
    model, teacher = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    step = torchorbax.train_step(
        model, torch.optim.SGD(model.parameters(), lr=0.0), lambda m, x: (m(x) * 0 + teacher(x)).sum()
    )
    x = torch.ones(1, 2)
    nn.init.ones_(teacher.weight)
    assert float(step(x)) == 2
    teacher = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(teacher.weight)
    assert float(step(x)) == 0


def test_a_tensor_that_shares_the_array_of_a_trained_one_outlives_donation() -> None:
    torch.manual_seed(0)
    model, teacher = nn.Linear(2, 2), nn.Linear(2, 2)
    torchorbax.place_(model)
    torchorbax.place_(teacher)
    _torchax.set_array(teacher.weight, to_jax(model.weight))
    before = np.asarray(to_jax(model.weight)).copy()
    step = torchorbax.train_step(
        model, torch.optim.SGD(model.parameters(), lr=0.1), lambda m, x: F.mse_loss(m(x), teacher(x) + 1)
    )
    step(torch.ones(1, 2))
    step(torch.ones(1, 2))
    np.testing.assert_array_equal(to_jax(teacher.weight), before)


def test_a_teacher_donated_elsewhere_is_named() -> None:
    model, teacher = nn.Linear(2, 2), nn.Linear(2, 2)
    step = torchorbax.train_step(
        model, torch.optim.SGD(model.parameters(), lr=0.1), lambda m, x: F.mse_loss(m(x), teacher(x))
    )
    step(torch.ones(1, 2))
    jax.jit(lambda w: w + 1, donate_argnums=0)(to_jax(teacher.weight))
    with pytest.raises(torchorbax.DeletedArrayError, match=r"teacher\.weight"):
        step(torch.ones(1, 2))


def test_a_loss_that_fails_leaves_what_it_reads_as_it_was() -> None:
    model, trainer = nn.Linear(4, 3), Trainer()
    center = trainer.center

    def failing(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        trainer.loss(model, x)
        raise RuntimeError("on purpose")

    step = torchorbax.train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), failing)
    with pytest.raises(RuntimeError, match="on purpose"):
        step(torch.ones(2, 4))
    assert trainer.center is center
    assert not center.any()


class Noisy(nn.Module):
    def __init__(self, draw: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.draw = draw

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x).sum() * 0 + self.draw(x).sum()


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: torch.randn(2, 3),
        lambda x: torch.rand((2, 3)).to(x.device),
        lambda x: torch.randint(0, 1000, (5,)).float(),
        lambda x: torch.randn_like(x),
        lambda x: torch.randn(7, device=x.device),
    ],
)
def test_noise_differs_at_every_step(draw: Callable[[torch.Tensor], torch.Tensor]) -> None:
    model = Noisy(draw)
    step = torchorbax.train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), lambda m, x: m(x))
    assert len({float(step(torch.ones(1, 2))) for _ in range(3)}) == 3


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda x: torch.rand(1).to(x.device), "same at every step"),
        (lambda x: x * torch.empty(1, 2).normal_(), "same at every step"),
        (lambda x: torch.randn(3, generator=torch.Generator()), "leave generator out"),
    ],
)
def test_noise_that_would_be_frozen_is_refused(draw: Callable[[torch.Tensor], torch.Tensor], message: str) -> None:
    model = Noisy(draw)
    step = torchorbax.train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), lambda m, x: m(x))
    with pytest.raises(torchorbax.ConfigError, match=message):
        step(torch.ones(1, 2))


def test_numpy_noise_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = Noisy(lambda x: x * np.random.rand())
    torchorbax.train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), lambda m, x: m(x))(torch.ones(1, 2))
    assert "draws random numbers from numpy.random while it is traced" in caplog.text


def test_a_counter_in_python_is_told_and_does_not_compile_again(
    caplog: pytest.LogCaptureFixture, compilations: list[str]
) -> None:
    class Counted(nn.Linear):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return super().forward(x)

    model = Counted(2, 2)
    model.calls = 0
    step = torchorbax.train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda m, x: m(x).sum())
    for _ in range(3):
        step(torch.ones(1, 2))
    assert "loss_fn changes calls, which happens when it is traced" in caplog.text
    assert compilations.count("step") == 1


def test_a_queue_on_the_cpu_that_is_read_transposed_and_written() -> None:
    """`keys.T` is a view of the tensor that moves to the devices, and not another tensor."""
    torch.manual_seed(0)
    model, keys = nn.Linear(4, 4), torch.randn(6, 4)
    other, expected = copy.deepcopy(model), keys.clone()

    def loss_with(keys: torch.Tensor) -> Any:
        def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
            found = (model(x) @ keys.T.clone()).logsumexp(-1).mean()
            with torch.no_grad():
                keys.copy_(torch.cat([keys[2:], x]))
            return found

        return loss

    step = torchorbax.train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_with(keys))
    optimizer, loss = torch.optim.SGD(other.parameters(), lr=0.1), loss_with(expected)
    for x in torch.randn(4, 2, 4):
        optimizer.zero_grad()
        value = loss(other, x)
        value.backward()
        optimizer.step()
        assert float(step(x)) == pytest.approx(float(value.detach()), rel=1e-5)
    np.testing.assert_allclose(np.asarray(to_jax(keys)), expected.numpy())
