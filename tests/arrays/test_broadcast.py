"""One slice reads, the others get it over the network of the devices; every replica writes its share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.several import Facts, RunProcesses, alike, facts_of

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
