"""Several jax processes, as on several hosts: what is saved and restored, who decides, and what happens to the others
when one of them fails."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import torchorbax
from jax.sharding import Mesh
from torchorbax import Checkpointer, CorruptCheckpointError, verify

from tests.helpers.models import RULES, batch_of, loss_fn, seeded
from tests.helpers.programs import RunPython
from tests.helpers.several import Ended, Running, RunProcesses
from tests.helpers.several_state import VALUES, Loader, generators, moments, spread, whole

Facts = list[dict[str, Any]]
"""What each process has noted."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of this module are."""
    return tmp_path_factory.mktemp("several")


def facts_of(ended: Sequence[Ended]) -> Facts:
    return [one.facts for one in ended]


def alike(facts: Facts, *keys: str) -> Any:
    """What all processes have noted under these keys, which must be the same."""
    found = [{key: one[key] for key in keys} for one in facts]
    assert all(one == found[0] for one in found), found
    return found[0] if len(keys) > 1 else found[0][keys[0]]


# ----------------------------------------------------------------------------- on another number of chips and processes

TRAIN = """
    import torch, torchorbax
    from torchorbax._src.tensors import torchax_tensors
    from tests.helpers.models import RULES, batch_of, loss_fn, seeded
    from tests.helpers.several_state import VALUES, Loader, all_devices, generators, moments, seed, whole

    path, stop = sys.argv[1], int(sys.argv[2])
    model = seeded()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    step = torchorbax.train_step(model, optimizer, loss_fn)
    seed(100 + index)
    torchax_tensors.set_rng_key(jax.random.key(index))  # torchax's, too: it comes from torch's seed
    loader = Loader(1000 * (index + 1) + count)

    def state():
        return {
            "model": whole(torchorbax.to_jax(model)), "optimizer": whole(moments(model, optimizer)),
            "generators": generators(), "loader": loader.told(),
        }

    losses, in_flight = [], 0
    with torchorbax.resume(
        model, optimizer, path, state={"loader": loader}, shardings=(all_devices("fsdp"), RULES), barrier_timeout_s=60,
        keep=None,
    ) as run:
        before = state()
        for i in run.steps(stop):
            losses.append(float(step(batch_of(i))))
            in_flight += bool(run.history) and run.history[-1].commit_s is None
            run.log(loss=losses[-1] + index)
        after = state()
    weight = torchorbax.to_jax(model)["hidden.weight"]
    note(
        step=run.step, before=before, after=after, losses=losses, in_flight=in_flight, steps=run.all_steps(),
        started=[one.step for one in run.history], nbytes=[one.nbytes for one in run.history],
        best=run.best_step("loss"), metrics={one.step: one.metrics for one in run.history},
        devices=len(weight.sharding.device_set), shard=list(weight.addressable_shards[0].data.shape),
    )
"""
STOPS = (30, 33, 35)


@pytest.fixture(scope="module")
def trained(folder: Path, run_processes: RunProcesses) -> dict[str, Any]:
    """One run that goes on: 30 steps by 2 processes, 3 by 4, 2 by 2 again; with 4 devices each."""
    path = folder / "trained"
    found: dict[str, Any] = {"path": path, "copies": {}}
    for name, processes, stop in zip(("two", "four", "two again"), (2, 4, 2), STOPS, strict=True):
        ended = run_processes(TRAIN, path, stop, processes=processes, timeout=180)
        found[name] = facts_of(ended)
        found["copies"][name] = folder / f"copy-{stop}"
        found[f"{name} said"] = [one.stderr for one in ended]
        shutil.copytree(path, found["copies"][name])
    return found


def uninterrupted_losses() -> list[float]:
    """Of one process that trains all steps on one device."""
    model = seeded()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    torchorbax.place_(model, optimizer)
    step = torchorbax.train_step(model, optimizer, loss_fn)
    return [float(step(batch_of(i))) for i in range(STOPS[-1])]


SHARED = ("model", "optimizer")


def test_two_processes_go_on_as_four_and_four_as_two(trained: dict[str, Any]) -> None:
    two, four, again = trained["two"], trained["four"], trained["two again"]
    assert (alike(two, "step"), alike(four, "step"), alike(again, "step")) == (None, 29, 32)
    for saved, restored in ((two, four), (four, again)):
        for item in SHARED:
            (left,) = {json.dumps(one["after"][item], sort_keys=True) for one in saved}
            assert {json.dumps(one["before"][item], sort_keys=True) for one in restored} == {left}
    assert alike(four, "devices", "shard") == {"devices": 16, "shard": [32, 2]}
    assert alike(again, "devices", "shard") == {"devices": 8, "shard": [32, 4]}


def test_the_losses_of_a_run_on_changing_processes_are_those_of_one_without_interruption(
    trained: dict[str, Any],
) -> None:
    losses = [loss for name in ("two", "four", "two again") for loss in alike(trained[name], "losses")]
    assert losses == pytest.approx(uninterrupted_losses(), rel=1e-3)


def test_saves_go_on_while_the_loop_runs_its_collectives(trained: dict[str, Any]) -> None:
    """A continuous run: saves are in flight at most steps, and none is in the way of another."""
    two = trained["two"]
    assert all(one["in_flight"] >= 3 for one in two), [one["in_flight"] for one in two]
    started = alike(two, "started")
    assert started[0] == 0
    assert started[-1] == 29
    assert alike(two, "steps") == started
    assert alike(two, "nbytes")
    assert verify(trained["path"]) == alike(trained["two again"], "steps")


def test_metrics_are_those_of_process_0_in_every_process(trained: dict[str, Any]) -> None:
    metrics = alike(trained["two"], "metrics")
    losses = alike(trained["two"], "losses")
    assert metrics == {str(step): {"loss": pytest.approx(losses[step])} for step in map(int, metrics)}
    best = min(metrics, key=lambda step: metrics[step]["loss"])
    assert alike(trained["two"], "best") == int(best)


def test_every_process_gets_its_own_generators_and_data_loader_back(
    trained: dict[str, Any], folder: Path, run_processes: RunProcesses
) -> None:
    two, four, again = trained["two"], trained["four"], trained["two again"]
    assert two[0]["after"]["loader"][0] == 1002
    assert two[1]["after"]["loader"][0] == 2002
    assert two[0]["after"]["generators"] != two[1]["after"]["generators"]
    for index, source in enumerate((0, 1, 0, 0)):
        for own in ("generators", "loader"):
            assert four[index]["before"][own] == two[source]["after"][own], f"{own} of process {index}"
    for index in range(2):
        for own in ("generators", "loader"):
            assert again[index]["before"][own] == four[index]["after"][own], f"{own} of process {index}"
    assert not any("was saved by" in text for text in trained["two said"])
    for text in trained["four said"]:
        assert "step 29 was saved by 2 processes and is restored by 4" in text
        assert "goes to the process of the same number; further ones take that of process 0" in text


@pytest.mark.parametrize("devices", [8, 1])
def test_one_process_goes_on_where_four_have_stopped(
    devices: int, trained: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run"
    shutil.copytree(trained["copies"]["four"], path)
    first = trained["four"][0]
    model, loader = seeded(), Loader(5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    step = torchorbax.train_step(model, optimizer, loss_fn)
    shardings = (Mesh(np.array(jax.devices()[:devices]), ("fsdp",)), RULES)
    with torchorbax.resume(model, optimizer, path, state={"loader": loader}, shardings=shardings) as run:
        assert run.step == 32
        assert whole(torchorbax.to_jax(model)) == first["after"]["model"]
        assert whole(moments(model, optimizer)) == first["after"]["optimizer"]
        assert generators() == first["after"]["generators"]
        assert loader.told() == first["after"]["loader"]
        losses = [float(step(batch_of(i))) for i in run.steps(35)]
    assert "step 32 was saved by 4 processes and is restored by 1" in caplog.text
    assert losses == pytest.approx(alike(trained["two again"], "losses"), rel=1e-3)
    assert verify(path, 34) == [34]


def test_plain_orbax_in_one_process_reads_what_several_have_written(
    trained: dict[str, Any], run_python: RunPython
) -> None:
    code = """
        import sys, json, hashlib
        import orbax.checkpoint as ocp
        import jax, numpy as np
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        found = {}
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
            for item in ("model", "optimizer"):
                folder = f"{sys.argv[1]}/29/{item}"
                leaves = orbax.metadata(folder).item_metadata.tree
                # The devices that it was saved from are not all here.
                args = {name: ocp.ArrayRestoreArgs(sharding=here) for name in leaves}
                found[item] = orbax.restore(folder, args=ocp.args.PyTreeRestore(restore_args=args))
        assert not any(name.startswith("torchorbax") for name in sys.modules)
        digests = {name: hashlib.sha256(np.asarray(array).tobytes()).hexdigest()
                   for name, array in found["model"].items()}
        print(json.dumps([digests, sorted(found["optimizer"])]))
    """
    done = run_python(code, trained["copies"]["two"], warnings="ignore")
    model, names = json.loads(done.stdout.splitlines()[-1])
    saved = trained["two"][0]["after"]
    assert model.items() <= saved["model"].items()
    assert set(saved["model"]) - set(model) <= {"head.weight"}  # tied
    assert {name for name in saved["optimizer"] if name.endswith("exp_avg")} <= set(names)


# ---------------------------------------------------------------------------------------------------- process 0 decides

DECIDE = """
    import datetime, random, time, warnings
    import torchorbax
    from torchorbax import Checkpointer, policies
    from tests.helpers.several_state import VALUES, spread

    root = sys.argv[1]
    random.seed(index)

    class ByTime:
        def should_save(self, step, previous_steps, *, context):
            return not previous_steps or (step.time - previous_steps[-1].time).total_seconds() > 0.02 * (1 + index)

    class ByChance:
        def should_save(self, step, previous_steps, *, context):
            return random.random() < 0.2

    def go(name, save, steps, pause_s=0.0, keep=None):
        state = {"state": {"w": spread(VALUES)}}
        with Checkpointer(f"{root}/{name}", state, save=save, keep=keep, rng=False, barrier_timeout_s=60) as run:
            for i in range(steps):
                time.sleep(pause_s * (1 + 2 * index))
                run.save(i, metrics={"loss": abs(i - 3.5 + index * 2), "mine": index})
            run.wait()
            note(**{name: dict(
                started=[one.step for one in run.history], there=run.all_steps(), best=run.best_step("loss"),
                most=run.best_step("loss", mode="max"), metrics={one.step: one.metrics for one in run.history},
            )})

    go("steps", 1, 6)
    go("best", 1, 8, keep=policies.BestN(get_metric_fn=lambda metrics: metrics["loss"], reverse=True, n=2))
    go("clock", policies.TimeIntervalPolicy(datetime.timedelta(seconds=0.1)), 300, 0.002)
    go("own-clock", ByTime(), 60, 0.002)
    go("chance", ByChance(), 40)
    go("continuous", "continuous", 300, 0.001)
    go("any", policies.AnySavePolicy([policies.FixedIntervalPolicy(50), ByChance()]), 60)
"""


@pytest.fixture(scope="module")
def decided(folder: Path, run_processes: RunProcesses) -> Facts:
    return facts_of(run_processes(DECIDE, folder / "decided", devices=2))


def test_the_metrics_stored_are_those_of_process_0(decided: Facts, folder: Path) -> None:
    found = alike(decided, "steps")
    assert found["metrics"] == {str(step): {"loss": abs(step - 3.5), "mine": 0} for step in range(6)}
    assert (found["best"], found["most"]) == (3, 0)
    later = Checkpointer(folder / "decided" / "steps", {"state": {"w": spread(np.zeros(8))}}, rng=False)
    assert (later.best_step("loss"), later.best_step("loss", mode="max")) == (3, 0)
    later.close()


def test_what_is_kept_is_kept_by_the_metrics_of_process_0(decided: Facts) -> None:
    found = alike(decided, "best")
    assert found["started"] == [*range(8)]
    assert found["there"] == [3, 4, 7]
    assert found["best"] == 3


@pytest.mark.parametrize("policy", ["clock", "own-clock", "chance", "continuous", "any"])
def test_every_process_saves_the_steps_that_process_0_chooses(policy: str, decided: Facts) -> None:
    found = alike(decided, policy)
    assert 2 <= len(found["started"]) < 300
    assert found["there"] == found["started"]


# -------------------------------------------------------------------------------------------------------------- SIGTERM

SIGTERM = """
    import torch, torchorbax
    from tests.helpers.models import RULES, batch_of, loss_fn, seeded
    from tests.helpers.several_state import all_devices

    def build(name):
        model = seeded()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        step = torchorbax.train_step(model, optimizer, loss_fn)
        return step, torchorbax.resume(
            model, optimizer, f"{sys.argv[1]}/{name}", shardings=(all_devices("fsdp"), RULES), save=None,
            barrier_timeout_s=60,
        )

    step, run = build("steps")
    last = None
    with run:
        for i in run.steps(1_000_000):
            float(step(batch_of(i)))
            last = i
            if i == 10:
                tell("running")
    note(steps=[last, run.all_steps(), run.preempted])

    step, run = build("by hand")
    last = 0
    while not run.preempted:
        float(step(batch_of(last)))
        if last == 10:
            tell("running by hand")
        saved = run.save(last)
        last += 1
    run.close()
    note(by_hand=[last - 1, run.all_steps(), saved])
"""


def test_sigterm_to_one_process_stops_all_with_the_same_step_saved(folder: Path, run_processes: RunProcesses) -> None:
    path = folder / "sigterm"

    def during(running: Running) -> Sequence[int]:
        running.wait_for(1, "running")
        running.signal(1, signal.SIGTERM)
        running.wait_for(0, "running by hand")
        running.signal(0, signal.SIGTERM)
        return ()

    ended = run_processes(SIGTERM, path, devices=2, during=during)
    last, there, preempted = alike(facts_of(ended), "steps")
    assert last >= 10
    assert there == [last]
    assert preempted
    last, there, saved = alike(facts_of(ended), "by_hand")
    assert last >= 10
    assert there == [last]
    assert saved
    assert "SIGTERM: saving the current step" in ended[1].stderr
    assert all(f"the last committed step is {one}" in ended[0].stderr for one in verify(path / "steps"))


# ----------------------------------------------------------------------------------------------- one process has failed

FAILURES = """
    import errno, time
    import torchorbax
    from torchorbax import Checkpointer
    from torchorbax._src.storage import array_writer
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


# ----------------------------------------------------------------------------------------------- one process is no more

MID_SAVE = """
    import threading, time
    from torchorbax import Checkpointer
    from torchorbax._src.storage import array_writer
    from tests.helpers.several_state import VALUES, outcome, spread

    run = Checkpointer(sys.argv[1], {"state": {"w": spread(VALUES)}}, save=None, rng=False, barrier_timeout_s=5)
    run.save(0, force=True)
    run.wait()
    meet("saved")
    if index == 1:
        write = array_writer.write
        def stuck(*args):
            write(*args)
            tell("in mid-save")
            threading.Event().wait()
        array_writer.write = stuck

    def both():
        run.save(1, force=True)
        run.wait()

    started = time.monotonic()
    note(ended=outcome(both), after_s=time.monotonic() - started, there=run.all_steps())
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
    assert sorted(entry.name for entry in path.iterdir()) == ["0", "1"]


# -------------------------------------------------------------------------------------------- damage, and what fits not

RESTORE = """
    import pathlib, shutil, warnings
    import numpy as np, torch, torchorbax
    from jax.sharding import PartitionSpec as P
    from torchorbax import Checkpointer
    from torchorbax._src.storage import array_reader
    from tests.helpers.several_state import VALUES, Loader, all_devices, outcome, parts, spread

    root = pathlib.Path(sys.argv[1])
    BIG = np.random.default_rng(1).standard_normal((256, 512)).astype(np.float32)

    def tree(value=0.0, rows=256):
        return {"big": spread(BIG[:rows] + value), "copied": spread(VALUES + value, P())}

    def opened(name, state, **options):
        loader = Loader(10 + index)
        options = {"save": None, "keep": None, "rng": False, "barrier_timeout_s": 60, **options}
        return Checkpointer(str(root / name), {"state": state, "loader": loader}, **options), loader

    def told(run, loader):
        return [parts(run.state["state"]), loader.told()]

    state = tree()
    run, loader = opened("run", state)
    saved = []
    for step in range(2):
        state.update(tree(float(step)))
        loader.position += 100
        run.save(step, force=True)
        run.wait()
        saved.append(told(run, loader))
    run.close()
    meet("saved")
    if index == 0:
        for name in ("data", "own", "mismatch", "verify"):
            shutil.copytree(root / "run", root / name)
        files = (root / "data" / "1" / "state" / "ocdbt.process_1").rglob("*")
        largest = max((file for file in files if file.is_file()), key=lambda file: file.stat().st_size)
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 1
        largest.write_bytes(content)
        own = root / "own" / "1" / "manifest" / "process_1"
        own.write_text(own.read_text().replace("data", "dada", 1))
    meet("damaged")

    for name in ("data", "own"):
        run, loader = opened(name, tree(9.0))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step = run.restore()
        note(**{name: dict(
            step=step, same=told(run, loader) == saved[0], there=run.all_steps(),
            warned=[str(one.message) for one in caught if "skipped" in str(one.message)],
        )})
        run.close()

    layout = (all_devices("fsdp"), {"big": P("fsdp")})
    loaded = torchorbax.load(str(root / "run"), 1, item="state", shardings=layout)
    bad = outcome(lambda: torchorbax.load(str(root / "data"), 1, item="state", shardings=layout))
    note(loaded=parts(loaded) == saved[1][0], loaded_damaged=bad)

    run, loader = opened("mismatch", tree(9.0, 256 if index == 0 else 128))
    before = told(run, loader)
    note(mismatch=outcome(run.restore), mismatch_unchanged=told(run, loader) == before)
    run.close()

    read = array_reader.read
    def wrong(folder, leaves, traffic, *then):
        found = read(folder, leaves, traffic, *then)
        if "copied" in found and index == 1:
            array = found["copied"]
            shards = [jax.device_put(np.asarray(one.data) + 1, one.device) for one in array.addressable_shards]
            found["copied"] = jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)
        return found
    array_reader.read = wrong
    run, loader = opened("verify", tree(9.0))
    before = told(run, loader)
    note(verify=outcome(run.restore), verify_unchanged=told(run, loader) == before)
    run.close()
    run, loader = opened("verify", tree(9.0), verify=False)
    note(unverified=run.restore())
    run.close()
    array_reader.read = read
    meet("verified")

    def network():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
        model[0].requires_grad_(False)
        return model

    frozen = []
    for start in range(2):
        model = network()
        with torchorbax.resume(
            model, None, str(root / "frozen"), shardings=(all_devices("fsdp"), {"*.weight": P("fsdp")}), save=None,
            keep=None, barrier_timeout_s=60,
        ) as run:
            frozen.append([run.step, parts(torchorbax.to_jax(model))])
            for step in run.steps(2 * start + 2):
                run.save(step, force=True)
            run.wait()
            frozen[-1] += [[one.nbytes for one in run.history], parts(torchorbax.to_jax(model))]
        meet(f"frozen {start}")
    with Checkpointer(str(root / "frozen"), {"model": model}, save=None, keep=None, barrier_timeout_s=60) as run:
        run.save(4, force=True)  # not restored: what is frozen is known by its fingerprint alone
        run.wait()
        note(unrestored_bytes=run.history[-1].nbytes)
    note(
        frozen_steps=[one[0] for one in frozen], frozen_bytes=[one[2] for one in frozen],
        frozen_same=frozen[1][1] == frozen[0][3],
    )
"""


@pytest.fixture(scope="module")
def restored(folder: Path, run_processes: RunProcesses) -> Facts:
    return facts_of(run_processes(RESTORE, folder / "restored", devices=2))


@pytest.mark.parametrize("what", ["data", "own"])
def test_a_step_that_is_damaged_for_one_process_is_skipped_by_all(what: str, restored: Facts) -> None:
    for one in restored:
        found = one[what]
        assert found["step"] == 0
        assert found["same"]
        assert found["there"] == [0]
        (warned,) = found["warned"]
        assert "skipped damaged step 1" in warned
        assert what == "data" or "process_1 is not what was written" in warned


def test_load_on_a_mesh_of_all_processes_checks_every_byte(restored: Facts) -> None:
    for one in restored:
        assert one["loaded"]
        assert one["loaded_damaged"][0] == "CorruptCheckpointError"


def test_verify_reads_the_files_of_processes_as_well(restored: Facts, folder: Path) -> None:
    with pytest.raises(CorruptCheckpointError, match="process_1 is not what was written"):
        verify(folder / "restored" / "own", 1)


def test_a_mismatch_in_one_process_changes_nothing_anywhere(restored: Facts) -> None:
    first, second = (one["mismatch"] for one in restored)
    assert second[0] == "MismatchError"
    assert first[0] == "ProcessError"
    assert "read: process 1: MismatchError" in first[1]
    assert first[2] == [1]
    assert all(one["mismatch_unchanged"] for one in restored)


def test_a_replica_that_was_read_differently_is_found_by_all(restored: Facts) -> None:
    for one in restored:
        kind, text, _ = one["verify"]
        assert kind == "CorruptCheckpointError"
        assert "step 1: the data of state: copied is not what was saved" in text
        assert "step 0: the data of state: copied is not what was saved" in text
        assert one["verify_unchanged"]
        assert one["unverified"] == 1  # who does not look does not see


def test_frozen_parameters_are_written_once_also_after_a_restart(restored: Facts, folder: Path) -> None:
    path = folder / "restored" / "frozen"
    assert alike(restored, "frozen_steps") == [None, 1]
    (first, second), (third, fourth) = alike(restored, "frozen_bytes")
    frozen_bytes = (64 * 64 + 64) * 4
    assert (first - second, second) == (frozen_bytes, third)
    assert third == fourth == alike(restored, "unrestored_bytes")
    assert all(one["frozen_same"] for one in restored)
    assert [entry.name for entry in (path / "base").iterdir()] == ["0"]
    assert verify(path) == [0, 1, 2, 3, 4]


# ----------------------------------------------------------------------------------------- slices, staging and donation

SLICES = """
    import pathlib
    import numpy as np, jax.numpy as jnp
    from jax.sharding import PartitionSpec as P
    from torchorbax import Checkpointer
    from tests.helpers.several_state import all_devices, array_bytes, bytes_read, outcome, parts, spread

    root = pathlib.Path(sys.argv[1])
    mesh = all_devices("slice", "fsdp", first=2)
    random = np.random.default_rng(0)
    VALUES = {
        "nans": (random.integers(0, 2**32, (1024, 2048), dtype=np.uint32).view(np.float32), P("fsdp", None)),
        "odd": (random.standard_normal((33, 5001)).astype(np.float32), P()),
        "both": (random.standard_normal((64, 1024)).astype(jnp.bfloat16), P(("slice", "fsdp"))),
        "half": (random.integers(0, 2**16, (512, 512), dtype=np.uint16).view(jnp.bfloat16), P("fsdp")),
        "small": (random.standard_normal((8,)).astype(np.float32), P()),
        "flags": (np.arange(200_000) % 3 == 0, P("fsdp")),
        "complex": ((random.standard_normal((4, 20_000)) + 1j).astype(np.complex64), P()),
    }

    def tree(empty=False):
        return {name: spread(np.zeros_like(one) if empty else one, spec, mesh) for name, (one, spec) in VALUES.items()}

    def opened(name, state, **options):
        return Checkpointer(str(root / name), {"state": state}, save=None, rng=False, barrier_timeout_s=60, **options)

    before = parts(tree())
    for replicas in ("first", "all"):
        with opened(replicas, tree(), replicas=replicas) as run:
            run.save(0, force=True)
        meet(replicas)
        note(**{f"written {replicas}": array_bytes(root / replicas / "0" / "state")})
        for single in (False, True):
            meet(f"{replicas} {single}")
            with opened(replicas, tree(True), replicas=replicas, single_replica_restore=single) as run:
                start = bytes_read()
                run.restore()
                note(**{f"read {replicas} {single}": bytes_read() - start})
                note(**{f"same {replicas} {single}": parts(run.state["state"]) == before})

    step = jax.jit(lambda arrays: {name: -one if one.dtype != bool else ~one for name, one in arrays.items()},
                   donate_argnums=0)
    for staging in ("reference", "device", "host", "auto"):
        state = tree()
        with opened(staging, state, staging=staging) as run:
            run.save(0, force=True)
            if staging == "reference":
                later = step(tree())  # nothing of it may be donated
            else:
                later = state["nans"]
                state.update(step(dict(state)))
                note(**{f"deleted {staging}": later.is_deleted()})
            jax.block_until_ready(state)
            run.wait()
        with opened(staging, tree(True)) as run:
            run.restore()
            note(**{staging: parts(run.state["state"]) == before})

    state = tree()
    run = opened("donated", state, staging="reference")
    gone = tree()
    step(gone)
    state.update(gone)
    note(donated=[outcome(lambda: run.save(0, force=True)), run.all_steps()])
    outcome(run.close)
"""


@pytest.fixture(scope="module")
def slices(folder: Path, run_processes: RunProcesses) -> Facts:
    return facts_of(run_processes(SLICES, folder / "slices", devices=2))


TOTAL_BYTES = 1024 * 2048 * 4 + 33 * 5001 * 4 + 64 * 1024 * 2 + 512 * 512 * 2 + 200_000 + 4 * 20_000 * 8
SPLIT_BYTES = 64 * 1024 * 2
"""Of what is laid out over the slices, too."""


def test_the_first_replica_is_written_by_the_first_slice_alone(slices: Facts) -> None:
    written = alike(slices, "written first")
    assert written["0"] + written["1"] == pytest.approx(TOTAL_BYTES, rel=0.05)
    assert written["1"] < SPLIT_BYTES


def test_all_replicas_share_the_writing_about_evenly(slices: Facts) -> None:
    written = alike(slices, "written all")
    assert written["0"] + written["1"] == pytest.approx(TOTAL_BYTES, rel=0.05)
    assert written["1"] == pytest.approx(TOTAL_BYTES / 2, rel=0.2)


@pytest.mark.parametrize("replicas", ["first", "all"])
def test_with_single_replica_restore_one_slice_reads_for_all(replicas: str, slices: Facts) -> None:
    each = [one[f"read {replicas} False"] for one in slices]
    single = [one[f"read {replicas} True"] for one in slices]
    assert min(each) > 0.9 * (TOTAL_BYTES - SPLIT_BYTES)
    assert single[0] > 0.9 * (TOTAL_BYTES - SPLIT_BYTES)
    complex_bytes = 4 * 20_000 * 8  # cannot be sent
    assert single[1] < complex_bytes + 0.1 * TOTAL_BYTES


@pytest.mark.parametrize("single", [False, True], ids=["each reads", "one reads"])
@pytest.mark.parametrize("replicas", ["first", "all"])
def test_every_bit_comes_back_however_replicas_share_the_work(replicas: str, single: bool, slices: Facts) -> None:
    """NaNs with payloads, bfloat16, bool and complex numbers among them."""
    assert all(one[f"same {replicas} {single}"] for one in slices)


@pytest.mark.parametrize("staging", ["reference", "device", "host", "auto"])
def test_a_step_right_after_save_does_not_reach_what_is_saved(staging: str, slices: Facts) -> None:
    """The step donates all arrays, unless their references are the snapshot."""
    assert all(one[staging] for one in slices)
    assert staging == "reference" or all(one[f"deleted {staging}"] == (staging != "auto") for one in slices)


def test_donated_arrays_are_refused_in_every_process(slices: Facts) -> None:
    for one in slices:
        (kind, text, _), there = one["donated"]
        assert kind == "DeletedArrayError"
        assert "donated" in text
        assert there == []
