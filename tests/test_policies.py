"""When to save and what to keep, as lists of steps under a clock that the test winds."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orbax.checkpoint as ocp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchorbax import ConfigError, policies
from torchorbax._src.run.options import preservation_policy, save_policy

START = datetime.datetime(2030, 1, 1, tzinfo=datetime.UTC)
OBJECT = pytest.param(object(), id="object")


def seconds(number: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=number)


@dataclass
class Step:
    step: int
    time: datetime.datetime
    metrics: dict[str, float] | None = None


@dataclass
class Run:
    """A training loop in which only time passes."""

    save: Any
    step_s: Sequence[float] = (1,)
    """Seconds that the steps take, over and over."""
    save_s: float = 0
    """Seconds from the start of a save until it is committed."""
    preempted_at: int | None = None
    saved: list[Step] = field(default_factory=list)

    def steps(self, stop: int, start: int = 0) -> list[int]:
        """The steps at which a save starts."""
        policy, now, busy_until, before = save_policy(self.save), START, START, len(self.saved)
        for step, duration in zip(range(start, stop), itertools.cycle(self.step_s), strict=False):
            now += seconds(duration)
            context = policies.DecisionContext(
                is_saving_in_progress=now < busy_until,
                reached_preemption=step == self.preempted_at,
                multiprocessing_options=ocp.options.MultiprocessingOptions(),
            )
            candidate = Step(step, now)
            if policy.should_save(candidate, list(self.saved), context=context):
                self.saved.append(candidate)
                busy_until = now + seconds(self.save_s)
        return [one.step for one in self.saved[before:]]


# --------------------------------------------------------------------------------------------------------- shorthands


def test_a_number_saves_every_so_many_steps() -> None:
    assert Run(save=3).steps(11) == [0, 3, 6, 9]
    assert Run(save=1).steps(4) == [0, 1, 2, 3]
    assert Run(save=100).steps(301, start=101) == [200, 300]


def test_a_timedelta_saves_when_so_much_time_has_passed() -> None:
    assert Run(save=seconds(3)).steps(11) == [0, 3, 6, 9]
    assert Run(save=seconds(2.5)).steps(11) == [0, 3, 6, 9]
    assert Run(save=seconds(3), step_s=(1, 1, 5)).steps(9) == [0, 2, 5, 8], "one late step makes one late save"
    assert Run(save=seconds(3), save_s=10).steps(7) == [0, 3, 6], "whatever is in flight: the checkpointer waits for it"


def test_a_timedelta_counts_from_the_step_before_a_restart() -> None:
    assert Run(save=seconds(60), saved=[Step(99, START - seconds(57))]).steps(110, start=100) == [102]


def test_continuous_saves_whenever_none_is_in_flight() -> None:
    assert Run(save="continuous").steps(4) == [0, 1, 2, 3]
    assert Run(save="continuous", save_s=2.5).steps(11) == [0, 3, 6, 9]
    assert Run(save="continuous", save_s=100).steps(11) == [0]
    assert Run(save="continuous", save_s=2.5, step_s=(1, 1, 1, 10)).steps(8) == [0, 3, 6, 7]


def test_none_saves_never() -> None:
    assert Run(save=None, preempted_at=3).steps(10) == []


# -------------------------------------------------------------------------------------------------------- save policies


def test_continuous_with_an_interval() -> None:
    policy = policies.ContinuousPolicy(minimum_interval=seconds(4))
    assert Run(save=policy).steps(11) == [0, 4, 8]
    assert Run(save=policy, save_s=5.5).steps(13) == [0, 6, 12], "the longer of both counts"
    assert Run(save=policy, saved=[Step(9, START - seconds(2))]).steps(20, start=10) == [11, 15, 19]


@given(
    step_s=st.lists(st.integers(0, 5), min_size=1, max_size=8),
    save_s=st.integers(0, 12),
    interval=st.integers(0, 12),
    earlier=st.booleans(),
)
def test_ours_decides_as_orbaxs(step_s: list[int], save_s: int, interval: int, earlier: bool) -> None:
    def steps(policy: Any) -> list[int]:
        saved = [Step(0, START - seconds(3))] if earlier else []
        return Run(policy, step_s=step_s, save_s=save_s, saved=saved).steps(20, start=1)

    orbaxs = policies.ContinuousCheckpointingPolicy(minimum_interval_secs=interval)
    assert steps(policies.ContinuousPolicy(minimum_interval=seconds(interval))) == steps(orbaxs)


def test_orbaxs_policies_work_as_they_are() -> None:
    specific, fixed = policies.SpecificStepsPolicy([1, 4]), policies.FixedIntervalPolicy(3)
    assert Run(save=specific).steps(10) == [1, 4]
    assert Run(save=fixed).steps(10) == [0, 3, 6, 9]
    assert Run(save=policies.InitialSavePolicy()).steps(10, start=5) == [5]
    assert Run(save=policies.PreemptionCheckpointingPolicy(), preempted_at=7).steps(10) == [7]
    assert Run(save=policies.AnySavePolicy([specific, fixed])).steps(8) == [0, 1, 3, 4, 6]
    either = policies.AnySavePolicy([policies.TimeIntervalPolicy(seconds(4)), policies.PreemptionCheckpointingPolicy()])
    assert Run(save=either, preempted_at=5).steps(12) == [0, 4, 5, 9]


def test_any_object_with_should_save_is_a_policy() -> None:
    class OddSteps:
        def should_save(self, step: Any, previous_steps: Any, *, context: Any) -> bool:
            return step.step % 2 == 1

    policy = OddSteps()
    assert save_policy(policy) is policy
    assert Run(save=policy).steps(6) == [1, 3, 5]


@pytest.mark.parametrize(
    "save",
    [0, -1, True, False, 1.5, "often", "", seconds(0), seconds(-1), [10], OBJECT, policies.FixedIntervalPolicy],
    ids=repr,
)
def test_what_is_no_save_policy(save: Any) -> None:
    with pytest.raises(ConfigError, match=r"save must be 'continuous', a positive number of steps.*, not "):
        save_policy(save)


# ---------------------------------------------------------------------------------------------------------------- keep


def kept(keep: Any, saves: Mapping[int, float | None] | Sequence[int], step_s: float = 1) -> list[int]:
    """What is left of these steps (with this loss), when after each save the policy's others are deleted."""
    policy = preservation_policy(keep)
    losses = saves if isinstance(saves, Mapping) else dict.fromkeys(saves)
    there: list[Step] = []
    for step, loss in losses.items():
        there.append(Step(step, START + seconds(step * step_s), None if loss is None else {"loss": loss}))
        stay = policy.should_preserve(there, context=policies.PreservationContext())
        assert len(stay) == len(there)
        there = [one for one, keep in zip(there, stay, strict=True) if keep or one is there[-1]]
    return [one.step for one in there]


def test_a_number_keeps_the_newest() -> None:
    assert kept(3, range(0, 100, 10)) == [70, 80, 90]
    assert kept(1, range(4)) == [3]
    assert kept(9, range(4)) == [0, 1, 2, 3]


def test_none_keeps_all() -> None:
    assert kept(None, range(10)) == list(range(10))


def test_orbaxs_preservation_policies_work_as_they_are() -> None:
    latest, every = policies.LatestN(2), policies.EveryNSteps(4)
    assert kept(latest, range(10)) == [8, 9]
    assert kept(every, range(11)) == [0, 4, 8, 10]
    assert kept(policies.AnyPreservationPolicy([latest, every]), range(11)) == [0, 4, 8, 9, 10]
    assert kept(policies.CustomSteps([2, 3]), range(6)) == [2, 3, 5]
    assert kept(policies.EveryNSeconds(4), range(0, 12, 3)) == [0, 6, 9]
    assert kept(policies.EveryNStepsClosest(10), [0, 4, 9, 12, 18, 21, 26]) == [0, 9, 21, 26]
    assert kept(policies.PreserveAll(), range(5)) == [0, 1, 2, 3, 4]


def test_the_latest_by_the_clock() -> None:
    now = datetime.datetime.now(datetime.UTC)  # Orbax asks the real clock here
    there = [Step(index, now - datetime.timedelta(minutes=minutes)) for index, minutes in enumerate((90, 61, 59, 5))]
    policy = preservation_policy(policies.LatestDuration(datetime.timedelta(hours=1)))
    assert policy.should_preserve(there, context=policies.PreservationContext()) == [False, False, True, True]


def test_the_best_by_a_metric() -> None:
    losses = {0: 0.9, 1: 0.2, 2: 0.5, 3: 0.1, 4: 0.4, 5: 0.7}
    lowest = policies.BestN(get_metric_fn=lambda metrics: metrics["loss"], reverse=True, n=2)
    assert kept(lowest, losses) == [1, 3, 5]
    highest = policies.BestN(get_metric_fn=lambda metrics: metrics["loss"], n=2)
    assert kept(highest, losses) == [0, 5]
    assert kept(lowest, losses | {2: None}) == [1, 2, 3, 5], "Orbax keeps what has no metrics"


def test_any_object_with_should_preserve_is_a_policy() -> None:
    class EvenSteps:
        def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
            return [one.step % 2 == 0 for one in checkpoints]

    policy = EvenSteps()
    assert preservation_policy(policy) is policy
    assert kept(policy, range(6)) == [0, 2, 4, 5]


@pytest.mark.parametrize(
    "keep",
    [0, -1, True, 1.5, "all", [1], seconds(5), OBJECT, policies.LatestN, policies.FixedIntervalPolicy(3)],
    ids=repr,
)
def test_what_is_no_preservation_policy(keep: Any) -> None:
    with pytest.raises(ConfigError, match=r"keep must be a positive number of steps, None \(all\).*, not "):
        preservation_policy(keep)


def test_orbaxs_policies_are_all_there_under_their_own_names() -> None:
    orbaxs = {
        name: value
        for name, value in vars(ocp.checkpoint_managers).items()
        if isinstance(value, type) and "CheckpointManager" not in name
    }
    assert {name: getattr(policies, name) for name in orbaxs} == orbaxs
    assert set(policies.__all__) == {
        *orbaxs,
        *("PreserveAll", "ContinuousPolicy", "TimeIntervalPolicy", "NeverPolicy"),
    }
    assert len(set(policies.__all__)) == len(policies.__all__)
