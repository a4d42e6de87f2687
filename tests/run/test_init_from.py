"""Where a run starts: a step of its own, else another run's full state, else its parameters, else fresh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchorbax
from jax.sharding import Mesh
from torch import nn
from torchorbax import Checkpointer, ConfigError, MismatchError, params, resume

from tests.helpers.tensors import bits


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.q_proj = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 8)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.q_proj(self.embed(tokens))))


def objects(seed: int) -> tuple[Base, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Base()
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.arange(8)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.fixture
def base(tmp_path: Path) -> str:
    """A run with steps 3 and 7."""
    model, optimizer = objects(1)
    with Checkpointer(str(tmp_path / "base"), {"model": model, "optimizer": optimizer}) as run:
        for step in (3, 7):
            train(model, optimizer)
            run.save(step, force=True)
    return str(tmp_path / "base")


def same(model: nn.Module, path: str, step: int) -> bool:
    saved = torchorbax.load(path, step)
    return all(bits(value) == bits(saved[name]) for name, value in model.state_dict().items())


def test_full_state_goes_on_with_the_step_counter(base: str, tmp_path: Path) -> None:
    model, optimizer = objects(2)
    with resume(model, optimizer, str(tmp_path / "new"), init_from=base, save=None) as run:
        assert (run.step, run.next_step, run.all_steps()) == (7, 8, [])
        assert same(model, base, 7)
        assert optimizer.state[model.head.weight]["step"] == 2
        run.save(8, force=True)
        run.wait()
        assert run.all_steps() == [8]
        assert [entry.name for entry in Path(base).iterdir() if entry.name.isdigit()] != ["8"]


def test_parameters_only_start_at_step_0_with_a_fresh_optimizer(base: str, tmp_path: Path) -> None:
    model, optimizer = objects(2)
    before = torch.get_rng_state()
    with resume(model, optimizer, str(tmp_path / "new"), init_from=params(Path(base))) as run:
        assert (run.step, run.next_step) == (None, 0)
        assert same(model, base, 7), "buffers as well"
        assert not optimizer.state
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("init_from", [lambda path: f"{path}/3", lambda path: params(f"{path}/3")])
def test_a_certain_step(init_from: Any, base: str, tmp_path: Path) -> None:
    model, optimizer = objects(2)
    resume(model, optimizer, str(tmp_path / "new"), init_from=init_from(base)).close()
    assert same(model, base, 3)


def test_a_step_of_its_own_wins(base: str, tmp_path: Path) -> None:
    model, optimizer = objects(2)
    with resume(model, optimizer, str(tmp_path / "new"), init_from=base) as run:
        train(model, optimizer)
        run.save(8, force=True)
    for init_from in (base, params(base), "/nowhere"):
        again, optimizer = objects(3)
        with resume(again, optimizer, str(tmp_path / "new"), init_from=init_from) as run:
            assert run.step == 8
            assert same(again, run.path, 8)


@pytest.mark.parametrize(
    ("init_from", "message"),
    [
        (lambda base: ("base", params(base)), r"init_from must be one of a path .* and torchorbax\.params\(path\)"),
        (lambda base: 3, "init_from must be one of"),
        (lambda base: f"{base}/5", r"init_from: there is no checkpoint at .*/base/5; give the folder of a run or"),
        (lambda base: params(f"{base}-not"), "init_from: there is no checkpoint at .*base-not"),
        (lambda base: f"{base}/../empty", "init_from: there is no checkpoint at"),
    ],
)
def test_where_nothing_can_start(init_from: Any, message: str, base: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    model, optimizer = objects(2)
    before = [bits(param) for param in model.parameters()]
    with pytest.raises(ConfigError, match=message):
        resume(model, optimizer, str(tmp_path / "new"), init_from=init_from(base))
    assert [bits(param) for param in model.parameters()] == before


def test_bad_arguments_of_params() -> None:
    with pytest.raises(ConfigError, match="params takes one path"):
        params(params("a"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="rename must be"):
        params("a", rename=3)  # type: ignore[arg-type]


def test_options_reach_where_they_should(base: str, tmp_path: Path) -> None:
    model, optimizer = objects(2)
    model.more = nn.Linear(2, 2)
    with pytest.raises(MismatchError, match="2 missing"):
        resume(model, optimizer, str(tmp_path / "a"), init_from=params(base))
    with resume(model, optimizer, str(tmp_path / "b"), init_from=params(base, strict=False)) as run:
        assert {problem.name for problem in run.left_out} == {"more.weight", "more.bias"}
    resume(model, optimizer, str(tmp_path / "e"), init_from=params(base), strict=False).close()
    half = Base().to(torch.bfloat16)
    half.tail = half.head
    del half.head
    source = params(base, rename={"head": "tail"}, cast=True)
    resume(half, None, str(tmp_path / "c"), init_from=source).close()
    assert bits(half.tail.bias) == bits(torchorbax.load(base)["head.bias"].astype("bfloat16"))
    whole = Base()
    whole.tail = whole.head
    del whole.head
    resume(whole, None, str(tmp_path / "d"), init_from=base, rename={"head": "tail"}, strict=False).close()
    assert bits(whole.tail.bias) == bits(torchorbax.load(base)["head.bias"])


def test_a_model_on_meta_starts_from_parameters(base: str, tmp_path: Path, mesh: Mesh) -> None:
    with torch.device("meta"):
        model = Base()
    resume(model, None, str(tmp_path / "new"), init_from=params(base, cast=True), shardings=(mesh, {})).close()
    assert bits(model.head.weight) == bits(torchorbax.load(base)["head.weight"])


def test_lora_takes_the_base_and_keeps_its_own_adapters(base: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapted(seed: int) -> Any:
        torch.manual_seed(seed)
        config = peft.LoraConfig(target_modules=["q_proj", "embed"], modules_to_save=["head"], init_lora_weights=False)
        return peft.get_peft_model(Base(), config)

    model = adapted(5)
    adapters = {name: bits(param) for name, param in model.named_parameters() if "lora" in name or "modules_to" in name}
    assert len(adapters) == 6
    with resume(model, None, str(tmp_path / "new"), init_from=params(base)) as run:
        saved = torchorbax.load(base)
        inner = model.base_model.model
        assert bits(inner.q_proj.base_layer.weight) == bits(saved["q_proj.weight"])
        assert bits(inner.embed.base_layer.weight) == bits(saved["embed.weight"])
        assert bits(inner.norm.running_mean) == bits(saved["norm.running_mean"])
        assert bits(inner.head.original_module.bias) == bits(saved["head.bias"])
        assert {name: bits(model.get_parameter(name)) for name in adapters} == adapters
        run.save(0, force=True)
    again = adapted(6)
    with resume(again, None, str(tmp_path / "new"), init_from=params(base)) as run:
        assert run.step == 0
        assert {name: bits(again.get_parameter(name)) for name in adapters} == adapters
    other = adapted(7)
    resume(other, None, str(tmp_path / "other"), init_from=params(run.path)).close()
    assert {name: bits(other.get_parameter(name)) for name in adapters} == adapters, "if the checkpoint has them"


def test_arguments_that_would_be_ignored_or_done_again(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"with init_from=params\(...\), rename and cast are arguments of params"):
        torchorbax.resume(model, None, tmp_path, init_from=torchorbax.params("elsewhere"), cast=True)
    with pytest.raises(
        ConfigError, match="rename has 'a', 'b' both as an old and as a new name, so resume would rename again"
    ):
        torchorbax.resume(model, None, tmp_path, rename={"a": "b", "b": "a"})


def test_a_value_that_was_none_at_first(tmp_path: Path) -> None:
    with torchorbax.resume(torch.nn.Linear(2, 2), None, tmp_path, save=None, state={"best": None}) as run:
        run.state["best"] = 0.5
        run.save(0, force=True)
    with torchorbax.resume(torch.nn.Linear(2, 2), None, tmp_path, state={"best": None}) as run:
        assert run.state["best"] == 0.5


def test_a_list_of_plain_values_that_has_grown(tmp_path: Path) -> None:
    losses: list[float] = []
    state = {"history": losses, "nested": {"lists": [[1, 2]], "epoch": 0}}
    with torchorbax.resume(torch.nn.Linear(2, 2), None, tmp_path, save=None, state=state) as run:
        losses += [3.0, 2.5]
        run.save(0, force=True)
    losses = [9.0]
    state = {"history": losses, "nested": {"lists": [], "epoch": 0}}
    with torchorbax.resume(torch.nn.Linear(2, 2), None, tmp_path, state=state) as run:
        assert run.state["history"] is losses
        assert losses == [3.0, 2.5]
        assert run.state["nested"] == {"lists": [[1, 2]], "epoch": 0}
