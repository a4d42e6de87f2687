"""How processes agree: threads that play processes, on a coordination service in memory."""

from __future__ import annotations

import datetime
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import pytest
from torchorbax import policies
from torchorbax._src.distributed.channel import Channel
from torchorbax._src.distributed.processes import Processes
from torchorbax._src.run import save_decision as deciding
from torchorbax._src.run.preemption import PreemptionNotice
from torchorbax._src.run.save_decision import Decider
from torchorbax.errors import ConfigError, ProcessError

from tests.helpers.coordination import FakeService, contract
from tests.helpers.several import RunProcesses

LONG_S = 60.0
"""More than any test takes: who waits for so long hangs."""


@pytest.fixture
def service() -> FakeService:
    return FakeService()


class World:
    """Some processes of one run, each with its own `Processes`."""

    def __init__(self, service: FakeService, count: int, timeout_s: float) -> None:
        self.processes = [Processes(timeout_s, service, index, count) for index in range(count)]
        for one in self.processes:
            one.name = "torchorbax/test"  # in one process they would count as several runs

    def channels(self, name: str = "run") -> list[Channel]:
        return [Channel(one, name) for one in self.processes]

    def run(self, body: Callable[[int], Any], *, only: tuple[int, ...] | None = None) -> list[Any]:
        """What `body(index)` gives in each process, or the error that it raises."""
        results: list[Any] = [None] * len(self.processes)

        def work(index: int) -> None:
            try:
                results[index] = body(index)
            except Exception as error:
                results[index] = error

        indices = range(len(self.processes)) if only is None else only
        threads = [threading.Thread(target=work, args=(index,), daemon=True) for index in indices]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG_S / 2)
            assert not thread.is_alive(), "a process hangs"
        return results


def three(service: FakeService, timeout_s: float = LONG_S) -> World:
    return World(service, 3, timeout_s)


def error_of(result: Any, match: str, processes: tuple[int, ...], phase: str) -> ProcessError:
    assert isinstance(result, ProcessError), result
    assert match in str(result)
    assert (result.processes, result.phase) == (processes, phase)
    return result


# ------------------------------------------------------------------------------------------------------- the service


def test_the_service_of_these_tests_answers_like_that_of_jax(run_processes: RunProcesses) -> None:
    program = """
        from tests.helpers.coordination import contract
        tell(json.dumps(contract(service)))
    """
    (real,) = run_processes(program, processes=1, devices=1)
    assert json.loads(real.stdout) == contract(FakeService())


# --------------------------------------------------------------------------------------------------------- agreements


def test_process_0_gathers_in_order_and_nobody_else_waits(service: FakeService) -> None:
    world = three(service)
    channels = world.channels()
    assert world.run(lambda index: channels[index].gather("count", {"mine": index}), only=(1, 2)) == [None] * 3
    found = world.run(lambda index: channels[index].gather("count", {"mine": index}), only=(0,))[0]
    assert found == [{"mine": 0}, {"mine": 1}, {"mine": 2}]


def test_all_hear_what_process_0_publishes(service: FakeService) -> None:
    channels = (world := three(service)).channels()
    assert world.run(lambda index: channels[index].publish("say", ["of", index])) == [["of", 0]] * 3


def test_everyone_hears_from_everyone_round_after_round(service: FakeService) -> None:
    channels = (world := three(service)).channels()
    rounds = world.run(lambda index: [channels[index].everyone("round", [index, i]) for i in range(20)])
    assert rounds == [[[[0, i], [1, i], [2, i]] for i in range(20)]] * 3


def test_channels_and_sequences_do_not_mix(service: FakeService) -> None:
    """A save that has broken off in one process leaves the next one alone."""
    world = three(service)
    save, run = world.channels("save"), world.channels("run")

    def body(index: int) -> Any:
        save[index].begin(1)
        save[index].gather("start", "first") if index else None  # process 0 has given up
        save[index].begin(2)
        return save[index].everyone("start", f"second {index}"), run[index].everyone("start", index)

    assert world.run(body) == [(["second 0", "second 1", "second 2"], [0, 1, 2])] * 3


def test_an_attempt_succeeds_with_everybodys_own_result(service: FakeService) -> None:
    channels = (world := three(service)).channels()
    assert world.run(lambda index: channels[index].attempt("open", lambda: 10 * index)) == [0, 10, 20]


@pytest.mark.parametrize("which", [0, 2])
def test_an_attempt_that_fails_in_one_process_fails_in_all(which: int, service: FakeService) -> None:
    channels = (world := three(service)).channels()

    def action(index: int) -> None:
        if index == which:
            raise ConfigError("no room")

    results = world.run(lambda index: channels[index].attempt("open", lambda: action(index)))
    assert isinstance(results[which], ConfigError)  # as it was raised
    for index in {0, 1, 2} - {which}:
        error_of(results[index], f"open: process {which}: ConfigError: no room", (which,), "open")


def test_one_process_agrees_with_itself_without_a_service() -> None:
    channel = Channel(alone := Processes(LONG_S, None, 0, 1), "run")
    alone.tell("anything")
    assert channel.gather("a", 1) == [1]
    assert channel.publish("b", 2) == 2
    assert channel.everyone("c", 3) == [3]
    assert channel.attempt("d", lambda: 4) == 4
    assert alone.told() == {}


def test_several_processes_without_a_service_are_told_so() -> None:
    with pytest.raises(ConfigError, match=r"2 processes without jax.distributed.initialize\(\) cannot agree"):
        Processes(1.0, None, 0, 2)


@pytest.mark.parametrize("timeout_s", [0, -1, True, "5", None, float("nan")])
def test_a_timeout_is_a_positive_number(timeout_s: Any) -> None:
    with pytest.raises(ConfigError, match="barrier_timeout_s must be a positive number of seconds"):
        Processes(timeout_s, None, 0, 1)


# ----------------------------------------------------------------------------------------------------------- time-outs


def test_who_has_not_come_in_time_is_named_with_the_phase_everywhere(service: FakeService) -> None:
    world = World(service, 4, 2.0)
    channels = world.channels()
    started = time.monotonic()
    results = world.run(lambda index: channels[index].everyone("write", index), only=(0, 2))
    assert time.monotonic() - started < 10
    for index in (0, 2):
        error = error_of(results[index], "process 1, process 3 did not come within 2 s", (1, 3), "write")
        assert "barrier_timeout_s" in str(error)


def test_a_process_0_that_does_not_come_is_named(service: FakeService) -> None:
    channels = (world := three(service, 0.5)).channels()
    results = world.run(lambda index: channels[index].everyone("write", index), only=(1, 2))
    for index in (1, 2):
        error_of(results[index], "process 0 did not come within 0.5 s", (0,), "write")


def test_a_slow_process_is_waited_for(service: FakeService) -> None:
    channels = (world := three(service, 20.0)).channels()

    def body(index: int) -> Any:
        if index == 2:
            while service.calls["get"] < 4:  # the others have waited, and looked who has left, once or twice
                time.sleep(0.01)
        return channels[index].everyone("write", index)

    assert world.run(body) == [[0, 1, 2]] * 3


def test_a_service_that_fails_is_process_0_gone(service: FakeService) -> None:
    channels = (world := three(service)).channels()
    service.broken = "UNAVAILABLE: failed to connect"
    result = world.run(lambda index: channels[index].publish("steps"), only=(1,))[1]
    error_of(
        result, "the coordination service of jax.distributed, which process 0 runs, says UNAVAILABLE", (0,), "steps"
    )
    assert isinstance(result.__cause__, jax.errors.JaxRuntimeError)


# ---------------------------------------------------------------------------------------------------------- departures


@pytest.mark.parametrize("gone", [0, 1])
def test_nobody_waits_for_a_process_that_has_closed_the_run(gone: int, service: FakeService) -> None:
    channels = (world := three(service)).channels()
    world.processes[gone].close()
    others = tuple(sorted({0, 1, 2} - {gone}))
    results = world.run(lambda index: channels[index].everyone("write", index), only=others)
    for index in others:
        error_of(results[index], f"process {gone} has left the run: it has closed the run", (gone,), "write")


def test_the_reason_why_a_process_has_left_is_told(service: FakeService) -> None:
    channels = (world := three(service)).channels()
    world.processes[1].fail("ValueError: boom")
    world.processes[1].close()
    results = world.run(lambda index: channels[index].everyone("write", index), only=(0, 2))
    for index in (0, 2):
        error_of(results[index], "process 1 has left the run: ValueError: boom", (1,), "write")


def test_what_a_process_said_before_it_left_counts(service: FakeService) -> None:
    channels = (world := three(service)).channels()
    for index in (1, 2):
        channels[index].gather("write", index)
        world.processes[index].close()
    assert channels[0].gather("write", 0) == [0, 1, 2]


def test_what_a_process_said_right_before_it_left_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says it and leaves just when somebody who has waited in vain looks whether it has left."""

    class JustThen(FakeService):
        def key_value_dir_get(self, key: str) -> list[tuple[str, str]]:
            if not self.calls["dir"]:
                channels[1].gather("write", 1)
                world.processes[1].close()
            return super().key_value_dir_get(key)

    monkeypatch.setattr("torchorbax._src.distributed.channel._POLL_S", 0.05)
    channels = (world := World(JustThen(), 2, LONG_S)).channels()
    assert channels[0].gather("write", 0) == [0, 1]


def test_a_process_that_has_failed_takes_part_but_waits_no_longer_than_it_must(
    service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchorbax._src.distributed.processes.LAST_WAIT_S", 0.3)
    channels = (world := three(service)).channels()
    for one in world.processes:
        one.fail("KeyError: 'x'")
    assert world.run(lambda index: channels[index].everyone("end", index)) == [[0, 1, 2]] * 3
    started = time.monotonic()
    result = world.run(lambda index: channels[index].everyone("end", index), only=(0,))[0]
    assert time.monotonic() - started < LONG_S / 4
    error_of(result, "process 1, process 2 did not come", (1, 2), "end")


def test_a_failure_is_found_among_the_notes_but_not_ones_own(service: FakeService) -> None:
    world = three(service)
    world.processes[1].fail("OSError: disk")
    world.processes[1].check_failures("decide", world.processes[1].told())
    with pytest.raises(ProcessError, match="decide: process 1 has left the run: OSError: disk"):
        world.processes[2].check_failures("decide", world.processes[2].told())


# ---------------------------------------------------------------------------------------------------------------- keys


def test_no_keys_pile_up_over_many_rounds(service: FakeService) -> None:
    channels = (world := three(service)).channels()
    sizes: list[int] = []

    def body(index: int) -> None:
        for i in range(200):
            channels[index].begin(i)
            channels[index].gather("start", index)
            channels[index].publish("start", i)
            channels[index].everyone("check", index)
            channels[index].attempt("apply", lambda: None)
            if index == 0:
                sizes.append(len(service.values))

    assert world.run(body) == [None] * 3
    assert max(sizes) < 20


def test_what_is_published_stays_until_all_have_read_it(service: FakeService) -> None:
    """Process 0 runs ahead of one that is slow to read."""
    channels = (world := three(service)).channels()
    for i in range(5):
        channels[0].publish("say", i)
    assert world.run(lambda index: [channels[index].publish("say") for _ in range(5)], only=(1, 2))[1:] == [
        [*range(5)],
        [*range(5)],
    ]


# ------------------------------------------------------------------------------------------------------------ deciding


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
