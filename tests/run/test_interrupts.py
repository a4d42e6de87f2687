"""Ctrl-C at every line of `save`, `wait` and `close`: a step is saved or it is not, and the run says which."""

from __future__ import annotations

import gc
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torchorbax
from torchorbax import Checkpointer, ConfigError

from tests.helpers.fake_runs import fake_run
from tests.helpers.memory_storage import MemoryStorage

PACKAGE = os.path.join(os.path.dirname(torchorbax.__file__), "_src")
TRACED = tuple(os.path.join(PACKAGE, wing) for wing in ("run", "save"))
NOT_TRACED = os.path.join(PACKAGE, "run", "turns.py")
"""Python raises KeyboardInterrupt when a call has returned, so it cannot come between the end of a `with` block and the
release of an interpreter's own lock; a trace function could raise there."""


def interrupted(call: Callable[[], object], at: int) -> bool:
    """Raise KeyboardInterrupt when `call` comes to its line number `at`. Returns whether it came there."""
    lines = itertools.count()

    def trace(frame: FrameType, event: str, _: object) -> Any:
        file = frame.f_code.co_filename
        if not file.startswith(TRACED) or file == NOT_TRACED:
            return None
        if event == "line" and next(lines) == at:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    gc.disable()  # a finalizer is not a line of `call`
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
        gc.enable()
    return False


def claimed(run: Checkpointer) -> int | None:
    """The step that the run says is the last committed one."""
    said = run._main.standing()
    return None if "no step" in said else int(said.partition("committed step is ")[2].partition(";")[0])


def interrupted_runs(storage: MemoryStorage, call: Callable[[Checkpointer], object]) -> Iterator[Checkpointer]:
    """Runs with step 0 saved, in each of which `call` was interrupted one line later than in the one before."""
    for at in itertools.count():
        storage.committed.clear()
        run = fake_run(storage, save=None, keep=None)
        run.save(0, force=True)
        run.wait()
        came_there = interrupted(lambda run=run: call(run), at)  # type: ignore[misc]
        said = claimed(run)
        assert said in storage.steps(), f"line {at}: it calls step {said} committed"
        yield run
        run.close()
        assert [one.step for one in run.history if one.commit_s is not None] == storage.steps(), f"line {at}"
        assert all(one.error is None and one.commit_s is not None for one in run.history), f"line {at}"
        if not came_there:
            assert at > 20
            return


def save_again(run: Checkpointer, step: int) -> None:
    if step in [one.step for one in run.history]:
        with pytest.raises(ConfigError, match=f"step {step} is already saved"):
            run.save(step, force=True)
    else:
        assert run.save(step, force=True)
    run.wait()


def test_ctrl_c_in_save(storage: MemoryStorage) -> None:
    for run in interrupted_runs(storage, lambda run: run.save(1, force=True, metrics={"loss": 1.0})):
        save_again(run, 1)
        run.save(2, force=True)
        run.wait()
        assert run.all_steps() == [0, 1, 2]


def test_ctrl_c_in_save_and_no_word_about_it(storage: MemoryStorage) -> None:
    """The loop goes on with the next step."""
    for run in interrupted_runs(storage, lambda run: run.save(1, force=True)):
        started = [one.step for one in run.history]
        run.save(2, force=True)
        run.wait()
        assert run.all_steps() == [*started, 2]


def test_ctrl_c_in_a_save_that_waits_for_the_one_before(storage: MemoryStorage) -> None:
    def two(run: Checkpointer) -> None:
        run.save(1, force=True)
        run.save(2, force=True)

    for run in interrupted_runs(storage, two):
        for step in (1, 2):
            if step not in [one.step for one in run.history] and run._main.newest < step:
                run.save(step, force=True)
        run.wait()
        assert run.all_steps() in ([0, 1, 2], [0, 2])


def test_ctrl_c_before_a_continuous_save_is_written_does_not_end_saving(storage: MemoryStorage) -> None:
    for at in itertools.count():
        storage.committed.clear()
        run = fake_run(storage)
        came_there = interrupted(lambda run=run: run.save(0), at)  # type: ignore[misc]
        for step in range(1, 4):
            run.save(step)
            run.wait()
        assert storage.steps()[-1] == 3, f"line {at}"
        run.close()
        if not came_there:
            break


@pytest.mark.parametrize("fails", [False, True])
def test_ctrl_c_in_wait_and_close(storage: MemoryStorage, fails: bool) -> None:
    for way, at in itertools.product(("wait", "close"), range(200)):
        storage.committed.clear()
        storage.failures = {0: OSError("full")} if fails else {}
        run = fake_run(storage, save=None)
        run.save(0, force=True)
        came_there = interrupted(getattr(run, way), at) if not fails else failed(run, way, at)
        errors = []
        for _ in range(2):
            try:
                run.close()
            except torchorbax.SaveError as error:
                errors.append(error)
        assert storage.steps() == ([] if fails else [0]), f"{way}, line {at}"
        assert [one.error is not None for one in run.history] == [fails]
        assert len(errors) <= fails
        if not came_there:
            assert at > 10
            continue


def failed(run: Checkpointer, way: str, at: int) -> bool:
    try:
        return interrupted(getattr(run, way), at)
    except torchorbax.SaveError:
        return False
