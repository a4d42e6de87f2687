"""Eight simulated devices, torchax's thread-local state put back after every test, and programs in processes of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

DEVICES = 8


def _with_devices(flags: str, devices: int) -> str:
    """XLA's flags with this number of CPU devices, which JAX reads once, when its backend starts."""
    others = re.sub(r"--xla_force_host_platform_device_count=\d+", "", flags)
    return f"{others} --xla_force_host_platform_device_count={devices}".strip()


os.environ["XLA_FLAGS"] = _with_devices(os.environ.get("XLA_FLAGS", ""), DEVICES)
os.environ["JAX_PLATFORMS"] = "cpu"

import hypothesis
import jax
import numpy as np
import pytest
import torch
from jax.sharding import Mesh

import torchorbax  # noqa: F401  # makes torchax importable
from torchorbax import _torchax

hypothesis.settings.register_profile(
    "torchorbax",
    deadline=None,  # the first example of a kind compiles
    database=None,  # nothing is written beside the tests
    max_examples=50,
    derandomize=True,  # a failure in CI is the same failure at a desk
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("torchorbax")

RunPython = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def mesh() -> Mesh:
    """Eight devices along 'fsdp'."""
    return Mesh(np.array(jax.devices()), ("fsdp",))


@pytest.fixture(scope="session")
def mesh_2d() -> Mesh:
    """Four devices along 'fsdp' times two along 'tp'."""
    return Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tp"))


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Every test starts from the same random numbers, and leaves torchax and JAX as it found them."""
    env = _torchax.torchax.default_env()
    key, enabled, x64 = _torchax.rng_key(), env.enabled, jax.config.jax_enable_x64
    torch.manual_seed(0)
    np.random.seed(0)
    _torchax.set_rng_key(jax.random.key(0))
    yield
    env.enabled = enabled
    _torchax.set_rng_key(key)
    jax.config.update("jax_enable_x64", x64)


@pytest.fixture
def run_python(tmp_path: Path) -> RunPython:
    """Run Python in a new process: `run_python(code or Path, *args, devices=8, timeout=120, check=True)`.

    A `str` is code, a `Path` a script. Warnings are errors there, too, unless `warnings` says otherwise. With `check`, an exit code
    other than 0 fails the test with the program's output.
    """

    def run(
        program: str | Path,
        *args: object,
        devices: int = DEVICES,
        timeout: float = 120,
        check: bool = True,
        warnings: str = "error",
        env: dict[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        what = [str(program)] if isinstance(program, Path) else ["-c", textwrap.dedent(program)]
        done = subprocess.run(
            [sys.executable, "-W", warnings, *what, *map(str, args)],
            cwd=tmp_path,
            env={**os.environ, "XLA_FLAGS": _with_devices(os.environ["XLA_FLAGS"], devices), **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and done.returncode:
            pytest.fail(f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}", pytrace=False)
        return done

    return run
