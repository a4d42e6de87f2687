"""Who may write to a run: one program at a time, from opening to the end.

The owner is written down in a record beside the steps. A record changes only from a known version to the next, so of
two programs that take a run at the same time one learns that it came second. The epoch counts the owners. An owner
shows a sign of life every few seconds; one that has ended, or has shown none for a while, has lost its right to the
next who asks. What has been lost is noticed because the record is read again before each commit and each deletion.
"""

from __future__ import annotations

import dataclasses
import datetime
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torchorbax._src.storage.owner import Owner, same_system, started_at, system_name
from torchorbax.errors import OwnershipError, StorageError

BEAT_S = 10.0
"""Seconds between two signs of life."""
LEASE_S = 30.0
"""Seconds without a sign of life after which an owner counts as silent, measured on the clock of who waits for one."""
_CLOCKS_DIFFER_S = 30.0
"""How far the clocks of two machines may be apart before a living owner might be taken for a silent one."""
_POLL_S = 0.5


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

    def noted(self) -> tuple[str, ...]:
        """The folders that an owner, whoever it is or was, has been writing or deleting."""
        owner = Owner.from_bytes(self._record.read()[0])
        return () if owner is None else owner.unfinished

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
            is_seen = owner.system == system_name() and not owner.has_ended
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
        if locked and owner.locked and same_system(owner.system):
            return True
        # A clock may have been set. While somebody holds the lock, only watching says that the owner is silent.
        return self._is_silent(owner) and not (locked is False and owner.locked)

    def _is_silent(self, owner: Owner) -> bool:
        """Was the last sign of life long ago, by the clocks? On the same system there is one clock."""
        patience_s = LEASE_S + (0 if same_system(owner.system) else _CLOCKS_DIFFER_S)
        return self._now() - owner.beat_time > patience_s

    def _enter(self, before: Owner | None, version: Any, *, locked: bool) -> None:
        owner = Owner(
            epoch=1 if before is None else before.epoch + 1,
            token=self.token,
            host=socket.gethostname(),
            pid=os.getpid(),
            since=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            system=system_name(),
            started=started_at(os.getpid()),
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
