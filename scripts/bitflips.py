"""One flipped bit in the array data of a checkpoint: who notices?

python scripts/bitflips.py

The same arrays are saved by torchorbax, plain Orbax, `torch.save` and torch's distributed checkpoint. Then, again and
again, one bit of their data is flipped on disk and everything is loaded: by a load that raises the flip was noticed, by
one that gives other values it was not. Each has a process of its own: torchax breaks torch's distributed checkpoint.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

Arrays = dict[str, np.ndarray]


def arrays() -> Arrays:
    return {f"w{index}": np.random.default_rng(index).standard_normal((256, 256), np.float32) for index in range(4)}


class Torchorbax:
    name = "torchorbax"

    def save(self, folder: Path, saved: Arrays) -> None:
        import torchorbax

        with torchorbax.Checkpointer(folder / "run", {"model": saved}, rng=False) as run:
            run.save(0, force=True)

    def load(self, folder: Path) -> Arrays:
        import torchorbax

        return {name: np.asarray(array) for name, array in torchorbax.load(folder / "run").items()}


class Orbax:
    name = "Orbax (StandardCheckpointer)"

    def save(self, folder: Path, saved: Arrays) -> None:
        import orbax.checkpoint as ocp

        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / "orbax", saved)

    def load(self, folder: Path) -> Arrays:
        import orbax.checkpoint as ocp

        with ocp.StandardCheckpointer() as checkpointer:
            loaded: Arrays = checkpointer.restore(folder / "orbax")
            return loaded


class TorchSave:
    name = "torch.save / torch.load"

    def save(self, folder: Path, saved: Arrays) -> None:
        import torch

        torch.save({name: torch.from_numpy(array) for name, array in saved.items()}, folder / "model.pt")

    def load(self, folder: Path) -> Arrays:
        import torch

        loaded = torch.load(folder / "model.pt", weights_only=True)
        return {name: tensor.numpy() for name, tensor in loaded.items()}


class Distributed:
    name = "torch.distributed.checkpoint"

    def save(self, folder: Path, saved: Arrays) -> None:
        import torch
        import torch.distributed.checkpoint as dcp

        state = {name: torch.from_numpy(array.copy()) for name, array in saved.items()}
        dcp.save(state, checkpoint_id=folder / "dcp", no_dist=True)

    def load(self, folder: Path) -> Arrays:
        import torch
        import torch.distributed.checkpoint as dcp

        state = {name: torch.zeros(256, 256) for name in arrays()}
        dcp.load(state, checkpoint_id=folder / "dcp", no_dist=True)
        return {name: tensor.numpy() for name, tensor in state.items()}


def places_of_data(folder: Path, saved: Arrays) -> list[tuple[Path, int]]:
    """The files, and where in them the arrays' own bytes begin; compressed ones are wherever the large files are."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.stat().st_size > 100_000]
    found = [
        (file, place)
        for file in files
        for array in saved.values()
        if (place := file.read_bytes().find(array.tobytes()[:1024])) >= 0
    ]
    return found or [(file, 1000) for file in files]


SYSTEMS = {system.name: system for system in (Torchorbax(), Orbax(), TorchSave(), Distributed())}


def count(system: Torchorbax | Orbax | TorchSave | Distributed, flips: int, seed: int) -> tuple[int, int]:
    """How many flips were noticed, and how many gave other values without a word."""
    chance, saved = random.Random(seed), arrays()
    noticed = silent = 0
    with tempfile.TemporaryDirectory(prefix="torchorbax-bitflips-") as name:
        folder = Path(name)
        system.save(folder, saved)
        places = places_of_data(folder, saved)
        for _ in range(flips):
            file, start = chance.choice(places)
            data = file.read_bytes()
            bit = 8 * start + chance.randrange(8 * 50_000)
            file.write_bytes(data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :])
            noticed_now, equal = outcome(lambda: system.load(folder), saved)
            noticed += noticed_now
            silent += not noticed_now and not equal
            file.write_bytes(data)
    return noticed, silent


def outcome(load: Callable[[], Arrays], saved: Arrays) -> tuple[bool, bool]:
    try:
        loaded = load()
    except Exception:  # whatever a system raises, it has noticed
        return True, False
    return False, all(loaded[name].tobytes() == array.tobytes() for name, array in saved.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(SYSTEMS), help="in this process")
    options = parser.parse_args()
    if options.only is not None:
        os.environ["JAX_PLATFORMS"] = "cpu"
        warnings.simplefilter("ignore")
        noticed, silent = count(SYSTEMS[options.only], options.flips, options.seed)
        print(f"{options.only:36}{options.flips:>8}{noticed:>10}{silent:>9}")
        return
    print(f"{'':36}{'flips':>8}{'noticed':>10}{'silent':>9}", flush=True)
    for name in SYSTEMS:
        command = [sys.executable, __file__, "--flips", str(options.flips), "--seed", str(options.seed), "--only", name]
        subprocess.run(command, stderr=subprocess.DEVNULL, check=True)


if __name__ == "__main__":
    main()
