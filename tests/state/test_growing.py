"""State that grows or becomes something else while the program runs, and the same program, started again."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch import nn
from torchmetrics import MeanMetric, SumMetric
from torchmetrics.wrappers import MetricTracker, MinMaxMetric, Running
from torchorbax import Checkpointer, MismatchError, UnsupportedLeafError, resume, train_step

from tests.helpers.recipes import Camera

GROWTH: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "a list of numbers": (list, lambda log: [*log, 0.5, 0.25]),
    "a log history": (list, lambda log: [*log, {"step": 1, "loss": 0.5}, {"step": 2, "eval": [1, "x"]}]),
    "a dict that gets keys": (dict, lambda log: {**log, "epoch 1": 0.5, 2: {"nested": None}}),
    "losses as tensors": (list, lambda log: [*log, torch.ones(()), torch.zeros(2)]),
    "arrays of all kinds": (
        list,
        lambda log: [jnp.ones(2), np.ones(3), np.float32(1), torch.ones(1), jax.random.key(3)],
    ),
    "None that becomes a tensor": (lambda: None, lambda log: torch.ones(3)),
    "a tensor that becomes None": (lambda: torch.ones(3), lambda log: None),
    "a tuple that grows": (tuple, lambda log: (*log, 1, "b")),
    "an array that grows": (lambda: np.zeros(1), lambda log: np.append(log, 2.0)),
    "a tensor that becomes an array": (lambda: torch.zeros(2), lambda log: np.ones(2)),
    "an array that goes to the devices": (lambda: np.zeros(2, np.float32), lambda log: jnp.ones(2)),
    "an array that comes from the devices": (lambda: jnp.zeros(2), lambda log: torch.ones(2)),
    "keys of mixed types": (lambda: {"a": torch.ones(1)}, lambda log: {**log, 0: torch.zeros(1), None: 1, (1, "x"): 2}),
    "keys in another order": (lambda: {"b": 1, "a": 2}, lambda log: {"a": 3, "b": 4}),
    "other mappings": (dict, lambda log: {"c": Counter("aab"), "o": OrderedDict(b=1, a=2), "d": defaultdict(int, x=1)}),
}


@pytest.mark.parametrize("kind", GROWTH)
def test_what_has_grown_comes_back(kind: str, lives: Callable[..., Any]) -> None:
    build, grown = GROWTH[kind]
    first, second = lives(lambda: {"log": build()}, lambda state: state.update(log=grown(state["log"])))
    assert Camera().picture(second["log"]) == Camera().picture(first["log"])


def test_containers_that_have_grown_are_still_the_programs_own(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, {"x": {"log": [1], "best": torch.zeros(2)}}, save=None) as run:
        run.state["x"]["log"].append({"loss": 2.0})
        run.state["x"]["best"].fill_(7)
        run.save(0, force=True)
    log, best = [5], torch.ones(2)
    tree = {"log": log, "best": best}
    with Checkpointer(tmp_path, {"x": tree}) as run:
        run.restore()
        assert run.state["x"] is tree
    assert tree["log"] is log
    assert tree["best"] is best
    assert (log, best.tolist()) == ([1, {"loss": 2.0}], [7, 7])


def test_losses_of_train_step_in_a_list_can_be_read_after_a_resume(tmp_path: Path) -> None:
    def life(stop: int) -> list[Any]:
        model = nn.Linear(2, 1)
        step = train_step(model, torch.optim.SGD(model.parameters(), 0.1), lambda model, batch: model(batch).sum())
        with resume(model, None, tmp_path, state={"losses": []}, save=1) as run:
            for _ in run.steps(stop):
                run.state["losses"].append(step(torch.ones(1, 2)))
        return run.state["losses"]

    before = life(2)
    after = life(3)
    assert [float(loss) for loss in after[:2]] == [float(loss) for loss in before]
    assert len(after) == 3


def test_one_tensor_in_two_places_stays_one(lives: Callable[..., Any]) -> None:
    def change(state: Any) -> None:
        shared = [1]
        state["x"]["a"] = state["x"]["more"] = torch.ones(2)
        state["x"]["lists"] = {"one": shared, "other": shared}

    _, second = lives(lambda: {"x": {"a": torch.zeros(2), "b": torch.zeros(2)}}, change)
    tree = second["x"]
    assert tree["a"] is tree["more"]
    assert tree["lists"]["one"] is tree["lists"]["other"]


def test_two_tensors_stay_two_where_the_program_starts_with_one(lives: Callable[..., Any]) -> None:
    def build() -> dict[str, Any]:
        one = torch.zeros(2)
        return {"x": {"a": one, "b": one}}

    _, second = lives(build, lambda state: state["x"].update(b=torch.ones(2)))
    assert second["x"]["a"].tolist() == [0, 0]
    assert second["x"]["b"].tolist() == [1, 1]


class Row(NamedTuple):
    step: int
    loss: float


def test_nodes_of_the_programs_own_types_must_be_there_at_the_start(tmp_path: Path, lives: Callable[..., Any]) -> None:
    with Checkpointer(tmp_path, {"log": []}, save=None) as run:
        run.state["log"].append(Row(1, 0.5))
        with pytest.raises(UnsupportedLeafError, match=r"log\.0: a Row can only be restored where the tree had one"):
            run.save(0, force=True)
    state = {"w": jnp.ones(2)}
    tx = optax.adam(0.1)
    first, second = lives(
        lambda: {"row": Row(0, 0.0), "opt": tx.init(state)},
        lambda live: live.update(row=Row(3, float("nan")), opt=tx.update(state, live["opt"], state)[1]),
    )
    assert repr(second["row"]) == repr(first["row"])
    assert jax.tree.all(jax.tree.map(lambda one, other: bool((one == other).all()), first["opt"], second["opt"]))


def test_a_program_that_was_built_otherwise_is_told_so(tmp_path: Path) -> None:
    with Checkpointer(tmp_path, {"x": {"a": 1, "log": []}}, save=None) as run:
        run.state["x"]["log"].append({"loss": 1.0})
        run.save(0, force=True)
    with (
        Checkpointer(tmp_path, {"x": {"a": 1, "log": [], "b": 2}}) as run,
        pytest.raises(MismatchError, match=r"x: b: expected a value, but it is missing"),
    ):
        run.restore()


class Warmup(torch.optim.lr_scheduler.LRScheduler):
    """Learns something of itself on the way."""

    def get_lr(self) -> list[float]:
        if self.last_epoch == 2:
            self.ended_at = self.last_epoch
        return [base * min(1, (self.last_epoch + 1) / 3) for base in self.base_lrs]


@pytest.mark.parametrize("strict", [True, False])
def test_a_scheduler_with_an_attribute_more(strict: bool, tmp_path: Path) -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer, Warmup]:
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        return model, optimizer, Warmup(optimizer)

    model, optimizer, scheduler = build()
    with resume(model, optimizer, tmp_path, state={"s": scheduler}, save=None) as run:
        for _ in range(4):
            optimizer.step()
            scheduler.step()
        run.save(0, force=True)
    model, optimizer, scheduler = build()
    with resume(model, optimizer, tmp_path, state={"s": scheduler}, strict=strict) as run:
        assert run.left_out == ()
    assert (scheduler.last_epoch, scheduler.ended_at) == (4, 2)


def test_metrics_keep_what_wrappers_have_in_attributes(lives: Callable[..., Any]) -> None:
    def build() -> dict[str, Any]:
        return {"extremes": MinMaxMetric(MeanMetric()), "running": Running(SumMetric(), window=2)}

    def change(state: Any) -> None:
        for value in (5.0, 4.0, 3.0):
            for metric in state.values():
                metric.update(torch.tensor(value))
                metric.compute()

    first, second = lives(build, change)
    for state in (first, second):
        for metric in state.values():
            metric.update(torch.tensor(7.0))
    assert [str(metric.compute()) for metric in second.values()] == [str(metric.compute()) for metric in first.values()]


def test_a_tracker_gets_the_metrics_back_that_it_had(lives: Callable[..., Any]) -> None:
    def change(state: Any) -> None:
        for value in (1.0, 5.0, 2.0):
            state["tracker"].increment()
            state["tracker"].update(torch.tensor(value))

    first, second = lives(lambda: {"tracker": MetricTracker(MeanMetric(), maximize=True)}, change)
    assert second["tracker"].n_steps == 3
    assert second["tracker"].compute_all().tolist() == first["tracker"].compute_all().tolist() == [1, 5, 2]
    assert second["tracker"].best_metric() == 5


def test_what_is_handed_to_save_may_have_grown(tmp_path: Path) -> None:
    start = {"w": jnp.zeros(2), "log": []}
    with Checkpointer(tmp_path, {"s": start}, save=None) as run:
        run.save(0, {"s": {"w": jnp.ones(2), "log": [{"loss": jnp.ones(())}], "extra": 1}}, force=True)
        with pytest.raises(MismatchError, match=r"s: w: expected float32\(2,\), but it is missing"):
            run.save(1, {"s": {"log": []}}, force=True)
        with pytest.raises(MismatchError, match=r"s: w: shape: expected \(2,\), found \(3,\)"):
            run.save(1, {"s": {"w": jnp.ones(3), "log": []}}, force=True)
    with Checkpointer(tmp_path, {"s": {"w": jnp.zeros(2), "log": []}}) as run:
        run.restore()
        assert run.state["s"]["extra"] == 1
        assert float(run.state["s"]["log"][0]["loss"]) == 1


def test_arrays_that_are_new_may_meet_those_of_a_mesh(lives: Callable[..., Any], mesh: Any) -> None:
    sharded = jax.device_put(jnp.ones(8), jax.NamedSharding(mesh, jax.P("fsdp")))
    _, second = lives(lambda: {"x": []}, lambda state: state["x"].append(sharded))
    assert (second["x"][0] + sharded).tolist() == [2] * 8
