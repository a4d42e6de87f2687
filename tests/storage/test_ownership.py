"""Who may write to a run: two programs, dead and silent owners, clocks that differ."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torchorbax import OwnershipError, StorageError
from torchorbax._src.storage import owner, owner_records, ownership
from torchorbax._src.storage.local_files import LocalFiles
from torchorbax._src.storage.owner import Owner, started_at
from torchorbax._src.storage.ownership import Ownership, RecordChangedError


class MemoryRecord:
    """A record in memory, for several owners. Its lock is held by one of them at most."""

    def __init__(self) -> None:
        self.content: bytes | None = None
        self.locked: bool | None = True  # what `lock` answers
        self.failing = False

    def read(self) -> tuple[bytes | None, Any]:
        if self.failing:
            raise StorageError("run", "no answer")
        return self.content, self.content

    def swap(self, content: bytes, version: Any) -> Any:
        if self.failing:
            raise StorageError("run", "no answer")
        if version != self.content:
            raise RecordChangedError
        self.content = content
        return content

    def lock(self) -> bool | None:
        return self.locked

    def unlock(self) -> None: ...

    @property
    def owner(self) -> Owner:
        found = Owner.from_bytes(self.content)
        assert found is not None
        return found

    def write(self, **changes: Any) -> None:
        self.content = dataclasses.replace(self.owner, **changes).to_bytes()


def of_another_machine(record: MemoryRecord, **changes: Any) -> None:
    """Make the owner in a record one that cannot be seen from here."""
    record.write(**{"system": "another/1", "host": "elsewhere", "pid": 77, "token": "theirs"} | changes)


@pytest.fixture
def record() -> MemoryRecord:
    """The record of an owner that was killed a moment ago."""
    record = MemoryRecord()
    Ownership("run", record, now=lambda: 1000.0).acquire()
    return record


def another(record: MemoryRecord, now: float, wait: Callable[[float], object] = lambda s: None) -> Ownership:
    return Ownership("run", record, now=lambda: now, wait=wait)


def test_a_living_owner_on_another_machine_keeps_others_out(record: MemoryRecord) -> None:
    of_another_machine(record, beat_time=1000.0)

    def beat(seconds: float) -> None:
        record.write(beat=record.owner.beat + 1)

    with pytest.raises(
        OwnershipError, match=r"process 77 on elsewhere, since .*, writes to this run; .*takeover=True"
    ) as caught:
        another(record, 1001.0, beat).acquire()
    assert caught.value.owner.startswith("process 77 on elsewhere")
    assert record.owner.token == "theirs"


def test_an_owner_that_is_seen_to_live_keeps_others_out_at_once(record: MemoryRecord) -> None:
    record.locked = False
    record.write(pid=os.getppid(), started=started_at(os.getppid()), token="theirs")
    with pytest.raises(OwnershipError, match="writes to this run"):
        another(record, 1001.0, lambda seconds: pytest.fail("it waits")).acquire()


@pytest.mark.parametrize(
    ("changes", "now"),
    [
        ({"released": True}, 1000.0),
        ({"beat_time": 1000.0}, 1100.0),  # silent for longer than a lease and what clocks may differ
        ({"beat_time": 5000.0}, 6000.0),
    ],
)
def test_an_owner_that_has_ended_or_is_silent_lets_others_in(
    changes: dict[str, Any], now: float, record: MemoryRecord
) -> None:
    of_another_machine(record, **changes)
    epoch = record.owner.epoch
    mine = another(record, now, lambda seconds: pytest.fail("it waits"))
    mine.acquire()
    assert (record.owner.epoch, record.owner.token) == (epoch + 1, mine.token)


def test_a_process_of_this_machine_that_is_gone_lets_others_in(record: MemoryRecord) -> None:
    record.write(pid=2**22 - 1, started="12345", token="theirs")
    another(record, 1001.0, lambda seconds: pytest.fail("it waits")).acquire()


def test_a_clock_that_was_set_ousts_nobody_who_holds_the_lock(record: MemoryRecord) -> None:
    record.locked = False
    record.write(pid=os.getppid(), started=started_at(os.getppid()), token="theirs")
    with pytest.raises(OwnershipError, match="writes to this run"):
        another(record, 1e9, lambda seconds: record.write(beat=record.owner.beat + 1)).acquire()


def test_a_process_that_is_hidden_has_not_ended(record: MemoryRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    """/proc may be mounted so that it shows no process of another user."""
    record.write(pid=os.getppid(), started=started_at(os.getppid()), token="theirs")
    monkeypatch.setattr(owner, "started_at", lambda pid: "")

    def refuse(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(owner.os, "kill", refuse)
    record.locked = False
    with pytest.raises(OwnershipError, match="writes to this run"):
        another(record, 1001.0).acquire()


def test_an_owner_of_the_future_is_waited_for(record: MemoryRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its clock is ahead: only that it shows no sign of life says that it is gone."""
    of_another_machine(record, beat_time=1e12)
    clock = [0.0]
    monkeypatch.setattr(ownership.time, "monotonic", lambda: clock[0])
    another(record, 1000.0, lambda seconds: clock.__setitem__(0, clock[0] + seconds)).acquire()
    assert clock[0] > ownership.LEASE_S


def test_taking_over_makes_the_other_stop(record: MemoryRecord) -> None:
    first = another(record, 1000.0)
    first.acquire(takeover=True)
    first.check()
    second = another(record, 1000.0)
    second.acquire(takeover=True)
    for attempt in (first.check, lambda: first.begin(["5"]), first.check):
        with pytest.raises(OwnershipError, match="has taken this run over; this process writes, commits and deletes"):
            attempt()
    first.release()
    assert not record.owner.released
    second.check()


def test_of_two_that_come_at_once_one_is_second(record: MemoryRecord) -> None:
    record.write(released=True)
    first, swapped = another(record, 1000.0), record.swap

    def late(content: bytes, version: Any) -> Any:
        record.swap = swapped  # type: ignore[method-assign]  # a fake of one call
        of_another_machine(record, released=False, beat_time=1000.0)
        return swapped(content, version)

    record.swap = late  # type: ignore[method-assign]  # a fake of one call
    with pytest.raises(OwnershipError, match="process 77 on elsewhere"):
        Ownership("run", record, lambda: 1000.0, lambda seconds: record.write(beat=record.owner.beat + 1)).acquire()
    first.release()


def test_what_was_unfinished_is_handed_on(record: MemoryRecord) -> None:
    first = another(record, 1000.0)
    first.acquire(takeover=True)
    first.begin(["5", "base/0"])
    first.finish("base/0")
    first.begin([])
    second = another(record, 1000.0)
    second.acquire(takeover=True)
    assert second.unfinished == ("5",)


def test_a_record_that_somebody_deleted_is_written_again(record: MemoryRecord) -> None:
    mine = another(record, 1000.0)
    mine.acquire(takeover=True)
    record.content = None
    mine.check()
    assert record.owner.token == mine.token


def test_a_storage_that_does_not_answer_is_no_loss(record: MemoryRecord) -> None:
    mine = another(record, 1000.0)
    mine.acquire(takeover=True)
    record.failing = True
    with pytest.raises(StorageError, match="no answer"):
        mine.check()
    record.failing = False
    mine.check()


ODD = [
    {"system": 5},
    {"pid": -1},
    {"pid": 1 << 70},
    {"pid": "a\0b"},
    {"beat_time": "x"},
    {"unfinished": 3},
    {"locked": None},
    {"host": None},
]


@pytest.mark.parametrize("odd", ODD, ids=str)
def test_a_record_with_odd_values_has_no_owner(odd: dict[str, Any], record: MemoryRecord) -> None:
    record.content = json.dumps({**vars(record.owner), **odd}).encode()
    mine = another(record, 1000.0)
    mine.acquire()
    assert record.owner.token == mine.token


def test_a_lock_that_is_held_says_that_somebody_lives(record: MemoryRecord) -> None:
    """The record has been damaged, and its owner writes it again with the next sign of life."""
    of_another_machine(record, beat_time=1000.0)
    whole, record.content, record.locked = record.content, b"", False

    def mend_then_beat(seconds: float) -> None:
        if record.content == b"":
            record.content = whole
        else:
            record.write(beat=record.owner.beat + 1)

    with pytest.raises(OwnershipError, match="process 77 on elsewhere"):
        another(record, 1001.0, mend_then_beat).acquire()


def test_a_run_that_is_dropped_while_a_sign_of_life_is_written_does_not_wait_for_itself(record: MemoryRecord) -> None:
    mine, swap = another(record, 1000.0), record.swap
    mine.acquire(takeover=True)

    def swap_and_drop(content: bytes, version: Any) -> Any:
        record.swap = swap  # type: ignore[method-assign]  # a fake of one call
        mine.release()  # as the garbage collector does
        return swap(content, record.content)

    record.swap = swap_and_drop  # type: ignore[method-assign]  # a fake of one call
    mine.begin([])


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"null", b'{"epoch": "x"}', b"\xff", b"[" * 200_000])
def test_a_record_that_says_nothing_has_no_owner(content: bytes) -> None:
    record = MemoryRecord()
    record.content = content
    mine = another(record, 1000.0)
    mine.acquire()
    assert record.owner.token == mine.token


def test_a_program_that_keeps_the_lock_on_the_folder_is_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that is suspended while it changes the record."""
    monkeypatch.setattr(owner_records, "LOCK_PATIENCE_S", 0.05)
    record = owner_records.LocalRecord(LocalFiles(str(tmp_path)))
    held = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    with pytest.raises(StorageError, match=r"another program has held the lock .* let it go on, or end it"):
        record.swap(b"mine", None)
    os.close(held)
    assert record.swap(b"mine", None) == b"mine"
