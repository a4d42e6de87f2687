"""Modules are saved by their own tensors and extra state, under whatever names, and restored from them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
import torch
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from torch import nn
from torchax import interop
from torchorbax import Checkpointer, ConfigError, MismatchError, place_, resume
from torchorbax._src.save.snapshot import take
from torchorbax._src.state.modules import ModuleItem
from torchorbax._src.state.request import Request
from torchorbax._src.state.sharing import Restoring
from torchorbax._src.tensors import torchax_tensors

from tests.helpers.tensors import bits


@pytest.mark.parametrize("name", ["rnn_extra_state", "_extra_state", "extra_state"])
def test_a_tensor_may_be_called_like_extra_state(name: str, lives: Callable[..., Any]) -> None:
    def build() -> dict[str, Any]:
        module = nn.Linear(2, 2)
        module.register_buffer(name, torch.rand(3))
        return {"model": nn.Sequential(module)}

    first, second = lives(build)
    assert bits(getattr(second["model"][0], name)) == bits(getattr(first["model"][0], name))


class Scaled(nn.Linear):
    """Keeps a plain value in its state_dict by overriding how that is made."""

    scale = 1.0

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "scale"] = self.scale


class Hooked(nn.Linear):
    """The same by a hook."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self._register_state_dict_hook(lambda module, state, prefix, meta: state.update({prefix + "scale": 7.0}))


class Average(nn.Linear):
    """Has a tensor that is no buffer."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {**super().state_dict(*args, **kwargs), "scale": torch.ones(2)}


@pytest.mark.parametrize("module", [Scaled(2, 2), Hooked(), Average(2, 2)], ids=lambda module: type(module).__name__)
def test_what_a_module_could_not_take_back_is_refused_at_resume(module: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model: .*scale of its state_dict is neither a parameter nor a buffer"):
        resume(module, None, tmp_path)


class FollowsTheAdvice(nn.Linear):
    """What the message advises: extra state."""

    scale = 1.0

    def get_extra_state(self) -> float:
        return self.scale

    def set_extra_state(self, state: float) -> None:
        self.scale = state


def test_the_advice_for_plain_values_works(lives: Callable[..., Any]) -> None:
    _, second = lives(
        lambda: {"model": FollowsTheAdvice(2, 2)}, lambda state: setattr(state["model"], "scale", float("inf"))
    )
    assert second["model"].scale == float("inf")


class Fused(nn.Module):
    """One tensor, of which hooks make two in the state_dict, and one again when it is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.qk = nn.Parameter(torch.rand(4, 8))
        self._register_state_dict_hook(self._split)
        self._register_load_state_dict_pre_hook(self._join)

    @staticmethod
    def _split(module: nn.Module, state: Any, prefix: str, meta: Any) -> None:
        joined = state.pop(prefix + "qk")
        state[prefix + "q"], state[prefix + "k"] = joined[:2] * 1, joined[2:] * 1

    def _join(self, state: Any, prefix: str, *rest: Any) -> None:
        state[prefix + "qk"] = torch.cat([state.pop(prefix + "q"), state.pop(prefix + "k")])


@pytest.mark.parametrize("on_jax", [False, True])
def test_fused_projections_are_saved_as_they_are(on_jax: bool, lives: Callable[..., Any], mesh: Mesh) -> None:
    def build() -> dict[str, Any]:
        model = nn.Sequential(Fused(), nn.Linear(2, 2))
        if on_jax:
            place_(model, None, (mesh, {"0.qk": P(None, "fsdp")}))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return {"model": model, "optimizer": optimizer}

    def change(state: Any) -> None:
        optimizer, param = state["optimizer"], state["model"][0].qk
        optimizer.state[param]["momentum_buffer"] = torch.rand(4, 8)

    first, second = lives(build, change)
    assert bits(second["model"][0].qk) == bits(first["model"][0].qk)
    one, other = (next(iter(state["optimizer"].state.values()))["momentum_buffer"] for state in (first, second))
    assert bits(one) == bits(other)


def test_hooks_that_rename_tensors_name_them(lives: Callable[..., Any], tmp_path: Path) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)
            self._register_state_dict_hook(self._strip)

        @staticmethod
        def _strip(module: nn.Module, state: Any, prefix: str, meta: Any) -> None:
            for name in list(state):
                state[name.replace("inner.", "")] = state.pop(name)

    first, second = lives(lambda: {"model": Wrapped()})
    assert bits(second["model"].inner.weight) == bits(first["model"].inner.weight)
    plain = nn.Linear(2, 2)
    with Checkpointer(tmp_path / "run", {"model": plain}) as run:
        run.restore()
    assert bits(plain.weight) == bits(first["model"].inner.weight)


CHANGES: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "a layer more": (lambda model: model.append(nn.Linear(2, 2)), r"2\.weight has been added, 2\.bias has been added"),
    "a layer less": (lambda model: model.pop(1), r"1\.weight is gone"),
    "another size": (lambda model: model.__setitem__(1, nn.Linear(3, 3)), r"1\.weight was torch\.float32\(2, 2\) and"),
    "another dtype": (lambda model: model.half(), r"0\.weight was torch\.float32\(2, 2\) and is torch\.float16"),
    "tied": (lambda model: setattr(model[1], "weight", model[0].weight), r"1\.weight is gone, 1\.weight is tied other"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_module_that_has_changed_is_not_saved(kind: str, tmp_path: Path) -> None:
    change, found = CHANGES[kind]
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with resume(model, None, tmp_path, save=None) as run:
        run.save(0, force=True)
        change(model)
        with pytest.raises(ConfigError, match=rf"model: the module has changed since the run was opened.*{found}"):
            run.save(1, force=True)
    with Checkpointer(tmp_path, {"model": model}, save=None) as run:  # as the message advises
        run.save(2, force=True)
    again = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    change(again)
    with resume(again, None, tmp_path) as run:
        assert run.step == 2


def test_a_lazy_module_is_refused_at_resume(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model: weight has no shape yet; run one batch through the lazy module"):
        resume(nn.LazyLinear(2), None, tmp_path)


def test_a_wrapper_of_torchax_is_refused_and_the_module_inside_it_is_saved(tmp_path: Path) -> None:
    with torchax_tensors.torchax.default_env():
        wrapped = interop.JittableModule(nn.Linear(2, 2).to("jax"))
    with pytest.raises(ConfigError, match=r"in place of the method .* hand over the module inside it \(_model\)"):
        resume(wrapped, None, tmp_path)
    with resume(wrapped._model, None, tmp_path, save=None) as run:
        run.save(0, force=True)
    again = nn.Linear(2, 2)
    with resume(again, None, tmp_path):
        assert bits(again.weight) == bits(wrapped._model.weight)


class Cached(nn.Module):
    """Makes its buffers when they are first needed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.register_buffer("cache", None)
        self.register_buffer("same", None)
        self.register_buffer("once", torch.ones(2))
        self.register_parameter("scale", None)


@pytest.mark.parametrize("where", ["host", "jax", "rules"])
def test_buffers_that_are_made_or_dropped_later_come_back(where: str, tmp_path: Path, mesh: Mesh) -> None:
    rules = (mesh, {"cache": P("fsdp")}) if where == "rules" else None
    model = Cached()
    if where == "jax":
        place_(model)
    with resume(model, None, tmp_path, shardings=rules, save=None) as run:
        made = torch.arange(8, dtype=torch.int64 if where == "host" else torch.int32)
        model.cache = made if where == "host" else torchax_tensors.wrap(jnp.asarray(made.numpy()))
        model.same = model.cache
        model.once = None
        run.save(0, force=True)
    again = Cached()
    with resume(again, None, tmp_path, shardings=rules, save=None) as run:
        assert again.cache is again.same
        assert bits(again.cache) == bits(model.cache)
        assert again.once is None
        assert torchax_tensors.is_torchax(again.cache) == (where != "host")
        if where == "rules":
            assert torchax_tensors.array_of(again.cache).sharding.spec == P("fsdp")
        again.cache, again.same = None, None
        run.restore(only="model.cache")
        assert bits(again.cache) == bits(model.cache)
        run.save(1, force=True)


def test_a_failed_restore_leaves_buffers_as_they_were() -> None:
    model, again = Cached(), Cached()
    item, fresh = ModuleItem("model", model), ModuleItem("model", again)
    model.cache, model.once = torch.ones(3), None
    snapshot = take({"model": item.capture()}, "host")
    saved = snapshot.items["model"]
    plan = fresh.plan(saved, None, Request())
    with ExitStack() as undo:
        fresh.apply(saved, plan, {name: array for (_, name), array in snapshot.arrays.items()}, undo, Restoring())
        assert again.cache.tolist() == [1, 1, 1]
        assert again.once is None
    assert again.cache is None
    assert again.once.tolist() == [1, 1]


def test_a_parameter_that_is_made_later_or_a_tie_that_is_new_is_refused(tmp_path: Path) -> None:
    model = Cached()
    with Checkpointer(tmp_path, {"model": model}, save=None) as run:
        model.scale = nn.Parameter(torch.ones(1))
        with pytest.raises(ConfigError, match=r"scale has been added\. .* and build it like that when"):
            run.save(0, force=True)
        model.scale = None
        model.cache = model.once
        with pytest.raises(ConfigError, match=r"model: the module has changed since the run was opened"):
            run.save(0, force=True)


def test_another_module_with_a_buffer_none_is_told_so(tmp_path: Path) -> None:
    model = Cached()
    model.cache = torch.ones(2)
    with Checkpointer(tmp_path, {"model": model}, save=None) as run:
        run.save(0, force=True)
    with Checkpointer(tmp_path, {"model": Cached()}) as run, pytest.raises(MismatchError, match="cache: found"):
        run.restore()
