"""What can never be saved is refused when the run is opened, by name, with what to do; and nobody's error is damage."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchdata.stateful_dataloader import StatefulDataLoader
from torchorbax import Checkpointer, ConfigError, SaveError, UnsupportedLeafError, resume
from torchorbax._src.state.pytrees import PytreeItem

from tests.helpers.tensors import bits


def test_a_data_loader_is_refused_and_the_cure_works(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    data = list(range(6))
    with pytest.raises(
        UnsupportedLeafError, match=r"loader: a DataLoader cannot be kept .*StatefulDataLoader"
    ) as caught:
        resume(nn.Linear(1, 1), None, tmp_path, state={"loader": torch.utils.data.DataLoader(data)})
    assert caught.value.name == "loader"
    loader = StatefulDataLoader(data, batch_size=2)
    with resume(nn.Linear(1, 1), None, tmp_path, state={"loader": loader}, save=None) as run:
        next(iter(loader))
        run.save(0, force=True)
    again = StatefulDataLoader(data, batch_size=2)
    with resume(nn.Linear(1, 1), None, tmp_path, state={"loader": again}):
        assert [batch.tolist() for batch in again] == [[2, 3], [4, 5]]
    recwarn.clear()  # torchdata's, of torch


class Holder:
    """An object with any state."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


NEVER: dict[str, tuple[Callable[[], Any], str]] = {
    "an iterator": (lambda: {"batches": iter([1])}, r"x\.batches: a list_iterator cannot be kept"),
    "a function in a state_dict": (lambda: Holder({"schedule": print}), r"x\.schedule: a builtin_function"),
    "a subclass of dict": (
        lambda: Holder(type("Odd", (dict,), {})(a=1)),
        r"x: a Odd cannot .* convert it to a built-in",
    ),
    "a factory": (
        lambda: {"d": defaultdict(lambda: 1)},
        r"x\.d: a defaultdict that makes its values with .* use a dict",
    ),
    "a tensor as a key": (lambda: [{torch.ones(1): 1}], r"x\.0: a Tensor as a key of a mapping cannot be kept"),
    "texts in an array": (lambda: {"a": np.array(["b"])}, r"x\.a: numpy dtype <U1 is not supported"),
    "a masked array": (lambda: {"a": np.ma.masked_array([1.0], [True])}, r"x\.a: a MaskedArray cannot be kept"),
    "a sparse tensor": (lambda: {"a": torch.eye(2).to_sparse()}, r"x\.a: torch torch\.float32 with torch\.sparse_coo"),
    "the system's generator": (random.SystemRandom, r"x: a SystemRandom cannot be kept"),
}


@pytest.mark.parametrize("kind", NEVER)
def test_what_can_never_be_saved_is_refused_at_resume(kind: str, tmp_path: Path) -> None:
    build, message = NEVER[kind]
    with pytest.raises(UnsupportedLeafError, match=message):
        resume(nn.Linear(1, 1), None, tmp_path, state={"x": build()})


def test_a_container_that_is_in_itself_is_refused(tmp_path: Path) -> None:
    tree: dict[str, Any] = {"a": []}
    with Checkpointer(tmp_path, {"x": tree}, save=None) as run:
        tree["a"].append(tree)
        with pytest.raises(UnsupportedLeafError, match=r"x\.a\.0: a dict below it contains itself"):
            run.save(0, force=True)
        tree["a"] = value = []
        for _ in range(150):
            value.append([])
            value = value[0]
        with pytest.raises(UnsupportedLeafError, match=r"x\.a.*nested more than 100 levels deep"):
            run.save(0, force=True)


class Source:
    """Not ready to say where it stands before it is started."""

    def __init__(self) -> None:
        self.at: int | None = None

    def start(self) -> None:
        self.at = self.at or 0

    def state_dict(self) -> dict[str, Any]:
        if self.at is None:
            raise RuntimeError("call start() first")
        return {"at": self.at, "array": torch.ones(2)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


def test_an_object_may_get_ready_after_resume(tmp_path: Path) -> None:
    for life in range(2):
        source = Source()
        with resume(nn.Linear(1, 1), None, tmp_path, state={"source": source}, save=1) as run:
            assert source.at == (None if life == 0 else 1)
            source.start()
            source.at += 1
            run.save(run.next_step)
    reason = r"source: state_dict of Source raised RuntimeError: call start\(\) first"
    with Checkpointer(tmp_path / "other", {"source": Source()}, save=None) as run:
        run.save(0, force=True)
        with pytest.raises(SaveError, match=reason):
            run.wait()


def test_an_object_that_was_not_ready_is_as_it_was_after_a_failed_restore(tmp_path: Path) -> None:
    class Refusing(Holder):
        def load_state_dict(self, state: Any) -> None:
            raise RuntimeError("no")

    source = Source()
    source.start()
    with Checkpointer(tmp_path, {"a": source, "b": Refusing(1)}, save=None) as run:
        run.save(0, force=True)
    source = Source()
    with Checkpointer(tmp_path, {"a": source, "b": Refusing(1)}) as run, pytest.raises(Exception, match="no"):
        run.restore()
    assert source.at is None


@pytest.mark.parametrize(
    "change", [lambda some: some.append(nn.Linear(1, 1)), lambda some: some.__setitem__(0, nn.Identity())]
)
def test_a_list_of_objects_must_stay_what_it_is(change: Callable[[Any], object], tmp_path: Path) -> None:
    some = [nn.Linear(1, 1)]
    with Checkpointer(tmp_path, {"teachers": some}, save=None) as run:
        run.save(0, force=True)
        change(some)
        with pytest.raises(ConfigError, match=r"teachers\.0: the container that it is in has got other entries since"):
            run.save(1, force=True)


def test_entries_that_are_added_later_are_not_lost_silently(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, {"x": 1, "model": nn.Linear(1, 1)}, save=None) as run:
        run.state["x"] = torch.ones(1)
        run.save(0, force=True)
        run.state["y"] = 2
        with pytest.raises(ConfigError, match=r"x: the container that it is in has got other entries since"):
            run.save(1, force=True)
        del run.state["y"]
        run.state["model"] = nn.Linear(1, 1)
        with pytest.raises(ConfigError, match=r"model: the container that it is in has got other entries since"):
            run.save(1, force=True)


def test_a_container_of_objects_must_stay_where_it_is(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, {"some": {"models": [nn.Linear(1, 1)], "epoch": 1}}, save=None) as run:
        run.state["some"]["epoch"] = 2
        run.save(0, force=True)
        run.state["some"]["models"] = [nn.Linear(1, 1)]
        with pytest.raises(ConfigError, match=r"some\.models\.0: the container that it is in has got other entries"):
            run.save(1, force=True)


def test_a_value_beside_objects_in_a_tuple_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"both\.1: a int beside objects in a tuple cannot be replaced .* use a list"):
        Checkpointer(tmp_path, {"both": (nn.Linear(1, 1), 3)})
    Checkpointer(tmp_path, {"both": (nn.Linear(1, 1), [3])}).close()
    Checkpointer(tmp_path, {"both": [nn.Linear(1, 1), 3]}).close()


def test_an_error_of_the_code_is_never_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes as it is, says which item it was about, and no older step is taken."""
    with Checkpointer(tmp_path, {"x": {"a": 1}}, save=None, keep=None) as run:
        run.save(0, force=True)
        run.save(1, force=True)

    def broken(*args: Any) -> Any:
        raise KeyError("a fault of ours")

    monkeypatch.setattr(PytreeItem, "plan", broken)
    with Checkpointer(tmp_path, {"x": {"a": 1}}) as run, pytest.raises(KeyError, match="a fault of ours") as caught:
        run.restore()
    assert any("step 1: while item x, a pytree, was compared" in note for note in caught.value.__notes__)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.isdecimal()) == ["0", "1"]


# ---------------------------------------------------------------------------------------------------------- generators

GENERATORS: dict[str, tuple[Callable[[int], Any], Callable[[Any], Any]]] = {
    "torch": (lambda seed: torch.Generator().manual_seed(seed), lambda one: bits(torch.rand(3, generator=one))),
    "numpy": (np.random.default_rng, lambda one: bits(one.normal(size=3))),
    "numpy, MT19937": (lambda seed: np.random.Generator(np.random.MT19937(seed)), lambda one: bits(one.normal(size=3))),
    "numpy, the bits": (np.random.PCG64DXSM, lambda one: bits(np.random.Generator(one).integers(0, 99, 3))),
    "numpy, the old one": (np.random.RandomState, lambda one: bits(one.randn(3))),
    "python": (random.Random, lambda one: (one.random(), one.gauss(0, 1))),
}


@pytest.mark.parametrize("kind", GENERATORS)
def test_generators_go_on_where_they_were(kind: str, tmp_path: Path) -> None:
    build, draw = GENERATORS[kind]
    live, alone = build(1), build(2)
    with Checkpointer(tmp_path, {"of": {"data": live}, "alone": alone}, save=None) as run:
        for one in (live, alone):
            draw(one)  # leaves half of a pair of normal numbers behind, perhaps
        run.save(0, force=True)
    again, other = build(3), build(4)
    with Checkpointer(tmp_path, {"of": {"data": again}, "alone": other}) as run:
        run.restore()
    assert [draw(again), draw(other)] == [draw(live), draw(alone)]


def test_a_generator_of_another_kind_is_a_mismatch(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, {"rng_of_data": np.random.default_rng(1)}, save=None) as run:
        run.save(0, force=True)
    for other in (np.random.Generator(np.random.MT19937(1)), random.Random(1), torch.Generator()):
        with (
            Checkpointer(tmp_path, {"rng_of_data": other}) as run,
            pytest.raises(Exception, match=r"rng_of_data: placement: expected a state that Generator takes"),
        ):
            run.restore()


@pytest.mark.parametrize("beside", [[], [random.Random(0)]], ids=["values", "objects"])
def test_a_list_that_contains_itself_is_refused_by_name(tmp_path: Path, beside: list[Any]) -> None:
    endless: list[Any] = [*beside]
    endless.append(endless)
    with pytest.raises(UnsupportedLeafError, match=r"endless.*contains itself"):
        resume(nn.Linear(1, 1), None, tmp_path, state={"endless": endless})
