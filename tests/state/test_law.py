"""The law: whatever `save` accepts, an identically built program restores, bit for bit, also when the state has grown
since it started. What cannot be restored is refused when the run is opened or at the save, by name."""

from __future__ import annotations

import contextlib
import datetime
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torchorbax import Checkpointer, ConfigError, MismatchError, UnsupportedLeafError
from torchorbax._src.format.manifest import Manifest
from torchorbax._src.restore.plan import planned
from torchorbax._src.save.snapshot import take
from torchorbax._src.state.capture import capture_all
from torchorbax._src.state.registry import items_of
from torchorbax._src.state.request import Request
from torchorbax._src.state.sharing import Restoring, in_order

from tests.helpers.recipes import Builder, Camera, Recipe, keys, odd_trees, trees, values

pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")  # Hypothesis's, of its strategies

Program = dict[str, Any]
"""What a program would hand to `resume`."""
REFUSALS = (ConfigError, MismatchError, UnsupportedLeafError)


def trip(live: Program, change: Callable[[Program], object], again: Program) -> str | None:
    """Save `live` after `change` and restore it into `again`, in memory.

    Returns:
        None, or what it was refused with when it was opened or saved.
    """
    try:
        items = items_of(live, rng=False)
        change(live)
        captured = capture_all(items, {})
        snapshot = take(captured, "host")
    except REFUSALS as error:
        return str(error)
    written = Manifest(0, datetime.datetime.now(datetime.UTC), {}, snapshot.items)
    prints = dict.fromkeys(written.leaves, "0" * 32)
    manifest = Manifest.from_json(json.loads(json.dumps(written.with_fingerprints(prints).to_json())))
    fresh = items_of(again, rng=False)
    arrays = snapshot.arrays
    plan = planned("a run", manifest, fresh, None, Request())
    restoring = Restoring()
    with contextlib.ExitStack() as undo:
        for name in in_order({name: fresh[name] for name in plan.items}):
            one = plan.items[name]
            loaded = {leaf: _loaded(arrays[name, leaf], target) for leaf, target in one.targets.items()}
            assert not one.dtypes
            fresh[name].apply(manifest.items[name], one, loaded, undo, restoring)
        undo.pop_all()
    return None


def _loaded(array: Any, target: Any) -> Any:
    """What storage would load: into host memory, or onto devices, without weak types."""
    return np.array(array) if target is None else jax.device_put(np.array(array), target)


def check(build: Callable[[], Program], change: Callable[[Program], object], picture: Callable[[Program], Any]) -> None:
    """The law for one program and what becomes of its state."""
    live, again = build(), build()
    refusal = trip(live, change, again)
    event("refused" if refusal else "restored")
    if refusal is not None:
        assert any(name in refusal for name in live), f"nameless: {refusal}"
        return
    assert picture(again) == picture(live)


def pictures(program: Program) -> Any:
    camera = Camera()
    return [(name, camera.picture(value)) for name, value in program.items()]


# --------------------------------------------------------------------------------------------------------------- trees


@given(start=trees, later=trees, in_place=st.booleans())
def test_trees(start: Recipe, later: Recipe, in_place: bool) -> None:
    """A tree becomes another one altogether, or another one inside its outermost container."""
    check(lambda: {"tree": Builder().build(start)}, lambda state: grow(state, later, in_place), pictures)


@given(start=odd_trees, later=odd_trees, in_place=st.booleans())
def test_trees_with_what_cannot_be_kept(start: Recipe, later: Recipe, in_place: bool) -> None:
    check(lambda: {"tree": Builder().build(start)}, lambda state: grow(state, later, in_place), pictures)


def grow(state: Program, later: Recipe, in_place: bool) -> None:
    live = state["tree"]
    new = Builder(objects_in(live)).build(later)
    if in_place and type(live) is list:
        live.append(new)
    elif in_place and isinstance(live, dict) and not isinstance(live, Counter):
        live["more"] = new
    else:
        state["tree"] = new


def objects_in(tree: Any) -> list[Any]:
    """The mutable objects of a tree."""
    found = [tree] if isinstance(tree, torch.Tensor | np.ndarray | list | dict) else []
    children = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return found + [one for child in children for one in objects_in(child)]


# ------------------------------------------------------------------------------------------------------------- objects


class Holder:
    """An object that holds any state."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> Any:
        return self.value

    def load_state_dict(self, state: Any) -> None:
        self.value = state


def held(program: Program) -> Any:
    return Camera().picture(program["holder"].value)


@given(start=values, later=values | values | odd_trees)
def test_objects(start: Recipe, later: Recipe) -> None:
    def change(state: Program) -> None:
        state["holder"].value = Builder().build(later)

    check(lambda: {"holder": Holder(Builder().build(start))}, change, held)


# ---------------------------------------------------------------------------------------------------------- optimizers

_ENTRIES = st.dictionaries(st.sampled_from(["exp_avg", "step", "L", "a.b", "", "params", 0, None]), values, max_size=3)


@st.composite
def optimizer_states(draw: st.DrawFn) -> dict[str, Any]:
    """What an optimizer keeps: by parameter (by its index), by other keys, and in its groups."""
    return {
        "state": draw(st.dictionaries(st.integers(0, 3), _ENTRIES, max_size=4)),
        "others": draw(st.dictionaries(keys, values, max_size=2)),
        "groups": draw(st.lists(st.dictionaries(st.sampled_from(["lr", "odd", "initial_lr"]), values), max_size=3)),
        "of": draw(st.lists(st.integers(0, 2), min_size=4, max_size=4)),
    }


class Odd(torch.optim.SGD):
    """An optimizer whose state is set from outside."""


def odd_program(start: dict[str, Any]) -> Program:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    optimizer = Odd(model.parameters(), lr=0.1)
    set_state(model, optimizer, start)
    return {"model": model, "optimizer": optimizer}


def set_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    params, builder = list(model.parameters()), Builder(objects_in(dict(optimizer.state)))
    optimizer.state.clear()
    for index, entries in state["state"].items():
        optimizer.state[params[index]] = {key: builder.build(recipe) for key, recipe in entries.items()}
    for key, recipe in state["others"].items():
        optimizer.state[key] = builder.build(recipe)
    groups = state["groups"] or [{}]
    optimizer.param_groups[:] = [
        {
            **optimizer.defaults,
            **{key: builder.build(recipe) for key, recipe in group.items()},
            "params": [param for param, of in zip(params, state["of"], strict=True) if of % len(groups) == index],
        }
        for index, group in enumerate(groups)
    ]


def optimizer_picture(program: Program) -> Any:
    names = {id(param): name for name, param in program["model"].named_parameters()}
    camera, optimizer = Camera(), program["optimizer"]
    state = {names.get(id(key), key): value for key, value in optimizer.state.items()}
    groups = [
        {key: [names[id(one)] for one in value] if key == "params" else value for key, value in sorted(group.items())}
        for group in optimizer.param_groups
    ]
    in_order = sorted(state, key=lambda key: str(Camera().picture(key)))
    return [(Camera().picture(key), camera.picture(state[key])) for key in in_order], camera.picture(groups)


@given(start=optimizer_states(), later=optimizer_states())
def test_optimizers(start: dict[str, Any], later: dict[str, Any]) -> None:
    def change(state: Program) -> None:
        set_state(state["model"], state["optimizer"], later)

    check(lambda: odd_program(start), change, optimizer_picture)


# ------------------------------------------------------------------------------------------------------------- modules

_NAMES = st.sampled_from(
    ["weight", "rnn_extra_state", "extra_state", "$", "a/b", "é", " ", "~2", "w~2", "0", "state", "kind", "keys"]
) | st.text(st.characters(exclude_characters=".", exclude_categories=["Cs"]), min_size=1, max_size=3)


class OddModule(torch.nn.Module):
    """Parameters, buffers and extra state by recipe."""

    def __init__(self, recipe: dict[str, Any]) -> None:
        super().__init__()
        builder = Builder()
        for name, kind, array in recipe["tensors"]:
            if hasattr(self, name):
                continue
            tensor = builder.build(("array", "torch", *array[2:]))
            if kind == "parameter":
                self.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=tensor.dtype.is_floating_point))
            elif kind == "none":
                self.register_buffer(name, None)
            elif kind != "tied":
                self.register_buffer(name, tensor, persistent=kind == "buffer")
            elif self._parameters:
                self.register_parameter(name, next(iter(self._parameters.values())))
        for name, child in recipe["children"]:
            if not hasattr(self, name):
                self.add_module(name, type(self)(child))


class WithExtraState(OddModule):
    """One with a value of its own."""

    extra: Any = None

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        vars(self)["extra"] = state  # a Parameter, too, without being registered


_TENSORS = st.lists(
    st.tuples(
        _NAMES,
        st.sampled_from(["parameter", "buffer", "none", "not persistent", "tied"]),
        st.tuples(
            st.just("array"),
            st.just("torch"),
            st.sampled_from([torch.float32, torch.int64, torch.bool]),
            st.sampled_from([(), (2,), (0, 2)]),
            st.binary(min_size=1, max_size=4),
        ),
    ),
    max_size=4,
)
modules: st.SearchStrategy[dict[str, Any]] = st.recursive(
    st.fixed_dictionaries({"tensors": _TENSORS, "children": st.just([])}),
    lambda inner: st.fixed_dictionaries(
        {"tensors": _TENSORS, "children": st.lists(st.tuples(_NAMES, inner), max_size=2)}
    ),
    max_leaves=3,
)


@given(
    recipe=modules,
    extras=st.lists(values | odd_trees, min_size=1, max_size=2),
    fill=st.integers(0, 9),
    flips=st.lists(st.booleans(), max_size=6),
    extra=st.booleans(),
)
def test_modules(recipe: dict[str, Any], extras: list[Recipe], fill: int, flips: list[bool], extra: bool) -> None:
    """Values change, and buffers become tensors or None."""
    cls = WithExtraState if extra else OddModule

    def change(state: Program) -> None:
        with torch.no_grad():
            for tensor in (*state["model"].parameters(), *state["model"].buffers()):
                tensor.fill_(fill)
        buffers = [(one, name) for one in state["model"].modules() for name in one._buffers]
        for (one, name), flipped in zip(buffers, flips, strict=False):
            if flipped:
                one._buffers[name] = torch.full((2,), float(fill)) if one._buffers[name] is None else None
        for index, module in enumerate(state["model"].modules()):
            if extra:
                vars(module)["extra"] = Builder().build(extras[index % len(extras)])

    def picture(state: Program) -> Any:
        kept = {name: state["model"].state_dict(keep_vars=True)[name] for name in state["model"].state_dict()}
        return [(name, Camera().picture(value)) for name, value in kept.items()]

    check(lambda: {"model": cls(recipe)}, change, picture)


# ------------------------------------------------------------------------------------------- what several items share


@given(
    starts=st.tuples(trees, trees, values),
    laters=st.tuples(trees, trees, values),
    which=st.sets(st.sampled_from(["x", "a", "optimizer", "holder"])),
    in_place=st.booleans(),
)
def test_what_items_share(
    starts: tuple[Recipe, ...], laters: tuple[Recipe, ...], which: set[str], in_place: bool
) -> None:
    """Trees, an optimizer and an object have tensors and containers of each other and of the model."""

    def parts(model: torch.nn.Module) -> list[Any]:
        return [*model.parameters(), *model.buffers()]

    def build() -> Program:
        model = torch.nn.BatchNorm1d(2)
        optimizer = Odd([model.weight], lr=0.1)
        builder = Builder(parts(model))
        x, a, more = map(builder.build, starts)
        optimizer.state[model.weight]["more"] = more
        return {"x": {"tree": x}, "model": model, "holder": Holder(None), "optimizer": optimizer, "a": {"tree": a}}

    def change(state: Program) -> None:
        model = state["model"]
        builder = Builder(parts(model) + objects_in([state["x"], state["a"]]))
        x, a, more = map(builder.build, laters)
        for name, new in (("x", x), ("a", a)):
            if name in which:
                state[name] = state[name] | {"tree": new} if in_place else {"tree": new}
        if "optimizer" in which:
            state["optimizer"].state[model.weight]["more"] = more
        if "holder" in which:
            state["holder"].value = builder.made[-1] if builder.made else None

    def picture(state: Program) -> Any:
        camera = Camera()
        model = [camera.picture(one) for one in parts(state["model"])]
        more = camera.picture(state["optimizer"].state[state["model"].weight]["more"])
        return model, more, camera.picture(state["x"]), camera.picture(state["a"])

    check(build, change, picture)


# ------------------------------------------------------------------------------------------------------------- on disk


@settings(max_examples=settings().max_examples // 5)
@given(recipe=modules, start=trees, later=trees, holds=values, optimizer=optimizer_states())
def test_all_of_it_on_disk(
    recipe: dict[str, Any],
    start: Recipe,
    later: Recipe,
    holds: Recipe,
    optimizer: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    def build() -> Program:
        odd = {"of_odd": OddModule(recipe), "tree": Builder().build(start), "holder": Holder(None)}
        return {**odd_program({"state": {}, "others": {}, "groups": [], "of": [0, 0, 0, 0]}), **odd}

    def change(state: Program) -> None:
        set_state(state["model"], state["optimizer"], optimizer)
        grow(state, later, in_place=False)
        state["holder"].value = Builder().build(holds)

    path = tmp_path_factory.mktemp("run")
    saved, refusal = saved_on_disk(path, build(), change)
    event("refused" if refusal else "restored")
    if refusal is not None:
        assert any(name in refusal for name in ("model", "optimizer", "of_odd", "tree", "holder"))
        return
    with Checkpointer(path, build(), save=None) as second:
        assert second.restore() == 0

    def picture(state: Any) -> Any:
        return [
            optimizer_picture(state),
            held(state),
            Camera().picture(state["tree"]),
            [(name, Camera().picture(value)) for name, value in state["of_odd"].state_dict(keep_vars=True).items()],
        ]

    assert picture(second.state) == picture(saved)


def saved_on_disk(path: Path, live: Program, change: Callable[[Any], object]) -> tuple[Any, str | None]:
    """The state as it was saved, and what it was refused with if it was. The program's own mapping changes."""
    try:
        with Checkpointer(path, live, save=None) as run:
            change(live)
            run.save(0, force=True)
    except REFUSALS as error:
        return None, str(error)
    return live, None
