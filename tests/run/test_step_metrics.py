"""The metrics that are stored with a step."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torchorbax import ConfigError

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
]


@pytest.mark.parametrize("value", METRICS, ids=repr)
def test_what_is_no_metric(storage: MemoryStorage, value: Any) -> None:
    with fake_run(storage) as run:
        with pytest.raises(ConfigError, match="metric loss must be a real number"):
            run.log(loss=value)
        with pytest.raises(ConfigError, match="the name of a metric must be a string, not 9"):
            run.save(0, metrics={9: 1.0})  # type: ignore[dict-item]
        assert run.all_steps() == []


def test_metrics_are_of_the_moment(storage: MemoryStorage) -> None:
    changing = {"numpy": np.array(1.0), "torch": torch.tensor(1.0, dtype=torch.bfloat16)}
    storage.gate.clear()
    with fake_run(storage) as run:
        run.save(0, metrics=changing, force=True)
        changing["numpy"][...] = changing["torch"][...] = 99
        storage.gate.set()
    assert storage.committed[0].metrics == {"numpy": 1.0, "torch": 1.0}
