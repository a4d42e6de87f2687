"""The arithmetic of scripts/scaling.py on cases small enough to do by hand, and its page. No time is judged here."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torchorbax
from benchmarks.report import filled
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from scripts.scaling import Estimate, Job, Machine, Measured
from torchorbax._src.storage import array_writer as _orbax_arrays

from benchmarks import scaling as measuring
from scripts import scaling
from tests.helpers.programs import RunPython

ROOT = Path(__file__).parents[2]

FREE = Measured(**{field.name: 0.0 for field in dataclasses.fields(Measured)})
"""A program that takes no time."""
PLAIN = Machine(
    hbm_bytes=100.0,
    hbm=10.0,
    nic=8.0,
    pcie=4.0,
    hbm_spare=0.0,
    stream=1e30,
    latency_s=0.0,
    egress=20.0,
    ingress=10.0,
)


def small(**options: Any) -> Job:
    """24 × 8² parameters of 14 bytes, over 4 chips a slice, 2 a host."""
    machine = dataclasses.replace(PLAIN, chips_per_host=2)
    return Job(**{"chips": 8, "layers": 2, "width": 8, "slice_chips": 4, "machine": machine, **options})


def test_the_page_shows_what_the_script_computes() -> None:
    page = scaling.PAGE.read_text()
    assert filled(page, scaling.sections(Measured.load())) == page, "run: python -m scripts.scaling --write"


def test_a_small_job_by_hand() -> None:
    job = small()
    assert (job.sharded_over, job.slices, job.hosts, job.hosts_of_slice) == (4, 2, 4, 2)
    assert (job.state_bytes, job.chip_bytes, job.leaves, job.all_leaves) == (21_504, 5_376, 48, 64)
    assert (job.written_per_host("first"), job.writers("first")) == (10_752, 2)
    assert (job.written_per_host("all"), job.writers("all")) == (5_376, 4)
    assert (job.keys("first"), job.keys("all")) == (48 * 4, 48 * 8)
    assert (job.read_bytes(False), job.read_bytes(True)) == (43_008, 21_504)
    assert small(chips=4).slices == 1
    assert small(chips=2).written_per_host() == small().state_bytes


def test_bytes_per_parameter_are_those_of_its_tensors() -> None:
    weights = small(parameter_bytes=(2,))
    assert weights.state_bytes == 24 * 64 * 2
    assert small().state_bytes == 7 * weights.state_bytes


def test_phases_by_hand() -> None:
    one = Estimate(small(), FREE)
    assert one.save()["bandwidth"] == 21_504 / 10
    assert one.restore(True)["host"] == 10_752 / 8
    assert one.restore(False)["bandwidth"] == 43_008 / 20
    assert one.restore(True)["network"] == 2 * 10_752 / 8
    assert one.restore(False)["network"] == 0
    wide = dataclasses.replace(small().machine, ingress=math.inf, egress=math.inf)
    assert Estimate(small(machine=wide), FREE).save()["host"] == 10_752 / 8
    told = dataclasses.replace(
        FREE, save_entry_s=1.0, save_entry_bytes=10.0, gather_per_byte_s=0.1, merge_per_key_s=2.0
    )
    save = Estimate(small(), told).save()
    assert (save["sums"], save["merge"]) == (2 * 48 * 2.0, 2 * 48 * 4.0)
    more = small(design=dataclasses.replace(scaling.TODAY, sums_of_writers=False))
    assert Estimate(more, told).save()["sums"] == 4 * 48 * 2.0
    shards = Estimate(small(), dataclasses.replace(FREE, restore_entry_s=1.0))
    assert shards.restore()["sums"] == 4 * 48 * 2
    assert Estimate(small(design=scaling.CHANGED), shards.measured).restore()["sums"] == 0


def test_what_has_no_room_is_copied_in_the_way() -> None:
    chip = small().chip_bytes
    for room, rest in ((0, chip), (chip / 2, chip / 2), (chip, 0), (5 * chip, 0)):
        needed = small().needed_bytes
        machine = dataclasses.replace(small().machine, hbm_bytes=(needed + room) / 0.95)
        one = Estimate(small(machine=machine), FREE)
        assert one.copied_in_the_way_bytes == pytest.approx(rest, abs=1e-6)
        assert one.stall_s() == pytest.approx(rest / 4, abs=1e-6)
        assert one.stall_s("reference") == 0
    assert not small(machine=dataclasses.replace(small().machine, hbm_bytes=chip)).fits


def test_requests_ramp_up() -> None:
    assert [scaling.ramped_s(n, 10.0, 100.0) for n in (0, 500, 1000, 3000, 7000)] == [0, 50, 100, 200, 300]
    assert scaling.ramped_s(1e6, 10.0, math.inf) == 1e5


@pytest.mark.parametrize(("replicas", "shape"), [*itertools.product((1, 2, 4), ((8, 8), (8, 12), (8, 3), (6, 5)))])
def test_sharing_is_that_of_the_program(replicas: int, shape: tuple[int, int]) -> None:
    mesh = Mesh(np.array(jax.devices()[: 2 * replicas]).reshape(replicas, 2), ("slice", "fsdp"))
    array = jax.device_put(np.ones(shape, np.float32), NamedSharding(mesh, P("fsdp")))
    assert scaling.shares(array.sharding.shard_shape(shape), replicas) == _orbax_arrays._shares(array)


def test_constants_are_those_of_the_program() -> None:
    assert (scaling.CHUNK_BYTES, scaling.FILE_BYTES) == (_orbax_arrays.CHUNK_BYTES, _orbax_arrays.BATCH_BYTES)
    defaults = inspect.signature(torchorbax.Checkpointer).parameters
    assert (
        defaults["max_host_bytes"].default,
        defaults["barrier_timeout_s"].default,
    ) == (scaling.MAX_HOST_BYTES, scaling.BARRIER_S)


@pytest.mark.parametrize(("old", "new", "chips_per_host"), [*itertools.product((1, 2, 3, 8), (1, 2, 4, 6, 24), (1, 2))])
def test_amplification_by_counting(old: int, new: int, chips_per_host: int) -> None:
    rows = 24
    if new % chips_per_host:
        return
    touched = 0
    for host in range(new // chips_per_host):
        mine = range(rows * host * chips_per_host // new, rows * (host + 1) * chips_per_host // new)
        touched += len({row * old // rows for row in mine})
    assert scaling.amplification(rows, old, new, chips_per_host) == touched / old


def test_amplification_at_its_limits() -> None:
    assert scaling.amplification(24, 8, 8, 1) == scaling.amplification(24, 8, 2, 1) == 1
    assert scaling.amplification(24, 1, 24, 1) == 24
    assert scaling.amplification(24, 8, 8, 4, across=True) == 2
    measured = Measured.load().across_amplification
    assert 2 <= measured <= 4.5  # of 2 and 4 processes with 2 devices, some of whose reads overlap


def test_goodput_is_what_a_simulation_finds() -> None:
    chance = random.Random(0)
    for interval, lag, stall, down in ((10, 0, 0, 0), (10, 10, 1, 5), (30, 5, 0, 20), (100, 50, 10, 10)):
        mtbf, stays, elapsed = 100.0, 0.0, 0.0
        for _ in range(100_000):
            up = chance.expovariate(1 / mtbf)
            stays += interval * max(0, math.floor((up - lag) / interval)) * (1 - stall / interval)
            elapsed += up
            while (failed := chance.expovariate(1 / mtbf)) < down:
                elapsed += failed
            elapsed += down
        assert scaling.goodput(interval, lag, stall, mtbf, down) == pytest.approx(stays / elapsed, rel=0.02)


def test_goodput_at_its_limits() -> None:
    assert scaling.goodput(1, 0, 0, 1e6, 0) == pytest.approx(1 - 0.5e-6, abs=1e-9)  # Young
    assert scaling.goodput(10, 0, 10, 1e6, 0) == 0
    assert scaling.goodput(1e9, 0, 0, 1.0, 0) == 0
    assert scaling.goodput(10, 0, 0, 100, 0) > scaling.goodput(20, 0, 0, 100, 0) > scaling.goodput(20, 5, 0, 100, 0)
    best = min(range(1, 500), key=lambda interval: -scaling.goodput(interval, 0, 0.5, 1e4, 0))
    assert best == pytest.approx(math.sqrt(2 * 0.5 * 1e4), rel=0.05)


def test_more_is_never_less() -> None:
    found = scaling.estimates(Measured.load())
    for (chips, size), one in found.items():
        larger = [found[key] for key in found if key[0] == chips and one.job.state_bytes <= found[key].job.state_bytes]
        assert all(one.commit_s() <= other.commit_s() for other in larger)
        assert all(one.restore_s(True) <= other.restore_s(True) for other in larger)
        more = [found[key] for key in found if key[1] == size and key[0] >= max(chips, one.job.slice_chips)]
        assert all(one.commit_s() <= other.commit_s() for other in more if one.job.slices >= 1 and chips >= 256)
        assert all(one.continuous >= other.continuous for other in more if chips >= 256)
        assert one.job.read_bytes(True) <= one.job.read_bytes(False)
        assert 0 <= one.goodput(3600, one.orbax_stall_s) <= 1
    faster = dataclasses.replace(Machine(), ingress=1e15, stream=1e15, latency_s=0.0)
    assert all(
        quick.commit_s() <= found[key].commit_s()
        for key, quick in scaling.estimates(Measured.load(), machine=faster).items()
    )


def test_numbers_are_shown_with_two_digits() -> None:
    shown = [scaling.shown_s(value) for value in (0.0123, 1.0, 99.4, 119.0, 121.0, 7300.0, 1e6)]
    assert shown == ["12 ms", "1.0 s", "99 s", "120 s", "2.0 min", "2.0 h", "280 h"]
    assert [scaling.shown_bytes(value) for value in (88, 1234, 14.09e12, 5.6e15)] == [
        "88 B",
        "1.2 KB",
        "14 TB",
        "5.6 PB",
    ]


def test_the_measurements_run(tmp_path: Path, run_python: RunPython) -> None:
    saved, restored = measuring.summing_a_save(3, 4), measuring.summing_a_restore(3, 4)
    assert (saved["entries"], restored["entries"]) == (12, 48)
    merged = measuring.merging(tmp_path / "merged", 2, 3)
    assert merged["keys"] == 6
    assert merged["index_bytes"] > 0
    assert measuring.metadata(tmp_path / "run", 2)["_METADATA"] > 0
    assert measuring.processor_time(8)["s_per_gb"] > 0
    code = "import runpy, sys; sys.argv[0] = 'it'; runpy.run_module('benchmarks.scaling', run_name='__main__')"
    done = run_python(code, "agreements", 3, 200, devices=1, warnings="ignore", env={"PYTHONPATH": str(ROOT)})
    assert json.loads(done.stdout.splitlines()[-1])["gather_s"] > 0
