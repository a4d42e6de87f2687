"""A run to be damaged, and damage for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torchorbax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from torch import nn
from torchorbax import Checkpointer

from tests.helpers.models import seeded
from tests.helpers.tensors import DTYPES, bits, tensor_of_bits


def state_of_every_dtype() -> dict[str, Any]:
    return {
        "tensors": {
            str(dtype).removeprefix("torch."): tensor_of_bits(dtype, (3, 5), bytes(range(1, 100))) for dtype in DTYPES
        },
        "arrays": {"scalar": jnp.float32(2.5), "empty": jnp.zeros((0, 3)), "half": jnp.ones((8, 4), jnp.bfloat16)},
        "weights": {"sharded": random_array(0, (16, 1024)), "host": np.asarray(random_array(1, (64, 64)))},
        "plain": {"epoch": 3, "name": "run", "rate": 0.1},
    }


def random_array(seed: int, shape: tuple[int, ...]) -> jax.Array:
    """Large enough to be in a file of its own: smaller ones are within OCDBT's nodes, which have a checksum."""
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return jax.device_put(values, NamedSharding(Mesh(np.array(jax.devices()), ("fsdp",)), P("fsdp")))


def resumed(path: Path, **options: Any) -> tuple[nn.Module, Checkpointer]:
    model = seeded()
    optimizer = torch.optim.AdamW(model.parameters())
    return model, torchorbax.resume(model, optimizer, str(path), state=state_of_every_dtype(), save=None, **options)


def data_of(step: Path, name: str) -> tuple[Path, int]:
    """The file that has the first values of a large array of the item `weights`, and where in it."""
    values = bits(torchorbax.load(str(step.parent), int(step.name), item="weights", verify=False)[name])[:1024]
    for file in (step / "weights").rglob("*"):
        if file.is_file() and (position := file.read_bytes().find(values)) >= 0:
            return file, position
    raise AssertionError(f"the values of {name} are in no file")


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def flip_in(step: Path, name: str) -> None:
    file, position = data_of(step, name)
    flip(file, 8 * position + 77)
