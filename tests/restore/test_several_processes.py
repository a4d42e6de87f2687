"""A restore by several processes: damage and mismatches in one of them are found by all."""

from __future__ import annotations

from pathlib import Path

import pytest
from torchorbax import CorruptCheckpointError, verify

from tests.helpers.several import Facts, RunProcesses, alike, facts_of

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
    def wrong(folder, leaves, traffic, *then, **options):
        found = read(folder, leaves, traffic, *then, **options)
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
