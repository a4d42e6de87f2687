"""Eight simulated devices, torchax's state put back after every test, and programs in processes of their own."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"  # tests write in their own folders only
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import hypothesis
import jax
import numpy as np
import pytest
import torch
import torchorbax  # makes torchax importable
from jax.sharding import Mesh
from torchorbax._src.storage import opening
from torchorbax._src.tensors import torchax_tensors as _torchax

from tests.helpers.coordination import FakeService
from tests.helpers.damage import state_of_every_dtype
from tests.helpers.memory_storage import MemoryStorage
from tests.helpers.models import RULES, batch_of, loss_fn, objects, seeded
from tests.helpers.programs import RunPython, run_program, with_devices
from tests.helpers.several import Ended, PortTakenError, Running, RunProcesses
from tests.helpers.side_by_side import ByUnit, place_of

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long modules come first, or one worker would end long after the other."""
    items.sort(key=lambda item: place_of(item.path))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByUnit:
    """What `-n 2` runs side by side."""
    config.option.loadscopereorder = False  # the order is that of the collection
    return ByUnit(config, log)


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
    an exit code other than 0 fails the test with the program's output. The process is forked from one that has
    imported nearly everything; `fresh=True` starts a new interpreter, for programs that are about importing.
    """
    return partial(run_program, tmp_path)


@pytest.fixture(scope="session")
def run_processes(tmp_path_factory: pytest.TempPathFactory) -> RunProcesses:
    """Run Python as several jax processes: `run_processes(code, *args, processes=2, devices=4, ...)`.

    `tests.helpers.several.Running` says what the program finds. `during` gets the running processes, to wait for what
    they print and to send them signals, and returns those that will end, or nothing if all do. If somebody else has
    taken the port, everything is started again.
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
        env = {**os.environ, "XLA_FLAGS": with_devices(os.environ["XLA_FLAGS"], devices)}
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


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Iterator[MemoryStorage]:
    """What every `Checkpointer` of the test finds in place of files."""
    fake = MemoryStorage()
    monkeypatch.setattr(opening, "OrbaxStorage", lambda path, traffic: fake)
    yield fake
    fake.gate.set()


@pytest.fixture
def trained_run(tmp_path: Path) -> str:
    """A run with two steps of a small network."""
    model, optimizer, _ = objects("adamw")
    step = torchorbax.train_step(model, optimizer, loss_fn)
    with torchorbax.resume(model, optimizer, str(tmp_path / "saved"), save=None) as run:
        for i in range(2):
            step(batch_of(i))
            run.save(i, force=True)
    return run.path


@pytest.fixture
def service() -> FakeService:
    """The coordination service of a test's threads that play processes."""
    return FakeService()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of this module are."""
    return tmp_path_factory.mktemp("several")


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two steps of a sharded model, an optimizer, and values of every dtype."""
    path = tmp_path_factory.mktemp("integrity") / "run"
    mesh = Mesh(np.array(jax.devices()), ("fsdp",))
    model = seeded()
    optimizer = torch.optim.AdamW(model.parameters())
    train_step = torchorbax.train_step(model, optimizer, loss_fn)
    with torchorbax.resume(
        model, optimizer, str(path), state=state_of_every_dtype(), save=1, shardings=(mesh, RULES)
    ) as run:
        for step in run.steps(2):
            train_step(batch_of(step))
    return path


@pytest.fixture
def run_path(saved_run: Path, tmp_path: Path) -> Path:
    """A copy of `saved_run`, to be damaged."""
    return Path(shutil.copytree(saved_run, tmp_path / "run"))
