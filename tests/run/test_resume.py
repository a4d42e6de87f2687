"""A resumed run is the run that was interrupted, wherever its tensors are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchorbax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from torch import nn
from torchorbax import Checkpointer, ConfigError, to_jax
from torchorbax._src.tensors import torchax_tensors as _torchax

from tests.helpers.models import RULES, TiedNet, batch_of, loss_fn, objects, seeded
from tests.helpers.tensors import bits


def train(run: Checkpointer, step: Any, steps: int) -> list[float]:
    losses = []
    for i in run.steps(steps):
        loss = step(batch_of(i))
        run.log(loss=loss)
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize("meta", [False, True], ids=["cpu", "meta"])
@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd", "optax"])
def test_a_resumed_run_is_the_same_run(kind: str, meta: bool, tmp_path: Path, mesh: Mesh) -> None:
    shardings = (mesh, RULES)

    def run_to(path: Path, steps: int, *, meta: bool = False) -> tuple[list[float], dict[str, bytes], TiedNet, Any]:
        model, optimizer, state = objects(kind, meta=meta)
        step = torchorbax.train_step(model, optimizer, loss_fn, batch_sharding=P("fsdp"))
        with torchorbax.resume(model, optimizer, str(path), state=state, shardings=shardings) as run:
            losses = []
            for i in run.steps(steps):
                losses.append(float(step(batch_of(i))))
                for scheduler in state.values():
                    scheduler.step()
        return losses, {name: bits(array) for name, array in to_jax(model).items()}, model, optimizer

    _torchax.set_rng_key(jax.random.key(1))
    expected, parameters, _, _ = run_to(tmp_path / "whole", 6)
    _torchax.set_rng_key(jax.random.key(1))
    first, _, _, _ = run_to(tmp_path / "parts", 3)
    _torchax.set_rng_key(jax.random.key(99))  # whatever the new process had
    second, resumed, model, optimizer = run_to(tmp_path / "parts", 6, meta=meta)
    assert first + second == expected
    assert resumed == parameters
    assert model.head.weight is model.embed.weight
    if kind != "optax":
        assert optimizer.param_groups[0]["params"][0] is model.embed.weight
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 0.1**3)


def test_the_run_reports_where_it_stands(tmp_path: Path) -> None:
    model, optimizer, _ = objects("sgd")
    step = torchorbax.train_step(model, optimizer, loss_fn)
    with torchorbax.resume(model, optimizer, str(tmp_path / "run")) as run:
        assert (run.step, run.next_step) == (None, 0)
        train(run, step, 3)
        assert run.next_step == 3
        train(run, step, 5)
    assert run.all_steps()[-1] == 4, "the last step of a continuous run is saved"
    for record in run.history:
        assert 0 < record.stall_s <= record.commit_s
        assert record.nbytes > sum(array.nbytes for array in to_jax(model).values())
        assert record.metrics["loss"] > 0
    model, optimizer, _ = objects("sgd")
    run = torchorbax.resume(model, optimizer, str(tmp_path / "run"))
    assert (run.step, run.next_step) == (4, 5)
    assert list(run.steps(5)) == []
    run.close()


def test_a_model_on_meta_needs_a_checkpoint(tmp_path: Path) -> None:
    model, optimizer, _ = objects("adamw", meta=True)
    with pytest.raises(
        ConfigError, match=r"8 tensors of the model are on meta \(embed\.weight, \.\.\.\) and .* has no"
    ):
        torchorbax.resume(model, optimizer, str(tmp_path / "new"))
    assert model.embed.weight.is_meta


def test_buffers_that_no_checkpoint_has_are_reported(tmp_path: Path) -> None:
    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.register_buffer("angles", torch.ones(2), persistent=False)

    path = str(tmp_path / "run")
    with torchorbax.resume(Rotary(), None, path) as run:
        run.save(0)
    with torch.device("meta"):
        model = Rotary()
    with pytest.warns(UserWarning, match="still on meta after the restore.*: angles"):
        torchorbax.resume(model, None, path).close()
    assert model.angles.is_meta
    assert not _torchax.array_of(model.weight).is_deleted()


def test_an_optimizer_of_another_model(tmp_path: Path) -> None:
    model, other = TiedNet(), TiedNet()
    with pytest.raises(ConfigError, match="5 of the optimizer's 5 parameters belong to no model that is saved"):
        torchorbax.resume(model, torch.optim.SGD(other.parameters(), lr=0.1), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_without_shardings_live_tensors_stay_where_they_are(trained_run: str, mesh: Mesh) -> None:
    model, optimizer, _ = objects("adamw")
    with torchorbax.resume(model, optimizer, trained_run):
        assert not _torchax.is_torchax(model.embed.weight)
        assert optimizer.state[model.embed.weight]["exp_avg"].device.type == "cpu"
    model, optimizer, _ = objects("adamw")
    torchorbax.place_(model, optimizer, (mesh, RULES))
    with torchorbax.resume(model, optimizer, trained_run):
        assert model.embed.weight.jax().sharding == NamedSharding(mesh, P("fsdp"))
        assert optimizer.state[model.embed.weight]["exp_avg"].jax().sharding == NamedSharding(mesh, P("fsdp"))


def test_a_cpu_model_goes_on_on_a_mesh(tmp_path: Path, mesh: Mesh) -> None:
    """Its BatchNorm counters are int64 on the CPU, and int32 on the devices."""
    model = nn.BatchNorm1d(8)
    model.num_batches_tracked.fill_(7)
    with torchorbax.resume(model, None, tmp_path, save=None) as run:
        run.save(0, force=True)
        model.num_batches_tracked.fill_(2**40)
        run.save(1, force=True)
        run.wait()
        model = nn.BatchNorm1d(8)
        run.close()
    with Checkpointer(tmp_path, {"model": model}, shardings=(mesh, {})) as run:
        with pytest.raises(torchorbax.MismatchError, match="expected values that fit into int32, found larger ones"):
            run.restore(1)
        run.restore(0)
    assert to_jax(model.num_batches_tracked).dtype == np.int32
    assert to_jax(model.num_batches_tracked) == 7


def test_a_resume_that_cannot_place_everything_restores_nothing(tmp_path: Path, mesh: Mesh) -> None:
    model = nn.Linear(8, 8)
    model.register_buffer("wide", torch.zeros(3, dtype=torch.float64), persistent=False)
    with torchorbax.resume(model, None, tmp_path, save=None) as run:
        run.save(0, force=True)
    before = bits(model.weight.detach().zero_())
    with pytest.raises(torchorbax.UnsupportedLeafError, match="wide: float64 would lose bits"):
        torchorbax.resume(model, None, tmp_path, shardings=(mesh, {"weight": P("fsdp")}))
    assert not _torchax.is_torchax(model.weight)
    assert bits(model.weight.detach()) == before


BAD_ARGUMENTS: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "optimizer": (lambda model, path: torchorbax.resume(model, 3, path), "optimizer must be a torch.optim or optax"),
    "state": (lambda model, path: torchorbax.resume(model, None, path, state=[1]), "state must be a mapping"),
    "handed": (lambda model, path: Checkpointer(path, {"m": model}).save(0, ["m"]), "save takes state= and metrics="),
    "metrics": (lambda model, path: Checkpointer(path, {"m": model}).save(0, metrics=[1]), "save takes state= and"),
    "tied": (
        lambda model, path: Checkpointer(path, {"m": model}).save(
            0, {"m": {"embed.weight": jnp.zeros((64, 32)), "head.weight": jnp.ones((64, 32))}}, force=True
        ),
        r"m: head\.weight is tied to embed\.weight, but was handed over as another array",
    ),
    "names": (lambda model, path: Checkpointer(path, {"_CHECKPOINT_METADATA": model}), "cannot name an item"),
}


@pytest.mark.parametrize("what", BAD_ARGUMENTS)
def test_bad_arguments(what: str, tmp_path: Path) -> None:
    call, message = BAD_ARGUMENTS[what]
    with pytest.raises(ConfigError, match=message):
        call(seeded(), tmp_path)


@pytest.mark.parametrize("devices", [0, 1, 8], ids=["default device", "mesh of 1", "mesh of 8"])
@pytest.mark.parametrize("kind", ["adamw", "sgd", "optax"])
def test_a_step_is_compiled_once_in_each_life(kind: str, devices: int, tmp_path: Path, compilations: list[str]) -> None:
    """What a step gives back is of the same kind as what a fresh start or a restore had given it."""
    shardings = (Mesh(np.array(jax.devices()[:devices]), ("fsdp",)), {}) if devices else None
    for start in (0, 2):
        model, optimizer, _ = objects(kind)
        step = torchorbax.train_step(model, optimizer, loss_fn)
        compilations.clear()
        with torchorbax.resume(model, optimizer, tmp_path / "run", shardings=shardings) as run:
            assert run.next_step == start
            train(run, step, start + 2)
        assert compilations.count("step") == 1
