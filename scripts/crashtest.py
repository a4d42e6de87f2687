"""Kills a training run again and again, and checks after every restart that nothing was lost and nothing is wrong.

python scripts/crashtest.py --trials 1000

A trial is one life of a run: it starts, which restores, trains on, and is killed with SIGKILL: at a random moment (and
then it saves continuously), or at one of the moments that matter, the n-th time that the process comes by (and then it
saves every step). Every trial checks that
- the newest step that was committed before (asked of the disk and not of torchorbax) is the one resumed,
- all of the restored state, parameters, optimizer, random numbers and data position, is what an uninterrupted run had
  after that step, bit for bit, and so is the loss of every step from there on,
- no committed step is lost, neither to the kill nor to retention, and every step listed passes `torchorbax.verify`,
- what interrupted saves and deletions left behind is gone when the run is through.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import torchorbax
from jax.sharding import Mesh, PartitionSpec

KEEP = 2
LIFE_TIMEOUT_S = 120.0


# ------------------------------------------------------------------------------------------------------- the moments


@dataclass(frozen=True)
class Moment:
    """A place in the code: before or after a call of `owner.name`."""

    owner: str
    name: str
    after: bool = False


_STORAGE = "torchorbax._src.storage.orbax_storage:OrbaxStorage"

_FILES = "torchorbax._src.storage.local_files:LocalFiles"

MOMENTS: dict[str, Moment] = {
    "before the snapshot": Moment("torchorbax._src.save.snapshot", "take"),
    "after the snapshot": Moment("torchorbax._src.save.snapshot", "take", after=True),
    "before the write": Moment(_STORAGE, "write"),
    "before the data": Moment("torchorbax._src.storage.array_writer", "write"),
    "in the data": Moment("torchorbax._src.storage.array_writer:_Batches", "add_small"),
    "after the data": Moment("torchorbax._src.storage.array_writer", "write", after=True),
    "in the metadata": Moment(_FILES, "write"),
    "before its files are summed": Moment(_STORAGE, "_merged"),
    "before the manifest": Moment(_FILES, "create"),
    "after the manifest": Moment(_FILES, "create", after=True),
    "before a rename": Moment("os", "rename"),
    "after a rename": Moment("os", "rename", after=True),
    "before the flush": Moment(_FILES, "flush"),
    "in the flush": Moment("os", "fsync"),
    "when the owner is written down": Moment("torchorbax._src.storage.owner_records:LocalRecord", "swap"),
    "before it is read back": Moment("torchorbax._src.verification.step_check", "check_step"),
    "after the commit": Moment(_STORAGE, "write", after=True),
    "before a deletion": Moment(_STORAGE, "delete"),
    "in a deletion": Moment("os", "unlink"),
    "after a deletion": Moment(_STORAGE, "delete", after=True),
    "before reading": Moment(_STORAGE, "read"),
    "after reading": Moment(_STORAGE, "read", after=True),
    "in the restore": Moment("torchorbax._src.tensors.live", "settle"),
    "while leftovers are removed": Moment(_STORAGE, "remove_leftovers", after=True),
}


def kill_at(moment: Moment, visits: int) -> None:
    """From now on, this process dies when it comes by for the n-th time."""
    module, _, attribute = moment.owner.partition(":")
    owner: Any = __import__(module, fromlist=["_"])
    for name in filter(None, attribute.split(".")):
        owner = getattr(owner, name)
    original = getattr(owner, moment.name)
    left = [visits]

    def visited(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0 and not moment.after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, moment.name, visited)
    for other in list(sys.modules.values()):  # what was imported by name
        if getattr(other, "__name__", "").startswith("torchorbax") and vars(other).get(moment.name) is original:
            setattr(other, moment.name, visited)


# ------------------------------------------------------------------------------------------------------ the training


class Net(torch.nn.Module):
    """Has what can be lost: tied weights, statistics, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(16, 8)
        self.norm = torch.nn.BatchNorm1d(8)
        self.dropout = torch.nn.Dropout(0.3)
        self.head = torch.nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.dropout(self.norm(self.embed(tokens))))
        return logits


def loss_fn(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(batch), batch)


def train(folder: Path, steps: int, devices: int, save: str | int) -> None:
    """One life: resume, train, and write down what the state of each step is before it is saved."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    if any(entry.name.isdigit() for entry in (folder / "run").glob("*")):
        torchorbax.verify(folder / "run")  # all that the last life left behind
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    train_step = torchorbax.train_step(model, optimizer, loss_fn)
    position = {"seen": np.zeros(1, np.int64)}
    mesh = Mesh(np.array(jax.devices()), ("fsdp",))
    with torchorbax.resume(
        model,
        optimizer,
        folder / "run",
        state={"scheduler": scheduler, "position": position},
        save=save,
        keep=KEEP,
        shardings=(mesh, {"embed.weight": PartitionSpec("fsdp")}),
    ) as run:
        note(folder / "starts", {"step": run.step, "digest": digest(model, optimizer, position)})
        for step in run.steps(steps):
            batch = torch.from_numpy(np.random.default_rng(step).integers(0, 16, 16))
            loss = float(train_step(batch))
            scheduler.step()
            position["seen"] += 16
            note(folder / "steps", {"step": step, "loss": loss.hex(), "digest": digest(model, optimizer, position)})


def digest(model: torch.nn.Module, optimizer: torch.optim.Optimizer, position: dict[str, np.ndarray]) -> str:
    """SHA-256 of all state there is, the next random numbers included."""
    found = hashlib.sha256()
    for name, array in torchorbax.to_jax(model).items():
        found.update(name.encode() + np.asarray(array).tobytes())
    for name, param in model.named_parameters():
        for key, value in sorted(optimizer.state[param].items()):
            found.update(f"{name}.{key}".encode() + np.asarray(torchorbax.to_jax(value)).tobytes())
    found.update(repr([group["lr"] for group in optimizer.param_groups]).encode())
    found.update(position["seen"].tobytes() + torch.get_rng_state().numpy().tobytes())
    found.update(repr(np.random.get_state()).encode() + repr(random.getstate()).encode())
    return found.hexdigest()


def note(file: Path, entry: dict[str, Any]) -> None:
    """A line of JSON that a kill cannot take back."""
    with file.open("a") as lines:
        lines.write(json.dumps(entry) + "\n")


def noted(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    *lines, _ = file.read_text().split("\n")  # what follows the last line break is not a whole line
    return [json.loads(line) for line in lines]


# -------------------------------------------------------------------------------------------------------- the trials


class Failure(Exception):
    """Something was lost or wrong; the message says what."""


@dataclass
class Campaign:
    """Trials on one run, and what is known about it."""

    folder: Path
    steps: int
    devices: int
    seed: int
    reference: list[dict[str, Any]] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    life_s: float = 0.0  # how long the uninterrupted run has taken

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)
        whole = self.folder / "reference"
        whole.mkdir(parents=True)
        started_s = time.monotonic()
        status = self.life(whole)
        self.life_s = time.monotonic() - started_s
        if status != 0:
            raise Failure(f"the uninterrupted run ended with {status}")
        self.reference = noted(whole / "steps")

    @property
    def run(self) -> Path:
        return self.folder / "trial"

    def life(self, folder: Path, moment: str | None = None, visits: int = 1, kill_after_s: float | None = None) -> int:
        """One process that trains in `folder`; returns its exit status, negative for the signal that ended it."""
        sys.stdout.flush()
        pid = os.fork()  # with everything imported, and JAX not started yet: a second instead of five
        if pid == 0:
            with (folder / "output").open("a") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                status = 1
                try:
                    if moment is not None:
                        kill_at(MOMENTS[moment], visits)
                    train(folder, self.steps, self.devices, "continuous" if moment is None else 1)
                    status = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(status)
        deadline_s = time.monotonic() + (kill_after_s if kill_after_s is not None else LIFE_TIMEOUT_S)
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            if time.monotonic() > deadline_s:
                os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
                if kill_after_s is None:
                    raise Failure(f"a life did not end within {LIFE_TIMEOUT_S} s, killed at {moment}")
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)

    def listed(self) -> list[int]:
        """The committed steps, by the names on disk."""
        folder = self.run / "run"
        return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit()) if folder.exists() else []

    def trial(self, number: int) -> str:
        """One life that is killed, and what it shows; returns how it was killed."""
        self.run.mkdir(exist_ok=True)
        before, starts = self.listed(), len(noted(self.run / "starts"))
        targeted = number % 2 == 0
        if targeted:
            moment = list(MOMENTS)[number // 2 % len(MOMENTS)]
            once_a_life = moment in ("before reading", "after reading", "while leftovers are removed")
            status = self.life(self.run, moment, visits=1 if once_a_life else self.chance.choice([1, 1, 2, 3, 5]))
            how = moment
        else:
            delay_s = self.chance.uniform(0.0, self.life_s)
            status = self.life(self.run, kill_after_s=delay_s)
            how = "at random"
        if status not in (0, -signal.SIGKILL):
            raise Failure(f"the life ended with {status}\n{(self.run / 'output').read_text()[-3000:]}")
        self.check_start(before, starts)
        self.check_losses()
        after = self.listed()
        if before and not after:
            raise Failure(f"steps {before} were there, and none is now")
        if before and after[-1] < before[-1]:
            raise Failure(f"the newest step was {before[-1]} and is {after[-1]}")
        if status == 0:
            self.check_end()
            shutil.rmtree(self.run)
            how += " (came to the end first)" if targeted else " (too late)"
        return how

    def check_start(self, before: list[int], starts: int) -> None:
        """The newest committed step was resumed, and every bit of it is right."""
        found = noted(self.run / "starts")[starts:]
        if not found:
            return  # killed before it had started
        expected = before[-1] if before else None
        if found[0]["step"] != expected:
            raise Failure(f"resumed from {found[0]['step']}, but the newest committed step was {expected}")
        if expected is not None and found[0]["digest"] != self.reference[expected]["digest"]:
            raise Failure(f"what was restored of step {expected} is not what was saved")

    def check_losses(self) -> None:
        """The loss curve is that of the uninterrupted run, and so is all of the state after every step."""
        for entry in noted(self.run / "steps"):
            if entry != self.reference[entry["step"]]:
                raise Failure(f"step {entry['step']} gave {entry}, uninterrupted {self.reference[entry['step']]}")

    def check_end(self) -> None:
        """The last life saved the last step, let older ones go, and left nothing else."""
        if self.listed()[-1] != self.steps - 1:
            raise Failure(f"the run is through, with steps {self.listed()}")
        if noted(self.run / "starts")[-1]["step"] == self.steps - 1:
            return  # killed after the last commit, so that nothing was left to be saved, and to clean up after
        own = {".torchorbax-lock", ".torchorbax-owner", ".torchorbax-run"}
        left = sorted({entry.name for entry in (self.run / "run").iterdir()} - own)
        if left != sorted(map(str, self.listed())):
            raise Failure(f"left behind: {left}")
        if len(left) > KEEP:
            raise Failure(f"{KEEP} steps were to be kept, there are {left}")


@contextlib.contextmanager
def scratch(path: Path | None) -> Iterator[Path]:
    if path is not None:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="torchorbax-crashtest-") as folder:
        yield Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=16, help="of the run that is killed; it starts anew at its end")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="kept for a look afterwards; a temporary one if not given")
    options = parser.parse_args()
    started_s = time.monotonic()
    with scratch(options.folder) as folder:
        campaign = Campaign(folder, options.steps, options.devices, options.seed)
        for number in range(options.trials):
            try:
                campaign.outcomes[campaign.trial(number)] += 1
            except (Failure, torchorbax.TorchorbaxError) as failure:
                sys.exit(f"trial {number} (seed {options.seed}): {failure}")
            if sys.stdout.isatty() or number % 100 == 99:
                print(f"{number + 1} trials, 0 failures, {time.monotonic() - started_s:.0f} s", flush=True)
    for how, count in sorted(campaign.outcomes.items()):
        print(f"{count:5}  {how}")
    print(f"{options.trials} trials, 0 failures")


if __name__ == "__main__":
    main()
