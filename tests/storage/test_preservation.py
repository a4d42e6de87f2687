"""What a preservation policy may answer, and which steps it ranks below others."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchorbax import policies
from torchorbax._src.storage.preservation import preserved

from tests.helpers.fake_runs import fake_run
from tests.helpers.memory_storage import MemoryStorage


class Answers:
    """A policy that answers with whatever it is given."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Any:
        return self.answer(checkpoints)


def raises(checkpoints: Sequence[Any]) -> list[bool]:
    raise KeyError("mine")


MISTAKES = {
    "too few": (lambda steps: [False] * (len(steps) - 1), "ValueError: .* one bool for each of 3 steps, not 2"),
    "none": (lambda steps: [], "ValueError: .* one bool for each of 3 steps, not 0"),
    "too many": (lambda steps: [False] * (len(steps) + 1), "ValueError: .* one bool for each of 3 steps, not 4"),
    "steps": (
        lambda steps: [one.step for one in steps],
        "TypeError: a policy must answer with True or False, not .*int",
    ),
    "words": (lambda steps: ["no"] * len(steps), "TypeError: a policy must answer .* not with str"),
    "nothing": (lambda steps: None, "TypeError: 'NoneType' object is not iterable"),
    "raises": (raises, "KeyError: 'mine'"),
    "breaks off": (lambda steps: (1 / (one.step - 1) < 0 for one in steps), "ZeroDivisionError|TypeError"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_of_a_policy_deletes_nothing_and_costs_no_save(
    storage: MemoryStorage, caplog: pytest.LogCaptureFixture, mistake: str
) -> None:
    answer, said = MISTAKES[mistake]
    with fake_run(storage, save=1, keep=None) as run:
        list(run.steps(2))
    with fake_run(storage, save=1, keep=Answers(answer)) as run:
        run.save(2)
        run.wait()
    assert storage.steps() == [0, 1, 2]
    assert all(record.error is None for record in run.history)
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == 1
    assert warned[0].startswith("run: keep=Answers does not say which steps to keep after step 2, so all stay: ")
    assert re.search(said, warned[0])


def test_a_policy_that_is_right_again_is_asked_again(storage: MemoryStorage) -> None:
    keep = Answers(raises)
    with fake_run(storage, save=1, keep=keep) as run:
        for step in run.steps(3):
            run.save(step)
            run.wait()
        assert run.all_steps() == [0, 1, 2]
        keep.answer = lambda steps: np.array([one.step == 1 for one in steps])
        run.save(3)
        run.wait()
        assert run.all_steps() == [1, 3]


VALUES = st.sampled_from([0.5, 1.0, 2.0, float("nan"), None])


@given(losses=st.lists(VALUES, min_size=1, max_size=7), reverse=st.booleans(), n=st.integers(1, 4))
def test_a_step_without_the_metric_ranks_below_those_that_have_it(
    losses: list[float | None], reverse: bool, n: int
) -> None:
    """As one whose metric is NaN does. All of them have another metric."""
    sign = 1 if reverse else -1
    keep = policies.BestN(get_metric_fn=lambda metrics: sign * metrics["loss"], reverse=reverse, n=n)
    infos = [Info(step, {"top": 1.0} | ({} if loss is None else {"loss": loss})) for step, loss in enumerate(losses)]
    stay = [info.step for info, kept in zip(infos, preserved(keep, infos), strict=True) if kept]
    numbers = {step: loss for step, loss in enumerate(losses) if loss is not None and loss == loss}
    # No step that is left out is better than one that stays.
    best = sorted(numbers.values())[:n]
    assert sorted(numbers[step] for step in stay if step in numbers)[: len(best)] == best
    if len(numbers) >= n:
        assert set(stay) <= numbers.keys()
    assert len(stay) >= min(n, len(losses))


class Info:
    def __init__(self, step: int, metrics: dict[str, float] | None) -> None:
        self.step, self.metrics = step, metrics


def test_best_and_latest_where_only_some_steps_have_the_metric(storage: MemoryStorage) -> None:
    """As with a validation every third step, in two lives."""
    best = policies.BestN(get_metric_fn=lambda metrics: -metrics["val_loss"], n=2)
    keep = policies.AnyPreservationPolicy([policies.LatestN(1), best])
    losses = itertools.chain([0.5, 0.2, 0.4, 0.3], itertools.repeat(0.9))
    for stop in (6, 13):
        with fake_run(storage, save=1, keep=keep) as run:
            run.restore()
            for step in run.steps(stop):
                run.log(train_loss=1.0)
                if step % 3 == 2:
                    run.log(val_loss=next(losses))
                run.save(step)
                run.wait()
        assert all(record.error is None for record in run.history)
    assert storage.steps() == [5, 11, 12]
