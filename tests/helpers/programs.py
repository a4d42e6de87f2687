"""Programs that run in a process of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

RunPython = Callable[..., "subprocess.CompletedProcess[str]"]


def with_devices(flags: str, devices: int | None) -> str:
    """XLA's flags with this number of CPU devices; None leaves it to the program."""
    others = re.sub(r"--xla_force_host_platform_device_count=\d+", "", flags).strip()
    return others if devices is None else f"{others} --xla_force_host_platform_device_count={devices}"


def run_program(
    cwd: Path,
    program: str | Path,
    *args: object,
    devices: int | None = 8,
    timeout: float = 120,
    check: bool = True,
    warnings: str = "error",
    env: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run Python in a new process, in the folder `cwd`; see the fixture `run_python`."""
    what = [str(program)] if isinstance(program, Path) else ["-c", textwrap.dedent(program)]
    done = subprocess.run(
        [sys.executable, "-W", warnings, *what, *map(str, args)],
        cwd=cwd,
        env={**os.environ, "XLA_FLAGS": with_devices(os.environ["XLA_FLAGS"], devices), **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if check and done.returncode:
        pytest.fail(f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}", pytrace=False)
    return done


ROOT = Path(__file__).parents[2]


def start(code: str, *args: object, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            "timeout",
            "-k",
            "5",
            "120",
            sys.executable,
            "-c",
            "\n".join(line[4:] for line in code.splitlines()),
            *map(str, args),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
    )


def child_of(process: subprocess.Popen[str]) -> int:
    """The pid of the Python below `timeout`."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(children[0])
