"""Eight simulated devices, torchax's state put back after every test, and programs in processes of their own."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import hypothesis
import jax
import numpy as np
import pytest
import torch
import torchorbax  # noqa: F401  # makes torchax importable
from hypothesis import strategies as st
from jax.sharding import Mesh
from torchorbax._src.tensors import torchax_tensors as _torchax

from tests.several import Ended, PortTakenError, Running, RunProcesses

for _profile, _examples in (("usual", 50), ("thorough", 2000)):  # pytest --hypothesis-profile=thorough
    hypothesis.settings.register_profile(
        _profile,
        max_examples=_examples,
        derandomize=_profile == "usual",  # a failure in CI is the same failure at a desk
        deadline=None,  # the first example of a kind compiles
        database=None,  # nothing is written beside the tests
        suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
    )
hypothesis.settings.load_profile("usual")


# A shell that runs the tests in the background has them, and the programs that they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


def _with_devices(flags: str, devices: int | None) -> str:
    """XLA's flags with this number of CPU devices; None leaves it to the program."""
    others = re.sub(r"--xla_force_host_platform_device_count=\d+", "", flags).strip()
    return others if devices is None else f"{others} --xla_force_host_platform_device_count={devices}"


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

    A `str` is code, a `Path` a script. Warnings are errors there, too, unless `warnings` says otherwise. With `check`,
    an exit code other than 0 fails the test with the program's output.
    """

    def run(
        program: str | Path,
        *args: object,
        devices: int | None = 8,
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


@pytest.fixture(scope="session")
def run_processes(tmp_path_factory: pytest.TempPathFactory) -> RunProcesses:
    """Run Python as several jax processes: `run_processes(code, *args, processes=2, devices=4, ...)`.

    What the program finds is told in `tests.several.Running`. `during` gets the running processes, to wait for what
    they say and to send them signals, and returns those that will end, or nothing if all do. Everything is started
    again if somebody else has taken the port.
    """

    def run(
        program: str,
        *args: object,
        processes: int = 2,
        devices: int = 4,
        timeout: float = 120,
        check: bool = True,
        heartbeat_s: int = 100,
        during: Callable[[Running], Sequence[int]] = lambda running: (),
    ) -> list[Ended]:
        env = {**os.environ, "XLA_FLAGS": _with_devices(os.environ["XLA_FLAGS"], devices)}
        for _ in range(5):
            try:
                folder = tmp_path_factory.mktemp("processes")
                with Running(program, args, folder, processes, timeout, heartbeat_s, env) as running:
                    return running.join(*during(running), check=check)
            except PortTakenError:
                continue
            except AssertionError as error:
                pytest.fail(str(error), pytrace=False)
        pytest.fail("no free port in 5 attempts")

    return run


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """The names of the functions that XLA compiles while the test runs, in order."""
    seen: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if found := re.search(r"Compiling jit\((\w+)\)", record.getMessage()):
                seen.append(found[1])

    logger, handler = logging.getLogger("jax"), Listener()
    logger.addHandler(handler)
    propagate, logger.propagate = logger.propagate, False
    jax.config.update("jax_log_compiles", True)
    yield seen
    jax.config.update("jax_log_compiles", False)
    logger.removeHandler(handler)
    logger.propagate = propagate


def bits(value: object) -> bytes:
    """The bytes of a tensor's or an array's values, so that NaNs with payloads and signed zeros compare, too."""
    if isinstance(value, torch.Tensor):
        if not _torchax.is_torchax(value):
            return value.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        value = _torchax.array_of(value)
    return np.asarray(value).tobytes()


def tensor_of_bits(dtype: torch.dtype, shape: tuple[int, ...], raw: bytes) -> torch.Tensor:
    """A CPU tensor with these bits, as many as it needs and over again if they are too few."""
    tensor = torch.empty(shape, dtype=dtype)
    memory = tensor.reshape(-1).view(torch.uint8).numpy()
    memory[...] = np.resize(np.frombuffer(raw, np.uint8), memory.shape)
    if dtype is torch.bool:
        memory &= 1  # other bytes are no bool
    return tensor


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy where JAX's CPU backend could use the memory as it is, without a copy."""
    memory = np.empty(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


DTYPES = [
    getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "complex64", "complex128", "bool"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
        *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    )
]
WIDE = {torch.float64, torch.int64, torch.uint64, torch.complex128}
"""What a jax.Array cannot hold while jax_enable_x64 is off."""

shapes = st.lists(st.sampled_from([0, 1, 2, 3, 5]), max_size=3).map(tuple)
_PATTERNS = st.sampled_from([b"\xff", b"\x00", b"\x80\x7f", b"\x01\xfc", b"\x01\x00\x80\x7f", b"\x01\x02\xf8\xff"])


@st.composite
def tensors(draw: st.DrawFn, dtypes: Sequence[torch.dtype] = DTYPES) -> torch.Tensor:
    """CPU tensors of any dtype and small shape, with any bits: NaNs with payloads, infinities, zero-size and 0-d."""
    raw = draw(_PATTERNS | st.binary(min_size=1, max_size=64))
    return tensor_of_bits(draw(st.sampled_from(dtypes)), draw(shapes), raw)
