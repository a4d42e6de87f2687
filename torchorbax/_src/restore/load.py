"""`load`: reads an item of a step as a tree of arrays, without live objects."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Sharding

from torchorbax._src.arrays.dtypes import BY_NAME, fits_on_device
from torchorbax._src.arrays.jax_context import transfers_allowed
from torchorbax._src.arrays.leaves import Array
from torchorbax._src.arrays.sharding_rules import ShardingRules, Shardings
from torchorbax._src.distributed.channel import Channel
from torchorbax._src.distributed.processes import Processes
from torchorbax._src.format.manifest import Key
from torchorbax._src.state.live_leaves import default_device
from torchorbax._src.storage.opening import open_storage
from torchorbax._src.verification.checked_read import CheckedReader
from torchorbax._src.verification.step_check import twice
from torchorbax.errors import ConfigError

_TIMEOUT_S = 600.0
"""How long `load` waits for other processes."""


def load(
    path: str | os.PathLike[str],
    step: int | None = None,
    item: str = "model",
    shardings: Shardings | None = None,
    *,
    verify: bool = True,
) -> dict[str, Array]:
    """The arrays of one item of a step, by name.

    Args:
        path: the run's folder or `gs://` URI.
        step: the step; None for the newest.
        item: the name of the item.
        shardings: `(mesh, rules by name)`; None loads onto the default device. If the mesh has devices of several
            processes, all of them call `load`.
        verify: compare what was read with the fingerprints made when it was saved.

    Returns:
        `jax.Array`s with the shapes and dtypes that were saved. A tied weight is there under each of its names, as the
        same array. An array whose dtype JAX would narrow (64 bits while `jax_enable_x64` is off) is a numpy array.

    Raises:
        CheckpointNotFoundError: no such path or step.
        ConfigError: the step has no such item, or the rules do not fit.
        CorruptCheckpointError: the step is damaged.
        ProcessError: another process did not call `load` in time, or failed.
    """
    # Which step.
    storage = open_storage(path)
    channel = Channel(Processes(_TIMEOUT_S), "load") if _spans_processes(shardings) else None
    if step is None:
        step = storage.existing_steps()[-1]
    manifest = storage.manifest(step)
    if item not in manifest.items:
        raise ConfigError(f"{storage.path}: step {step} has no item {item!r}; it has {', '.join(manifest.items)}")
    if item in manifest.parts:
        raise ConfigError(
            f"{storage.path} has what one of several processes holds of {item!r}, not all of it; load the run's path"
        )
    # Where each leaf goes.
    meta = manifest.items[item]
    on_device = {name: leaf.shape for name, leaf in meta.leaves.items() if fits_on_device(BY_NAME[leaf.dtype])}
    if shardings is None:
        targets = dict.fromkeys(on_device, default_device())
    else:
        targets = dict(ShardingRules(shardings).for_leaves(on_device))
    # Read and compare.
    reader = CheckedReader(storage, manifest, verify=verify, channel=channel)
    wanted = {(item, name): targets.get(name) for name in meta.leaves}
    with transfers_allowed():
        read = twice(lambda: _read_and_check(reader, wanted, channel))
    arrays = {name: array for (_, name), array in read.items()}
    return {**arrays, **{alias: arrays[name] for alias, name in meta.ties.items()}}


def _read_and_check(
    reader: CheckedReader, wanted: Mapping[Key, Sharding | None], channel: Channel | None
) -> dict[Key, Any]:
    read = reader.read(wanted) if channel is None else channel.attempt("read", lambda: reader.read(wanted))
    reader.check(read)
    return read


def _spans_processes(shardings: Shardings | None) -> bool:
    """Does the mesh have devices of other processes? False for a malformed value, which `ShardingRules` refuses."""
    devices: list[Any] = list(shardings[0].devices.flat) if isinstance(shardings, tuple) and shardings else []
    return any(device.process_index != jax.process_index() for device in devices)
