"""Saves in the background: one at a time, errors kept for the caller, and told once."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torchorbax
from torchorbax import Checkpointer, SaveError, policies

from tests.helpers.fake_runs import fake_run, weights
from tests.helpers.memory_storage import MemoryStorage


def test_continuous_saves_start_when_the_one_before_is_committed(storage: MemoryStorage) -> None:
    with fake_run(storage) as run:
        storage.gate.clear()
        assert run.save(0)
        assert [run.save(step) for step in (1, 2, 3)] == [False] * 3
        assert storage.steps() == []
        storage.gate.set()
        run.wait()
        assert storage.steps() == [0]
        assert run.save(4)
        run.wait()
        assert run.all_steps() == [0, 4]


def test_intervals_wait_for_the_save_in_flight_and_never_overlap(storage: MemoryStorage) -> None:
    with fake_run(storage, save=2) as run:
        storage.gate.clear()
        assert run.save(0)
        assert not run.save(1)
        threading.Timer(0.2, storage.gate.set).start()
        assert run.save(2)
        assert "commit 0" in storage.log
    assert storage.steps() == [0, 2]


def test_the_new_step_is_committed_before_an_old_one_goes(storage: MemoryStorage) -> None:
    with fake_run(storage, keep=1) as run:
        run.save(0, force=True)
        run.save(1, force=True)
    assert storage.log == ["clean", "commit 0", "commit 1", "delete 0"]


@pytest.mark.parametrize("ask", ["save", "wait", "close"])
def test_errors_of_background_saves_are_raised_once_with_the_step(storage: MemoryStorage, ask: str) -> None:
    storage.failures[0] = OSError("disk full")
    run = fake_run(storage)
    run.save(0)
    run._main.saver._in_flight[1].exception()
    calls: dict[str, Callable[[], Any]] = {"save": lambda: run.save(1), "wait": run.wait, "close": run.close}
    with pytest.raises(SaveError, match="step 0 was not saved: OSError: disk full") as caught:
        calls[ask]()
    assert caught.value.step == 0
    assert isinstance(caught.value.__cause__, OSError)
    run.close()
    assert storage.steps() == ([1] if ask == "save" else [])
    assert [record.error is None for record in run.history] == ([False, True] if ask == "save" else [False])


def test_a_preservation_policy_that_fails_is_told_and_loses_nothing(storage: MemoryStorage) -> None:
    keep = policies.BestN(get_metric_fn=lambda metrics: metrics["accuracy"], n=1)
    run = fake_run(storage, keep=keep)
    run.save(0, metrics={"loss": 1.0})
    run.wait()
    run.save(1, metrics={"loss": 2.0})
    with pytest.raises(SaveError, match="step 1 was saved, but letting older steps go failed: KeyError") as caught:
        run.close()
    assert caught.value.committed
    assert storage.steps() == [0, 1]


def test_a_failed_save_never_stops_later_ones(storage: MemoryStorage) -> None:
    storage.failures = {step: OSError("full") for step in (1, 2)}
    errors = []
    with fake_run(storage) as run:
        for step in range(5):
            try:
                run.save(step)
            except SaveError as error:
                errors.append(error.step)
            run._main.saver.collect()
    assert errors == [1, 2]
    assert storage.steps() == [0, 3, 4][-3:]


def test_a_failed_step_can_be_saved_again(storage: MemoryStorage) -> None:
    storage.failures[3] = OSError("full")
    with fake_run(storage) as run:
        run.save(3)
        with pytest.raises(SaveError, match="step 3"):
            run.wait()
        storage.failures.clear()
        assert run.save(3)
    assert storage.steps() == [3]


def test_an_error_at_the_end_does_not_hide_the_loop_s_own(storage: MemoryStorage) -> None:
    storage.failures[0] = OSError("full")

    def loop() -> None:
        with fake_run(storage) as run:
            run.save(0)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as caught:
        loop()
    assert any("step 0 was not saved" in note for note in caught.value.__notes__)
    with pytest.raises(SaveError, match="step 0"), fake_run(storage) as run:
        run.save(0)


def test_log_messages_name_what_is_waited_for(storage: MemoryStorage, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "torchorbax")
    run = fake_run(storage)
    storage.gate.clear()
    run.save(4)
    timer = threading.Timer(0.2, storage.gate.set)
    timer.start()
    run.close()
    assert "waiting for step 4 to be committed" in caplog.text


def test_two_runs_on_one_path(tmp_path: Path) -> None:
    with Checkpointer(str(tmp_path), {"w": weights(1)}) as one, Checkpointer(str(tmp_path), {"w": weights(2)}) as other:
        one.save(0, force=True)
        one.wait()
        other.save(0, force=True)
        with pytest.raises(
            SaveError, match="step 0 was not saved: somebody else has saved it meanwhile; is another run"
        ):
            other.wait()
    assert torchorbax.load(str(tmp_path), item="w")["w"][0] == 1
