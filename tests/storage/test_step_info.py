"""The time as policies see it, whatever is done to the wall clock between and during the lives of a run."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchorbax import policies
from torchorbax._src.run import checkpointer
from torchorbax._src.storage import step_info
from torchorbax._src.storage.step_info import RunClock

from tests.helpers.fake_runs import fake_run
from tests.helpers.memory_storage import MemoryStorage

START = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)


class Clocks:
    """The two clocks of a machine: one that only goes on, and one that can be set."""

    def __init__(self) -> None:
        self.monotonic_s = 1000.0
        self.set_ahead_s = 0.0

    def monotonic(self) -> float:
        return self.monotonic_s

    def wall(self) -> datetime.datetime:
        return START + datetime.timedelta(seconds=self.monotonic_s + self.set_ahead_s)


@pytest.fixture
def clocks() -> Iterator[Clocks]:
    clocks = Clocks()
    with pytest.MonkeyPatch.context() as patch:
        use(patch, clocks)
        yield clocks


def use(patch: pytest.MonkeyPatch, clocks: Clocks) -> None:
    patch.setattr(step_info, "_read", lambda: step_info._Reading(clocks.wall(), clocks.monotonic_s))
    for module in (step_info, checkpointer):
        patch.setattr(module, "time", SimpleNamespace(monotonic=clocks.monotonic))


YEARS_S = 3e9


@given(
    steps=st.lists(
        st.tuples(st.floats(0, 1e6), st.sampled_from([0.0, 3600.0, -3600.0, YEARS_S, -YEARS_S / 2])), max_size=9
    )
)
def test_durations_within_a_life_are_those_of_the_monotonic_clock(steps: list[tuple[float, float]]) -> None:
    clocks = Clocks()
    with pytest.MonkeyPatch.context() as patch:
        use(patch, clocks)
        clock, moments = RunClock(), []
        for lasts_s, set_by_s in steps:
            clocks.monotonic_s += lasts_s
            clocks.set_ahead_s += set_by_s
            now = clock.now()
            assert now == clocks.wall()
            moments.append(clocks.monotonic_s)
            for then_s in moments:
                ago_s = (now - clock.time_at(then_s)).total_seconds()
                assert ago_s == pytest.approx(clocks.monotonic_s - then_s, abs=1e-5)


SAVE: list[Any] = [datetime.timedelta(hours=1), policies.ContinuousPolicy(minimum_interval=datetime.timedelta(hours=1))]


@pytest.mark.parametrize("save", SAVE, ids=["interval", "continuous"])
@pytest.mark.parametrize("set_by_s", [0.0, -7200.0, YEARS_S, -YEARS_S / 2])
def test_a_clock_that_is_set_changes_no_interval(
    storage: MemoryStorage, clocks: Clocks, save: Any, set_by_s: float
) -> None:
    with fake_run(storage, save=save, keep=None) as run:
        for step in range(7):
            if step == 2:
                clocks.set_ahead_s = set_by_s
            run.save(step)
            run.wait()
            clocks.monotonic_s += 1200.0
        assert run.all_steps() == [0, 3, 6]


@pytest.mark.parametrize("save", SAVE, ids=["interval", "continuous"])
def test_a_step_from_the_future_does_not_stop_saving(storage: MemoryStorage, clocks: Clocks, save: Any) -> None:
    clocks.set_ahead_s = YEARS_S
    with fake_run(storage, save=save, keep=None) as run:
        run.save(0)
    assert storage.committed[0].time.year > 2100
    clocks.set_ahead_s = 0.0
    with fake_run(storage, save=save, keep=None) as run:
        for step in range(1, 8):
            run.save(step)
            run.wait()
            clocks.monotonic_s += 1200.0
        assert run.all_steps() == [0, 4, 7], "an interval after the start of this life at the latest"


def test_an_interval_counts_from_the_step_before_a_restart(storage: MemoryStorage, clocks: Clocks) -> None:
    save = datetime.timedelta(hours=1)
    for step in itertools.count(0, 10):
        with fake_run(storage, save=save, keep=None) as run:
            for number in range(step, step + 2):
                run.save(number)
                run.wait()
                clocks.monotonic_s += 600.0
        if step == 30:
            break
    assert storage.steps() == [0, 30], "two steps in each life of twenty minutes"


def test_what_is_written_is_the_wall_clock(storage: MemoryStorage, clocks: Clocks) -> None:
    with fake_run(storage, save=1) as run:
        run.save(0)
        clocks.set_ahead_s = -7200.0
        run.save(1)
    times = [START + datetime.timedelta(seconds=clocks.monotonic_s + ahead_s) for ahead_s in (0.0, -7200.0)]
    assert [storage.committed[step].time for step in (0, 1)] == times
    assert [record.time for record in run.history] == times


def test_the_latest_by_the_clock_are_kept_by_their_ages(storage: MemoryStorage, clocks: Clocks) -> None:
    """Orbax's policy asks the wall clock itself, and ages are counted back from there."""
    now = datetime.datetime.now(datetime.UTC)
    clocks.set_ahead_s = (now - START).total_seconds() - clocks.monotonic_s
    keep = policies.LatestDuration(datetime.timedelta(hours=1))
    with fake_run(storage, save=1, keep=keep) as run:
        for step in range(6):
            run.save(step)
            run.wait()
            clocks.monotonic_s += 1200.0
            clocks.set_ahead_s -= 1200.0  # the real clock stands still in a test, as far as this policy sees
        assert run.all_steps() == [3, 4, 5]
