"""Who may write to a run: one program at a time, from opening to the end.

The owner is written down in a record beside the steps. A record changes only from a known version to the next, so of
two programs that take a run at the same time one learns that it came second. The epoch counts the owners. An owner
shows a sign of life every few seconds; one that has ended, or has shown none for a while, has lost its right to the
next who asks. What has been lost is noticed because the record is read again before each commit and each deletion.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from torchorbax.errors import OwnershipError, StorageError

BEAT_S = 10.0
"""Seconds between two signs of life."""
LEASE_S = 30.0
"""Seconds without a sign of life after which an owner counts as silent, measured on the clock of who waits for one."""
_CLOCKS_DIFFER_S = 30.0
"""How far the clocks of two machines may be apart before a living owner might be taken for a silent one."""
_POLL_S = 0.5
_MOST_PID = 1 << 31

_logger = logging.getLogger(__name__)


class RecordChangedError(Exception):
    """A record has been changed by somebody else."""


class Record(Protocol):
    """Where the owner of a run is written down."""

    def read(self) -> tuple[bytes | None, Any]:
        """The content, None if there is none, and its version."""

    def swap(self, content: bytes, version: Any) -> Any:
        """Replace the content of this version; returns the new version.

        Raises:
            RecordChangedError: the content has another version by now.
        """

    def lock(self) -> bool | None:
        """Take the lock that ends with this process. False if another process has it, None if there are no locks."""

    def unlock(self) -> None:
        """Let the lock go."""


@dataclass(frozen=True)
class Owner:
    """The content of the record.

    Attributes:
        epoch: how many owners there have been, this one included.
        token: a unique name of this owner.
        host: the name of its machine.
        pid: the number of its process.
        since: when it became the owner, in UTC.
        system: the running system and the process's namespace; the same for processes that can see each other.
        started: when its process started, in the system's own units.
        locked: has it taken the lock?
        beat: the number of its signs of life.
        beat_time: the time of the last one, in seconds since 1970.
        released: it has ended in order.
        unfinished: under a URI, the folders that are being written or deleted, or were when an owner died.
    """

    epoch: int
    token: str
    host: str
    pid: int
    since: str
    system: str
    started: str
    locked: bool = False
    beat: int = 0
    beat_time: float = 0.0
    released: bool = False
    unfinished: tuple[str, ...] = ()

    def to_bytes(self) -> bytes:
        """The content of the record, as JSON."""
        return json.dumps(vars(self)).encode()

    @classmethod
    def from_bytes(cls, content: bytes | None) -> Owner | None:
        """The owner in the content of a record; None if there is none."""
        try:
            values = json.loads(content or b"null")
            owner = cls(**{**values, "unfinished": tuple(map(str, values["unfinished"]))})
        except (ValueError, TypeError, KeyError, RecursionError):  # empty after a loss of power, or somebody else's
            return None
        kinds = {name: type(value) for name, value in vars(owner).items()}
        return owner if kinds == _KINDS and 0 < owner.pid < _MOST_PID else None

    @property
    def is_this_process(self) -> bool:
        """Is it a run of this very process?"""
        return (self.system, self.pid, self.started) == (_system(), os.getpid(), _started(os.getpid()))

    @property
    def has_ended(self) -> bool:
        """Has its process certainly ended? False if that cannot be seen from here."""
        if self.system != _system():
            return False
        try:
            os.kill(self.pid, 0)  # sends nothing; it says if there is such a process
        except ProcessLookupError:
            return True
        except OSError:  # it is another user's, and /proc may hide it
            return False
        return _started(self.pid) not in ("", self.started)  # the number may have gone to another process

    def __str__(self) -> str:
        return f"process {self.pid} on {ascii(self.host)[1:-1]}, since {ascii(self.since)[1:-1]}"


_KINDS: dict[str, type] = {
    **dict.fromkeys(("token", "host", "since", "system", "started"), str),
    **dict.fromkeys(("epoch", "pid", "beat"), int),
    "locked": bool,
    "released": bool,
    "beat_time": float,
    "unfinished": tuple,
}


class Ownership:
    """The right of this program to write to one run.

    Args:
        path: the path or URI of the run, for messages.
        record: where the owner is written down.
        now: the clock that is compared with other machines' clocks, in seconds since 1970.
        wait: waits for a number of seconds.

    Attributes:
        epoch: how many owners the run has had, this one included.
        token: a unique name of this owner.
    """

    def __init__(
        self,
        path: str,
        record: Record,
        now: Callable[[], float] = time.time,
        wait: Callable[[float], object] = time.sleep,
    ) -> None:
        self.token = uuid.uuid4().hex
        self._path = path
        self._record = record
        self._now = now
        self._wait = wait
        self._pid = os.getpid()
        self._lock = threading.RLock()  # garbage may be collected, and so a run dropped, while it is held
        self._version: Any = None
        self._mine: Owner | None = None
        self._lost: OwnershipError | None = None
        self._end = threading.Event()

    @property
    def epoch(self) -> int:
        """How many owners the run has had, this one included; 0 before `acquire`."""
        return 0 if self._mine is None else self._mine.epoch

    @property
    def unfinished(self) -> tuple[str, ...]:
        """The folders that are being written or deleted, or were when an owner died."""
        return () if self._mine is None else self._mine.unfinished

    def acquire(self, *, takeover: bool = False) -> None:
        """Become the owner, and show signs of life from now on.

        Args:
            takeover: also if another program is the owner, which loses its right.

        Raises:
            OwnershipError: another program is the owner, and alive.
            StorageError: the record cannot be read or written.
        """
        locked, waited_s = self._record.lock(), 0.0
        try:
            while True:
                content, version = self._record.read()
                before = Owner.from_bytes(content)
                if before is not None and not takeover:
                    self._wait_for_end(before, locked)
                elif before is None and locked is False and not takeover and waited_s < LEASE_S:
                    # Somebody holds the lock, and writes the record again with the next sign of life.
                    self._wait(_POLL_S)
                    waited_s += _POLL_S
                    continue
                try:
                    self._enter(before, version, locked=bool(locked))
                    break
                except RecordChangedError:  # somebody else came first, or the owner has shown a sign of life
                    continue
        except BaseException:
            self._record.unlock()
            raise
        threading.Thread(target=self._show_life, name="torchorbax-owner", daemon=True).start()

    def check(self) -> None:
        """Raise OwnershipError if another program has taken the run over.

        Raises:
            StorageError: the record cannot be read.
        """
        self._check_process()
        with self._lock:
            self._check_here()
            content, version = self._record.read()
            found = Owner.from_bytes(content)
            if found is None:
                self._swap(version)  # somebody has deleted the record
            elif found.token != self.token:
                raise self._lose(found)
            else:
                self._version = version

    def begin(self, folders: Iterable[str]) -> None:
        """Note, for whoever comes after a crash, that folders are about to be written or deleted; check the right to.

        Raises:
            OwnershipError: another program has taken the run over.
            StorageError: the record cannot be written.
        """
        self._check_process()
        with self._lock:
            self._check_here()
            self._update(unfinished=tuple(dict.fromkeys((*self.unfinished, *folders))))

    def finish(self, folder: str) -> None:
        """Note that a folder is complete, or gone. It is written down with the next sign of life."""
        with self._lock:
            if self._mine is not None:
                left = tuple(name for name in self._mine.unfinished if name != folder)
                self._mine = dataclasses.replace(self._mine, unfinished=left)

    def release(self) -> None:
        """Let the run go: the next program need not wait. Nothing can be written afterwards."""
        if self._pid != os.getpid():  # a forked process, in which the lock may be held for ever
            return
        self._end.set()
        with self._lock:
            if self._mine is None or self._lost is not None:
                return
            try:
                self._update(released=True)
            except (OwnershipError, StorageError) as error:
                _logger.info(
                    "%s: the run could not be let go, so the next program may have to wait: %s", self._path, error
                )
            self._mine = None
            self._record.unlock()

    def _wait_for_end(self, owner: Owner, locked: bool | None) -> None:
        """Return when an owner has lost its right. Raise OwnershipError when it shows that it is alive."""
        began = time.monotonic()
        while not self._has_lost(owner, locked):
            is_seen = owner.system == _system() and not owner.has_ended
            if (is_seen or (locked is False and owner.locked)) and not self._is_silent(owner):
                raise OwnershipError.of_owner(self._path, str(owner))
            if time.monotonic() - began > LEASE_S:
                return
            if time.monotonic() - began < _POLL_S:
                _logger.warning("%s: waiting for a sign of life of %s", self._path, owner)
            self._wait(_POLL_S)
            found = Owner.from_bytes(self._record.read()[0])
            if found is None:
                return
            if (found.token, found.beat) != (owner.token, owner.beat) and not found.released:
                raise OwnershipError.of_owner(self._path, str(found))
            owner = found

    def _has_lost(self, owner: Owner, locked: bool | None) -> bool:
        """Has an owner ended, or been silent for so long that it has lost its right?"""
        if owner.released or owner.has_ended:
            return True
        if owner.is_this_process:
            _logger.warning("%s has been opened again in this process; the earlier run there is over", self._path)
            return True
        if locked and owner.locked and _same_system(owner.system):
            return True
        # A clock may have been set. While somebody holds the lock, only watching says that the owner is silent.
        return self._is_silent(owner) and not (locked is False and owner.locked)

    def _is_silent(self, owner: Owner) -> bool:
        """Was the last sign of life long ago, by the clocks? On the same system there is one clock."""
        patience_s = LEASE_S + (0 if _same_system(owner.system) else _CLOCKS_DIFFER_S)
        return self._now() - owner.beat_time > patience_s

    def _enter(self, before: Owner | None, version: Any, *, locked: bool) -> None:
        owner = Owner(
            epoch=1 if before is None else before.epoch + 1,
            token=self.token,
            host=socket.gethostname(),
            pid=os.getpid(),
            since=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            system=_system(),
            started=_started(os.getpid()),
            locked=locked,
            beat_time=float(self._now()),
            unfinished=() if before is None else before.unfinished,
        )
        with self._lock:
            self._version = self._record.swap(owner.to_bytes(), version)
            self._mine = owner
        if before is not None and not before.released:
            _logger.warning("%s: this process takes over from %s", self._path, before)

    def _show_life(self) -> None:
        while not self._end.wait(BEAT_S):
            with self._lock:
                if self._lost is not None or self._mine is None:
                    return
                try:
                    self._update()
                except OwnershipError as error:
                    _logger.error("%s", error)
                    return
                except StorageError as error:  # the next sign of life may succeed
                    _logger.info("%s: no sign of life could be written: %s", self._path, error)

    def _update(self, **changes: Any) -> None:
        """Write the record anew, as a sign of life, with changes."""
        if self._mine is None:
            return
        self._mine = dataclasses.replace(self._mine, beat=self._mine.beat + 1, beat_time=float(self._now()), **changes)
        self._swap(self._version)

    def _swap(self, version: Any) -> None:
        if self._mine is None:
            return
        while True:
            try:
                self._version = self._record.swap(self._mine.to_bytes(), version)
                return
            except RecordChangedError:
                content, version = self._record.read()
                found = Owner.from_bytes(content)
                if found is not None and found.token != self.token:
                    raise self._lose(found) from None

    def _lose(self, new: Owner) -> OwnershipError:
        self._lost = OwnershipError.taken_over(self._path, str(new))
        self._end.set()
        self._record.unlock()
        return self._lost

    def _check_here(self) -> None:
        if self._lost is not None:
            raise OwnershipError.taken_over(self._path, self._lost.owner)
        if self._mine is None:
            raise OwnershipError(self._path, "this process has not opened it for writing", "")

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            raise OwnershipError(self._path, f"it was opened for writing by process {self._pid}, not by this one", "")


def _same_system(system: str) -> bool:
    """Is it the running system, whatever the namespace of processes?"""
    return system.partition("/")[0] == _system().partition("/")[0]


@cache
def _system() -> str:
    """The running system, the same until it is started again, and the namespace of this process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # no Linux
        return f"{socket.gethostname()}-{uuid.getnode()}/0"


def _started(pid: int) -> str:
    """When a process started, in ticks since the system did; empty if that cannot be seen."""
    try:
        # The name, in brackets, may have spaces in it. The start is the 22nd field.
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except OSError:
        return ""
