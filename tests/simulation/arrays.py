"""Stands in for Orbax and TensorStore: the arrays of an item are a small file, written and merged in Orbax's order."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Sharding
from torchorbax._src.arrays import fingerprint
from torchorbax._src.arrays.fingerprint import Sums
from torchorbax._src.arrays.leaves import Array
from torchorbax._src.format.manifest import Key, LeafMeta
from torchorbax._src.storage import array_writer
from torchorbax._src.storage.traffic import Traffic

_MERGED = "manifest.ocdbt"


class Blobs(Protocol):
    """Whole files by their full names, one request each."""

    def put(self, path: str, content: bytes) -> None:
        """Write a file."""

    def get(self, path: str) -> bytes:
        """Read a file. Raises FileNotFoundError."""


class SimulatedArrays:
    """What `orbax_storage` and `step_reader` call of the modules `array_writer` and `array_reader`."""

    folder_of = staticmethod(array_writer.folder_of)
    is_of_process = staticmethod(array_writer.is_of_process)

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs

    def write(
        self,
        folders: Mapping[str, str],
        arrays: MutableMapping[Key, Array],
        traffic: Traffic,
        process: int = 0,
        *,
        alone: bool = True,
    ) -> dict[Key, Sums]:
        """See `array_writer.write`."""
        contents: dict[str, dict[str, Any]] = {}
        sums = {}
        for item, name in list(arrays):
            host = np.asarray(arrays.pop((item, name)))
            data = base64.b64encode(host.tobytes()).decode()
            contents.setdefault(item, {})[name] = [list(host.shape), str(host.dtype), data]
            sums[item, name] = fingerprint.start(host)()
        for item, content in contents.items():
            where = _MERGED if alone else f"{self.folder_of(process)}/d"
            self._blobs.put(f"{folders[item]}/{where}", json.dumps(content).encode())
        return sums

    def merge(self, folders: Mapping[str, str], written: Mapping[str, Sequence[str]], traffic: Traffic) -> None:
        """See `array_writer.merge`."""
        for item, names in written.items():
            merged: dict[str, Any] = {}
            for name in names:
                merged |= json.loads(self._blobs.get(f"{folders[item]}/{name}/d"))
            self._blobs.put(f"{folders[item]}/{_MERGED}", json.dumps(merged).encode())

    def read(
        self,
        folder: str,
        wanted: Mapping[str, tuple[LeafMeta, Sharding | None]],
        traffic: Traffic,
        then: Callable[[str, Any], object] | None = None,
        readers: int = 1,
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
