"""The protocol under kills, suspensions, delays, lost requests and answers, and two owners: nothing that must not be.

`python -m tests.campaigns.simulation` runs any number of further schedules.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.simulation.schedule import WHATS, Fault, Program, Schedule, Store, generated, shrunk
from tests.simulation.world import Report, simulate


@pytest.fixture(autouse=True, scope="module")
def _objects_that_stay() -> Iterator[None]:
    """JAX's many objects are not looked at again and again by the collector of garbage."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("first", range(0, 1000, 250))
def test_all_invariants_hold(first: int) -> None:
    for seed in range(first, first + 250):
        report = simulate(generated(seed))
        assert not report.violations, f"python -m tests.campaigns.simulation --replay {seed}"


def test_the_schedules_are_of_all_kinds() -> None:
    schedules = [generated(seed) for seed in range(1000)]
    assert {schedule.store for schedule in schedules} == {"local", "nfs", "gcs"}
    assert {fault.what for schedule in schedules for fault in schedule.faults} == set(WHATS)
    processes = {program.processes for schedule in schedules for program in schedule.programs}
    assert {1, 2, 3} <= processes
    assert max(processes) > 16
    assert any(program.start_s is not None for schedule in schedules for program in schedule.programs)


@pytest.mark.parametrize("store", ["local", "nfs", "gcs"])
def test_sixty_four_processes(store: Store) -> None:
    report = simulate(Schedule(store=store, programs=(Program(64, steps=1),)))
    assert not report.violations
    assert outcomes(report, 0) == ["committed"] * 64
    assert {came.step for came in report.history.came if came.program == 1} == {0}


def test_the_same_seed_gives_the_same_simulation() -> None:
    for seed in range(20):
        assert simulate(generated(seed)).trace == simulate(generated(seed)).trace


def test_what_is_killed_in_the_commit_is_there_or_not_and_the_next_life_goes_on() -> None:
    """Kills before, at and after each of the last requests of a save; so it is known that they reach that far."""
    restored = set()
    for what in ("kill", "kill after"):
        for nth in range(4):
            fault = Fault(0, 0, "0/commit_success", nth, what)
            report = simulate(Schedule(store="gcs", programs=(Program(steps=1),), faults=(fault,)))
            assert not report.violations
            restored |= {came.step for came in report.history.came if came.program == 1}
    assert restored == {None, 0}


def test_an_owner_that_wakes_up_learns_that_it_has_been_ousted() -> None:
    programs = (Program(steps=2), Program(steps=1, start_s=40.0))
    fault = Fault(0, 0, "flush", 0, "suspend", 200.0)
    report = simulate(Schedule(programs=programs, faults=(fault,)))
    assert not report.violations
    ousted = [saved for saved in report.history.saved if saved.program == 0]
    assert [saved.outcome for saved in ousted] == ["failed", "failed"]
    assert all("has taken this run over" in saved.why for saved in ousted)
    assert outcomes(report, 1) == ["committed"]


def test_a_schedule_is_shrunk_to_what_matters() -> None:
    def kills_in_a_save_of_the_second(schedule: Schedule) -> bool:
        return any(fault.program == 1 and fault.what == "kill" for fault in schedule.faults)

    seed = next(seed for seed in range(1000) if kills_in_a_save_of_the_second(generated(seed)))
    schedule = replace(generated(seed), frozen=True, keep=3)
    simple = shrunk(schedule, kills_in_a_save_of_the_second)
    assert [fault.what for fault in simple.faults] == ["kill"]
    assert all(program.steps == 1 for program in simple.programs)
    assert (simple.seed, simple.frozen, simple.keep, len(simple.programs)) == (0, False, 1, 2)


def outcomes(report: Report, program: int) -> list[str]:
    return [saved.outcome for saved in report.history.saved if saved.program == program]
