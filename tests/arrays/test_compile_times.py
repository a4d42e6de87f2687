"""What tracing and compiling take is counted, and disturbed by no collection of garbage."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torchorbax
from torchorbax._src.arrays import compile_times

from tests.helpers.models import batch_of, loss_fn, seeded


@pytest.fixture(params=["train_step", "eval_step"])
def build(request: pytest.FixtureRequest) -> Callable[[Any], Any]:
    """Makes a step of a function of a model and a batch."""
    model = seeded()
    if request.param == "eval_step":
        return lambda fn: torchorbax.eval_step(model, fn)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return lambda fn: torchorbax.train_step(model, optimizer, fn)


@pytest.fixture
def collecting() -> Iterator[None]:
    yield
    gc.enable()


def test_first_calls_count_and_no_others(build: Callable[[Any], Any]) -> None:
    step = build(loss_fn)
    before = compile_times.total()
    step(batch_of(0))
    first = compile_times.total()
    assert first.trace_s > before.trace_s
    assert first.compile_s > before.compile_s
    step(batch_of(1))
    assert compile_times.total() == first


@pytest.mark.usefixtures("collecting")
@pytest.mark.parametrize("enabled", [True, False])
def test_no_garbage_is_collected_while_a_step_is_traced(build: Callable[[Any], Any], enabled: bool) -> None:
    seen: list[bool] = []

    def fn(model: Any, batch: Any) -> Any:
        seen.append(gc.isenabled())
        if len(seen) == 1:
            raise ArithmeticError("the loss fails")
        return loss_fn(model, batch)

    step = build(fn)
    (gc.enable if enabled else gc.disable)()
    before = compile_times.total()
    with pytest.raises(ArithmeticError, match="the loss fails"):
        step(batch_of(0))
    assert gc.isenabled() == enabled
    assert compile_times.total() == before  # a call that fails does not count
    step(batch_of(0))
    assert gc.isenabled() == enabled
    assert not any(seen)
