"""Who owns a run, as it is written down, and what can be seen from here of the process that does."""

from __future__ import annotations

import json
import os
import socket
import uuid
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_MOST_PID = 1 << 31


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
        return (self.system, self.pid, self.started) == (system_name(), os.getpid(), started_at(os.getpid()))

    @property
    def has_ended(self) -> bool:
        """Has its process certainly ended? False if that cannot be seen from here."""
        if self.system != system_name():
            return False
        try:
            os.kill(self.pid, 0)  # sends nothing; it says if there is such a process
        except ProcessLookupError:
            return True
        except OSError:  # it is another user's, and /proc may hide it
            return False
        return started_at(self.pid) not in ("", self.started)  # the number may have gone to another process

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


def same_system(system: str) -> bool:
    """Is it the running system, whatever the namespace of processes?"""
    return system.partition("/")[0] == system_name().partition("/")[0]


@cache
def system_name() -> str:
    """The running system, the same until it is started again, and the namespace of this process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # no Linux
        return f"{socket.gethostname()}-{uuid.getnode()}/0"


def started_at(pid: int) -> str:
    """When a process started, in ticks since the system did; empty if that cannot be seen."""
    try:
        # The name, in brackets, may have spaces in it. The start is the 22nd field.
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    except OSError:
        return ""
