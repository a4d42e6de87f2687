"""What `scripts/scaling.py` needs to know of this program: measured small, stored in benchmarks/results/scaling.json.

python -m benchmarks.scaling

Requests are counted on the test server for gs://, of real processes joined by `jax.distributed`. Agreements run on the
real coordination service, with clients in one process. What process 0 computes with the answers of many processes is
the program's own code, given answers of so many. Nothing here needs more than a few minutes of two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import functools
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorstore as ts
import torchorbax
from jax._src.lib import _jax  # type: ignore[attr-defined]  # only here can one process be many clients
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint._src.serialization import ocdbt_process_spec, ocdbt_utils, tensorstore_utils
from tests.helpers import gcs_server
from torchorbax._src.arrays import fingerprint
from torchorbax._src.distributed.channel import Channel
from torchorbax._src.distributed.processes import Processes
from torchorbax._src.format.manifest import ItemMeta, LeafMeta, Manifest
from torchorbax._src.save import contribution
from torchorbax._src.verification import checked_read

from benchmarks.measure import median, timed

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "scaling.json"

Found = dict[str, float]

_alive: list[Any] = []
"""The coordination service and its clients, whose end would hang or end this process."""

_ITEMS = ("model", "optimizer")
_LAYOUTS = ((2, 8, 1), (2, 40, 1), (4, 8, 1), (4, 40, 1), (4, 40, 2))
"""Processes, leaves of an item, slices."""


def names(leaves: int) -> list[str]:
    """Names as long as those of a transformer."""
    return [f"model.layers.{index}.self_attn.q_proj.weight.exp_avg" for index in range(leaves)]


# ----------------------------------------------------------------------------------------------------------- requests


def worker(index: int, count: int, address: str, path: str, leaves: int, slices: int) -> None:
    """One of several processes that save twice and restore; process 0 prints when."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, count, index, initialization_timeout=120, heartbeat_timeout_seconds=100)
    service: Any = jax._src.distributed.global_state.client
    meet = service.wait_at_barrier
    mesh = Mesh(np.array(jax.devices()).reshape(slices, -1), ("slice", "fsdp"))
    values = np.random.default_rng(0).standard_normal((128, 512)).astype(np.float32)

    def state_by(spec: P) -> dict[str, dict[str, jax.Array]]:
        sharding = NamedSharding(mesh, spec)
        array = jax.make_array_from_callback(values.shape, sharding, lambda part: values[part])
        return {item: dict.fromkeys(names(leaves), array) for item in _ITEMS}

    state = state_by(P("fsdp"))
    marks: list[float] = []

    def mark() -> None:
        meet(f"mark{len(marks)}", 120_000)
        marks.append(time.time())
        meet(f"marked{len(marks)}", 120_000)

    with torchorbax.Checkpointer(path, state, save=None, keep=1) as run:
        run.save(0, force=True)
        run.wait()
        mark()
        run.save(1, force=True)
        run.wait()
        mark()
    for target, single in ((state, False), (state, True), (state_by(P(None, "fsdp")), False)):
        mark()
        with torchorbax.Checkpointer(path, target, save=None, single_replica_restore=single) as run:
            mark()
            run.restore()
            mark()
    if index == 0:
        print(json.dumps(marks), flush=True)


def requests(processes: int, leaves: int, slices: int) -> dict[str, Any]:
    """Requests of the second save, and of restores, by process and kind; bytes read and written by process."""
    with gcs_server.Server(buckets=["bucket"]) as server, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
        probe.close()
        started = []
        for index in range(processes):
            env = {**os.environ, **gcs_server.environment(server.port, f"p{index}"), **_cpu(2)}
            arguments = (index, processes, address, "gs://bucket/run", leaves, slices)
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.scaling", "worker", *map(str, arguments)]
            started.append(subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        answers = [process.communicate(timeout=300) for process in started]
        if any(process.returncode for process in started):
            raise RuntimeError("\n".join(err.decode()[-2000:] for _, err in answers))
        marks = json.loads(answers[0][0].decode().splitlines()[-1])
        log = server.log()
    phases = {"save": (0, 1), "open": (2, 3), "restore": (3, 4), "restore_single": (6, 7), "restore_across": (9, 10)}
    found: dict[str, Any] = {"processes": processes, "leaves": leaves, "slices": slices}
    for phase, (first, last) in phases.items():
        entries = [entry for entry in log if marks[first] <= entry.time < marks[last]]
        found[phase] = [_summary([one for one in entries if one.client == f"p{index}"]) for index in range(processes)]
    return found


def large_reads(leaves: int = 4, leaf_bytes: int = 32 << 20) -> list[int]:
    """Bytes of each read of array data in a restore by one process with 4 devices; in a process of its own."""
    with gcs_server.Server(buckets=["bucket"]) as server:
        os.environ.update(gcs_server.environment(server.port))
        mesh = Mesh(np.array(jax.devices()[:4]), ("fsdp",))
        values = np.random.default_rng(0).standard_normal((64, leaf_bytes // 256), np.float32)
        array = jax.device_put(values, NamedSharding(mesh, P("fsdp")))
        state = {"model": {name: array + index for index, name in enumerate(names(leaves))}}
        with torchorbax.Checkpointer("gs://bucket/run", state, save=None, rng=False) as run:
            run.save(0, force=True)
            run.wait()
            server.clear_log()
            run.restore()
        return [entry.read for entry in server.requests("read") if entry.read >= leaf_bytes // 8]


def _summary(entries: list[gcs_server.Entry]) -> dict[str, Any]:
    kinds = Counter(entry.kind for entry in entries)
    return {
        "kinds": dict(sorted(kinds.items())),
        "read_bytes": sum(entry.read for entry in entries),
        "written_bytes": sum(entry.written for entry in entries),
    }


def _cpu(devices: int) -> dict[str, str]:
    return {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": str(ROOT),
    }


# --------------------------------------------------------------------------------------------------------- agreements


def agreements(clients: int, payload_bytes: int, rounds: int = 3) -> Found:
    """Seconds that process 0 takes to gather what all have said, and until all have what it publishes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    _alive.append(_jax.get_distributed_runtime_service(address, clients))
    connected = [
        _jax.get_distributed_runtime_client(address, index, init_timeout=60, use_compression=True)
        for index in range(clients)
    ]
    _alive.extend(connected)
    _all(clients, lambda index: connected[index].connect())
    channels = [
        Channel(Processes(60.0, connected[index], index, clients, name="measured"), "agreements")
        for index in range(clients)
    ]
    payload = {name: fingerprint.text(_some_sums(index)) for index, name in enumerate(names(payload_bytes // 80))}
    gathers, publishes = [], []
    for _ in range(rounds + 1):
        for channel in channels[1:]:
            channel.gather("sums", payload)
        gathers.append(timed(lambda: channels[0].gather("sums", payload)))
        publishes.append(timed(lambda: _all(clients, lambda index: channels[index].publish("all", {}))))
    return {"gather_s": median(gathers[1:]), "publish_s": median(publishes[1:]), "bytes": len(json.dumps(payload))}


def _all(count: int, action: Callable[[int], object]) -> None:
    threads = [threading.Thread(target=action, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _some_sums(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1 << 63, 2, np.uint64)


# ---------------------------------------------------------------------------------------- process 0, with many answers


def summing_a_save(processes: int, leaves: int) -> Found:
    """Seconds of processor time that process 0 takes to add up what all have sent, and the bytes that one has sent."""
    sums = {name: fingerprint.text(_some_sums(index)) for index, name in enumerate(names(leaves))}
    files = {f"model/ocdbt.process_1000/d/{file:032x}": [128 << 20, "0" * 8] for file in range(8)}
    part = {"sums": {"model": sums}, "own": "0" * 64, "files": files}
    meta = LeafMeta((8192, 8192), "float32", "jax", {"mesh": {"fsdp": 256}, "spec": ["fsdp", None]})
    manifest = Manifest(
        0, datetime.datetime.now(datetime.UTC), {}, {"model": ItemMeta("module", dict.fromkeys(sums, meta))}
    )
    seconds = _processor_s(lambda: contribution.with_reports(manifest, [part] * processes))
    return {"seconds": seconds, "bytes": len(json.dumps(part)), "entries": processes * leaves}


def summing_a_restore(processes: int, leaves: int, parts: int = 4) -> Found:
    """The same of a restore: each process tells of every part that it has of a leaf."""
    answers = [
        [
            ["model", name, {str((process * parts + part) << 20): fingerprint.text(sums) for part in range(parts)}]
            for name in names(leaves)
        ]
        for process in range(1, processes)
        for sums in [_some_sums(process)]
    ]
    seconds = _processor_s(lambda: checked_read.added_fingerprints([[], *answers]))
    size = len(json.dumps(answers[0]))
    return {"seconds": seconds, "bytes": size, "entries": processes * leaves * parts}


# --------------------------------------------------------------------------------------------------- merge and metadata


def merging(folder: Path, processes: int, keys: int) -> Found:
    """Seconds of processor time to merge folders of processes, with so many chunks each; bytes of the merged index."""
    context = tensorstore_utils.get_ts_context(use_ocdbt=True)
    for process in range(processes):
        spec = tensorstore_utils.build_kvstore_tspec(
            str(folder),
            ocdbt_process_spec=ocdbt_process_spec.OcdbtProcessSpec(str(process)),
            ocdbt_write_options=tensorstore_utils.OcdbtKvStoreWriteOptions(mode=tensorstore_utils.OcdbtWriteMode.WRITE),
        )
        store, transaction = ts.KvStore.open(spec, context=context).result(), ts.Transaction()
        random = np.random.default_rng(process)
        for name in names(keys):
            store.with_transaction(transaction)[f"{name}/{process}.0"] = random.bytes(4096)
            if process == 0:
                store.with_transaction(transaction)[f"{name}/.zarray"] = b"{}" * 100
        transaction.commit_async().result()
    merge = ocdbt_utils.merge_ocdbt_per_process_files
    fresh = tensorstore_utils.get_ts_context(use_ocdbt=True)
    seconds = _processor_s(lambda: asyncio.run(merge(_epath(folder), fresh, use_zarr3=False)))
    index = sum(file.stat().st_size for file in (folder / "d").iterdir())
    return {"seconds": seconds, "index_bytes": index, "keys": processes * keys}


def _merging_in(folders: Iterator[Path], processes: int, keys: int) -> Found:
    return merging(next(folders), processes, keys)


def _epath(folder: Path) -> Any:
    from etils import epath

    return epath.Path(folder)


def metadata(folder: Path, leaves: int) -> Found:
    """Bytes of a step that are no array data, on the local disk; seconds to read its manifest."""
    mesh = Mesh(np.array(jax.devices()), ("fsdp",))
    values = jax.device_put(np.ones((128, 512), np.float32), NamedSharding(mesh, P("fsdp")))
    state = {"model": {name: values + index for index, name in enumerate(names(leaves))}}
    with torchorbax.Checkpointer(folder, state, save=None) as run:
        run.save(0, force=True)
    step = folder / "0"
    size = {
        name: sum(one.stat().st_size for one in step.rglob(name)) for name in ("metadata", "_METADATA", "_sharding")
    }
    text = (step / "manifest" / "metadata").read_text()
    return {**size, "parse_s": timed(lambda: Manifest.from_json(json.loads(text)))}


def processor_time(mib: int = 64) -> Found:
    """Seconds of processor time to sum an array, a GB of it."""
    mesh = Mesh(np.array(jax.devices()), ("fsdp",))
    array = jax.device_put(np.ones((mib, 1 << 18), np.float32), NamedSharding(mesh, P("fsdp")))
    fingerprint.start(array)()
    return {"s_per_gb": _processor_s(lambda: fingerprint.start(array)()) / array.nbytes * 1e9}


def _processor_s(work: Callable[[], object]) -> float:
    """Seconds of processor time, which other programs do not lengthen much."""
    before = time.process_time()
    work()
    return time.process_time() - before


# ----------------------------------------------------------------------------------------------------------------- all


def _medians(measure: Callable[[], Mapping[str, float]], repeats: int) -> Found:
    found = [measure() for _ in range(repeats)]
    return {name: median([one[name] for one in found]) for name in found[0]}


def _isolated(*arguments: object) -> Any:
    """A measurement in a process of its own, which the coordination service's clients end when they please."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.scaling", *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, **_cpu(8)}, cwd=ROOT, capture_output=True, text=True, timeout=300)
    lines = done.stdout.splitlines()
    if not lines:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(lines[-1])


def measure_all(repeats: int) -> dict[str, Any]:
    """Everything, with the labels that `scripts/scaling.py` looks for."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        folders = (Path(place) / str(number) for number in range(10_000))
        found["requests"] = [requests(*layout) for layout in _LAYOUTS]
        found["large_reads"] = _isolated("large_reads")
        found["agreements"] = {
            f"{clients}x{size}": {**_isolated("agreements", clients, size), "clients": clients}
            for clients, size in ((16, 80), (64, 80), (256, 80), (16, 800_000))
        }
        found["summing_a_save"] = _medians(lambda: summing_a_save(100, 500), repeats)
        found["summing_a_restore"] = _medians(lambda: summing_a_restore(50, 200), repeats)
        found["merging"] = {
            f"{processes}x{keys}": {
                **_medians(functools.partial(_merging_in, folders, processes, keys), repeats),
                "processes": processes,
            }
            for processes, keys in ((8, 10), (64, 10), (64, 1000))
        }
        found["metadata"] = {str(leaves): metadata(next(folders), leaves) for leaves in (100, 500)}
        found["processor_time"] = _medians(processor_time, repeats)
    return found


def main() -> None:
    """See the module."""
    if sys.argv[1:2] == ["worker"]:
        index, count, address, path, leaves, slices = sys.argv[2:]
        return worker(int(index), int(count), address, path, int(leaves), int(slices))
    if sys.argv[1:2] == ["agreements"]:
        print(json.dumps(agreements(int(sys.argv[2]), int(sys.argv[3]))), flush=True)
        os._exit(0)
    if sys.argv[1:2] == ["large_reads"]:
        print(json.dumps(large_reads()))
        return None
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    from benchmarks.__main__ import machine

    content = {"command": "python -m benchmarks.scaling", "machine": machine(), "repeats": repeats}
    RESULTS.write_text(json.dumps({**content, **measure_all(repeats)}, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
