"""A run that several processes train goes on with another number of processes and chips."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import torchorbax
from jax.sharding import Mesh
from torchorbax import verify

from tests.helpers.models import RULES, batch_of, loss_fn, seeded
from tests.helpers.programs import RunPython
from tests.helpers.several import RunProcesses, alike, facts_of
from tests.helpers.several_state import Loader, generators, moments, whole

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
    done = run_python(code, trained["copies"]["two"], warnings="ignore", fresh=True)
    model, names = json.loads(done.stdout.splitlines()[-1])
    saved = trained["two"][0]["after"]
    assert model.items() <= saved["model"].items()
    assert set(saved["model"]) - set(model) <= {"head.weight"}  # tied
    assert {name for name in saved["optimizer"] if name.endswith("exp_avg")} <= set(names)
