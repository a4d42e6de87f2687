"""torch.save, torch's distributed checkpoint, the disk and the memory, in a process of their own.

Importing torchax breaks torch.distributed.checkpoint in the same process. So the benchmark starts this one, tells it
line by line what to do, and gets a line of JSON for each; both take turns on the same machine.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from benchmarks.measure import timed

State = dict[str, torch.Tensor]


class TorchPeers:
    """The other end: `do("torch.save")` gives its measures."""

    def __init__(self, folder: Path, leaves: int, leaf_bytes: int) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.torch_peers", str(folder)]
        self._process = subprocess.Popen(
            [*command, str(leaves), str(leaf_bytes)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def do(self, what: str) -> dict[str, float]:
        """Run one of `PEERS` once."""
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the process has no pipes")
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        found: dict[str, float] = json.loads(self._process.stdout.readline())
        return found

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def torch_save(folder: Path, state: State) -> dict[str, float]:
    """`torch.save`, until it is on the disk as ours is: with fsync."""
    (folder / "state.pt").unlink(missing_ok=True)

    def save() -> None:
        with (folder / "state.pt").open("wb") as out:
            torch.save(state, out)
            out.flush()
            os.fsync(out.fileno())

    return {"commit_s": timed(save)}


def dcp_async_save(folder: Path, state: State) -> dict[str, float]:
    """`torch.distributed.checkpoint.async_save`, which clones the state first."""
    shutil.rmtree(folder / "dcp", ignore_errors=True)
    started = time.perf_counter()
    future: Any = dcp.async_save(state, checkpoint_id=folder / "dcp")
    stall_s = time.perf_counter() - started
    future.result()
    return {"stall_s": stall_s, "commit_s": time.perf_counter() - started}


def disk(folder: Path, state: State) -> dict[str, float]:
    """The least that saving takes here: the bytes into one file, and fsync."""
    (folder / "bytes").unlink(missing_ok=True)

    def write() -> None:
        with (folder / "bytes").open("wb", buffering=0) as out:
            for tensor in state.values():
                out.write(memoryview(tensor.numpy()).cast("B"))
            os.fsync(out.fileno())

    return {"commit_s": timed(write)}


def memory(folder: Path, state: State) -> dict[str, float]:
    """One copy in memory."""
    return {"commit_s": timed(lambda: [tensor.clone() for tensor in state.values()])}


PEERS = {"torch.save": torch_save, "dcp": dcp_async_save, "disk": disk, "memory": memory}


def serve(folder: Path, leaves: int, leaf_bytes: int) -> None:
    """Answer until there is nothing more to do."""
    state = {f"layers.{index}.weight": torch.randn(leaf_bytes // 4) for index in range(leaves)}
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 1), rank=0, world_size=1)
    for line in sys.stdin:
        print(json.dumps(PEERS[line.strip()](folder, state)), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
