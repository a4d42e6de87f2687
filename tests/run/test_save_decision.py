"""Whether a step is saved: by policy, by force, and by process 0 for all."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchorbax import Checkpointer, policies
from torchorbax._src.distributed.processes import Processes
from torchorbax._src.run import save_decision as deciding
from torchorbax._src.run.preemption import PreemptionNotice
from torchorbax._src.run.save_decision import Decider

from tests.helpers.coordination import LONG_S, FakeService, World, error_of, three
from tests.helpers.fake_runs import fake_run
from tests.helpers.memory_storage import MemoryStorage
from tests.helpers.several import Facts, RunProcesses, alike, facts_of
from tests.helpers.several_state import spread


def test_force_saves_whatever_the_policy_says(storage: MemoryStorage) -> None:
    with fake_run(storage, save=None) as run:
        assert not run.save(0)
        assert run.save(1, force=True)
        run.wait()
    assert storage.steps() == [1]


def test_a_save_policy_sees_steps_times_and_context(storage: MemoryStorage) -> None:
    seen: list[tuple[int, list[int], bool, bool]] = []

    class Recorder:
        def should_save(self, step: Any, previous_steps: Any, *, context: Any) -> bool:
            assert all(info.time.tzinfo is not None for info in [step, *previous_steps])
            previous = [info.step for info in previous_steps]
            seen.append((step.step, previous, context.is_saving_in_progress, context.reached_preemption))
            return step.step in (0, 2)

    with fake_run(storage, save=Recorder()) as run:
        for step in range(3):
            run.save(step)
            run.wait()
        storage.gate.clear()
        run.save(3, force=True)
        run.save(4)
        storage.gate.set()
    assert seen == [
        (0, [], False, False),
        (1, [0], False, False),
        (2, [0], False, False),
        (4, [0, 2, 3], True, False),
    ]


class Answers:
    """A policy that gives these answers, one after the other; an exception is raised."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)

    def should_save(self, step: Any, previous_steps: Any, *, context: Any) -> Any:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


MISTAKES = [KeyError("mine"), None, "no", 1, [False]]


@pytest.mark.parametrize("mistake", MISTAKES, ids=repr)
def test_a_save_policy_that_makes_a_mistake_costs_a_warning_and_no_step(
    storage: MemoryStorage, caplog: pytest.LogCaptureFixture, mistake: Any
) -> None:
    with fake_run(storage, save=Answers(mistake, mistake, False, np.bool_(True), mistake)) as run:
        assert run.save(0)
        run.wait()
        assert run.save(1), "without an answer, a step is saved if no save is in flight"
        run.wait()
        assert not run.save(2), "it is asked again"
        storage.gate.clear()
        assert run.save(3)
        assert not run.save(4)
        storage.gate.set()
    assert storage.steps() == [0, 1, 3]
    warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == 1, "once for each kind of mistake"
    assert warned[0].startswith("run: save=Answers does not say whether to save, so a step is saved whenever no save ")
    assert ("KeyError: 'mine'" if isinstance(mistake, KeyError) else "TypeError: a policy must answer") in warned[0]


def test_processes_that_each_ask_a_policy_agree_on_its_mistake(service: FakeService) -> None:
    """Whether a save is in flight may differ between them."""
    policy = policies.FixedIntervalPolicy(0)
    deciders = [
        Decider(Processes(LONG_S, service, index, 2, "run"), "a", policy, PreemptionNotice()) for index in (0, 1)
    ]
    assert all(decider.is_asked_everywhere for decider in deciders)
    one = Decider(Processes(LONG_S, service, 0, 1, "run"), "a", policy, PreemptionNotice())
    assert not one.is_asked_everywhere


def test_a_step_without_a_save_costs_microseconds(storage: MemoryStorage) -> None:
    """Structurally: nothing of the state is looked at, and nothing is allocated for it."""
    looked: list[str] = []

    class Watched:
        def state_dict(self) -> dict[str, Any]:
            looked.append("state_dict")
            return {}

        def load_state_dict(self, state: Any) -> None: ...

    with Checkpointer("run", {"watched": Watched()}, save=1000, rng=False) as run:
        run.save(0)
        run.wait()
        looked.clear()
        for step in range(1, 100):
            run.save(step)
    assert looked == []


def test_timedelta_policy(storage: MemoryStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_run(storage, save=datetime.timedelta(hours=1)) as run:
        assert run.save(0)
        run.wait()
        assert not run.save(1)


class OnlyAfter:
    """A policy of a user's own, of which nothing is known."""

    def should_save(self, step: Any, previous_steps: Any, *, context: Any) -> bool:
        return False


class Deciders:
    """Every process calls `due` for each of some steps."""

    def __init__(self, world: World, policy: object) -> None:
        self.world = world
        self.notices = [PreemptionNotice() for _ in world.processes]
        self.deciders = [
            Decider(one, "decide", policy, notice) for one, notice in zip(world.processes, self.notices, strict=True)
        ]
        self.asked: list[list[int]] = [[] for _ in world.processes]

    def run(
        self,
        steps: range,
        says: Callable[[int, int], bool],
        before: Callable[[int, int], None] = lambda index, step: None,
    ) -> list[Any]:
        """By process, the steps that were due, and the first 50 at which it knew of SIGTERM; or an error."""

        def body(index: int) -> tuple[list[int], list[int]]:
            due, preempted = [], []
            for step in steps:
                before(index, step)
                if self.deciders[index].due(lambda step=step: self._ask(index, step, says)):  # type: ignore[misc]
                    due.append(step)
                if self.deciders[index].preempted:
                    preempted.append(step)
                if len(preempted) == 50:
                    break
            return due, preempted

        return self.world.run(body)

    def _ask(self, index: int, step: int, says: Callable[[int, int], bool]) -> bool:
        self.asked[index].append(step)
        return says(index, step)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time as process 0 sees it, to be set."""
    now = [100.0]

    class Clock:
        @staticmethod
        def monotonic() -> float:
            return now[0]

    monkeypatch.setattr(deciding, "time", Clock)
    return now


STEP_POLICY = policies.FixedIntervalPolicy(7)

TIME_POLICY = policies.ContinuousPolicy()


def test_a_policy_about_steps_is_asked_everywhere(service: FakeService) -> None:
    deciders = Deciders(three(service), STEP_POLICY)
    found = deciders.run(range(100), lambda index, step: step % 7 == 0)
    assert [due for due, _ in found] == [[*range(0, 100, 7)]] * 3
    assert deciders.asked == [[*range(100)]] * 3


@pytest.mark.parametrize("policy", [TIME_POLICY, OnlyAfter()], ids=["continuous", "a user's own"])
def test_any_other_policy_is_asked_in_process_0_alone(policy: object, service: FakeService) -> None:
    """Here every process would say something else."""
    deciders = Deciders(three(service), policy)
    found = deciders.run(range(300), lambda index, step: (step + index) % 3 == 0)
    first = found[0][0]
    assert first
    assert [due for due, _ in found] == [first] * 3
    assert deciders.asked[1:] == [[], []]


def test_a_policy_of_the_users_own_is_asked_at_every_call(service: FakeService) -> None:
    deciders = Deciders(three(service), OnlyAfter())
    found = deciders.run(range(50), lambda index, step: step in (3, 4, 31))
    assert deciders.asked[0] == [*range(50)]
    assert [due for due, _ in found] == [[3, 4, 31]] * 3


@pytest.mark.parametrize("policy", [STEP_POLICY, TIME_POLICY], ids=["steps", "time"])
def test_a_step_without_a_save_hardly_costs_a_message(policy: object, service: FakeService, clock: list[float]) -> None:
    deciders = Deciders(three(service), policy)

    def ticks(index: int, step: int) -> None:
        if index == 0:
            clock[0] += 0.001

    deciders.run(range(20_000), lambda index, step: False, ticks)
    rounds = 4 + 20_000 // 16  # the lease doubles up to 16 steps
    assert service.calls["set"] <= rounds * 1.02 + 5  # and what tidying up takes
    assert service.calls["dir"] <= rounds + 5 + service.calls["get"]
    for asked in deciders.asked[1:]:
        assert len(asked) == (20_000 if policy is STEP_POLICY else 0)


def test_slow_steps_are_asked_about_one_by_one(service: FakeService, clock: list[float]) -> None:
    deciders = Deciders(three(service), TIME_POLICY)

    def ticks(index: int, step: int) -> None:
        if index == 0:
            clock[0] += 1.0

    found = deciders.run(range(30), lambda index, step: step in (11, 12), ticks)
    assert [due for due, _ in found] == [[11, 12]] * 3
    assert deciders.asked[0] == [*range(30)]


def test_a_policy_about_time_is_asked_about_twice_a_second(service: FakeService, clock: list[float]) -> None:
    deciders = Deciders(three(service), policies.TimeIntervalPolicy(datetime.timedelta(seconds=10)))

    def ticks(index: int, step: int) -> None:
        if index == 0:
            clock[0] += 0.06

    deciders.run(range(600), lambda index, step: False, ticks)
    gaps = [later - earlier for earlier, later in zip(deciders.asked[0], deciders.asked[0][1:], strict=False)]
    assert max(gaps) <= 9
    assert min(gaps[10:]) >= 7


def test_sixteen_steps_at_most_go_by_when_steps_become_slow(service: FakeService, clock: list[float]) -> None:
    deciders = Deciders(three(service), TIME_POLICY)

    def ticks(index: int, step: int) -> None:
        if index == 0:
            clock[0] += 0.0001 if step < 500 else 10.0

    deciders.run(range(540), lambda index, step: False, ticks)
    asked = [step for step in deciders.asked[0] if step >= 500]
    assert asked[0] < 516
    assert len(asked) >= 20


@pytest.mark.parametrize("policy", [STEP_POLICY, TIME_POLICY, OnlyAfter()], ids=["steps", "time", "a user's own"])
@pytest.mark.parametrize("which", [0, 2])
def test_sigterm_in_one_process_is_known_to_all_at_the_same_call(
    which: int, policy: object, service: FakeService
) -> None:
    deciders = Deciders(three(service), policy)

    def before(index: int, step: int) -> None:
        if index == which and step == 40:
            deciders.notices[index].received = True

    found = deciders.run(range(1_000_000), lambda index, step: False, before)  # process 0 may be far ahead
    known = found[0][1]
    assert known == [*range(known[0], known[0] + 50)]
    assert known[0] >= 40
    assert [preempted for _, preempted in found] == [known] * 3


def test_one_process_looks_at_its_own_notice() -> None:
    notice = PreemptionNotice()
    decider = Decider(Processes(LONG_S, None, 0, 1), "decide", TIME_POLICY, notice)
    assert decider.due(lambda: True)
    assert not decider.preempted
    notice.received = True
    assert decider.preempted


def test_all_others_hear_of_a_process_that_has_failed(service: FakeService) -> None:
    deciders = Deciders(three(service), TIME_POLICY)

    def before(index: int, step: int) -> None:
        if index == 1 and step == 10:
            deciders.world.processes[1].fail("ValueError: boom")
            deciders.world.processes[1].close()
            raise ValueError("boom")

    found = deciders.run(range(1_000_000), lambda index, step: False, before)
    for index in (0, 2):
        error_of(found[index], "process 1 has left the run: ValueError: boom", (1,), "decide")
    assert isinstance(found[1], ValueError)


def test_all_others_hear_that_process_0_has_failed(service: FakeService) -> None:
    deciders = Deciders(three(service), TIME_POLICY)

    def before(index: int, step: int) -> None:
        if index == 0 and step == 10:
            deciders.world.processes[0].fail("ValueError: boom")
            deciders.world.processes[0].close()
            raise ValueError("boom")

    found = deciders.run(range(1_000_000), lambda index, step: False, before)
    for index in (1, 2):
        error_of(found[index], "process 0 has left the run: ValueError: boom", (0,), "decide")


def test_a_long_run_leaves_no_keys_behind(service: FakeService) -> None:
    deciders = Deciders(World(service, 2, LONG_S), OnlyAfter())
    most = [0]

    def before(index: int, step: int) -> None:
        most[0] = max(most[0], len(service.values))

    found = deciders.run(range(2_000), lambda index, step: step % 500 == 0, before)
    assert [due for due, _ in found] == [[0, 500, 1000, 1500]] * 2
    assert most[0] <= deciding._ROUNDS_KEPT + 8


DECIDE = """
    import datetime, random, time, warnings
    import torchorbax
    from torchorbax import Checkpointer, policies
    from tests.helpers.several_state import VALUES, spread

    root = sys.argv[1]
    random.seed(index)

    class ByTime:
        def should_save(self, step, previous_steps, *, context):
            return not previous_steps or (step.time - previous_steps[-1].time).total_seconds() > 0.02 * (1 + index)

    class ByChance:
        def should_save(self, step, previous_steps, *, context):
            return random.random() < 0.2

    def go(name, save, steps, pause_s=0.0, keep=None):
        state = {"state": {"w": spread(VALUES)}}
        with Checkpointer(f"{root}/{name}", state, save=save, keep=keep, rng=False, barrier_timeout_s=60) as run:
            for i in range(steps):
                time.sleep(pause_s * (1 + 2 * index))
                run.save(i, metrics={"loss": abs(i - 3.5 + index * 2), "mine": index})
            run.wait()
            note(**{name: dict(
                started=[one.step for one in run.history], there=run.all_steps(), best=run.best_step("loss"),
                most=run.best_step("loss", mode="max"), metrics={one.step: one.metrics for one in run.history},
            )})

    go("steps", 1, 6)
    go("best", 1, 8, keep=policies.BestN(get_metric_fn=lambda metrics: metrics["loss"], reverse=True, n=2))
    go("clock", policies.TimeIntervalPolicy(datetime.timedelta(seconds=0.1)), 300, 0.002)
    go("own-clock", ByTime(), 60, 0.002)
    go("chance", ByChance(), 40)
    go("continuous", "continuous", 300, 0.001)
    go("any", policies.AnySavePolicy([policies.FixedIntervalPolicy(50), ByChance()]), 60)
"""


@pytest.fixture(scope="module")
def decided(folder: Path, run_processes: RunProcesses) -> Facts:
    return facts_of(run_processes(DECIDE, folder / "decided", devices=2))


def test_the_metrics_stored_are_those_of_process_0(decided: Facts, folder: Path) -> None:
    found = alike(decided, "steps")
    assert found["metrics"] == {str(step): {"loss": abs(step - 3.5), "mine": 0} for step in range(6)}
    assert (found["best"], found["most"]) == (3, 0)
    later = Checkpointer(folder / "decided" / "steps", {"state": {"w": spread(np.zeros(8))}}, rng=False)
    assert (later.best_step("loss"), later.best_step("loss", mode="max")) == (3, 0)
    later.close()


def test_what_is_kept_is_kept_by_the_metrics_of_process_0(decided: Facts) -> None:
    found = alike(decided, "best")
    assert found["started"] == [*range(8)]
    assert found["there"] == [3, 4, 7]
    assert found["best"] == 3


@pytest.mark.parametrize("policy", ["clock", "own-clock", "chance", "continuous", "any"])
def test_every_process_saves_the_steps_that_process_0_chooses(policy: str, decided: Facts) -> None:
    found = alike(decided, policy)
    assert 2 <= len(found["started"]) < 300
    assert found["there"] == found["started"]
