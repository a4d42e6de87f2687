"""The metrics that are stored with a step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from torchorbax import Checkpointer
from torchorbax._src.run.step_metrics import ready

from tests.helpers.fake_runs import fake_run
from tests.helpers.memory_storage import MemoryStorage


def test_what_was_logged_belongs_to_the_save_that_follows(storage: MemoryStorage) -> None:
    with fake_run(storage) as run:
        run.log(loss=1.0, top=2.0)
        run.save(0, metrics={"top": 3.0}, force=True)
        run.save(1, force=True)
        run.wait()
        for step in run.steps(3):
            run.log(loss=5.0)
            run.save(step, force=True)
    assert [storage.committed[step].metrics for step in (0, 1, 2)] == [{"loss": 1.0, "top": 3.0}, {}, {"loss": 5.0}]


class Raises:
    def __float__(self) -> float:
        raise KeyError("x")


METRICS: list[Any] = [
    "1",
    None,
    [1],
    1j,
    10**400,
    np.ones(2),
    jnp.ones(2),
    torch.ones((), device="meta"),
    np.array("x"),
    np.complex64(1j),
    b"1",
    Raises(),
]


@pytest.mark.parametrize("value", METRICS, ids=[type(value).__name__ for value in METRICS])
def test_what_is_no_metric_costs_one_warning_and_not_the_step(
    storage: MemoryStorage, caplog: pytest.LogCaptureFixture, value: Any
) -> None:
    with fake_run(storage, save=1) as run:
        for step in run.steps(3):
            run.log(loss=value, top=2.0)
            run.save(step, metrics={"loss": value})
    assert [storage.committed[step].metrics for step in range(3)] == [{"top": 2.0}] * 3
    assert [record.message.partition(":")[0] for record in caplog.records] == ["run"]
    assert "metric loss is left out, now and without further warnings: it " in caplog.text


@pytest.mark.parametrize("name", [9, "\ud800"], ids=repr)
def test_a_name_that_is_none(storage: MemoryStorage, caplog: pytest.LogCaptureFixture, name: Any) -> None:
    with fake_run(storage) as run:
        run.save(0, metrics={name: 1.0, "loss": 2.0})
    assert storage.committed[0].metrics == {"loss": 2.0}
    assert f"metric {name!a} is left out" in caplog.text


def test_a_metric_that_is_part_of_a_state_that_is_donated(storage: MemoryStorage) -> None:
    """A moving average of the loss, in a functional loop."""
    step = jax.jit(lambda state: {"w": state["w"] * 0.5, "mean": state["mean"] + 1.0}, donate_argnums=0)
    state = {"w": jnp.ones((8, 8)), "mean": jnp.float32(0.0)}
    with Checkpointer("run", {"s": state}, rng=False, save=1, keep=None) as run:
        for index in range(20):
            state = step(state)
            run.save(index, {"s": state}, metrics={"mean": state["mean"]})
    assert [storage.committed[index].metrics["mean"] for index in range(20)] == [*range(1, 21)]


def test_a_metric_over_several_devices_that_is_donated(storage: MemoryStorage, mesh: Mesh) -> None:
    replicated = jax.device_put(jnp.float32(3.0), NamedSharding(mesh, P()))
    storage.gate.clear()
    with fake_run(storage) as run:
        run.save(0, metrics={"loss": replicated})
        replicated.delete()
        storage.gate.set()
    assert storage.committed[0].metrics == {"loss": 3.0}


def test_a_metric_that_is_gone_already(storage: MemoryStorage, caplog: pytest.LogCaptureFixture) -> None:
    gone = jnp.float32(1.0)
    with fake_run(storage) as run:
        run.log(late=gone)
        gone.delete()
        run.save(0, metrics={"loss": gone, "top": 2.0})
    assert storage.committed[0].metrics == {"top": 2.0}
    assert "metric loss is left out, now and without further warnings: its array has been deleted" in caplog.text
    assert "metric late is left out" in caplog.text


def test_a_metric_whose_computation_failed(storage: MemoryStorage, caplog: pytest.LogCaptureFixture) -> None:
    """It is read on the saving thread, when the loop has gone on."""

    class Failed:
        def __array__(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("the device is gone")

    with fake_run(storage, save=None) as run:
        run._saves._metrics.protected = lambda metrics: {**metrics, "loss": Failed()}  # type: ignore[assignment, method-assign]
        run.save(0, metrics={"top": 2.0}, force=True)
    assert storage.committed[0].metrics == {"top": 2.0}
    assert "step 0 is saved without metric loss, which cannot be read: RuntimeError: the device is gone" in caplog.text


def test_the_bar_shows_what_there_is(storage: MemoryStorage) -> None:
    gone = jnp.float32(1.0)
    gone.delete()
    assert ready({"loss": gone, "top": 2.0}) == {"top": "2"}


def test_metrics_are_of_the_moment(storage: MemoryStorage) -> None:
    changing = {"numpy": np.array(1.0), "torch": torch.tensor(1.0, dtype=torch.bfloat16)}
    storage.gate.clear()
    with fake_run(storage) as run:
        run.save(0, metrics=changing, force=True)
        changing["numpy"][...] = changing["torch"][...] = 99
        storage.gate.set()
    assert storage.committed[0].metrics == {"numpy": 1.0, "torch": 1.0}
