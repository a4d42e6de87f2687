"""One save by several processes: when one of them fails, or is no more, all learn it, and no step is half there."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchorbax import Checkpointer, verify

from tests.helpers.runs import visible
from tests.helpers.several import Facts, Running, RunProcesses, alike, facts_of
from tests.helpers.several_state import VALUES, spread

FAILURES = """
    import errno, time
    import torchorbax
    from torchorbax import Checkpointer
    from torchorbax._src.save.read_back import ReadBack
    from torchorbax._src.storage import array_writer
    from torchorbax._src.storage.local_files import LocalFiles
    from torchorbax._src.storage.opening import open_storage as Storage
    from tests.helpers.several_state import VALUES, outcome, spread

    root = sys.argv[1]
    write = array_writer.write

    def opened(name, tree=None, **options):
        options = {"save": None, "keep": None, "rng": False, "barrier_timeout_s": 60, **options}
        return Checkpointer(f"{root}/{name}", {"state": {"w": spread(VALUES)} if tree is None else tree}, **options)

    def saved(run, step):
        def both():
            run.save(step, force=True)
            run.wait()
        return outcome(both)

    def goes_on(name, run, *outcomes):
        last = saved(run, 100)
        closed = outcome(run.close)
        note(**{name: dict(outcomes=outcomes, last=last, closed=closed, there=run.all_steps())})
        meet(name)

    def in_the_loop():
        with opened("loop", save="continuous") as run:
            for i in range(1_000_000):
                if index == 1 and i == 20:
                    raise ValueError("boom")
                run.save(i)

    started = time.monotonic()
    note(loop=outcome(in_the_loop), loop_s=time.monotonic() - started)
    meet("loop")

    def all_fail():
        with opened("all", save_on_exception=True) as run:
            for i in range(10):
                if i == 7:
                    raise ValueError("boom")
                run.save(i)

    result = outcome(all_fail)
    meet("all")
    run = opened("all")
    note(all=[result, run.all_steps()])
    run.close()

    tree = {"w": spread(VALUES), "extra": 1}
    run = opened("leaf", tree)
    first = saved(run, 0)
    if index == 1:
        tree["extra"] = object()
    second = saved(run, 1)
    again = outcome(run.wait)  # the background save of a process whose `save` has raised
    tree["extra"] = 2
    goes_on("leaf", run, first, second, again)

    for who in (0, 1):
        run = opened(f"write {who}")
        def fails(*args, **kwargs):
            raise OSError(errno.ENOSPC, "no space left")
        array_writer.write = fails if index == who else write
        failed = saved(run, 0)
        array_writer.write = write
        goes_on(f"write {who}", run, failed)

    for who in (0, 1):
        run = opened(f"one {who}")
        result = saved(run, 0) if index == who else outcome(run.close)
        note(**{f"one {who}": result})
        meet(f"one {who}")
        run.close()

    for who in (0, 1):
        run = opened(f"late {who}", barrier_timeout_s=2)
        started = time.monotonic()
        result = saved(run, 0) if index == who else None
        note(**{f"late {who}": result, f"late {who} s": time.monotonic() - started})
        meet(f"late {who}")
        outcome(run.close)

    digested = []
    digests = LocalFiles.digests
    def noting(files, folder, paths):
        digested.extend(f"{files.root}/{folder}/{path}" for path in paths)
        return digests(files, folder, paths)
    LocalFiles.digests = noting
    run = opened("digests", {"w": spread(VALUES), "own": index}, verify_after_save=False)
    result = saved(run, 0)
    LocalFiles.digests = digests
    listed = Storage(f"{root}/digests").manifest(0).files
    goes_on("digests", run, result, digested, list(listed))

    def harmed(self, manifest, bases):
        if index == 1:
            path = f"{root}/harmed/{manifest.step}/manifest/process_1"
            content = open(path, "rb").read()
            open(path, "wb").write(content[:-1] + b" ")
        meet("harmed already")
        return read(self, manifest, bases)
    read = ReadBack.read
    run = opened("harmed", {"w": spread(VALUES), "own": index})
    ReadBack.read = harmed
    result = saved(run, 0)
    ReadBack.read = read
    goes_on("harmed", run, result)

    run = opened("steps")
    goes_on("steps", run, saved(run, 5 + index))

    run = opened("shapes", {"w": spread(VALUES[: 24 * (1 + index)])})
    note(shapes=saved(run, 5))
    outcome(run.close)

    note(path=outcome(lambda: opened(f"path {index}")))
    meet("path")
    note(items=outcome(lambda: Checkpointer(f"{root}/items", {f"state{index}": {"w": spread(VALUES)}}, rng=False)))
    meet("items")
    if index == 0:
        os.makedirs(f"{root}/strange")
        open(f"{root}/strange/notes.txt", "w").close()
    meet("strange")
    note(strange=outcome(lambda: opened("strange")))
    meet("end")
"""

FINE = ["none", "", None]


@pytest.fixture(scope="module")
def failures(folder: Path, run_processes: RunProcesses) -> Facts:
    return facts_of(run_processes(FAILURES, folder / "failures", devices=2))


def outcomes_of(facts: Facts, name: str, before: Sequence[int] = ()) -> list[Any]:
    """By process, what went wrong in a run that then went on."""
    for one in facts:
        assert (one[name]["last"], one[name]["closed"]) == (FINE, FINE)
        assert one[name]["there"] == [*before, 100]
    return [one[name]["outcomes"] for one in facts]


def test_an_exception_in_one_loop_ends_the_others_with_an_error_that_names_the_process(failures: Facts) -> None:
    first, second = failures[0]["loop"], failures[1]["loop"]
    assert second == ["ValueError", "boom", None]
    assert first[0] in ("ProcessError", "SaveError")
    assert "process 1 has left the run: ValueError: boom" in first[1]
    assert first[2] == [1]
    assert failures[0]["loop_s"] < 40


def test_a_step_that_all_have_completed_is_saved_when_all_fail(failures: Facts) -> None:
    assert alike(failures, "all") == [["ValueError", "boom", None], [6]]


def test_an_unsupported_leaf_in_one_process_fails_the_save_of_all_and_no_later_one(failures: Facts) -> None:
    (fine, first, quiet), (also_fine, second, _) = outcomes_of(failures, "leaf", [0])
    assert fine == also_fine == quiet == FINE
    assert first[0] == "SaveError"
    assert "step 1 was not saved" in first[1]
    assert "process 1: UnsupportedLeafError" in first[1]
    assert first[2] == [1]
    assert second[0] == "UnsupportedLeafError"
    assert "extra" in second[1]


@pytest.mark.parametrize("who", [0, 1])
def test_a_process_that_cannot_write_fails_the_save_of_all_and_no_later_one(who: int, failures: Facts) -> None:
    for (failed,) in outcomes_of(failures, f"write {who}"):
        assert failed[0] == "SaveError"
        assert "step 0 was not saved" in failed[1]
        assert "no space left" in failed[1]
        assert who == 0 or "process 1: OSError" in failed[1]


@pytest.mark.parametrize("who", [0, 1])
def test_a_save_in_one_process_only_names_the_other(who: int, failures: Facts) -> None:
    kind, text, named = failures[who][f"one {who}"]
    assert kind == "SaveError"
    assert f"process {1 - who} has left the run: it has closed the run" in text
    assert named == [1 - who]
    assert failures[1 - who][f"one {who}"] == FINE


@pytest.mark.parametrize("who", [0, 1])
def test_a_process_that_does_not_save_is_not_waited_for_longer_than_said(who: int, failures: Facts) -> None:
    kind, text, named = failures[who][f"late {who}"]
    assert kind == "SaveError"
    assert f"start: process {1 - who} did not come within 2 s (barrier_timeout_s)" in text
    assert named == [1 - who]
    assert failures[who][f"late {who} s"] < 15


def test_each_process_sums_what_it_has_written_itself(failures: Facts) -> None:
    """Else process 0 would read the whole step, however many hosts there are, before it commits."""
    (fine, first, listed), (also_fine, second, also_listed) = outcomes_of(failures, "digests", [0])
    assert fine == also_fine == FINE
    assert listed == also_listed
    of_second = {path for path in listed if "ocdbt.process_1/" in path or path.endswith("/process_1")}
    assert len(of_second) > 2
    assert {path.rpartition("/digests/")[2].partition("/")[2] for path in first}.isdisjoint(of_second)
    assert len(second) == len(of_second)


def test_each_process_reads_its_own_state_back(failures: Facts) -> None:
    for (failed,) in outcomes_of(failures, "harmed"):
        assert failed[0] == "SaveError"
        assert "process_1 is not what was written" in failed[1]


def test_saves_of_different_steps_fail_everywhere(failures: Facts) -> None:
    (first,), (second,) = outcomes_of(failures, "steps")
    assert first[0] == second[0] == "SaveError"
    assert "step 5 was not saved: process 1 saves step 6 instead" in first[1]
    assert "step 6 was not saved: process 1 saves step 6 instead" in second[1]


def test_models_of_different_shapes_are_not_saved(failures: Facts) -> None:
    for one in failures:
        assert one["shapes"][0] == "SaveError"
        assert "process 1 has other arrays, by name, shape or dtype, than process 0" in one["shapes"][1]


def test_processes_that_open_different_runs_are_told_so(failures: Facts) -> None:
    for index, one in enumerate(failures):
        kind, text, _ = one["path"]
        assert kind == "ConfigError"
        assert text.index(f"path {index}") < text.index(f"process {1 - index} ") < text.index(f"path {1 - index}")
        kind, text, _ = one["items"]
        assert kind == "ConfigError"
        assert "['state0']" in text
        assert "['state1']" in text


def test_a_path_that_process_0_refuses_is_refused_everywhere(failures: Facts) -> None:
    assert [one["strange"][0] for one in failures] == ["ConfigError", "ProcessError"]
    assert all("holds no run but other things (notes.txt)" in one["strange"][1] for one in failures)
    assert "process 0: ConfigError" in failures[1]["strange"][1]


MID_SAVE = """
    import threading, time
    from torchorbax import Checkpointer
    from torchorbax._src.save.read_back import ReadBack
    from torchorbax._src.storage import array_writer
    from torchorbax._src.storage.local_files import LocalFiles
    from torchorbax._src.storage.opening import open_storage as Storage
    from tests.helpers.several_state import VALUES, outcome, spread

    run = Checkpointer(sys.argv[1], {"state": {"w": spread(VALUES)}}, save=None, rng=False, barrier_timeout_s=5)
    run.save(0, force=True)
    run.wait()
    meet("saved")
    if index == 1:
        write = array_writer.write
        def stuck(*args, **options):
            write(*args, **options)
            tell("in mid-save")
            threading.Event().wait()
        array_writer.write = stuck

    def both():
        run.save(1, force=True)
        run.wait()

    started = time.monotonic()
    note(ended=outcome(both), after_s=time.monotonic() - started, there=run.all_steps())
    if index == 0:  # runs the service, without which JAX ends the other at once
        service.blocking_key_value_get("the other has noted it", 60_000)
    else:
        service.key_value_set("the other has noted it", "")
    end()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_process_that_is_gone_in_mid_save_is_named_and_its_step_is_not_there(
    number: signal.Signals, tmp_path: Path, run_processes: RunProcesses
) -> None:
    path = tmp_path / "run"

    def during(running: Running) -> Sequence[int]:
        running.wait_for(1, "in mid-save")
        running.signal(1, number)
        return (0, 2)

    for one in run_processes(MID_SAVE, path, processes=3, devices=1, during=during):
        kind, text, named = one.facts["ended"]
        assert kind == "SaveError"
        assert "step 1 was not saved" in text
        assert "write: process 1 did not come within 5 s (barrier_timeout_s)" in text
        assert named == [1]
        assert one.facts["after_s"] < 30
        assert one.facts["there"] == [0]
        assert "step 1 was not saved" in one.stderr  # at once, not only when somebody asks
    state = {"state": {"w": spread(np.zeros_like(VALUES))}}
    with Checkpointer(path, state, save=None, rng=False) as run:
        assert run.restore() == 0
        assert np.array_equal(state["state"]["w"], VALUES)
        assert run.save(1, force=True)
    assert verify(path) == [0, 1]
    assert visible(path) == ["0", "1"]
