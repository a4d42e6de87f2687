"""References to the last complete step: they give the state as it was, or nothing."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchorbax._src.run.last_step import LastStep, References
from torchorbax._src.state.item import Captured

NOW = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
PLENTY = 1 << 30


class Clock:
    """A clock that stands still, unless somebody moves it."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def references_to(leaves: Mapping[str, Any], most_host_bytes: int = PLENTY) -> LastStep | None:
    captured = {"w": Captured("pytree", leaves, values={"lr": 0.5})}
    return References(most_host_bytes).take(7, NOW, {"loss": 1.0}, lambda: captured)


def values_of(last: LastStep | None) -> dict[str, np.ndarray] | None:
    assert last is not None
    captured = last.captured()
    return None if captured is None else {name: np.asarray(leaf) for name, leaf in captured["w"].leaves.items()}


@jax.jit
def plus_one(x: jax.Array) -> jax.Array:
    return x + 1


plus_one_donating = jax.jit(lambda x: x + 1, donate_argnums=0)
SIZES = pytest.mark.parametrize("size", [1, 100_000], ids=["small", "large"])


@SIZES
def test_arrays_that_nothing_has_replaced_give_the_state(size: int) -> None:
    live = {"jax": jnp.full(size, 2.0), "torch": torch.full((size,), 3.0), "numpy": np.full(size, 4.0)}
    last = references_to(live)
    live["torch"] += 1
    live["numpy"] += 1
    values = values_of(last)
    assert values is not None
    assert {name: set(value) for name, value in values.items()} == {"jax": {2.0}, "torch": {3.0}, "numpy": {4.0}}
    assert last is not None
    assert (last.step, last.time, last.metrics) == (7, NOW, {"loss": 1.0})
    assert last.captured()["w"].values == {"lr": 0.5}  # type: ignore[index]  # the state is there


@SIZES
def test_an_array_that_has_been_donated_gives_nothing(size: int) -> None:
    live = {"w": jnp.zeros(size), "other": jnp.ones(size)}
    last = references_to(live)
    live["w"] = plus_one_donating(live["w"])
    assert values_of(last) is None


def test_a_large_array_that_has_been_replaced_is_not_kept_alive() -> None:
    live = {"w": jnp.zeros(100_000)}
    last = references_to(live)
    live["w"] = plus_one(live["w"])
    assert values_of(last) is None


def test_small_arrays_that_nobody_else_has_are_kept() -> None:
    values = values_of(references_to({"key": jnp.arange(4)}))
    assert values is not None
    assert list(values["key"]) == [0, 1, 2, 3]


def test_state_in_host_memory_beyond_the_limit_is_not_copied() -> None:
    state = {"a": np.zeros(10), "b": torch.zeros(10)}
    assert references_to(state, most_host_bytes=120) is not None
    assert references_to(state, most_host_bytes=119) is None


def test_a_state_that_cannot_be_saved_is_left_to_the_next_save() -> None:
    assert references_to({"w": torch.zeros(3, device="meta")}) is None
    gone = jnp.zeros(3)
    gone.delete()
    assert values_of(references_to({"w": gone})) is None


@given(st.floats(0.001, 10.0), st.lists(st.floats(0.0, 100.0), min_size=1, max_size=60))
def test_references_cost_a_hundredth_of_the_time_and_half_a_second(cost_s: float, steps_s: list[float]) -> None:
    clock = Clock()
    references = References(PLENTY, clock)
    taken = 0

    def capture() -> dict[str, Captured]:
        clock.now_s += cost_s
        return {}

    for step_s in steps_s:
        clock.now_s += step_s
        taken += references.take(0, NOW, {}, capture) is not None
        # The one that is in progress when the limit is reached is finished.
        assert (taken - 1) * cost_s <= 0.01 * clock.now_s + 0.5 + 1e-6


def test_long_steps_all_have_references_and_so_has_a_short_beginning() -> None:
    clock = Clock()
    references = References(PLENTY, clock)

    def taken(step_s: float, cost_s: float, steps: int) -> list[bool]:
        def capture() -> dict[str, Captured]:
            clock.now_s += cost_s
            return {}

        found = []
        for _ in range(steps):
            clock.now_s += step_s
            found.append(references.take(0, NOW, {}, capture) is not None)
        return found

    assert all(taken(step_s=0.001, cost_s=0.004, steps=100))
    assert sum(taken(step_s=0.001, cost_s=0.004, steps=10_000)) < 200
    assert all(taken(step_s=0.5, cost_s=0.004, steps=100))
