"""What a save, a restore and a failure cost on 8 to 100,000 chips: arithmetic, with constants measured or published.

python -m scripts.scaling            # prints the tables
python -m scripts.scaling --write    # puts them into docs/scaling.md

The model is a transformer that is sharded over the chips of a slice (FSDP) and replicated over slices. A phase takes as
long as its slowest resource; phases follow each other as they do in the program. Nothing of this has been run at scale.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import median
from benchmarks.report import filled

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "scaling.md"
RESULTS = ROOT / "benchmarks" / "results"

MIB = 1 << 20
CHUNK_BYTES, FILE_BYTES = 64 * MIB, 128 * MIB  # as in torchorbax._src.storage.array_writer, where a test looks
MAX_HOST_BYTES = 1 << 30
READ_BYTES = 24 * MIB
BARRIER_S = 600.0


# ---------------------------------------------------------------------------------------------------------- constants


@dataclass(frozen=True)
class Machine:
    """A TPU v5p, its host and its bucket. Rates in bytes per second.

    Attributes:
        hbm_spare: the part of the memory that a training step needs beside state and gradients.
        fingerprint_slowdown: sums against one reading of the memory.
        stream: of one request for object data.
        latency_s: of one request.
        egress: of the bucket's region, for the project; `ingress` likewise.
        writes, reads: requests per second of a bucket that has been quiet; may double every `doubling_s`.
        mtbf_h: of a chip with its share of everything else.
        restart_s: until a job that has failed begins to restore.
    """

    chips_per_host: int = 4
    hbm_bytes: float = 95 * 2**30
    hbm: float = 2765e9
    host_bytes: float = 448e9
    nic: float = 4 * 50e9 / 8
    pcie: float = 1.5e10
    hbm_spare: float = 0.1
    fingerprint_slowdown: float = 10.0
    stream: float = 200.0 * MIB
    latency_s: float = 0.05
    egress: float = 200e9 / 8
    ingress: float = 200e9 / 8
    writes: float = 1000.0
    reads: float = 5000.0
    doubling_s: float = 1200.0
    mtbf_h: float = 54 * 24 * 16_384 / 419
    restart_s: float = 300.0


@dataclass(frozen=True)
class Measured:
    """Of this program, see `benchmarks/scaling.py`. Per process, leaf, chunk or byte as the names say."""

    stall_per_leaf_s: float
    orbax_stall_per_leaf_s: float
    writes_per_writer: float
    writes_per_process: float
    writes_of_first: float
    calls_of_first: float
    deletes_per_writer: float
    deletes_of_first: float
    calls_per_restore: float
    reads_per_restore: float
    gather_per_process_s: float
    publish_per_process_s: float
    gather_per_byte_s: float
    save_entry_s: float
    save_entry_bytes: float
    restore_entry_s: float
    restore_entry_bytes: float
    merge_per_process_s: float
    merge_per_key_s: float
    index_per_key_bytes: float
    metadata_per_leaf_bytes: float
    fingerprint_s_per_gb: float
    across_amplification: float
    merged_read_bytes: float

    @classmethod
    def load(cls) -> Measured:
        """From the results that are stored beside the benchmarks."""
        table = json.loads((RESULTS / "cpu.json").read_text())["table"]
        return cls.of(table, json.loads((RESULTS / "scaling.json").read_text()))

    @classmethod
    def of(cls, table: Mapping[str, Any], found: Mapping[str, Any]) -> Measured:
        """From the results of `python -m benchmarks` and `python -m benchmarks.scaling`."""
        small = {key: median(values) / 2000 for key, values in table["save_small"].items()}
        runs = found["requests"]
        firsts, others = [run["save"][0] for run in runs], [one for run in runs for one in run["save"][1:]]
        writers = [one for one in others if _kinds(one, "media")]
        restores = [one for run in runs for one in run["restore"][1:]]
        two, four = (
            [_kinds(run["save"][0], "delete") for run in runs if (run["processes"], run["slices"]) == (count, 1)]
            for count in (2, 4)
        )
        deletes = (_mean(four) - _mean(two)) / 2
        agreed, told = found["agreements"], found["agreements"]["16x800000"]
        gather = (agreed["256x80"]["gather_s"] - agreed["16x80"]["gather_s"]) / 240
        few, many, long = (found["merging"][label] for label in ("8x10", "64x10", "64x1000"))
        per_key = (long["seconds"] - many["seconds"]) / (long["keys"] - many["keys"])
        merged = (many["seconds"] - few["seconds"] - per_key * (many["keys"] - few["keys"])) / 56
        little, much = (
            sum(found["metadata"][label][name] for name in ("metadata", "_METADATA", "_sharding"))
            for label in ("100", "500")
        )
        saved, restored = found["summing_a_save"], found["summing_a_restore"]
        across = [one["read_bytes"] for run in runs for one in run["restore_across"]]
        straight = [one["read_bytes"] for run in runs for one in run["restore"]]
        return cls(
            stall_per_leaf_s=small["reference/stall_s"],
            orbax_stall_per_leaf_s=small["orbax/stall_s"],
            writes_per_writer=_mean([_kinds(one, "media") for one in writers]),
            writes_per_process=_mean([_kinds(one, "chunk", "resumable") for one in others]),
            writes_of_first=_mean([_kinds(one, "media", "chunk", "resumable") for one in firsts]),
            calls_of_first=_mean([_kinds(one, "list", "stat", "chunk", "resumable") for one in firsts]),
            deletes_per_writer=deletes,
            deletes_of_first=_mean(two) - 2 * deletes,
            calls_per_restore=_mean([_kinds(one, "list", "stat") for one in restores]),
            reads_per_restore=_mean([_kinds(one, "read") for one in restores]),
            gather_per_process_s=gather,
            publish_per_process_s=(agreed["256x80"]["publish_s"] - agreed["16x80"]["publish_s"]) / 240,
            gather_per_byte_s=(told["gather_s"] / 15 - gather) / told["bytes"],
            save_entry_s=saved["seconds"] / saved["entries"],
            save_entry_bytes=saved["bytes"] / 500,
            restore_entry_s=restored["seconds"] / restored["entries"],
            restore_entry_bytes=restored["bytes"] / 800,
            merge_per_process_s=max(0.0, merged),
            merge_per_key_s=per_key,
            index_per_key_bytes=long["index_bytes"] / long["keys"],
            metadata_per_leaf_bytes=(much - little) / 400,
            fingerprint_s_per_gb=found["processor_time"]["s_per_gb"],
            across_amplification=sum(across) / sum(straight),
            merged_read_bytes=max(found["large_reads"]),
        )


def _kinds(one: Mapping[str, Any], *kinds: str) -> int:
    return sum(one["kinds"].get(kind, 0) for kind in kinds)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


@dataclass(frozen=True)
class Design:
    """What might be changed in the program.

    Attributes:
        sums_of_writers: only processes that have a first replica tell of sums.
        check_on_devices: a restore adds up its sums by a collective of the devices.
        read_streams, read_bytes_each: requests for data at once in a restore, and how large: today what is read ahead,
            in requests that stop growing at 16 MiB, which makes them 24 MiB of neighbours of 8 MiB.
        first_looks: process 0 alone reads a step's metadata and passes it on.
        most_sharing: at most so many replicas share writing when `replicas="all"`.
    """

    sums_of_writers: bool = True
    check_on_devices: bool = False
    read_streams: int = FILE_BYTES // READ_BYTES
    read_bytes_each: int = READ_BYTES
    first_looks: bool = False
    most_sharing: int = 1 << 30


TODAY = Design()
CHANGED = Design(
    check_on_devices=True,
    read_streams=MAX_HOST_BYTES // CHUNK_BYTES,
    read_bytes_each=CHUNK_BYTES,
    first_looks=True,
    most_sharing=8,
)
WIDER = Machine(egress=250e9, ingress=250e9)
"""A bucket with ten times the bandwidth."""


# ---------------------------------------------------------------------------------------------------------- arithmetic


def ramped_s(requests: float, rate: float, doubling_s: float) -> float:
    """Seconds for so many requests at a rate that doubles at once after every period.

    >>> [ramped_s(requests, 10.0, 100.0) for requests in (500, 1000, 3000)]
    [50.0, 100.0, 200.0]
    """
    seconds = 0.0
    while requests > rate * doubling_s:
        requests -= rate * doubling_s
        seconds += doubling_s
        rate *= 2
    return seconds + requests / rate


def shares(shard: tuple[int, ...], holders: int) -> int:
    """Among how many of its holders writing a shard can be shared: all or one (`_orbax_arrays._shares`)."""
    return holders if any(size % holders == 0 for size in shard) else 1


def amplification(rows: int, old: int, new: int, chips_per_host: int, *, across: bool = False) -> float:
    """Bytes read over bytes needed, of an array whose first axis was cut into `old` chunks.

    Args:
        rows: of the array.
        old: chips over which its rows were sharded, with one chunk each.
        new: chips over which it is sharded now. A host reads a chunk once for all its chips.
        chips_per_host: of them.
        across: along the other axis.
    """
    hosts = math.ceil(new / chips_per_host)
    if across:
        return float(hosts)
    touched = 0
    for host in range(hosts):
        first, last = (rows * (host + end) // hosts for end in (0, 1))
        touched += (last - 1) * old // rows - first * old // rows + 1
    return touched / old


def goodput(interval_s: float, lag_s: float, stall_s: float, mtbf_s: float, down_s: float) -> float:
    """The part of the time that makes progress which stays.

    Failures come at random (exponentially). A save begins every `interval_s` and counts `lag_s` later, so of a time t
    without failure, `interval_s * floor((t - lag_s) / interval_s)` stays, which is `interval_s * exp(-lag_s / mtbf_s) /
    (exp(interval_s / mtbf_s) - 1)` on average. Then it is down for `down_s`, once more for every failure meanwhile. This
    is Daly's model with a lag; without lag and stall, and for short intervals, it is Young's `1 - interval / 2 mtbf`.
    """
    if interval_s / mtbf_s > 500 or down_s / mtbf_s > 500:
        return 0.0
    stays = interval_s * math.exp(-lag_s / mtbf_s) / math.expm1(interval_s / mtbf_s)
    return (1 - stall_s / interval_s) * stays / (mtbf_s * math.exp(down_s / mtbf_s)) if interval_s > stall_s else 0.0


# ------------------------------------------------------------------------------------------------------------- the job

SHAPES = {"1 B": (20, 2048), "10 B": (40, 4608), "100 B": (80, 10240), "1 T": (128, 25600)}
"""Layers and width of a transformer of 12 * layers * width**2 parameters: six matrices a layer."""
CHIPS = (8, 64, 256, 1024, 10_240, 102_400)

Phases = dict[str, float]


@dataclass(frozen=True)
class Job:
    """A training run.

    Attributes:
        chips: all of them.
        layers, width: of the transformer.
        parameter_bytes: of each tensor that a parameter has: weight, master weight and two moments.
        slice_chips: over so many it is sharded, and over the rest replicated.
        items: of a step.
    """

    chips: int
    layers: int
    width: int
    parameter_bytes: tuple[int, ...] = (2, 4, 4, 4)
    slice_chips: int = 256
    items: int = 2
    machine: Machine = Machine()
    design: Design = TODAY

    @property
    def sharded_over(self) -> int:
        """Chips that have one replica."""
        return min(self.chips, self.slice_chips)

    @property
    def slices(self) -> int:
        """Replicas."""
        return self.chips // self.sharded_over

    @property
    def hosts(self) -> int:
        """Processes."""
        return math.ceil(self.chips / self.machine.chips_per_host)

    @property
    def hosts_of_slice(self) -> int:
        """Processes that have one replica."""
        return math.ceil(self.sharded_over / self.machine.chips_per_host)

    @property
    def state_bytes(self) -> float:
        """Each parameter counted once."""
        return 12.0 * self.layers * self.width**2 * sum(self.parameter_bytes)

    @property
    def chip_bytes(self) -> float:
        """Of state on a chip."""
        return self.state_bytes / self.sharded_over

    @property
    def leaves(self) -> int:
        """Large ones: the matrices and what the optimizer has for them."""
        return 6 * self.layers * len(self.parameter_bytes)

    @property
    def all_leaves(self) -> int:
        """With the norms."""
        return 8 * self.layers * len(self.parameter_bytes)

    @property
    def needed_bytes(self) -> float:
        """Of a chip's memory: state, gradients as wide as the weights, and what a step works with."""
        gradients = self.chip_bytes * self.parameter_bytes[0] / sum(self.parameter_bytes)
        return self.chip_bytes + gradients + self.machine.hbm_spare * self.machine.hbm_bytes

    @property
    def fits(self) -> bool:
        """Can it be trained at all?"""
        return self.needed_bytes <= self.machine.hbm_bytes

    def _shards(self) -> list[tuple[tuple[int, int], int]]:
        """Shapes of a chip's parts of a layer's matrices, and how many there are."""
        rows, width = self.width // self.sharded_over, self.width
        return [((rows, width), 4), ((rows, 4 * width), 1), ((4 * rows, width), 1)]

    def sharing(self, replicas: str) -> dict[tuple[int, int], int]:
        """By the shape of a shard, how many replicas write of it."""
        holders = min(self.slices, self.design.most_sharing) if replicas == "all" else 1
        return {shard: shares(shard, holders) for shard, _ in self._shards()}

    def written_per_host(self, replicas: str = "first") -> float:
        """Bytes of the busiest host."""
        sharing = self.sharing(replicas)
        parts = [(shard[0] * shard[1] * count, sharing[shard]) for shard, count in self._shards()]
        per_chip = sum(elements / shared for elements, shared in parts) * self.layers * sum(self.parameter_bytes)
        return per_chip * min(self.machine.chips_per_host, self.sharded_over)

    def writers(self, replicas: str = "first") -> int:
        """Hosts that write array data."""
        return self.hosts_of_slice * max(self.sharing(replicas).values())

    def keys(self, replicas: str = "first") -> int:
        """Chunks of a step."""
        sharing = self.sharing(replicas)
        return self.sharded_over * sum(
            count * self.layers * sharing[shard] * math.ceil(shard[0] * shard[1] * size / sharing[shard] / CHUNK_BYTES)
            for shard, count in self._shards()
            for size in self.parameter_bytes
        )

    def read_bytes(self, single: bool) -> float:
        """By all hosts together."""
        return self.state_bytes * (1 if single else self.slices)


@dataclass(frozen=True)
class Estimate:
    """What a job's saves, restores and failures cost."""

    job: Job
    measured: Measured

    # ------------------------------------------------------------------------------------------------------------ stall

    @property
    def copied_in_the_way_bytes(self) -> float:
        """Of a chip's state, what its memory has no room for a second time and goes to the host while the loop waits."""
        room = 0.95 * self.job.machine.hbm_bytes - self.job.needed_bytes
        return max(0.0, self.job.chip_bytes - max(0.0, room))

    def stall_s(self, staging: str = "device") -> float:
        """What a save keeps the loop."""
        on_host = self.job.all_leaves * self.measured.stall_per_leaf_s
        return on_host + (self.copied_in_the_way_bytes / self.job.machine.pcie if staging == "device" else 0.0)

    @property
    def device_s(self) -> float:
        """What a save keeps the chips: a copy (read and written), and the sums."""
        machine = self.job.machine
        return self.job.chip_bytes * (2 + machine.fingerprint_slowdown) / machine.hbm

    @property
    def orbax_stall_s(self) -> float:
        """Its blocking copy to the host, shared by replicas where that goes evenly."""
        per_chip = self.job.written_per_host("all") / min(self.job.machine.chips_per_host, self.job.sharded_over)
        return self.job.all_leaves * self.measured.orbax_stall_per_leaf_s + per_chip / self.job.machine.pcie

    # ------------------------------------------------------------------------------------------------------------- save

    def write_requests(self, replicas: str = "first") -> float:
        """Objects and requests of one save."""
        job, measured = self.job, self.measured
        files = measured.writes_per_writer + max(0, math.ceil(job.written_per_host(replicas) / FILE_BYTES) - job.items)
        return job.writers(replicas) * files + job.hosts * measured.writes_per_process + measured.writes_of_first

    def save(self, replicas: str = "first") -> Phases:
        """Seconds until a save is committed, by what they are needed for. Data waits for the slowest of three."""
        job, machine, measured = self.job, self.job.machine, self.measured
        at_once = MAX_HOST_BYTES // FILE_BYTES
        per_host = min(machine.nic, machine.pcie * machine.chips_per_host, at_once * _rate(FILE_BYTES, machine))
        data = {
            "host": job.written_per_host(replicas) / per_host,
            "bandwidth": job.state_bytes / machine.ingress,
            "requests": ramped_s(self.write_requests(replicas), machine.writes, machine.doubling_s),
        }
        entry_s = measured.save_entry_s + measured.save_entry_bytes * measured.gather_per_byte_s
        return {
            "calls": measured.calls_of_first * machine.latency_s,
            **_slowest(data),
            "agreement": job.hosts * (2 * measured.gather_per_process_s + 3 * measured.publish_per_process_s),
            "sums": self.tellers(replicas) * job.leaves * entry_s,
            "merge": job.writers(replicas) * measured.merge_per_process_s
            + job.keys(replicas) * measured.merge_per_key_s,
        }

    def commit_s(self, replicas: str = "first") -> float:
        """Until a save is committed."""
        return sum(self.save(replicas).values())

    def period_s(self, replicas: str = "first") -> float:
        """From a save to the next that follows at once: with the deletion of an older step."""
        job, measured = self.job, self.measured
        files = max(0, math.ceil(job.written_per_host(replicas) / FILE_BYTES) - job.items)
        deleted = measured.deletes_of_first + job.writers(replicas) * (measured.deletes_per_writer + files)
        return self.commit_s(replicas) + ramped_s(deleted, job.machine.writes, job.machine.doubling_s)

    def save_waits_s(self) -> float:
        """How long the process that is done first waits for process 0: one without data for all of it."""
        phases, job = self.save(), self.job
        return sum(phases.values()) - phases["calls"] if job.slices > 1 else phases["sums"] + phases["merge"]

    def tellers(self, replicas: str = "first") -> int:
        """Processes that tell process 0 of sums in a save."""
        return self.job.writers(replicas) if self.job.design.sums_of_writers else self.job.hosts

    @property
    def answers_bytes(self) -> float:
        """What process 0 gets for the sums of a save by the first replica, and holds."""
        return self.tellers() * self.job.leaves * self.measured.save_entry_bytes

    @property
    def host_bytes(self) -> float:
        """Host memory of a save: what is on its way, and what the chips had no room for."""
        in_the_way = self.copied_in_the_way_bytes * min(self.job.machine.chips_per_host, self.job.sharded_over)
        return min(MAX_HOST_BYTES, self.job.written_per_host()) + in_the_way

    @property
    def metadata_bytes(self) -> float:
        """Manifest, Orbax's metadata and the merged index."""
        measured = self.measured
        return self.job.all_leaves * measured.metadata_per_leaf_bytes + self.job.keys() * measured.index_per_key_bytes

    # ---------------------------------------------------------------------------------------------------------- restore

    def read_requests(self, single: bool) -> float:
        """Of one restore."""
        job, measured = self.job, self.measured
        readers = job.hosts_of_slice if single else job.hosts
        per_reader = max(measured.reads_per_restore, job.state_bytes / job.hosts_of_slice / job.design.read_bytes_each)
        lookers = 1 if job.design.first_looks else job.hosts
        return readers * per_reader + lookers * measured.calls_per_restore

    def restore(self, single: bool = False) -> Phases:
        """Seconds to restore, by what they are needed for."""
        job, machine, measured = self.job, self.job.machine, self.measured
        rate = job.design.read_streams * _rate(job.design.read_bytes_each, machine)
        per_host = min(machine.nic, machine.pcie * machine.chips_per_host, rate)
        data = {
            "host": job.state_bytes / job.hosts_of_slice / per_host,
            "bandwidth": job.read_bytes(single) / machine.egress,
            "requests": ramped_s(self.read_requests(single), machine.reads, machine.doubling_s),
        }
        entry_s = measured.restore_entry_s + measured.restore_entry_bytes * measured.gather_per_byte_s
        entries = (
            0 if job.design.check_on_devices or job.hosts == 1 else job.hosts * job.leaves * machine.chips_per_host
        )
        spread = 2 * job.state_bytes / job.hosts_of_slice / machine.nic if single and job.slices > 1 else 0.0
        rounds = 5 * job.hosts * (measured.gather_per_process_s + measured.publish_per_process_s)
        return {
            "calls": measured.calls_per_restore * machine.latency_s,
            **_slowest(data),
            "network": spread,
            "sums": entries * entry_s,
            "agreement": rounds + 5 * job.hosts**2 * len("null, ") / machine.nic,
        }

    def restore_waits_s(self, single: bool) -> float:
        """The same of a restore, of its longest phase."""
        phases, job = self.restore(single), self.job
        data = max(phases.get(name, 0.0) for name in ("host", "bandwidth", "requests"))
        return max(phases["sums"], data if single and job.slices > 1 else 0.0)

    def restore_s(self, single: bool = False) -> float:
        """All of it."""
        return sum(self.restore(single).values())

    # --------------------------------------------------------------------------------------------------------- failures

    @property
    def mtbf_s(self) -> float:
        """Of the whole job."""
        return self.job.machine.mtbf_h * 3600 / self.job.chips

    def lost_s(self, interval_s: float) -> float:
        """Work that a failure costs on average: half an interval and the time to commit."""
        return interval_s / 2 + self.commit_s()

    def goodput(self, interval_s: float, stall_s: float) -> float:
        """With saves at an interval, restored by one replica."""
        down_s = self.job.machine.restart_s + self.restore_s(single=True)
        return goodput(interval_s, self.commit_s(), stall_s, self.mtbf_s, down_s)

    @property
    def continuous(self) -> float:
        """The goodput of continuous saves, the chips' time for copies and sums included."""
        return self.goodput(self.period_s(), self.stall_s() + self.device_s)

    def young_s(self, stall_s: float) -> float:
        """The interval that Young recommends for saves that cost so much; never shorter than a save takes."""
        return max(self.period_s(), math.sqrt(2 * stall_s * self.mtbf_s))


def _rate(nbytes: float, machine: Machine) -> float:
    """Bytes per second of requests of this size, one after another."""
    return nbytes / (machine.latency_s + nbytes / machine.stream)


def _slowest(data: Phases) -> Phases:
    name = max(data, key=lambda one: data[one])
    return {name: data[name]}


def estimates(
    measured: Measured,
    design: Design = TODAY,
    machine: Machine = Machine(),
) -> dict[tuple[int, str], Estimate]:
    """Of the jobs that fit, by chips and parameters."""
    found = {
        (chips, size): Job(chips, *SHAPES[size], design=design, machine=machine)
        for chips, size in itertools.product(CHIPS, SHAPES)
    }
    return {key: Estimate(job, measured) for key, job in found.items() if job.fits}


# ---------------------------------------------------------------------------------------------------------- the tables

ROWS = ((8, "1 B"), (256, "100 B"), (1024, "1 T"), (10_240, "1 T"), (102_400, "1 B"), (102_400, "1 T"))
"""What the wide tables show of all that fits."""

_TPU = "[Cloud TPU v5p](https://docs.cloud.google.com/tpu/docs/v5p)"
_BOOK = "[How to Scale Your Model](https://jax-ml.github.io/scaling-book/tpus/)"
_RATE = "[request rate guidelines](https://cloud.google.com/storage/docs/request-rate)"
_QUOTA = "[Cloud Storage quotas](https://cloud.google.com/storage/quotas)"
_LLAMA = "[The Llama 3 Herd of Models](https://arxiv.org/abs/2407.21783)"
_STREAM = (
    "[one stream, measured by others](https://www.beginswithdata.com/2024/02/01/google-cloud-storage-max-throughput/)"
)


def shown_s(seconds: float) -> str:
    """With two digits, in a unit that people read."""
    for limit, unit, scale in ((0.9995, "ms", 1e3), (120, "s", 1.0), (7200, "min", 1 / 60), (math.inf, "h", 1 / 3600)):
        if seconds < limit:
            return f"{_digits(seconds * scale)} {unit}"
    return "for ever"


def shown_bytes(nbytes: float) -> str:
    """With two digits, in powers of 1000."""
    for unit, scale in (("B", 1.0), ("KB", 1e3), ("MB", 1e6), ("GB", 1e9), ("TB", 1e12)):
        if nbytes < 999.5 * scale:
            return f"{_digits(nbytes / scale)} {unit}"
    return f"{_digits(nbytes / 1e15)} PB"


def _digits(value: float) -> str:
    """Two of them that count."""
    if value == 0:
        return "0"
    digits = max(0, 1 - math.floor(math.log10(abs(value))))
    if value >= 99.5:
        return f"{round(value, 1 - math.floor(math.log10(value))):,.0f}"
    return f"{round(value, digits):,.{min(digits, 4)}f}"


def _table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    titles = list(head)
    rows = [titles, ["---"] * len(titles), *(list(line) for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def given_table() -> str:
    """What is taken from others, or assumed."""
    machine = Machine()
    gb = 1e9
    return _table(
        ("constant", "value", "from"),
        (
            ("chips of a host; memory of a chip, of a host", f"{machine.chips_per_host}; {machine.hbm_bytes / 2**30:.0f} GiB, {machine.host_bytes / gb:.0f} GB", _TPU),
            ("a chip's memory bandwidth; a host's network", f"{machine.hbm / gb:,.0f} GB/s; {machine.nic / gb:.0f} GB/s", f"{_TPU} (50 Gbit/s a chip)"),
            ("chip to host", f"{machine.pcie / gb:.0f} GB/s a chip", _BOOK),
            ("a quiet bucket's requests", f"{machine.writes:,.0f} writes/s, {machine.reads:,.0f} reads/s; doubled in {machine.doubling_s / 60:.0f} min at the fastest", _RATE),
            ("all buckets of a region", f"{machine.egress / gb:.0f} GB/s read, {machine.ingress / gb:.0f} GB/s written", f"{_QUOTA}: 200 Gbit/s read by default, more on request; written **assumed**"),
            ("one request for data", f"{machine.stream / MIB:.0f} MiB/s", _STREAM),
            ("time between failures", f"{_thousands(machine.mtbf_h)} h for a chip and its share of the rest", f"{_LLAMA}: 419 unexpected interruptions of 16,384 GPUs in 54 days"),
            ("latency of a request; until a failed job begins to restore; memory for a step beside state and gradients", f"{shown_s(machine.latency_s)}; {shown_s(machine.restart_s)}; {machine.hbm_spare:.0%}", "**assumed**"),
            ("fingerprints on a chip", f"{machine.fingerprint_slowdown:.0f} readings of the memory", "**assumed**, never measured on a TPU"),
        ),
    )  # fmt: skip


def _thousands(value: float) -> str:
    return f"{round(value, -3):,.0f}"


def measured_table(one: Measured) -> str:
    """What was measured of this program."""
    micro, nano = 1e6, 1e9
    return _table(
        ("constant", "value"),
        (
            ("on the loop's thread, a leaf: ours, Orbax", f"{one.stall_per_leaf_s * micro:.0f} µs, {one.orbax_stall_per_leaf_s * micro:.0f} µs"),
            ("a save of two items writes: a process with data; its own file (random state), of every process", f"{one.writes_per_writer:.1f}; {one.writes_per_process:.1f}"),
            ("process 0 besides: calls, taken as one after another; writes", f"{one.calls_of_first:.0f}; {one.writes_of_first:.0f}"),
            ("deletions when an old step goes: at all; a process with data", f"{one.deletes_of_first:.0f}; {one.deletes_per_writer:.1f}"),
            ("a restore, each process", f"{one.calls_per_restore:.0f} lists and stats, {one.reads_per_restore:.0f} reads of small states"),
            ("process 0 hears one process; is heard by one; a byte of what it hears", f"{one.gather_per_process_s * micro:.0f} µs; {one.publish_per_process_s * micro:.0f} µs; {one.gather_per_byte_s * nano:.0f} ns"),
            ("a leaf's sums in a save, from one process; a shard's in a restore", f"{one.save_entry_bytes:.0f} bytes and {one.save_entry_s * micro:.1f} µs to add; {one.restore_entry_bytes:.0f} bytes and {one.restore_entry_s * micro:.1f} µs"),
            ("merge: a process's folder, a chunk", f"{one.merge_per_process_s * micro:.0f} µs, {one.merge_per_key_s * micro:.1f} µs"),
            ("metadata: a leaf in the manifest and Orbax's files, a chunk in the index", f"{one.metadata_per_leaf_bytes:,.0f} bytes, {one.index_per_key_bytes:.1f} bytes"),
            ("fingerprints on a CPU, a GB", f"{one.fingerprint_s_per_gb:.2f} s of processor time"),
            ("largest read from `gs://`, of leaves of 32 MiB; read along the other axis", f"{one.merged_read_bytes / MIB:.0f} MiB; {one.across_amplification:.1f} times the bytes, by 2 and 4 hosts"),
        ),
    )  # fmt: skip


def bytes_table(found: Mapping[tuple[int, str], Estimate]) -> str:
    """Where bytes go."""
    lines = []
    for (chips, size), one in _rows(found):
        job = one.job
        reads = f"{shown_bytes(job.read_bytes(False))}, {shown_bytes(job.read_bytes(True))}"
        lines.append(
            (
                *(f"{chips:,}", size, shown_bytes(job.state_bytes), shown_bytes(job.chip_bytes)),
                f"{shown_bytes(job.written_per_host())} × {job.writers():,}",
                f"{shown_bytes(job.written_per_host('all'))} × {job.writers('all'):,}",
                *(reads, f"{job.leaves:,}", f"{job.keys():,}", shown_bytes(one.metadata_bytes)),
                shown_bytes(one.answers_bytes),
            )
        )
    head = ("chips", "parameters", "state", "a chip", "a host writes: `first`", "`all`")
    return _table((*head, "read: by all, by one replica", "leaves", "chunks", "metadata", "process 0 hears"), lines)


def stall_table(found: Mapping[tuple[int, str], Estimate]) -> str:
    """What a save costs the loop."""
    lines = []
    for (chips, size), one in _rows(found)[:3] + _rows(found)[-2:]:
        ours, theirs = one.stall_s(), one.orbax_stall_s
        lines.append(
            (
                *(f"{chips:,}", size, shown_s(one.stall_s("reference")), shown_s(ours), shown_s(theirs)),
                *(f"{theirs / ours:.1f}", shown_s(one.device_s), shown_bytes(one.host_bytes)),
            )
        )
    head = ("chips", "parameters", "`reference`", "`device`", "Orbax", "Orbax / `device`", "chips busy", "host memory")
    return _table(head, lines)


def times_table(found: Mapping[tuple[int, str], Estimate]) -> str:
    """How long saves and restores take."""
    lines = []
    for (chips, size), one in _rows(found):
        commit = _late(one.commit_s(), one.save_waits_s())
        single, each = (_late(one.restore_s(way), one.restore_waits_s(way)) for way in (True, False))
        lines.append(
            (
                *(f"{chips:,}", size, commit, _phases(one.save()), shown_s(one.commit_s("all"))),
                *(single, _phases(one.restore(True)), each),
            )
        )
    head = (
        "chips",
        "parameters",
        "commit",
        "of which",
        "with `all`",
        "restore, one replica reads",
        "of which",
        "all read",
    )
    return _table(head, lines)


def _late(seconds: float, longest_wait_s: float) -> str:
    return f"{shown_s(seconds)}{' ‡' if longest_wait_s > BARRIER_S else ''}"


def failures_table(today: Mapping[tuple[int, str], Estimate], changed: Mapping[tuple[int, str], Estimate]) -> str:
    """What continuous saves are worth."""
    lines = []
    for key, one in _rows(today):
        young = one.young_s(one.orbax_stall_s)
        rates = (one.continuous, one.goodput(young, one.orbax_stall_s), one.goodput(3600, one.orbax_stall_s))
        lines.append(
            (
                *(f"{key[0]:,}", key[1], shown_s(one.mtbf_s), shown_s(one.period_s() + one.commit_s())),
                *(shown_s(one.lost_s(one.period_s())), shown_s(one.lost_s(3600.0))),
                *(_lost(rate) for rate in rates),
                *(shown_s(young), _lost(changed[key].continuous)),
            )
        )
    head = ("chips", "parameters", "between failures", "newest step at most", "a failure loses", "hourly")
    tail = (
        "time lost: continuous",
        "Orbax, Young's interval",
        "Orbax, hourly",
        "Young's interval",
        "continuous, changed",
    )
    return _table((*head, *tail), lines)


def _lost(rate: float) -> str:
    return f"{_digits(100 * (1 - rate))} %"


def limits_table(found: Mapping[tuple[int, str], Estimate]) -> str:
    """What limits a save and a restore by one replica, first of all."""
    lines = []
    for chips in CHIPS:
        cells = []
        for size in SHAPES:
            one = found.get((chips, size))
            cells.append("does not fit" if one is None else f"{_limit(one.save())} / {_limit(one.restore(True))}")
        lines.append((f"{chips:,}", *cells))
    return _table(("chips", *SHAPES), lines)


def changed_table(*states: Mapping[tuple[int, str], Estimate]) -> str:
    """What the changes would do."""
    lines = []
    for key in ROWS:
        if states[0][key].job.slices > 1:
            ones = [state[key] for state in states]
            lines.append(
                (f"{key[0]:,}", key[1], *map(_best_save, ones), *(_timed_limit(one.restore(True)) for one in ones))
            )
    ways = ("today", "changed", f"and {shown_bytes(WIDER.ingress)}/s")
    return _table(("chips", "parameters", *(f"{what}: {way}" for what in ("commit", "restore") for way in ways)), lines)


def _best_save(one: Estimate) -> str:
    return _timed_limit(min((one.save("first"), one.save("all")), key=lambda phases: sum(phases.values())))


def _timed_limit(phases: Phases) -> str:
    return f"{shown_s(sum(phases.values()))}, {_limit(phases)}"


def reshard_sentence() -> str:
    """How much more than its part a host reads."""
    rows, old, each = 25_600, 256, Machine().chips_per_host
    found = {new: amplification(rows, old, new, each) for new in (64, 256, 1024, 2048, 5120)}
    told = ", ".join(f"{new:,}: {times:g}" for new, times in found.items())
    across = amplification(rows, old, old, each, across=True)
    return (
        f"Saved on {old} chips and restored on other numbers of chips, the bytes read to those needed are {told}; along the "
        f"other axis on {old} chips {across:g}."
    )


def _rows(found: Mapping[tuple[int, str], Estimate]) -> list[tuple[tuple[int, str], Estimate]]:
    return [(key, found[key]) for key in ROWS]


def _phases(phases: Phases) -> str:
    """Those that matter, the longest first."""
    total = sum(phases.values())
    longest = sorted(phases.items(), key=lambda one: -one[1])
    return ", ".join(f"{name} {shown_s(seconds)}" for name, seconds in longest if seconds > 0.1 * total)


def _limit(phases: Phases) -> str:
    return max(phases, key=lambda name: phases[name])


def sections(measured: Measured) -> dict[str, str]:
    """All that the page shows."""
    today, changed = estimates(measured), estimates(measured, CHANGED)
    wider = estimates(measured, CHANGED, WIDER)
    adapter = Estimate(dataclasses.replace(today[ADAPTER].job, parameter_bytes=(2,)), measured)
    return {
        "given": given_table(),
        "measured": measured_table(measured),
        "bytes": f"{bytes_table(today)}\n\n{adapter_sentence(today[ADAPTER], adapter)}",
        "stall": stall_table(today),
        "times": times_table(today),
        "reshard": reshard_sentence(),
        "failures": failures_table(today, wider),
        "limits": limits_table(today),
        "changed": changed_table(today, changed, wider),
    }


ADAPTER = (256, "100 B")
ADAPTER_SHARE = 0.01
"""Of the parameters, those of adapters."""


def adapter_sentence(full: Estimate, base: Estimate) -> str:
    """Fine-tuning with adapters: what each save writes, and what is written once."""
    trained = full.job.state_bytes * ADAPTER_SHARE
    return (
        f"With adapters of {ADAPTER_SHARE:.0%} of {ADAPTER[1]} parameters a save writes {shown_bytes(trained)} instead of "
        f"{shown_bytes(full.job.state_bytes)}; the frozen weights, {shown_bytes(base.job.state_bytes)}, are written once."
    )


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m scripts.scaling", description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/scaling.md")
    found = sections(Measured.load())
    if parser.parse_args().write:
        PAGE.write_text(filled(PAGE.read_text(), found))
    else:
        print("\n\n".join(f"{name}\n{text}" for name, text in found.items()))


if __name__ == "__main__":
    main()
