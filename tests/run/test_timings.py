"""A run says how long it has taken to come back, part by part."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torchorbax
from torchorbax import Checkpointer, Timings
from torchorbax._src.run.timings import Stopwatch

from tests.helpers.models import batch_of, loss_fn, objects


def live(path: Path, steps: int) -> tuple[Timings, Timings, Checkpointer]:
    """What a run says before and after the first of some steps."""
    model, optimizer, _ = objects("adamw")
    step = torchorbax.train_step(model, optimizer, loss_fn)
    with torchorbax.resume(model, optimizer, path) as run:
        before = run.timings
        for i in run.steps(run.next_step + steps):
            step(batch_of(i))
        return before, run.timings, run


def test_every_part_is_known_after_the_first_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    live(tmp_path / "run", 2)
    caplog.clear()
    with caplog.at_level(logging.INFO, "torchorbax"):
        before, after, run = live(tmp_path / "run", 2)
    assert run.step == 1
    assert before == Timings(before.open_s, before.find_s, before.read_s, before.place_s)
    parts = vars(after)
    assert all(seconds is not None and seconds > 0 for seconds in parts.values())
    assert after.trace_s is not None
    assert after.compile_s is not None
    assert after.first_step_s is not None
    assert after.trace_s + after.compile_s <= after.first_step_s
    (line,) = [one.getMessage() for one in caplog.records if "first of this start" in one.getMessage()]
    found = re.findall(r"(\w[\w ]*) (\d+\.\d\d) s", line.partition("the first of this start: ")[2])
    assert {f"{name.replace(' ', '_')}_s": seconds for name, seconds in found} == {
        name: f"{seconds:.2f}" for name, seconds in parts.items()
    }


def test_a_fresh_run_reads_and_places_nothing(tmp_path: Path) -> None:
    _, after, _ = live(tmp_path / "run", 1)
    assert (after.read_s, after.place_s) == (None, None)
    assert after.find_s is not None
    assert after.first_step_s is not None


def test_what_comes_after_the_first_step_does_not_count() -> None:
    watch = Stopwatch()
    with watch.part("read_s"):
        pass
    watch.add("read_s", 3.0)
    assert watch.timings.read_s is not None
    assert watch.timings.read_s >= 3
    watch.step_done("runs/x", 0)
    assert watch.timings.first_step_s is None  # nobody has said that the loop may begin
    watch.ready()
    watch.step_done("runs/x", 1)
    known = watch.timings
    watch.add("read_s", 3.0)
    watch.step_done("runs/x", 2)
    assert watch.timings == known
