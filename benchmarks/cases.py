"""The measurements. Each runs in a process of its own with simulated CPU devices, and returns samples by name.

`python -m benchmarks.cases NAME '{"option": value}' FOLDER [COORDINATOR COUNT INDEX]` prints them as JSON.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import torch
import torchorbax
from tests.helpers import gcs_server
from torchorbax._src.arrays import fingerprint

from benchmarks import peers, states, steps
from benchmarks.measure import Samples, interleaved, median, peak_bytes, timed
from benchmarks.torch_peers import PEERS, TorchPeers


def save(folder: Path, leaves: int, leaf_bytes: int, repeats: int, with_torch: bool = False) -> Samples:
    """Stall of a save, and time until it is committed."""
    tree, change = states.state(leaves, leaf_bytes), states.step()
    ours = {staging: peers.Ours(folder / staging, tree, staging) for staging in ("auto", "device", "reference")}
    orbax = peers.Orbax(folder / "orbax", tree)

    def saved(peer: Any) -> dict[str, float]:
        nonlocal tree
        tree = change(tree)
        found: dict[str, float] = peer.save(tree)
        return found

    contenders: dict[str, Callable[[], dict[str, float]]] = {
        name: (lambda peer=peer: saved(peer)) for name, peer in {**ours, "orbax": orbax}.items()
    }
    contenders["fingerprint"] = lambda: {"commit_s": timed(lambda: fingerprint.fingerprints(tree))}
    others = TorchPeers(folder, leaves, leaf_bytes) if with_torch else None
    if others is not None:
        contenders |= {name: (lambda name=name: others.do(name)) for name in PEERS}
    samples = interleaved(contenders, repeats)
    for peer in (*ours.values(), orbax, others):
        if peer is not None:
            peer.close()
    return samples


def restore(folder: Path, leaves: int, leaf_bytes: int, repeats: int) -> Samples:
    """Time to restore what `save` has left in the same folder, on as many devices as there are now."""
    tree = states.state(leaves, leaf_bytes)
    ours = peers.Ours(folder / "auto", tree)
    orbax = peers.Orbax(folder / "orbax", tree)
    placed = {"tree": tree}

    def checked() -> dict[str, float]:
        return {"restore_s": timed(lambda: fingerprint.fingerprints(placed["tree"]))}

    samples = interleaved({"auto": ours.restore, "orbax": orbax.restore, "fingerprint": checked}, repeats)
    ours.close()
    orbax.close()
    return samples


def read_back(folder: Path, leaves: int, leaf_bytes: int, repeats: int) -> Samples:
    """The same save with no step read back, and with every step read back before the step before it is deleted."""
    tree, change = states.state(leaves, leaf_bytes), states.step()
    contenders = {
        name: peers.Ours(folder / name, tree, verify_after_save=which) for name, which in (("no", False), ("all", True))
    }

    def saved(peer: peers.Ours) -> dict[str, float]:
        nonlocal tree
        tree = change(tree)
        return {**peer.save(tree), "check_s": peer.check_owner()}

    samples = interleaved({name: lambda peer=peer: saved(peer) for name, peer in contenders.items()}, repeats)
    for peer in contenders.values():
        peer.close()
    return samples


def object_storage(folder: Path, leaves: int, leaf_bytes: int, answer_s: float, repeats: int) -> Samples:
    """Saves and restores under gs://, on a server on this machine that takes its time for each answer."""
    tree, change = states.state(leaves, leaf_bytes), states.step()
    with gcs_server.ServerProcess(folder, buckets=["bucket"]) as server:
        os.environ.update(gcs_server.environment(server.port))
        contenders: dict[str, Any] = {
            "ours": peers.Ours("gs://bucket/ours", tree),
            "orbax": peers.Orbax("gs://bucket/orbax", tree),
        }
        server.add_faults(f"delay:{answer_s}")

        def saved_and_restored(peer: Any) -> dict[str, float]:
            nonlocal tree
            tree = change(tree)
            server.clear_log()
            found: dict[str, float] = peer.save(tree)
            found["save_requests"] = len(server.log())
            server.clear_log()
            found |= peer.restore()
            found["restore_requests"] = len(server.log())
            return found

        samples = interleaved(
            {name: lambda peer=peer: saved_and_restored(peer) for name, peer in contenders.items()}, repeats
        )
        for peer in contenders.values():
            peer.close()
    return samples


def skipped(folder: Path, repeats: int, calls: int = 1000) -> Samples:
    """Seconds that `save` takes on a step where the policy says no, on average over many calls."""
    tree = states.state(64, 64 << 10)
    ours = peers.Ours(folder / "ours", tree, save=peers.never())
    orbax = peers.Orbax(folder / "orbax", tree, continuous=3600)
    for peer in (ours, orbax):
        peer.offer(0, tree)
        peer.wait()
    steps = iter(range(1, 1 << 40))

    def offered(peer: Any) -> dict[str, float]:
        return {"skip_s": timed(lambda: [peer.offer(next(steps), tree) for _ in range(calls)]) / calls}

    samples = interleaved({"ours": lambda: offered(ours), "orbax": lambda: offered(orbax)}, repeats)
    ours.close()
    orbax.close()
    return samples


def loop(folder: Path, leaves: int, leaf_bytes: int, repeats: int, step_s: float, seconds: float) -> Samples:
    """Steps a second of a training loop whose step takes about `step_s` on all cores, and waits for its loss."""
    tree = states.state(leaves, leaf_bytes)
    size = 768
    work = jnp.ones((size, size))

    def build(products: int) -> Any:
        def run(tree: Any, x: Any) -> Any:
            for _ in range(products):
                x = x @ work / size
            return jax.tree.map(lambda array: array * 1.0001, tree), x.sum()

        return jax.jit(run, donate_argnums=0)

    def step_time(program: Any) -> float:
        nonlocal tree
        times = []
        for _ in range(6):
            started = time.perf_counter()
            tree, loss = program(tree, work)
            float(loss)
            times.append(time.perf_counter() - started)
        return median(times[1:])

    one, many = step_time(build(1)), step_time(build(21))
    program = build(max(1, 1 + round((step_s - one) / max((many - one) / 20, 1e-6))))
    commit_s = median([peers.Ours(folder / f"commit{index}", tree).save(tree)["commit_s"] for index in range(3)])
    numbers = iter(range(1, 1 << 40))

    def rate(peer: Any) -> dict[str, float]:
        nonlocal tree
        done, saves, started = 0, 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            tree, loss = program(tree, work)
            float(loss)
            saves += peer is not None and peer.offer(next(numbers), tree)
            done += 1
        rate = done / (time.perf_counter() - started)
        if peer is not None:
            peer.wait()
        return {"steps_per_s": rate, "saves": saves}

    ours = peers.Ours(folder / "ours", tree, save="continuous")
    rare = peers.Ours(
        folder / "rare", tree, save=torchorbax.policies.ContinuousPolicy(datetime.timedelta(seconds=10 * commit_s))
    )
    orbax = peers.Orbax(folder / "orbax", tree, continuous=0)
    contenders = {"none": None, "ours": ours, "orbax": orbax, "rare": rare}
    samples = interleaved({name: (lambda peer=peer: rate(peer)) for name, peer in contenders.items()}, repeats)
    for peer in (ours, rare, orbax):
        peer.close()
    return samples


def memory(folder: Path, leaves: int, leaf_bytes: int, peer: str, restoring: bool) -> Samples:
    """Peak host memory of one save, or of one restore above the state restored; in a fresh process each."""
    tree = states.state(leaves, leaf_bytes)
    made = peers.Ours(folder / "auto", tree) if peer == "ours" else peers.Orbax(folder / "orbax", tree)
    if not restoring:
        peak, _ = peak_bytes(lambda: made.save(tree))
    else:
        target = states.abstract(tree)
        nbytes = leaves * leaf_bytes
        peak, _ = peak_bytes(lambda: made.restore())
        peak -= nbytes
        del target
    made.close()
    return {f"{peer}/peak_bytes": [float(max(peak, 0))]}


def adapter(folder: Path, repeats: int, tensors: int = 2000) -> Samples:
    """Seconds that `to_jax` takes for each tensor of a module."""
    module = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(2)) for _ in range(tensors)])
    torchorbax.place_(module)
    held = dict(module.named_parameters())
    return interleaved(
        {"to_jax": lambda: {"tensor_s": timed(lambda: torchorbax.to_jax(held)) / tensors}}, repeats, warmup=2
    )


def step(folder: Path, repeats: int, parameters: int, calls: int = 20) -> Samples:
    """Seconds that a call of a training step takes on the caller's thread."""
    contenders = {
        "torch": steps.ours(parameters, "torch"),
        "optax": steps.ours(parameters, "optax"),
        "hand": steps.by_hand(parameters),
    }
    measured = {name: functools.partial(steps.caller_times, call, calls) for name, call in contenders.items()}
    return interleaved(measured, repeats)


def back(folder: Path, repeats: int, layers: int = 12) -> Samples:
    """Seconds from the start of a process to the end of its first new step: fresh, and after a `kill -9`."""

    def life(number: int) -> dict[str, float]:
        found: dict[str, float] = {}
        for name in ("cold", "resumed"):
            started = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "benchmarks.llama", folder / f"run{number}", str(layers)],
                env={
                    **os.environ,
                    "XDG_CACHE_HOME": str(folder / f"cache{number}"),
                    "JAX_ENABLE_COMPILATION_CACHE": "1",
                    "XLA_FLAGS": "",
                },
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            with process:
                if process.stdout is None or process.stdout.readline() != "trained\n":
                    raise RuntimeError(f"the {name} program has ended before its first step")
                found[f"{name}_s"] = time.perf_counter() - started
                if not process.stdout.readline().startswith(f"saved {1 if name == 'cold' else 2} "):
                    raise RuntimeError(f"the {name} program has not saved the step that it should")
                process.kill()
        return found

    numbers = itertools.count()
    return interleaved({"back": lambda: life(next(numbers))}, repeats, warmup=0)


CASES: dict[str, Callable[..., Samples]] = {
    case.__name__: case
    for case in (save, restore, read_back, object_storage, skipped, loop, memory, adapter, step, back)
}


def _join(coordinator: str, count: str, index: str) -> None:
    """Become one of several processes."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, int(count), int(index))


if __name__ == "__main__":
    if sys.argv[4:]:
        _join(*sys.argv[4:])
    print(json.dumps(CASES[sys.argv[1]](Path(sys.argv[3]), **json.loads(sys.argv[2]))))
