"""A small vision transformer learns scikit-learn's digits on simulated chips, and may be killed at any moment.

python examples/train_digits.py --devices 8
python examples/train_digits.py --devices 16    # goes on where the other one was killed
python examples/train_digits.py --processes 2 --devices 4 --path gs://bucket/digits    # as on two hosts of a pod
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import signal
import socket
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch.nn.functional as F
import torchorbax  # before torchax, which it makes importable
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torchax.interop import jax_jit, torch_view

SIDE, PATCH, CLASSES = 8, 2, 10
PATCHES_PER_SIDE = SIDE // PATCH
PEAK_LEARNING_RATE = 4e-3


# ------------------------------------------------------------------------------------------------------------ training


def train(options: Options) -> Summary:
    simulate_chips(options.devices)
    if options.coordinator is not None:
        jax.distributed.initialize(options.coordinator, options.processes, options.process)
    torch.manual_seed(options.seed)
    train_set, test_set = train_and_test_digits(options.seed)

    model = VisionTransformer()
    optimizer, schedulers = optimizer_of(options.optimizer, model, options.steps)
    train_step = torchorbax.train_step(model, optimizer, cross_entropy, batch_sharding=PartitionSpec("chips"))

    with torchorbax.resume(
        model,
        optimizer,
        options.path,
        state=schedulers,
        save=options.save,
        keep=options.keep,
        shardings=(Mesh(np.array(jax.devices()), ("chips",)), split_evenly),
    ) as run:
        loss = None
        for step in run.steps(options.steps):
            loss = train_step(train_set.batch(options.batch_size, options.seed, step))
            for scheduler in schedulers.values():
                scheduler.step()
            run.log(loss=loss)
            append_loss(options.log_losses, step, loss)

    if run.preempted:
        sys.exit(f"stopped by SIGTERM; step {run.next_step - 1} is saved, start again to go on")
    return summary_of(run, loss, model, test_set)


def cross_entropy(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


def split_evenly(name: str, shape: tuple[int, ...]) -> PartitionSpec:
    """As FSDP does: each chip holds its part of the first dimension that all chips can share; else all of the array."""
    chips = jax.device_count()
    before = next((dimension for dimension, size in enumerate(shape) if size % chips == 0), None)
    return PartitionSpec() if before is None else PartitionSpec(*[None] * before, "chips")


def optimizer_of(
    kind: str, model: nn.Module, steps: int
) -> tuple[torch.optim.Optimizer | torchorbax.OptaxOptimizer, dict[str, LambdaLR]]:
    """AdamW with a cosine decay, by torch or by optax (which has the schedule inside)."""
    if kind == "optax":
        schedule = optax.cosine_decay_schedule(PEAK_LEARNING_RATE, steps)
        return torchorbax.OptaxOptimizer(model, optax.adamw(schedule, weight_decay=0.01)), {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=0.01)
    cosine = LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(step / steps, 1))))
    return optimizer, {"scheduler": cosine}


def simulate_chips(count: int) -> None:
    """Make the CPU look like `count` chips; works only as long as nothing has asked jax for its devices."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # between processes


# ----------------------------------------------------------------------------------------------------------- processes


def start_processes(count: int) -> int:
    """Run this program in `count` processes that form one job, as the launcher of a cluster would; the exit code."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    processes = [
        subprocess.Popen([sys.executable, *sys.argv, "--process", str(index), "--coordinator", coordinator])
        for index in range(count)
    ]
    signal.signal(signal.SIGTERM, lambda *_: [process.terminate() for process in processes])
    return max((process.wait() for process in processes), key=abs)


# --------------------------------------------------------------------------------------------------------------- model


class VisionTransformer(nn.Module):
    """Classifies images by their patches of 2x2 pixels: `[batch, 8, 8]` to `[batch, 10]`."""

    def __init__(self, width: int = 64, depth: int = 2, heads: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH, width)
        self.position = nn.Parameter(0.5 * torch.randn(PATCHES_PER_SIDE**2, width))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(Block(width, heads, dropout) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.dropout(self.embed(patches_of(images)) + self.position)
        logits: torch.Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits


class Block(nn.Module):
    """Self-attention and an MLP; the input of each is normalised, the output added to what came in."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.mix_heads = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens + self.dropout(self.attend(self.attention_norm(tokens)))
        tokens = tokens + self.dropout(self.mlp(self.mlp_norm(tokens)))
        return tokens

    def attend(self, tokens: torch.Tensor) -> torch.Tensor:
        batch, length, width = tokens.shape
        by_head = self.qkv(tokens).reshape(batch, length, 3, self.heads, width // self.heads)
        query, key, value = by_head.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        mixed: torch.Tensor = self.mix_heads(attended.permute(0, 2, 1, 3).reshape(batch, length, width))
        return mixed


def patches_of(images: torch.Tensor) -> torch.Tensor:
    """`[batch, 8, 8]` to `[batch, 16, 4]`."""
    grid = images.reshape(-1, PATCHES_PER_SIDE, PATCH, PATCHES_PER_SIDE, PATCH).permute(0, 1, 3, 2, 4)
    return grid.reshape(-1, PATCHES_PER_SIDE**2, PATCH * PATCH)


# ---------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Digits:
    """Images, with pixels of mean 0 and variance 1, and the digits that they show."""

    images: np.ndarray
    labels: np.ndarray

    def batch(self, size: int, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        # Of seed and step alone, so that a resumed run sees what it would have seen without the interruption.
        chosen = np.random.default_rng((seed, step)).choice(len(self.labels), size)
        return self.images[chosen], self.labels[chosen]


def train_and_test_digits(seed: int) -> tuple[Digits, Digits]:
    images, labels = load_digits(return_X_y=True)
    images = ((images - images.mean()) / images.std()).reshape(-1, SIDE, SIDE).astype(np.float32)
    labels = labels.astype(np.int32)
    train, test = np.split(np.random.default_rng(seed).permutation(len(labels)), [len(labels) * 4 // 5])
    return Digits(images[train], labels[train]), Digits(images[test], labels[test])


# -------------------------------------------------------------------------------------------------------------- report


@dataclass(frozen=True)
class Summary:
    """How a run went.

    Attributes:
        digest: SHA-256 of the model's parameters; equal only if every bit is.
    """

    devices: int
    resumed_from: int | None
    final_loss: float | None
    accuracy: float
    saves: int
    stalls_ms: list[float]
    steps_on_disk: list[int]
    digest: str

    def __str__(self) -> str:
        start = "started fresh" if self.resumed_from is None else f"resumed from step {self.resumed_from}"
        loss = "nothing left to train" if self.final_loss is None else f"final loss {self.final_loss:.4f}"
        stall = f", median stall {statistics.median(self.stalls_ms):.1f} ms" if self.stalls_ms else ""
        return (
            f"{self.devices} devices, {start}\n"
            f"{loss}, test accuracy {self.accuracy:.1%}\n"
            f"{self.saves} saves{stall}; on disk: steps {', '.join(map(str, self.steps_on_disk))}"
        )


def summary_of(run: torchorbax.Checkpointer, loss: torch.Tensor | None, model: nn.Module, test_set: Digits) -> Summary:
    committed = [save for save in run.history if save.commit_s is not None]
    weights = whole_weights(model)
    return Summary(
        devices=jax.device_count(),
        resumed_from=run.step,
        final_loss=None if loss is None else float(loss),
        accuracy=accuracy(model, weights, test_set),
        saves=len(committed),
        stalls_ms=[1e3 * save.stall_s for save in committed],
        steps_on_disk=run.all_steps(),
        digest=digest_of(weights),
    )


def whole_weights(model: nn.Module) -> dict[str, np.ndarray]:
    """All of the weights, in every process."""
    arrays = torchorbax.to_jax(model)
    everywhere = NamedSharding(next(iter(arrays.values())).sharding.mesh, PartitionSpec())
    gathered = jax.jit(lambda weights: weights, out_shardings=everywhere)(arrays)
    return {name: np.asarray(array) for name, array in gathered.items()}


def accuracy(model: nn.Module, weights: dict[str, np.ndarray], digits: Digits) -> float:
    model.eval()
    predict = jax_jit(lambda weights, images: torch.func.functional_call(model, weights, (images,)).argmax(-1))
    on_one_chip = {name: torch_view(jnp.asarray(array)) for name, array in weights.items()}
    predicted = predict(on_one_chip, torch_view(jnp.asarray(digits.images)))
    return float(np.mean(np.asarray(torchorbax.to_jax(predicted)) == digits.labels))


def digest_of(weights: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, array in weights.items():
        digest.update(name.encode() + array.tobytes())
    return digest.hexdigest()


def append_loss(file: Path | None, step: int, loss: torch.Tensor) -> None:
    """Add a line of JSON; closing the file at once hands it to the system, where it survives a kill of this process."""
    if file is not None and jax.process_index() == 0:
        with file.open("a") as lines:
            lines.write(json.dumps({"step": step, "loss": float(loss)}) + "\n")


# ------------------------------------------------------------------------------------------------------------- options


@dataclass(frozen=True)
class Options:
    path: str
    processes: int
    devices: int
    optimizer: str
    steps: int
    batch_size: int
    save: str | int
    keep: int
    seed: int
    log_losses: Path | None
    summary: Path | None
    process: int
    coordinator: str | None


def parse_options() -> Options:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default="runs/digits", help="the run's folder, or gs://bucket/folder")
    parser.add_argument("--processes", type=positive, default=1, help="that train together, each with its own chips")
    parser.add_argument("--devices", type=positive, default=8, help="simulated chips of each process")
    parser.add_argument("--optimizer", choices=["adamw", "optax"], default="adamw")
    parser.add_argument("--steps", type=positive, default=200, help="of the whole run")
    parser.add_argument("--batch-size", type=positive, default=128)
    parser.add_argument("--save", type=continuous_or_steps, default="continuous", help="'continuous' or every N steps")
    parser.add_argument("--keep", type=positive, default=3, help="how many of the newest steps stay")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-losses", type=Path, metavar="FILE", help="append the loss of each step, as JSON lines")
    parser.add_argument("--summary", type=Path, metavar="FILE", help="write what is printed at the end as JSON as well")
    parser.add_argument("--process", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--coordinator", help=argparse.SUPPRESS)
    options = Options(**vars(parser.parse_args()))
    if options.batch_size % (options.processes * options.devices):
        chips = options.processes * options.devices
        parser.error(f"a batch of {options.batch_size} cannot be split evenly over {chips} devices")
    return options


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def continuous_or_steps(text: str) -> str | int:
    return text if text == "continuous" else positive(text)


def main() -> None:
    options = parse_options()
    if options.processes > 1 and options.coordinator is None:
        sys.exit(start_processes(options.processes))
    summary = train(options)
    if options.process > 0:
        return
    print(summary)
    if options.summary is not None:
        options.summary.write_text(json.dumps(asdict(summary)))


if __name__ == "__main__":
    main()
