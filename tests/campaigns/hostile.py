"""Thousands of checkpoints that somebody has damaged, or made to do harm: none may do more than be refused.

`python -m tests.campaigns.hostile --mutations 10000` makes real runs of several layouts, changes a copy of one of them,
and then verifies, loads and restores it. `--write` puts the table in docs/reliability.md.

All of it happens in worker processes whose memory is limited. A worker that ends, or does not answer in time, has found
a failure, and so has one that restores wrong bytes, changes the files, or raises an error of another kind.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import logging
import os
import random
import re
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torchorbax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from torchorbax._src.format import per_process
from torchorbax.errors import CorruptCheckpointError, TorchorbaxError

from tests.campaigns.hostile_mutations import FORGED, MUTATIONS
from tests.helpers.forgery import rewrite

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
LIMIT_S = 60.0
"""How long a mutation may take: its making, a verification, a load and a restore."""
MEMORY_BYTES = 3 << 30
"""How much memory a worker may take besides what its libraries take."""
OUTCOMES = ("refused", "restored", "forged", "FAILURE")
HEADINGS = ("refused with an error of torchorbax", "restored bit for bit", "other values, signed to fit", "failures")


# ------------------------------------------------------------------------------------------------------------- layouts


def small(value: float) -> dict[str, Any]:
    torch.manual_seed(int(value))
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=value)
    model(torch.randn(4, 4)).sum().backward()
    optimizer.step()
    return {
        "model": model,
        "optimizer": optimizer,
        "plain": {"epoch": int(value), "name": f"run {value}", "w": (1, 2.5)},
    }


def frozen(value: float) -> dict[str, Any]:
    state = small(value)
    state["model"][0].weight.requires_grad_(False)
    return {"model": state["model"], "plain": state["plain"]}


def large(value: float) -> dict[str, Any]:
    numbers = np.random.default_rng(int(value))
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), PartitionSpec("x"))
    return {
        "arrays": {
            "sharded": jax.device_put(numbers.random((256, 128), np.float32), sharding),
            "half": jnp.asarray(numbers.random((300, 300)), jnp.bfloat16),
            "host": numbers.random(30_000),
            "zeros": np.full((200, 100), value - 1, np.float32),
            "scalar": jnp.float32(value),
        }
    }


def empty(value: float) -> dict[str, Any]:
    return {
        "arrays": {"none": np.zeros((0, 3)), "w": np.full(300, value), "x": np.int8(value), "list": [1, {"a": value}]}
    }


LAYOUTS: dict[str, tuple[Callable[[float], dict[str, Any]], dict[str, Any]]] = {
    "small leaves, several items": (small, {}),
    "large leaves": (large, {}),
    "compressed": (large, {"compression": "zstd"}),
    "without elements": (empty, {}),
    "with a base": (frozen, {}),
    "several processes": (small, {}),
}


def build(folder: Path) -> None:
    for name, (state, options) in LAYOUTS.items():
        with torchorbax.Checkpointer(folder / name, state(1), rng=False, save=None, **options) as run:
            run.save(0, force=True)
    # As a second process would have written it.
    text = per_process.to_text({"plain": per_process.HostItem(None, {}, {}, ())})
    (folder / "several processes" / "0" / "manifest" / "process_1").write_text(text)
    own = {"1": per_process.digest_of(text)}
    rewrite(folder / "several processes", lambda content: content.update(processes=2, own=own))


def contents(value: Any) -> str:
    """All of a live state, as text. Forged manifests can give an optimizer state of any kind."""
    if isinstance(value, torch.nn.Module):
        return contents(torchorbax.to_jax(value))
    if isinstance(value, torch.optim.Optimizer):
        return contents([*value.state.values(), *({**group, "params": None} for group in value.param_groups)])
    if isinstance(value, dict):
        return "\n".join(f"{contents(name)}: {contents(one)}" for name, one in value.items())
    if isinstance(value, list | tuple):
        return "\n".join(map(contents, value))
    if type(value) is int:
        return hex(value)  # Python refuses to write long ones in decimals
    return np.asarray(value).tobytes().hex() if hasattr(value, "dtype") else repr(value)


# -------------------------------------------------------------------------------------------------------------- worker


def attempt(number: int, pristine: Path, folder: Path) -> tuple[str, str, str]:
    """Make a mutation and use the run; returns the mutation's name, the outcome, and what explains it."""
    chance = random.Random(number)
    layout, mutation = chance.choice(list(LAYOUTS)), chance.choice(MUTATIONS)
    state, _ = LAYOUTS[layout]
    run = folder / "run"
    shutil.copytree(pristine / layout, run)
    name = mutation.__name__
    what = f"{number} {name} {layout}"
    mutation(run, chance)
    stamps = stamps_of(run)
    outcomes = set()
    for use in (
        functools.partial(verified, run),
        functools.partial(loaded, run, state),
        functools.partial(restored, run, state),
    ):
        try:
            outcomes.add(use())
        except TorchorbaxError as error:
            outcomes.add("refused")
            if len(str(error)) > 20_000:
                return name, "FAILURE", f"{what}: an error of {len(str(error))} characters"
            is_told = isinstance(error, CorruptCheckpointError) or "link" in str(error)  # a link in place of a step
            if not is_told and mutation not in FORGED:
                return name, "FAILURE", f"{what}: {use.func.__name__}: {type(error).__name__}: {str(error)[:300]}"
        except Exception as error:  # whatever it is, it is a failure
            return name, "FAILURE", f"{what}: {use.func.__name__}: {type(error).__name__}: {str(error)[:300]}"
    if stamps_of(run) != stamps:
        return name, "FAILURE", f"{what}: what only reads has changed files"
    if "other values" in outcomes and mutation not in FORGED:
        return name, "FAILURE", f"{what}: other values than those that were saved"
    outcome = "refused" if "refused" in outcomes else "forged" if "other values" in outcomes else "restored"
    return name, outcome, what


def stamps_of(run: Path) -> dict[Path, tuple[int, int, int]]:
    """What changes when a file or folder of the step or of the bases does."""
    found = {path: path.lstat() for folder in ("0", "base") for path in sorted((run / folder).rglob("*"))}
    return {path: (stat.st_mode, stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


def verified(run: Path) -> str:
    torchorbax.verify(run)
    return "restored"


def loaded(run: Path, state: Callable[[float], dict[str, Any]]) -> str:
    item = next(iter(state(1)))
    found = torchorbax.load(run, 0, item)
    saved = torchorbax.to_jax(state(1)[item])
    same = all(
        np.asarray(found[name]).tobytes() == np.asarray(saved[name]).tobytes() for name in found if name in saved
    )
    return "restored" if same else "other values"


def restored(run: Path, state: Callable[[float], dict[str, Any]]) -> str:
    live = state(2)
    with torchorbax.Checkpointer(run, live, rng=False, save=None) as checkpointer:
        try:
            checkpointer.restore(0)
        except TorchorbaxError:
            if contents({**live, **checkpointer.state}) != contents(state(2)):
                return "other values"
            raise
        return "restored" if contents({**live, **checkpointer.state}) == contents(state(1)) else "other values"


def work(pristine: Path, folder: Path) -> None:
    """Make the mutations whose numbers come on the standard input, one after another."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    for _, (state, _options) in LAYOUTS.items():  # compiles, and imports what is imported late
        state(1)
    for name in LAYOUTS:
        shutil.copytree(pristine / name, folder / "warm")
        verified(folder / "warm")
        restored(folder / "warm", LAYOUTS[name][0])
        shutil.rmtree(folder / "warm")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, resource.RLIM_INFINITY))
    print("ready", flush=True)
    for line in sys.stdin:
        place = folder / line.strip()
        place.mkdir()
        print(json.dumps(attempt(int(line), pristine, place)), flush=True)
        shutil.rmtree(place)


# ---------------------------------------------------------------------------------------------------------------- pool


@dataclasses.dataclass
class Worker:
    """A process that makes mutations."""

    process: subprocess.Popen[str]
    folder: Path
    errors: Path
    number: int = -1

    def ask(self, number: int) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if self.number < 0 and self.process.stdout.readline() != "ready\n":
            raise RuntimeError(f"a worker cannot use runs that nobody has changed\n{self.errors.read_text()[-3000:]}")
        self.number = number
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()

    def answer(self) -> tuple[str, str, str]:
        """What became of the mutation that was asked for last."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], LIMIT_S)
        line = self.process.stdout.readline() if ready else ""
        if line:
            name, outcome, why = json.loads(line)
            return name, outcome, why
        how = f"no answer in {LIMIT_S} s" if not ready else f"the process ended with {self.process.wait()}"
        chance = random.Random(self.number)
        layout, mutation = chance.choice(list(LAYOUTS)), chance.choice(MUTATIONS)
        return mutation.__name__, "FAILURE", f"{self.number} {mutation.__name__} {layout}: {how}"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def started(pristine: Path, errors: Path) -> Worker:
    folder = Path(tempfile.mkdtemp(prefix="worker-", dir=pristine.parent))
    command = [sys.executable, "-W", "ignore", "-m", "tests.campaigns.hostile", "--work", str(pristine), str(folder)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    with errors.open("a") as stderr:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment, cwd=ROOT
        )
    return Worker(process, folder, errors)


def campaign(numbers: range, workers: int, folder: Path) -> tuple[dict[str, Counter[str]], list[str]]:
    """Make mutations; returns the outcomes by mutation, and the failures."""
    pristine = folder / "pristine"
    build(pristine)
    found: dict[str, Counter[str]] = defaultdict(Counter)
    failures: list[str] = []
    waiting = iter(numbers)
    pool = [started(pristine, folder / "errors") for _ in range(workers)]
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [worker.end() for worker in pool])
        busy: list[Worker] = []
        for worker, number in zip(pool, waiting, strict=False):
            worker.ask(number)
            busy.append(worker)
        while busy:
            worker = busy.pop(0)
            name, outcome, why = worker.answer()
            found[name][outcome] += 1
            if outcome == "FAILURE":
                failures.append(why)
                print(f"FAILURE {why}", flush=True)
            if worker.process.poll() is not None or "no answer" in why:
                worker.end()
                pool.remove(worker)
                worker = started(pristine, folder / "errors")
                pool.append(worker)
            if (number := next(waiting, None)) is not None:
                worker.ask(number)
                busy.append(worker)
                if number % 500 == 0:
                    print(f"{number} asked for, {len(failures)} failures", flush=True)
    return found, failures


def table(found: dict[str, Counter[str]]) -> str:
    lines = [f"| change | {' | '.join(HEADINGS)} |", "|---" * (len(HEADINGS) + 1) + "|"]
    total: Counter[str] = Counter()
    for name in dict.fromkeys(mutation.__name__ for mutation in MUTATIONS):
        total.update(found[name])
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(str(found[name][outcome]) for outcome in OUTCOMES)} |")
    return "\n".join([*lines, f"| all | {' | '.join(str(total[outcome]) for outcome in OUTCOMES)} |"])


def start_jax() -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    torch.set_num_threads(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="the number of the first; a mutation is its number")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="put the table in docs/reliability.md")
    parser.add_argument("--work", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    start_jax()
    if options.work:
        work(*options.work)
        return
    with tempfile.TemporaryDirectory(prefix="torchorbax-hostile-") as folder:
        numbers = range(options.first, options.first + options.mutations)
        found, failures = campaign(numbers, options.workers, Path(folder))
    print(table(found))
    print(f"{sum(sum(of.values()) for of in found.values())} mutations, {len(failures)} failures")
    if options.write:
        pattern = r"(<!-- hostile: [^>]*-->\n).*?(\n<!-- end of hostile -->)"
        page = re.sub(
            pattern, lambda found_at: f"{found_at[1]}{table(found)}{found_at[2]}", PAGE.read_text(), flags=re.S
        )
        PAGE.write_text(page)
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
