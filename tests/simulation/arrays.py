"""Stands in for Orbax and TensorStore: the arrays of an item are a small file, written and merged in Orbax's order."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Sharding
from torchorbax._src.arrays import fingerprint
from torchorbax._src.arrays.fingerprint import Sums
from torchorbax._src.arrays.leaves import Array
from torchorbax._src.format.manifest import LeafMeta, Manifest
from torchorbax._src.storage.run_folder import MANIFEST
from torchorbax._src.storage.storage import Folders
from torchorbax._src.storage.traffic import Traffic

_MERGED = "manifest.ocdbt"


class Blobs(Protocol):
    """Whole files by their full names, one request each."""

    def put(self, path: str, content: bytes) -> None:
        """Write a file."""

    def get(self, path: str) -> bytes:
        """Read a file. Raises FileNotFoundError."""

    def remove(self, path: str) -> None:
        """Delete a file."""

    def names(self, folder: str) -> list[str]:
        """The files and folders in a folder."""


class SimulatedArrays:
    """What `orbax_storage` calls of the modules `orbax_commit`, `array_writer` and `array_reader`."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs

    def described(self, arrays: Mapping[tuple[str, str], Array]) -> dict[str, list[str]]:
        """See `orbax_commit.described`."""
        by_item: dict[str, list[str]] = {}
        for item, name in arrays:
            by_item.setdefault(item, []).append(name)
        return by_item

    def save(
        self,
        folder: str,
        leaves: Mapping[str, Any],
        traffic: Traffic,
        fill: Callable[[Folders], Manifest],
        check: Callable[[], None],
    ) -> Manifest:
        """See `orbax_commit.save`."""
        self._blobs.put(f"{folder}/_CHECKPOINT_METADATA", b"{}")
        for item in leaves:
            self._blobs.put(f"{folder}/{item}/_METADATA", b"{}")
        manifest = fill({item: f"{folder}/{item}" for item in (*leaves, MANIFEST)})
        for item in leaves:
            check()
            self._merge(f"{folder}/{item}")
        self._blobs.put(f"{folder}/_CHECKPOINT_METADATA", b'{"commit_timestamp_nsecs": 1}')
        return manifest

    def write(self, folder: str, arrays: Mapping[str, Array], traffic: Traffic, process: int) -> dict[str, Sums]:
        """See `array_writer.write`."""
        content, sums = {}, {}
        for name, array in arrays.items():
            host = np.asarray(array)
            content[name] = [list(host.shape), str(host.dtype), base64.b64encode(host.tobytes()).decode()]
            sums[name] = fingerprint.start(host)()
        self._blobs.put(f"{folder}/ocdbt.process_{process}", json.dumps(content).encode())
        return sums

    def read(
        self,
        folder: str,
        wanted: Mapping[str, tuple[LeafMeta, Sharding | None]],
        traffic: Traffic,
        then: Callable[[str, Any], object] | None = None,
    ) -> dict[str, Array]:
        """See `array_reader.read`."""
        content = json.loads(self._blobs.get(f"{folder}/{_MERGED}"))
        arrays: dict[str, Array] = {}
        for name, (meta, target) in wanted.items():
            if name not in content:
                raise ValueError(f"{name} is missing")
            shape, dtype, data = content[name]
            host = np.frombuffer(bytearray(base64.b64decode(data)), dtype).reshape(shape)
            if (tuple(shape), dtype) != (meta.shape, meta.dtype):
                raise ValueError(f"{name} has another shape or dtype")
            arrays[name] = host if target is None else jax.device_put(host, target)
            if then is not None:
                then(name, arrays[name])
        return arrays

    def _merge(self, folder: str) -> None:
        """See `array_writer.merge`."""
        parts = [name for name in self._blobs.names(folder) if name.startswith("ocdbt.process_")]
        merged: dict[str, Any] = {}
        for part in parts:
            merged |= json.loads(self._blobs.get(f"{folder}/{part}"))
        self._blobs.put(f"{folder}/{_MERGED}", json.dumps(merged).encode())
        for part in parts:
            self._blobs.remove(f"{folder}/{part}")
