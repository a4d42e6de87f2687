"""A restore that cannot fit says everything that is wrong and changes nothing; one that is asked for less does less."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torchorbax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from torch import nn
from torchorbax import Checkpointer, ConfigError, MismatchError, OptaxOptimizer, place_, to_jax

from tests.helpers.fake_runs import weights
from tests.helpers.models import TiedNet, objects
from tests.helpers.tensors import bits


class Net(nn.Module):
    """An encoder and a head, tied if asked to."""

    def __init__(
        self, encoder: str = "encoder", width: int = 4, tied: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        setattr(self, encoder, nn.Sequential(nn.Linear(4, width, dtype=dtype), nn.Linear(width, 4, dtype=dtype)))
        self.head = nn.Linear(4, 4, bias=False, dtype=dtype)
        self.out = nn.Linear(4, 4, bias=False, dtype=dtype)
        if tied:
            self.out.weight = self.head.weight


def optimizer_of(model: nn.Module, kind: str, steps: int) -> Any:
    """An optimizer with the state that this many steps leave."""
    if kind == "optax":
        optimizer: Any = OptaxOptimizer(model, optax.adam(0.1))
        for _ in range(steps):
            state = optimizer.init()
            optimizer.state = (
                state[0]._replace(count=state[0].count + 1, mu={k: v + 1 for k, v in state[0].mu.items()}),
                *state[1:],
            )
        return optimizer
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(steps):
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
    return optimizer


def save(path: Path, model: nn.Module, kind: str = "torch", steps: int = 2, **state: Any) -> str:
    with Checkpointer(str(path), {"model": model, "optimizer": optimizer_of(model, kind, steps), **state}) as run:
        run.save(5, force=True)
    return str(path)


def everything(*objects: Any) -> list[Any]:
    """The bits and hyperparameters of modules and optimizers, and which tensors are which."""
    seen: list[Any] = []
    for one in objects:
        if isinstance(one, nn.Module):
            seen += [(name, id(value), bits(value)) for name, value in one.state_dict(keep_vars=True).items()]
        elif isinstance(one, torch.optim.Optimizer):
            seen.append([{**group, "params": [id(p) for p in group["params"]]} for group in one.param_groups])
            seen += [(id(p), key, bits(value)) for p, state in one.state.items() for key, value in state.items()]
    return seen


@pytest.fixture
def saved(tmp_path: Path) -> str:
    torch.manual_seed(1)
    return save(tmp_path / "run", Net())


def test_everything_that_is_wrong_is_said_at_once_and_nothing_is_changed(saved: str) -> None:
    model = Net("backbone", tied=True)
    model.head = nn.Linear(4, 4, bias=True, dtype=torch.bfloat16)
    model.out = nn.Linear(8, 4, bias=False)
    optimizer = torch.optim.Adam(
        [{"params": model.backbone.parameters()}, {"params": [*model.head.parameters(), *model.out.parameters()]}]
    )
    before = everything(model, optimizer)
    with Checkpointer(saved, {"model": model, "optimizer": optimizer, "extra": {"x": 1}}) as run:
        with pytest.raises(MismatchError) as caught:
            run.restore()
        assert run.step is None
    assert everything(model, optimizer) == before
    lines = str(caught.value).splitlines()
    assert lines[0].endswith(
        "step 5 does not fit the live objects: 11 missing, 8 unexpected, 2 dtype, 2 shape, 3 groups"
    )
    assert "  extra: the whole item: expected pytree, but it is missing" in lines
    assert "  model: backbone.0.weight: expected float32(4, 4), but it is missing (was it encoder.0.weight?)" in lines
    assert "  model: encoder.0.bias: found float32(4,), but there is no such live value" in lines
    assert "  model: out.weight: shape: expected (4, 8), found (4, 4)" in lines
    assert "  model: head.weight: dtype: expected bfloat16, found float32" in lines
    assert "  optimizer: head.weight: groups: expected in param_groups[1], found in param_groups[0]" in lines
    assert "  ... and 6 more of kind missing (see .problems)" in lines
    assert lines[-1].startswith("Nothing was changed. To try: if these were renamed, rename={")
    assert "cast=True" in lines[-1]
    assert "sizes" in lines[-1]
    assert len(caught.value.problems) == 26


def test_ties_that_differ(tmp_path: Path) -> None:
    save(tmp_path / "tied", Net(tied=True))
    save(tmp_path / "untied", Net())
    untied, tied = Net(), Net(tied=True)
    with pytest.raises(
        MismatchError, match=r"model: head\.weight: ties: expected not tied, found tied with out\.weight"
    ):
        Checkpointer(str(tmp_path / "tied"), {"model": untied, "optimizer": optimizer_of(untied, "torch", 0)}).restore()
    with pytest.raises(
        MismatchError, match=r"out\.weight: ties: expected tied with head\.weight, found not tied\n(.*\n)*.*To try: tie"
    ):
        Checkpointer(str(tmp_path / "untied"), {"model": tied, "optimizer": optimizer_of(tied, "torch", 0)}).restore()


def test_param_groups_that_differ_are_named(saved: str) -> None:
    model = Net()
    names = [name for name, _ in model.named_parameters()]

    def restore(groups: list[list[str]]) -> None:
        params = dict(model.named_parameters())
        optimizer = torch.optim.Adam([{"params": [params[name] for name in group]} for group in groups])
        with Checkpointer(saved, {"model": model, "optimizer": optimizer}) as run:
            run.restore()

    restore([names[::-1]])  # the order within a group does not matter: state goes by name
    with pytest.raises(
        MismatchError, match=r"optimizer: head\.weight: expected .*missing|optimizer: head\.weight: found in"
    ):
        restore([[name for name in names if name != "head.weight"]])
    with pytest.raises(
        MismatchError, match=r"1 groups\n  optimizer: param_groups: groups: expected 2 of them, found 1"
    ):
        restore([names, []])
    with pytest.raises(
        MismatchError, match=r"7 groups|out\.weight: groups: expected in param_groups\[1\], found in param"
    ):
        restore([names[:-1], names[-1:]])


def test_schedulers_of_another_kind_are_no_silent_swap(tmp_path: Path) -> None:
    def objects(kind: Callable[..., Any]) -> dict[str, Any]:
        model = Net()
        optimizer = optimizer_of(model, "torch", 1)
        return {"model": model, "optimizer": optimizer, "scheduler": kind(optimizer)}

    with Checkpointer(str(tmp_path), objects(lambda o: torch.optim.lr_scheduler.StepLR(o, 3))) as run:
        run.save(0, force=True)
    with (
        Checkpointer(str(tmp_path), objects(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 9))) as run,
        pytest.raises(
            MismatchError, match=r"scheduler: T_max: expected a value.*\n(.*\n)*.*scheduler: step_size: found"
        ),
    ):
        run.restore()


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


@pytest.mark.parametrize("kind", ["torch", "optax"])
def test_only_part_of_an_optimizer(kind: str, tmp_path: Path) -> None:
    saved = save(tmp_path / "run", Net(), kind)
    model = Net()
    optimizer = optimizer_of(model, kind, 0)
    with Checkpointer(saved, {"model": model, "optimizer": optimizer}) as run:
        run.restore(only=["optimizer.head.*"])
    if kind == "torch":
        assert list(optimizer.state) == [model.head.weight]
        assert optimizer.state[model.head.weight]["step"] == 2
    else:
        assert [(name, float(array.mean())) for name, array in optimizer.state[0].mu.items() if array.any()] == [
            ("head.weight", 2.0)
        ]


def test_only_leaves_the_rest_unchecked(saved: str) -> None:
    model = Net(width=8)
    head = bits(torchorbax.load(saved)["head.weight"])
    with Checkpointer(saved, {"model": model, "other": [1]}) as run:
        run.restore(only=["model.head.*"])
    assert bits(model.head.weight) == head


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": "modle"}, r"only=\['modle'\] matches nothing; a pattern is 'item' or 'item\.name'"),
        ({"only": ["model", "model.decoder.*"]}, r"only=\['model\.decoder\.\*'\] matches nothing"),
        ({"only": []}, "only must be a pattern or several"),
        ({"only": [3]}, "only must be a pattern or several"),
        ({"rename": {"nothing": "elsewhere"}}, "rename: the checkpoint has nothing called 'nothing'"),
        ({"rename": "head"}, r"rename must be a mapping \{old name: new name\} or a function"),
        ({"rename": lambda name: "head.weight"}, r"rename gives two leaves of model the name 'head\.weight'"),
    ],
)
def test_slips_of_the_pen(saved: str, options: dict[str, Any], message: str) -> None:
    model = Net()
    optimizer = optimizer_of(model, "torch", 0)
    before = everything(model, optimizer)
    with (
        Checkpointer(saved, {"model": model, "optimizer": optimizer}) as run,
        pytest.raises(ConfigError, match=message),
    ):
        run.restore(**options)
    assert everything(model, optimizer) == before


@pytest.mark.parametrize("kind", ["torch", "optax"])
@pytest.mark.parametrize(
    "rename",
    [
        {"encoder": "backbone"},
        {"model.encoder": "model.backbone", "optimizer.encoder": "optimizer.backbone"},
        {f"encoder.{i}.{part}": f"backbone.{i}.{part}" for i in range(2) for part in ("weight", "bias")},
        lambda name: name.replace("encoder", "backbone"),
    ],
    ids=["prefix", "with items", "every leaf", "function"],
)
def test_renamed_leaves_take_their_optimizer_state_along(tmp_path: Path, kind: str, rename: Any) -> None:
    saved = save(tmp_path / "run", Net(), kind)
    model = Net("backbone")
    optimizer = optimizer_of(model, kind, 0)
    with Checkpointer(saved, {"model": model, "optimizer": optimizer}) as run:
        assert run.restore(rename=rename) == 5
        run.save(6, force=True)
        run.wait()
        source = torchorbax.load(saved, 5)
        moments = torchorbax.load(saved, 5, item="optimizer")
        assert bits(model.backbone[1].weight) == bits(source["encoder.1.weight"])
        for name, array in torchorbax.load(saved, 6, item="optimizer").items():
            assert bits(array) == bits(moments[name.replace("backbone", "encoder")]), name
        if not callable(rename):
            run.restore(6, rename=rename)  # the argument may stay where it is after that


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


def test_a_mismatch_lists_everything_and_changes_nothing(trained_run: str) -> None:
    class Other(TiedNet):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = nn.Linear(32, 16)
            self.norm = nn.LayerNorm(32)
            self.extra = nn.Parameter(torch.zeros(2, dtype=torch.float16))
            self.head.weight = nn.Parameter(torch.zeros(64, 32))

    model = Other()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    before = {name: bits(value.detach().numpy()) for name, value in model.state_dict().items()}
    with pytest.raises(torchorbax.MismatchError, match="step 1 does not fit the live objects") as caught:
        torchorbax.resume(model, optimizer, trained_run)
    found = {(problem.kind, problem.item, problem.name) for problem in caught.value.problems}
    assert {
        ("missing", "model", "extra"),
        ("unexpected", "model", "norm.running_mean"),
        ("shape", "model", "hidden.weight"),
        ("shape", "model", "hidden.bias"),
        ("ties", "model", "head.weight"),
        ("missing", "optimizer", "extra"),
        ("missing", "optimizer", "head.weight"),
    } <= found
    assert {name: bits(value.detach().numpy()) for name, value in model.state_dict().items()} == before
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert not optimizer.state


def test_items_and_kinds_must_agree(trained_run: str) -> None:
    model, _, _ = objects("adamw")
    with pytest.raises(torchorbax.MismatchError, match=r"whole item: found a torch\.optim item, but there is no such"):
        torchorbax.resume(model, None, trained_run)
    with pytest.raises(
        torchorbax.MismatchError,
        match=r"optimizer: the whole item: placement: expected optax, found a torch\.optim item",
    ):
        torchorbax.resume(model, torchorbax.OptaxOptimizer(model, optax.sgd(0.1)), trained_run)
    with pytest.raises(torchorbax.MismatchError, match="ema: the whole item: expected pytree, but it is missing"):
        torchorbax.resume(model, torch.optim.AdamW(model.parameters()), trained_run, state={"ema": weights()})


def test_dtypes_are_never_cast(trained_run: str) -> None:
    model = TiedNet().bfloat16()
    with pytest.raises(torchorbax.MismatchError, match=r"embed\.weight: dtype: expected bfloat16, found float32"):
        torchorbax.resume(model, torch.optim.AdamW(model.parameters()), trained_run)


def test_the_one_widening_that_loses_nothing(trained_run: str) -> None:
    """Training made BatchNorm's counter int32 on jax; a CPU model has int64."""
    model, optimizer, _ = objects("adamw")
    with torchorbax.resume(model, optimizer, trained_run):
        assert model.norm.num_batches_tracked.dtype == torch.int64
        assert model.norm.num_batches_tracked.item() == 2


def test_an_optimizer_of_another_class_is_a_mismatch(tmp_path: Path) -> None:
    """Its state and hyperparameters would mean something else, or nothing."""
    model = nn.Linear(2, 2)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with torchorbax.resume(model, sgd, tmp_path, save=None) as run:
        run.save(0, force=True)
    adam = torch.optim.AdamW(model.parameters())
    with pytest.raises(torchorbax.MismatchError, match="the optimizer: placement: expected a AdamW, found a SGD"):
        torchorbax.resume(model, adam, tmp_path)
    assert adam.param_groups[0]["lr"] == 1e-3
    with torchorbax.resume(model, adam, tmp_path, strict=False) as run:
        assert [problem.item for problem in run.left_out] == ["optimizer"]
        assert adam.param_groups[0]["lr"] == 1e-3
