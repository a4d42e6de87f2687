"""Programs that run as several jax processes on this machine, joined by gloo."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.helpers.programs import ROOT, Forked, start_program

_GRACE_S = 20.0
"""How long the others go on when one has failed, which may be the very thing that they are to notice."""

PRELUDE = f"""
import faulthandler, json, os, sys, traceback
index, count, address, timeout_s, heartbeat_s = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:6]
del sys.argv[1:6]
faulthandler.dump_traceback_later(float(timeout_s), exit=True)
sys.path.insert(0, {str(ROOT)!r})
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(
    address, count, index, initialization_timeout=90, heartbeat_timeout_seconds=int(heartbeat_s)
)
service = jax._src.distributed.global_state.client

def tell(*values):
    print(*values, flush=True)

def note(**facts):
    '''What the test is to know; see `Ended.facts`.'''
    tell("= " + json.dumps(facts))

def meet(where):
    '''Wait for all processes, without a device.'''
    service.wait_at_barrier(where, 90_000)

def end():
    '''Without the farewell of jax.distributed, which waits for processes that are no more.'''
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)

def failed(kind, error, trace):
    '''At once, for the same reason.'''
    traceback.print_exception(kind, error, trace)
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(1)

sys.excepthook = failed
"""


@dataclass(frozen=True)
class Ended:
    """A process that has ended.

    Attributes:
        index: its number among the processes of the run.
        returncode: negative if a signal has ended it.
        stdout: all of it.
        stderr: all of it.
    """

    index: int
    returncode: int
    stdout: str
    stderr: str

    @property
    def facts(self) -> dict[str, Any]:
        """Everything that it has noted."""
        found: dict[str, Any] = {}
        for line in self.stdout.splitlines():
            if line.startswith("= "):
                found |= json.loads(line[2:])
        return found


class PortTakenError(Exception):
    """Somebody else got the port first."""


class Running:
    """Processes that run a program; none survives the `with` block.

    The program finds its `index`, the `count` of processes, `sys.argv` as if it had been started with `args`, `tell` to
    say something at once, `note` for the test's facts, `meet` to wait for all, and `end` for when others are no more.

    Args:
        program: code; warnings are errors.
        args: what it finds in `sys.argv[1:]`.
        cwd: its folder; what it says on stderr is kept there.
        processes: how many.
        devices: of each.
        timeout: seconds after which it is over, for parent and children alike.
        heartbeat_s: after which jax.distributed takes a process for dead, and ends all others.
        env: XLA's flags included.
    """

    def __init__(
        self,
        program: str,
        args: tuple[object, ...],
        cwd: Path,
        processes: int,
        timeout: float,
        heartbeat_s: int,
        env: dict[str, str],
    ) -> None:
        self._deadline = time.monotonic() + timeout
        self._errors = [cwd / f"stderr.{index}" for index in range(processes)]
        self._lines: list[list[str]] = [[] for _ in range(processes)]
        self._changed = threading.Condition()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        self._processes: list[Forked | subprocess.Popen[str]] = []
        self._readers: list[threading.Thread] = []
        code = PRELUDE + textwrap.dedent(program)
        for index in range(processes):
            told = (index, processes, address, timeout, heartbeat_s)
            with self._errors[index].open("w") as stderr:
                process = start_program(cwd, code, *told, *args, env=env, stderr=stderr)
            self._processes.append(process)
            self._readers.append(threading.Thread(target=self._read, args=(index,), daemon=True))
            self._readers[-1].start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for process in self._processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        for process, reader in zip(self._processes, self._readers, strict=True):
            process.wait()
            reader.join(5)
            if process.stdout is not None:
                process.stdout.close()

    def _read(self, index: int) -> None:
        stdout = self._processes[index].stdout
        for line in stdout or ():
            with self._changed:
                self._lines[index].append(line)
                self._changed.notify_all()
        self._processes[index].wait()
        with self._changed:
            self._changed.notify_all()

    def wait_for(self, index: int, line: str) -> None:
        """Wait until a process has said this line.

        Raises:
            PortTakenError: try again.
            AssertionError: it has ended without, or time is up.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: f"{line}\n" in self._lines[index] or self._processes[index].poll() is not None,
                self._deadline - time.monotonic(),
            )
            if f"{line}\n" in self._lines[index]:
                return
        self._check_port()
        raise AssertionError(f"process {index} has not said {line!r}\n{self.report()}")

    def signal(self, index: int, number: signal.Signals) -> None:
        """Send a signal to one process."""
        self._processes[index].send_signal(number)

    def join(self, *indices: int, check: bool = True) -> list[Ended]:
        """Wait for these processes to end, or all of them.

        Args:
            indices: which ones.
            check: every exit code must be 0; as soon as one is not, the others have little time left.

        Raises:
            PortTakenError: try again.
            AssertionError: an exit code is not 0, or time is up.
        """
        which = indices or tuple(range(len(self._processes)))
        failed_since: float | None = None
        while any(self._processes[index].poll() is None for index in which):
            with self._changed:
                self._changed.wait(0.2)
            now = time.monotonic()
            if failed_since is None and any(self._processes[index].poll() for index in which):
                self._check_port()
                failed_since = now
            if now > self._deadline or (check and failed_since is not None and now > failed_since + _GRACE_S):
                raise AssertionError(f"not all have ended\n{self.report()}")
        if check and any(self._processes[index].returncode for index in which):
            self._check_port()
            raise AssertionError(f"a process has failed\n{self.report()}")
        return [self._ended(index) for index in which]

    def _ended(self, index: int) -> Ended:
        self._readers[index].join()
        return Ended(index, self._processes[index].wait(), "".join(self._lines[index]), self._errors[index].read_text())

    def _check_port(self) -> None:
        if "Failed to add port to server" in self._errors[0].read_text():
            raise PortTakenError

    def report(self) -> str:
        """What all have said so far."""
        return "\n".join(
            f"--- process {index}: exit code {process.poll()}\n{''.join(self._lines[index])}{error.read_text()}"
            for index, (process, error) in enumerate(zip(self._processes, self._errors, strict=True))
        )


RunProcesses = Callable[..., "list[Ended]"]
"""`run_processes(program, *args, processes=2, devices=4, timeout=120, check=True, heartbeat_s=100, during=None)`"""

Facts = list[dict[str, Any]]
"""What each process has noted."""


def facts_of(ended: Sequence[Ended]) -> Facts:
    return [one.facts for one in ended]


def alike(facts: Facts, *keys: str) -> Any:
    """What all processes have noted under these keys, which must be the same."""
    found = [{key: one[key] for key in keys} for one in facts]
    assert all(one == found[0] for one in found), found
    return found[0] if len(keys) > 1 else found[0][keys[0]]
