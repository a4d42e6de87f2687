"""What the last life of a run has compiled is loaded while the next one is still restoring and tracing."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torchorbax
from torchorbax._src.run import programs_ahead
from torchorbax._src.run.compile_cache import use_compile_cache
from torchorbax._src.run.programs_ahead import ProgramsAhead, load_ahead

from tests.helpers.models import batch_of, loss_fn, objects

LOADING = "torchorbax-programs_0"


@pytest.fixture
def loads(jax_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Each load of a program that is in the cache: by which thread, and the program's name."""
    found: list[tuple[str, str]] = []
    load = programs_ahead._load_from_cache

    def recorded(key: str, *others: Any) -> Any:
        loaded = load(key, *others)
        if loaded[0] is not None:
            found.append((threading.current_thread().name, key.rpartition("-")[0]))
        return loaded

    monkeypatch.setattr(programs_ahead, "_load_from_cache", recorded)
    monkeypatch.setattr(programs_ahead, "SMALLEST_BYTES", 1)
    use_compile_cache(tmp_path / "programs")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return found


def life(factor: float = 2.0, path: str = "runs/x") -> float:
    """Compile and run a program, as a new process would that opens the run."""
    jax.clear_caches()
    ahead = load_ahead(path)
    assert ahead is not None

    def step(x: jax.Array) -> jax.Array:
        return (x * factor).sum()

    result = float(jax.jit(step)(np.ones(3, np.float32)))
    ahead.finish()
    return result


def test_the_next_life_loads_on_a_thread_of_its_own(loads: list[tuple[str, str]]) -> None:
    assert life() == 6
    assert loads == []
    assert life() == 6
    assert loads == [(LOADING, "jit_step")]
    assert life(path="runs/another") == 6
    assert loads[1:] == [(threading.current_thread().name, "jit_step")]


def test_a_run_loads_its_training_step_ahead(loads: list[tuple[str, str]], tmp_path: Path) -> None:
    losses = []
    for _ in range(2):
        jax.clear_caches()
        model, optimizer, _ = objects("sgd")
        step = torchorbax.train_step(model, optimizer, loss_fn)
        loads.clear()
        with torchorbax.resume(model, optimizer, tmp_path / "run", compile_cache=tmp_path / "programs") as run:
            for i in run.steps(run.next_step + 1):
                losses.append(float(step(batch_of(i))))
    assert (LOADING, "jit_step") in loads
    assert (threading.current_thread().name, "jit_step") not in loads


def test_another_program_is_compiled_and_takes_the_place_of_the_last(loads: list[tuple[str, str]]) -> None:
    life()
    assert life(3.0) == 9
    assert loads == [(LOADING, "jit_step")]  # in vain
    loads.clear()
    assert life(3.0) == 9
    assert loads == [(LOADING, "jit_step")]


@pytest.mark.parametrize("what", ["the list", "the program"])
def test_what_is_damaged_is_not_loaded(loads: list[tuple[str, str]], tmp_path: Path, what: str) -> None:
    life()
    entries = sorted((tmp_path / "programs").iterdir(), key=lambda path: path.stat().st_size)
    (entries[0] if what == "the list" else entries[-1]).write_bytes(b"garbage")
    assert life() == 6
    assert (LOADING, "jit_step") not in loads


def test_a_program_that_does_not_load_is_loaded_again_when_it_is_needed(
    loads: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    life()

    def fail(self: ProgramsAhead, use: programs_ahead.Use) -> Any:
        raise RuntimeError("no memory on the device")

    monkeypatch.setattr(ProgramsAhead, "_load", fail)
    with caplog.at_level(logging.INFO, "torchorbax"):
        assert life() == 6
    assert loads == [(threading.current_thread().name, "jit_step")]
    assert "could not be loaded ahead: RuntimeError('no memory on the device')" in caplog.text


def test_a_program_for_other_options_or_devices_is_not_taken(loads: list[tuple[str, str]]) -> None:
    life()
    jax.clear_caches()
    ahead = load_ahead("runs/x")
    assert ahead is not None
    (use,) = [use for use in ahead._loading if use.key.startswith("jit_step")]
    assert ahead.take(use._replace(options=b"others")) is None
    assert ahead.take(use._replace(devices=(1,))) is None
    assert ahead.take(use)[0] is not None


@pytest.mark.usefixtures("loads")
def test_nothing_is_loaded_ahead_by_several_processes_or_without_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert load_ahead("runs/x") is None
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    use_compile_cache(False)
    assert load_ahead("runs/x") is None
