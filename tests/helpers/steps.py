"""Arrays written as a step, and read again, without a run around them."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np
from torchorbax._src.arrays import fingerprint
from torchorbax._src.arrays import stacks as gathering
from torchorbax._src.format.manifest import ItemMeta, LeafMeta, Manifest
from torchorbax._src.storage.opening import open_storage
from torchorbax._src.storage.storage import Folders, Storage
from torchorbax._src.storage.traffic import Traffic

SMALL = gathering.GATHERED_BYTES


def metas(arrays: dict[str, Any]) -> dict[str, LeafMeta]:
    return {name: LeafMeta(tuple(array.shape), str(array.dtype), "jax") for name, array in arrays.items()}


def write(folder: Path, arrays: dict[str, Any], traffic: Traffic | None = None, step: int = 0) -> Storage:
    storage = open_storage(str(folder), traffic or Traffic())
    storage.create()
    manifest = Manifest(step, datetime.datetime.now(datetime.UTC), {}, {"state": ItemMeta("pytree", metas(arrays))})
    mine = {("state", name): array for name, array in arrays.items()}

    def fill(folders: Folders) -> Manifest:
        sums = storage.write_arrays(folders, mine, 0, alone=True)
        return manifest.with_fingerprints({key: fingerprint.text(found) for key, found in sums.items()})

    storage.write(step, mine, fill)
    return storage


def read(storage: Storage, targets: dict[str, Any], step: int = 0, when_read: Any = None) -> dict[str, Any]:
    wanted = {("state", name): target for name, target in targets.items()}
    found = storage.read(step, storage.manifest(step).leaves, wanted, when_read)
    return {name: array for (_, name), array in found.items()}


def random(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    raw = np.random.default_rng(0).integers(0, 256, int(np.prod(shape)) * np.dtype(dtype).itemsize, np.uint8)
    return (raw & 1 if dtype == np.bool_ else raw).view(dtype).reshape(shape)
