"""Programs that run in a process of their own."""

from __future__ import annotations

import atexit
import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import pytest

from tests.helpers import forkserver

ROOT = Path(__file__).parents[2]

RunPython = Callable[..., "subprocess.CompletedProcess[str]"]


def with_devices(flags: str, devices: int | None) -> str:
    """XLA's flags with this number of CPU devices; None leaves it to the program."""
    others = re.sub(r"--xla_force_host_platform_device_count=\d+", "", flags).strip()
    return others if devices is None else f"{others} --xla_force_host_platform_device_count={devices}"


class Forked:
    """A program that a fork server runs, with as much of `subprocess.Popen` as tests use.

    It leads a session of its own.

    Attributes:
        pid: of the program.
        returncode: None until it is known that the program has ended; negative if a signal has ended it.
        stdin: a stream to write to, if it was asked for with `subprocess.PIPE`; likewise the others, to read from.
        stdout: see `stdin`.
        stderr: see `stdin`.
    """

    def __init__(
        self,
        program: str | Path,
        arguments: list[str],
        cwd: Path,
        env: Mapping[str, str],
        warnings: str,
        stdin: int | IO[Any],
        stdout: int | IO[Any],
        stderr: int | IO[Any],
    ) -> None:
        self.returncode: int | None = None
        theirs: list[int] = []
        ours: list[IO[Any] | None] = []
        for stream, mode in ((stdin, "w"), (stdout, "r"), (stderr, "r")):
            if stream == subprocess.PIPE:
                ends = os.pipe()
                mine, other = ends if mode == "r" else ends[::-1]
                ours.append(os.fdopen(mine, mode))
                theirs.append(other)
            else:
                ours.append(None)
                theirs.append(
                    os.open(os.devnull, os.O_RDWR) if stream == subprocess.DEVNULL else os.dup(_number(stream))
                )
        self.stdin, self.stdout, self.stderr = ours
        request = {
            "code": program if isinstance(program, str) else None,
            "script": str(program) if isinstance(program, Path) else None,
            "arguments": arguments,
            "cwd": str(cwd),
            "env": dict(env),
            "warnings": warnings,
        }
        self._server = socket.socket(socket.AF_UNIX)
        self._server.connect(fork_server())
        data = json.dumps(request).encode() + b"\n"
        sent = socket.send_fds(self._server, [data], theirs)
        self._server.sendall(data[sent:])
        for descriptor in theirs:
            os.close(descriptor)
        self._answers = self._server.makefile()
        self.pid = int(self._answers.readline())
        self._lock = threading.Lock()

    def wait(self, timeout: float | None = None) -> int:
        """The exit code.

        Raises:
            subprocess.TimeoutExpired: it has not ended in time.
        """
        with self._lock:
            if self._look(timeout) is None:
                raise subprocess.TimeoutExpired("the program", timeout or 0)
            return self.returncode  # type: ignore[return-value]  # it is known now

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        if not self._lock.acquire(blocking=False):
            return None  # another thread waits for it
        try:
            return self._look(0)
        finally:
            self._lock.release()

    def _look(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            self._server.settimeout(timeout)
            try:
                answer = self._server.recv(32)
            except (TimeoutError, BlockingIOError):
                return None
            self.returncode = int(answer)
            self._answers.close()
            self._server.close()
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the program alone."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it, and all that it has started."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)


def _number(stream: int | IO[Any]) -> int:
    return stream if isinstance(stream, int) else stream.fileno()


_starting = threading.Lock()


def fork_server() -> str:
    """The socket of the fork server, which is started by the first to ask."""
    with _starting:
        return _started_server()


@functools.cache
def _started_server() -> str:
    folder = tempfile.TemporaryDirectory(prefix="fork-server-")
    path = os.path.join(folder.name, "socket")
    server = subprocess.Popen(
        [sys.executable, "-W", "error", forkserver.__file__, path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert server.stdin is not None
    assert server.stdout is not None
    if server.stdout.readline() != b"ready\n":
        raise RuntimeError(f"the fork server has ended with exit code {server.wait()}")
    server.stdout.close()

    def end() -> None:
        assert server.stdin is not None
        server.stdin.close()
        server.wait()
        folder.cleanup()

    atexit.register(end)
    return path


def start_program(
    cwd: Path,
    program: str | Path,
    *args: object,
    env: Mapping[str, str],
    warnings: str = "error",
    fresh: bool = False,
    stdin: int | IO[Any] = subprocess.DEVNULL,
    stdout: int | IO[Any] = subprocess.PIPE,
    stderr: int | IO[Any] = subprocess.PIPE,
) -> Forked | subprocess.Popen[str]:
    """Start Python in a new process, which leads a session of its own.

    Args:
        cwd: its folder.
        program: code, which may be indented, or a script.
        args: what it finds in `sys.argv[1:]`.
        env: its whole environment.
        warnings: what is done about them.
        fresh: run a new interpreter, for programs that are about importing; else the fork server's, which has
            imported nearly everything.
        stdin: a stream or a descriptor, `subprocess.PIPE` or `subprocess.DEVNULL`.
        stdout: likewise.
        stderr: likewise.
    """
    if isinstance(program, str):
        program = textwrap.dedent(program)
    arguments = list(map(str, args))
    if not fresh:
        return Forked(program, arguments, cwd, env, warnings, stdin, stdout, stderr)
    what = ["-c", program] if isinstance(program, str) else [str(program)]
    return subprocess.Popen(
        [sys.executable, "-W", warnings, *what, *arguments],
        cwd=cwd,
        env=env,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        text=True,
        start_new_session=True,
    )


def run_program(
    cwd: Path,
    program: str | Path,
    *args: object,
    devices: int | None = 8,
    timeout: float = 120,
    check: bool = True,
    warnings: str = "error",
    env: Mapping[str, str] | None = None,
    fresh: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run Python in a new process to its end; see the fixture `run_python`."""
    environment = {**os.environ, "XLA_FLAGS": with_devices(os.environ["XLA_FLAGS"], devices), **(env or {})}
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        running = start_program(
            cwd, program, *args, env=environment, warnings=warnings, fresh=fresh, stdout=stdout, stderr=stderr
        )
        try:
            returncode = running.wait(timeout)
        except subprocess.TimeoutExpired:
            returncode = None
        finally:
            if running.poll() is None:
                os.killpg(running.pid, signal.SIGKILL)
                running.wait()
        printed = []
        for stream in (stdout, stderr):
            stream.seek(0)
            printed.append(stream.read())
    if returncode is None:
        pytest.fail(f"has not ended within {timeout} s\n{printed[0]}\n{printed[1]}", pytrace=False)
    if check and returncode:
        pytest.fail(f"exit code {returncode}\n{printed[0]}\n{printed[1]}", pytrace=False)
    return subprocess.CompletedProcess([], returncode, *printed)
