"""Saves in the background: one at a time, errors kept for the caller, and told once."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchorbax
from torchorbax import Checkpointer, SaveError
from torchorbax._src.save import snapshot

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
    run._main.saver.wait()
    calls: dict[str, Callable[[], Any]] = {"save": lambda: run.save(1), "wait": run.wait, "close": run.close}
    with pytest.raises(SaveError, match="step 0 was not saved: OSError: disk full") as caught:
        calls[ask]()
    assert caught.value.step == 0
    assert isinstance(caught.value.__cause__, OSError)
    run.close()
    assert storage.steps() == ([1] if ask == "save" else [])
    assert [record.error is None for record in run.history] == ([False, True] if ask == "save" else [False])


class Unusual:
    """An object whose `state_dict` does something."""

    def __init__(self, does: Callable[[], object]) -> None:
        self.does = does

    def state_dict(self) -> dict[str, Any]:
        self.does()
        return {"a": 1}

    def load_state_dict(self, state: Any) -> None: ...


@pytest.mark.parametrize("error", [MemoryError("no room"), ZeroDivisionError("mine")])
def test_a_snapshot_that_cannot_be_taken_is_a_save_that_failed(storage: MemoryStorage, error: Exception) -> None:
    """It does not end the loop from within `save`, and the saves after it are as usual."""
    errors: list[Exception] = []
    run = Checkpointer("run", {"a": Unusual(lambda: raise_first(errors))}, rng=False, save=1)
    errors.append(error)
    assert run.save(0)
    with pytest.raises(SaveError, match=f"step 0 was not saved: .*{type(error).__name__}: {error}") as caught:
        run.wait()
    assert run.save(1)
    run.close()
    assert storage.steps() == [1]
    assert [record.error is caught.value for record in run.history] == [True, False]


def raise_first(errors: list[Exception]) -> None:
    if errors:
        raise errors.pop()


def test_no_memory_is_held_for_a_snapshot_that_failed(storage: MemoryStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error stays in `history`, with a traceback whose frames would hold what had been copied."""
    copied: list[weakref.ref[np.ndarray]] = []

    def copy(array: np.ndarray) -> np.ndarray:
        if copied:
            raise MemoryError
        copied.append(weakref.ref(mine := array.copy()))
        return mine

    monkeypatch.setattr(snapshot, "host_copy", copy)
    with Checkpointer("run", {"w": {"a": np.ones(9), "b": np.ones(9)}}, rng=False, save=1) as run:
        run.save(0)
        with pytest.raises(SaveError, match="MemoryError"):
            run.wait()
        assert run.history[0].error is not None
        assert copied[0]() is None


def test_a_step_kept_for_an_exception_that_has_no_room_is_a_warning(
    storage: MemoryStorage, caplog: pytest.LogCaptureFixture
) -> None:
    errors: list[Exception] = []
    state = {"a": Unusual(lambda: raise_first(errors))}
    with Checkpointer("run", state, rng=False, save=None, save_on_exception=True) as run:
        errors.append(MemoryError("no room"))
        run.save(0)
        assert "step 0 could not be kept for the case of an exception: NotReadyError: a: state_dict" in caplog.text
        run.save(1)
    assert run.history == []


def test_no_thread_to_write_a_save(storage: MemoryStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with fake_run(storage, save=1) as run:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            run.save(0)
        with pytest.raises(SaveError, match="step 0 was not saved: there is no thread to write it: can't start new"):
            run.wait()
        run.save(1)
    assert storage.steps() == [1]


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


def test_a_run_that_is_opened_again_in_the_same_process_takes_the_earlier_one_over(tmp_path: Path) -> None:
    """As when a cell of a notebook runs twice."""
    with Checkpointer(str(tmp_path), {"w": weights(1)}) as one, Checkpointer(str(tmp_path), {"w": weights(2)}) as other:
        other.save(0, force=True)
        other.wait()
        one.save(0, force=True)
        with pytest.raises(SaveError, match=r"step 0 was not saved: .* has taken this run over"):
            one.wait()
        other.save(1, force=True)
    assert torchorbax.verify(str(tmp_path)) == [0, 1]
    assert torchorbax.load(str(tmp_path), item="w")["w"][0] == 2
