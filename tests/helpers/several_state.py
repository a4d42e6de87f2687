"""What programs of several processes have in common: arrays over all their devices, and ways to compare them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import torchorbax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from torchorbax._src.tensors import torchax_tensors as _torchax

from tests.helpers.models import WIDTH


def all_devices(*names: str, first: int = 1) -> Mesh:
    """All devices of all processes; with two names, `first` times the rest."""
    devices = np.array(jax.devices())
    return Mesh(devices if len(names) == 1 else devices.reshape(first, -1), names)


def spread(array: Any, spec: P | None = None, mesh: Mesh | None = None) -> jax.Array:
    """An array over all devices, of which every process makes its part; by rows if nothing else is said."""
    sharding = NamedSharding(mesh or all_devices("fsdp"), P("fsdp") if spec is None else spec)
    values = np.asarray(array)
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def whole(arrays: Mapping[str, jax.Array]) -> dict[str, str]:
    """Digests of whole arrays, the same on any devices. A device collective: every process calls it."""

    def digest(array: jax.Array) -> str:
        if not array.is_fully_addressable:
            array = jax.jit(lambda x: x, out_shardings=NamedSharding(array.sharding.mesh, P()))(array)
        return sha256(np.asarray(array).tobytes()).hexdigest()

    return {name: digest(array) for name, array in arrays.items()}


def parts(arrays: Mapping[str, jax.Array]) -> dict[str, list[str]]:
    """Digests of what is on this process's devices, one by one."""
    return {
        name: [sha256(np.asarray(shard.data).tobytes()).hexdigest() for shard in array.addressable_shards]
        for name, array in arrays.items()
    }


def generators() -> dict[str, str]:
    """Digests of the random number generators of this process."""
    key = _torchax.rng_key()
    key = key if key.is_fully_addressable else key.addressable_data(0)
    if jax.numpy.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    found = {
        "torchax": np.asarray(key).tobytes(),
        "torch": torch.get_rng_state().numpy().tobytes(),
        "numpy": repr(np.random.get_state()).encode(),
        "python": repr(random.getstate()).encode(),
    }
    return {name: sha256(state).hexdigest() for name, state in found.items()}


def seed(number: int) -> None:
    """Seed the generators on the host, not torchax's, which are the same in every process."""
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


class Loader:
    """A data loader that is somewhere else in every process."""

    def __init__(self, position: int) -> None:
        self.position = position
        self.order = np.random.default_rng(position).permutation(7)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "order": self.order}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.position, self.order = state["position"], state["order"]

    def told(self) -> list[int]:
        return [self.position, *map(int, self.order)]


def moments(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, jax.Array]:
    """The state of an optimizer, by parameter."""
    found: dict[str, jax.Array] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            found[f"{name}.{key}"] = value.jax() if hasattr(value, "jax") else np.asarray(value)
    return found


def outcome(action: Callable[[], Any]) -> list[Any]:
    """The name of the error that an action raises, what it says, and who is named in it or its cause."""
    try:
        action()
    except Exception as error:
        cause = error if isinstance(error, torchorbax.ProcessError) else error.__cause__
        who = list(cause.processes) if isinstance(cause, torchorbax.ProcessError) else None
        return [type(error).__name__, str(error), who]
    return ["none", "", None]


def array_bytes(item: Path) -> dict[str, int]:
    """How many bytes of array data each process has written of an item."""
    return {
        folder.name.rpartition("_")[2]: sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        for folder in item.glob("ocdbt.process_*")
    }


def bytes_read() -> int:
    """By this process so far, by all system calls."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


VALUES = np.random.default_rng(0).standard_normal((48, WIDTH)).astype(np.float32)
"""Something to save."""
