"""A restore that cannot fit says everything that is wrong and changes nothing; one that is asked for less does less."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchorbax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from torch import nn
from torchorbax import Checkpointer, ConfigError, MismatchError, place_, to_jax

from tests.helpers.models import objects
from tests.helpers.restores import Net, everything, optimizer_of, save
from tests.helpers.tensors import bits


def test_an_object_that_refuses_its_state_is_told_and_all_is_undone(tmp_path: Path) -> None:
    class Picky:
        value = 1

        def state_dict(self) -> dict[str, int]:
            return {"value": self.value}

        def load_state_dict(self, state: dict[str, int]) -> None:
            self.value = state["value"]
            if state["value"] == 2:
                raise KeyError("two")

    picky = Picky()
    picky.value = 2
    save(tmp_path / "run", Net(), picky=picky)
    picky.value, model = 1, Net()
    optimizer = optimizer_of(model, "torch", 0)
    before = everything(model, optimizer)
    with (
        Checkpointer(str(tmp_path / "run"), {"model": model, "optimizer": optimizer, "picky": picky}) as run,
        pytest.raises(
            MismatchError, match=r"picky: placement: expected a state that Picky takes, found .*KeyError: 'two'"
        ),
    ):
        run.restore()
    assert everything(model, optimizer) == before
    assert picky.value == 1


def test_modules_that_cannot_be_restored_say_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"0\.weight has no shape yet; run one batch through the lazy module first"):
        Checkpointer(str(tmp_path), {"model": nn.Sequential(nn.LazyLinear(3))}).save(0, force=True)

    class Derived(nn.Linear):
        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return {"doubled": self.weight * 2}

    with pytest.raises(ConfigError, match="doubled of its state_dict is neither a parameter nor a buffer"):
        Checkpointer(str(tmp_path), {"model": Derived(2, 2)}).save(0, force=True)


@pytest.mark.parametrize("kind", ["torch", "optax"])
def test_what_fits_is_restored_and_the_rest_is_listed(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(1)
    source = Net()
    saved = save(tmp_path / "run", source, kind)
    model = Net()
    model.out = nn.Linear(8, 4, bias=False)
    model.more = nn.Linear(2, 2)
    optimizer = optimizer_of(model, kind, 0)
    kept = {name: bits(model.get_parameter(name)) for name in ("out.weight", "more.weight", "more.bias")}
    with Checkpointer(saved, {"model": model, "optimizer": optimizer}) as run, caplog.at_level(logging.WARNING):
        assert run.restore(strict=False) == 5
        problems = {(problem.item, problem.kind, problem.name.removesuffix(".0.mu")) for problem in run.left_out}
    assert {("model", "shape", "out.weight"), ("model", "missing", "more.weight")} <= problems
    assert {problem for problem in problems if problem[0] == "optimizer"}
    assert "restored without what does not fit: " in caplog.text
    assert "model: out.weight: shape: expected (4, 8), found (4, 4)" in caplog.text
    for name, param in model.named_parameters():
        assert bits(param) == kept.get(name, bits(source.state_dict()[name] if name not in kept else param)), name
    if kind == "torch":
        assert optimizer.state[model.head.weight]["step"] == 2
        assert model.out.weight not in optimizer.state
    else:
        assert optimizer.state[0].count == 2
        assert (np.asarray(optimizer.state[0].mu["head.weight"]) == 2).all()
        assert (np.asarray(optimizer.state[0].mu["more.weight"]) == 0).all()


def test_strict_false_with_nothing_in_common_is_still_an_error(saved: str) -> None:
    with (
        Checkpointer(saved, {"model": nn.Linear(1, 1)}) as run,
        pytest.raises(MismatchError, match=r"2 missing, .* unexpected"),
    ):
        run.restore(strict=False)


def test_a_strict_restore_clears_the_list(saved: str) -> None:
    model = Net()
    with Checkpointer(saved, {"model": model}) as run:
        run.restore(strict=False)
        assert [problem.item for problem in run.left_out] == ["optimizer"]
        run.restore(only="model")
        assert run.left_out == ()


@pytest.mark.parametrize(
    ("only", "restored"),
    [
        (
            "model",
            {"encoder.0.weight", "encoder.0.bias", "encoder.1.weight", "encoder.1.bias", "head.weight", "out.weight"},
        ),
        (["model.encoder.*"], {"encoder.0.weight", "encoder.0.bias", "encoder.1.weight", "encoder.1.bias"}),
        ("model.encoder.0", {"encoder.0.weight", "encoder.0.bias"}),
        (["model.*.bias", "model.head.weight"], {"encoder.0.bias", "encoder.1.bias", "head.weight"}),
        ("optimizer", set()),
    ],
)
def test_only_what_is_asked_for_is_restored(saved: str, only: Any, restored: set[str]) -> None:
    torch.manual_seed(2)
    model = Net()
    optimizer = optimizer_of(model, "torch", 0)
    before = {name: bits(value) for name, value in model.named_parameters()}
    source = torchorbax.load(saved)
    with Checkpointer(saved, {"model": model, "optimizer": optimizer}) as run:
        assert run.restore(only=only) == 5
        assert run.step is None, "a part of a step is no place to go on from"
    assert {name for name, value in model.named_parameters() if bits(value) != before[name]} == restored
    assert all(bits(model.get_parameter(name)) == bits(source[name]) for name in restored)
    assert bool(optimizer.state) == (only == "optimizer")


def test_prefixes_come_and_go(tmp_path: Path) -> None:
    bare, wrapped = nn.Linear(2, 2), nn.Sequential()
    wrapped.module = nn.Linear(2, 2)
    with Checkpointer(str(tmp_path / "wrapped"), {"model": wrapped}) as run:
        run.save(0, force=True)
    with Checkpointer(str(tmp_path / "wrapped"), {"model": bare}) as run:
        with pytest.raises(MismatchError, match=r"weight: .*\(was it module\.weight\?\)"):
            run.restore()
        run.restore(rename={"module": ""})
        assert bits(bare.weight) == bits(wrapped.module.weight)
        run.save(1, force=True)
    with Checkpointer(str(tmp_path / "wrapped"), {"model": wrapped}) as run:
        run.restore(1, rename={"": "module"})
        run.save(2, force=True)
        run.wait()
        run.restore(2, rename={"": "module"})


@pytest.mark.parametrize(
    ("to", "where"),
    [(torch.bfloat16, "cpu"), (torch.bfloat16, "jax"), (torch.float16, "jax"), (torch.float64, "cpu")],
)
def test_a_cast_happens_on_request_only(saved: str, to: torch.dtype, where: str, mesh: Mesh) -> None:
    model = Net(dtype=to)
    optimizer = optimizer_of(model, "torch", 0)
    if where == "jax":
        place_(model, optimizer, (mesh, lambda name, shape: P()))
    before = everything(model, optimizer)
    with Checkpointer(saved, {"model": model, "optimizer": optimizer}) as run:
        name = str(to).removeprefix("torch.")
        with pytest.raises(
            MismatchError, match=rf"12 dtype\n.*expected {name}, found float32(\n.*)*cast=True converts"
        ):
            run.restore()
        assert everything(model, optimizer) == before
        run.restore(cast=True)
    for key, array in torchorbax.load(saved).items():
        live = to_jax(model)[key]
        assert str(live.dtype) == name
        assert bits(live) == bits(np.asarray(array).astype(live.dtype))
    state = optimizer.state[model.head.weight]
    assert state["exp_avg"].dtype == to
    assert (state["step"].dtype, float(state["step"])) == (torch.float32, 2.0)


def test_no_cast_between_kinds_of_numbers_and_none_that_loses_integers(tmp_path: Path) -> None:
    with Checkpointer(str(tmp_path), {"model": {"x": jnp.ones(3), "n": np.array([1, 2**40])}}) as run:
        run.save(0, force=True)
    other = {"x": jnp.ones(3, int), "n": np.array([1, 2])}
    with (
        Checkpointer(str(tmp_path), {"model": other}) as run,
        pytest.raises(MismatchError, match=r"x: dtype: expected int32, found float32"),
    ):
        run.restore(cast=True)
    small = {"x": jnp.ones(3, jnp.bfloat16), "n": np.array([1, 2], np.int32)}
    with (
        Checkpointer(str(tmp_path), {"model": small}) as run,
        pytest.raises(
            MismatchError, match=r"n: dtype: expected values that fit into int32, found larger ones of int64"
        ),
    ):
        run.restore(cast=True)
    assert (np.asarray(small["x"]) == 1).all()
    assert small["n"].tolist() == [1, 2]


def test_restore_an_older_step(trained_run: str) -> None:
    model, optimizer, _ = objects("adamw")
    with torchorbax.resume(model, optimizer, trained_run) as run:
        newest = bits(model.hidden.weight.detach().numpy())
        assert run.restore(0) == 0
        assert bits(model.hidden.weight.detach().numpy()) != newest
        assert (run.step, run.next_step) == (0, 1)
        with pytest.raises(torchorbax.CheckpointNotFoundError, match="no step 7 found; steps there: 0, 1") as caught:
            run.restore(7)
        assert caught.value.step == 7


def test_the_one_widening_that_loses_nothing(trained_run: str) -> None:
    """Training made BatchNorm's counter int32 on jax; a CPU model has int64."""
    model, optimizer, _ = objects("adamw")
    with torchorbax.resume(model, optimizer, trained_run):
        assert model.norm.num_batches_tracked.dtype == torch.int64
        assert model.norm.num_batches_tracked.item() == 2
