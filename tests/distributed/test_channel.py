"""How processes agree: threads that play processes, on a coordination service in memory."""

from __future__ import annotations

import time
from typing import Any

import jax
import pytest
from torchorbax._src.distributed.channel import Channel
from torchorbax._src.distributed.processes import Processes
from torchorbax.errors import ConfigError, ProcessError

from tests.helpers.coordination import LONG_S, FakeService, World, error_of, three


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
