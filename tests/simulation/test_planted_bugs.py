"""Each invariant is seen to fail: a mistake is put into the product, and the simulation finds it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
from torchorbax._src.distributed.channel import Channel
from torchorbax._src.save.writer import _StepWriting
from torchorbax._src.storage.gcs_files import GcsFiles
from torchorbax._src.storage.orbax_storage import OrbaxStorage
from torchorbax._src.storage.ownership import Ownership

from tests.simulation.schedule import Schedule, generated, shrunk, two_owners
from tests.simulation.world import simulate

MOST_SCHEDULES = 150


def commit_without_a_look_at_the_record() -> Any:
    real = OrbaxStorage._commit

    def commit(storage: OrbaxStorage, step: int, folder: str) -> None:
        storage.check_owned = lambda: None  # type: ignore[method-assign]  # the mistake
        try:
            real(storage, step, folder)
        finally:
            del storage.check_owned

    return mock.patch.object(OrbaxStorage, "_commit", commit)


def never_look_at_the_record() -> Any:
    return mock.patch.object(Ownership, "check", return_value=None)


def announce_before_the_commit() -> Any:
    real = _StepWriting.commit

    def commit(writing: Any) -> Any:
        if writing._processes.is_first:
            writing._channel.publish("commit", {"failure": None, "value": {"metrics": {}, "nbytes": 0}})
            with mock.patch.object(writing._channel, "announcing", _announced(writing._channel)):
                return real(writing)
        return real(writing)

    return mock.patch.object(_StepWriting, "commit", commit)


def _announced(channel: Channel) -> Any:
    real = channel.announcing

    @contextmanager
    def announcing(phase: str) -> Iterator[Callable[[Any], None]]:
        if phase == "commit":
            yield lambda value: None
        else:
            with real(phase) as announce:
                yield announce

    return announcing


def delete_whatever_has_a_number() -> Any:
    return mock.patch.object(OrbaxStorage, "is_own", return_value=True)


def wait_for_ever() -> Any:
    def wait_for(channel: Any, key: str, process: int, phase: str, deadline: float) -> str:
        while (value := channel._get(key, phase, 60.0)) is None:
            pass
        return str(value)

    return mock.patch.object(Channel, "_wait_for", wait_for)


def delete_in_place() -> Any:
    return mock.patch.object(OrbaxStorage, "delete", lambda storage, step: storage.files.delete_folder(str(step)))


def delete_the_old_before_the_new_is_there() -> Any:
    real = OrbaxStorage.write

    def write(storage: OrbaxStorage, step: int, arrays: Any, fill: Any) -> Any:
        for older in storage.steps():
            if storage.is_own(older):
                storage.delete(older)
        return real(storage, step, arrays, fill)

    return mock.patch.object(OrbaxStorage, "write", write)


def write_the_marker_whether_or_not_the_manifest_is_there() -> Any:
    def copy(files: GcsFiles, folder: str, path: str, to: str) -> None:
        files.create(f"{folder}/{to}", b"committed")

    return mock.patch.object(GcsFiles, "copy", copy)


def later_ones(seed: int) -> Schedule:
    """Of two owners, some 800 schedules later: one in a thousand has an owner that is ousted just before the marker."""
    return two_owners(800 + seed)


PLANTED: dict[Callable[[], Any], tuple[Callable[[int], Schedule], str]] = {
    commit_without_a_look_at_the_record: (two_owners, "although it could know that it has been ousted"),
    never_look_at_the_record: (two_owners, "although it could know that it has been ousted"),
    announce_before_the_commit: (generated, "has two outcomes|was acknowledged"),
    delete_whatever_has_a_number: (generated, "not the run's own"),
    wait_for_ever: (generated, "wait for ever|waited"),
    delete_in_place: (generated, "is listed, but"),
    delete_the_old_before_the_new_is_there: (generated, "was acknowledged"),
    write_the_marker_whether_or_not_the_manifest_is_there: (later_ones, "is listed, but has no manifest"),
}
"""For each mistake: the schedules among which it is looked for, and what the simulation says about it."""


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found(plant: Callable[[], Any]) -> None:
    schedules, expected = PLANTED[plant]
    with plant():
        found = next((seed for seed in range(MOST_SCHEDULES) if _finds(schedules(seed), expected)), None)
    assert found is not None, f"not in {MOST_SCHEDULES} schedules"
    assert not simulate(schedules(found)).violations, "without the bug, the same schedule is fine"


def test_what_finds_a_bug_is_shrunk() -> None:
    with announce_before_the_commit():
        found = next(schedule for seed in range(MOST_SCHEDULES) if _finds(schedule := generated(seed), "two outcomes"))
        simple = shrunk(found, lambda schedule: _finds(schedule, "two outcomes"))
        assert _finds(simple, "two outcomes")
    assert len(simple.faults) == len(simple.programs) == 1
    assert simple.programs[0].processes == 2


def _finds(schedule: Schedule, expected: str) -> bool:
    return any(re.search(expected, violation) for violation in simulate(schedule).violations)
