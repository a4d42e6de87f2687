"""Damages the files of a checkpoint in every way, and restores it: the right bytes or a clear error, and nothing else.

python scripts/fuzz.py --mutations 10000

Each mutation changes one file of a step: a bit, a byte, a block, its length, its name, its place. Then the step is
restored into live objects that hold other values. Allowed are a `CorruptCheckpointError` with the live objects as they
were, or the saved values in all of them, bit for bit (some bytes of a checkpoint mean nothing). Anything else is a
failure: another exception, a wrong value, a half-restored state, a crash of the interpreter, a hang, a file that the
restore has written.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torchorbax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

BATCH = 250
BATCH_TIMEOUT_S = 300

Mutation = Callable[[Path, random.Random, list[Path]], None]


# ---------------------------------------------------------------------------------------------------------- mutations


def flip_a_bit(file: Path, chance: random.Random, others: list[Path]) -> None:
    data = bytearray(file.read_bytes())
    if data:
        bit = chance.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def change_bytes(file: Path, chance: random.Random, others: list[Path]) -> None:
    data = bytearray(file.read_bytes())
    for _ in range(chance.choice([1, 2, 8])):
        if data:
            data[chance.randrange(len(data))] = chance.randrange(256)
    file.write_bytes(data)


def change_a_digit(file: Path, chance: random.Random, others: list[Path]) -> None:
    """What metadata is made of: sizes, offsets, shapes, versions."""
    data = bytearray(file.read_bytes())
    digits = [place for place, byte in enumerate(data) if chr(byte).isdigit()]
    if digits:
        data[chance.choice(digits)] = ord(chance.choice("0123456789-e."))
    file.write_bytes(data)


def zero_a_block(file: Path, chance: random.Random, others: list[Path]) -> None:
    data = bytearray(file.read_bytes())
    start = chance.randrange(len(data) + 1)
    size = min(chance.choice([4, 64, 512, 4096]), len(data) - start)
    data[start : start + size] = bytes(size)
    file.write_bytes(data)


def truncate(file: Path, chance: random.Random, others: list[Path]) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: chance.randrange(len(data) + 1)])


def extend(file: Path, chance: random.Random, others: list[Path]) -> None:
    with file.open("ab") as end:
        end.write(chance.randbytes(chance.choice([1, 16, 4096])))


def insert(file: Path, chance: random.Random, others: list[Path]) -> None:
    data = file.read_bytes()
    place = chance.randrange(len(data) + 1)
    file.write_bytes(data[:place] + chance.randbytes(chance.choice([1, 4, 64])) + data[place:])


def nest_deeply(file: Path, chance: random.Random, others: list[Path]) -> None:
    file.write_text("[" * chance.choice([100, 5_000, 200_000]))


def delete(file: Path, chance: random.Random, others: list[Path]) -> None:
    file.unlink()


def replace_by_another(file: Path, chance: random.Random, others: list[Path]) -> None:
    shutil.copyfile(chance.choice(others), file.with_name("swapped"))
    file.with_name("swapped").rename(file)


def make_a_folder_of_it(file: Path, chance: random.Random, others: list[Path]) -> None:
    file.unlink()
    file.mkdir()


MUTATIONS: list[Mutation] = [
    *[flip_a_bit] * 6,
    *[change_bytes] * 3,
    *[change_a_digit] * 3,
    *[zero_a_block] * 2,
    *[truncate] * 2,
    extend,
    insert,
    nest_deeply,
    delete,
    replace_by_another,
    make_a_folder_of_it,
]


# ------------------------------------------------------------------------------------------------------------ a batch


def state(value: float) -> dict[str, Any]:
    """A bit of everything, all of it different from what another `value` gives."""
    mesh = Mesh(np.array(jax.devices()), ("x",))
    torch.manual_seed(int(value))
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.BatchNorm1d(8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=value)
    model(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    numbers = np.random.default_rng(int(value))
    return {
        "model": model,
        "optimizer": optimizer,
        "arrays": {
            "sharded": jax.device_put(numbers.random((64, 64), np.float32), NamedSharding(mesh, PartitionSpec("x"))),
            "half": jnp.asarray(numbers.random((16, 16)), jnp.bfloat16),
            "host": numbers.random(300),
            "scalar": jnp.float32(value),
        },
        "plain": {"epoch": int(value), "name": f"run {value}"},
    }


def digest(live: dict[str, Any]) -> str:
    found = [np.asarray(value).tobytes().hex() for value in torchorbax.to_jax(live["model"]).values()]
    for one in live["optimizer"].state.values():
        found += [np.asarray(value).tobytes().hex() for value in one.values()]
    found += [str(group["lr"]) for group in live["optimizer"].param_groups]
    found += [f"{name} {np.asarray(value).tobytes().hex()}" for name, value in live["arrays"].items()]
    return "\n".join([*found, repr(live["plain"])])


def build(run: Path) -> None:
    with torchorbax.Checkpointer(run, state(1), rng=False) as checkpointer:
        checkpointer.save(0, force=True)


def batch(folder: Path, first: int, count: int) -> None:
    """Mutations by number, in this process; prints how each went."""
    saved, other = digest(state(1)), digest(state(2))
    step = folder / "run" / "0"
    pristine = {file.relative_to(step): file.read_bytes() for file in sorted(step.rglob("*")) if file.is_file()}
    for number in range(first, first + count):
        chance = random.Random(number)
        name, mutate = chance.choice(sorted(pristine)), chance.choice(MUTATIONS)
        print(f"{number} {mutate.__name__} {name}", flush=True)
        mutate(step / name, chance, [step / other for other in pristine])
        damaged = snapshot_of(step)
        live = state(2)
        checkpointer = torchorbax.Checkpointer(folder / "run", live, rng=False)
        live = {**live, **checkpointer.state}
        try:
            checkpointer.restore(0)
        except torchorbax.CorruptCheckpointError:
            outcome, expected = "found", other
        else:
            outcome, expected = "harmless", saved
        live = {**live, **checkpointer.state}
        if digest(live) != expected:
            sys.exit(
                f"{number}: {mutate.__name__} of {name}: {outcome}, but the live objects are not as they should be"
            )
        if snapshot_of(step) != damaged:
            sys.exit(f"{number}: {mutate.__name__} of {name}: the restore has changed the files")
        checkpointer.close()
        print(f"= {outcome} {mutate.__name__}", flush=True)
        put_back(step, pristine)


def snapshot_of(step: Path) -> dict[Path, bytes | None]:
    return {file: file.read_bytes() if file.is_file() else None for file in step.rglob("*")}


def put_back(step: Path, pristine: dict[Path, bytes]) -> None:
    for name, data in pristine.items():
        file = step / name
        if file.is_dir():
            file.rmdir()
        if not file.exists() or file.read_bytes() != data:
            file.write_bytes(data)


# --------------------------------------------------------------------------------------------------------------- main


def start_jax() -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)


def run_batch(folder: Path, first: int, count: int, outcomes: Counter[str]) -> None:
    command = [sys.executable, "-W", "ignore", __file__, "--batch", str(folder), str(first), str(count)]
    with (folder / "output").open("w+") as output, (folder / "errors").open("w+") as errors:
        status: int | str
        try:
            status = subprocess.run(
                command, stdout=output, stderr=errors, timeout=BATCH_TIMEOUT_S, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            status = "a hang"
    lines = (folder / "output").read_text().splitlines()
    outcomes.update(line.removeprefix("= ") for line in lines if line.startswith("= "))
    if status != 0:
        last = next((line for line in reversed(lines) if not line.startswith("= ")), "the start")
        tail = (folder / "errors").read_text()[-2000:]
        raise SystemExit(f"ended with {status} at mutation {last}\n{tail}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutations", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="the number of the first; a mutation is its number")
    parser.add_argument("--batch", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    start_jax()
    if options.batch:
        folder, first, count = options.batch
        batch(Path(folder), int(first), int(count))
        return
    outcomes: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="torchorbax-fuzz-")))
        build(folder / "run")
        for first in range(options.first, options.first + options.mutations, BATCH):
            shutil.rmtree(folder / "run")
            build(folder / "run")
            run_batch(folder, first, min(BATCH, options.first + options.mutations - first), outcomes)
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:6}  {outcome}")
    print(f"{sum(outcomes.values())} mutations, 0 failures")


if __name__ == "__main__":
    main()
