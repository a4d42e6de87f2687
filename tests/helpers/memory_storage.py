"""A `Storage` in memory, for tests of what stands above it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, MutableMapping
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding
from torchorbax import CheckpointNotFoundError, CorruptCheckpointError, SaveError
from torchorbax._src.arrays import fingerprint
from torchorbax._src.arrays.fingerprint import Sums
from torchorbax._src.arrays.leaves import Array
from torchorbax._src.format import per_process
from torchorbax._src.format.manifest import FileDigest, Key, LeafMeta, Manifest
from torchorbax._src.format.per_process import HostItem
from torchorbax._src.storage.storage import Folders


class MemoryStorage:
    """Steps in memory, as one process writes them.

    Attributes:
        committed: the manifests of the committed steps.
        gate: a save waits here before it is written.
        writing: set when the first save has come to the gate.
        failures: by step, what writing it raises.
        log: what was done, in order: `clean`, `commit N`, `delete N`, `set aside N`.
    """

    def __init__(self, path: str = "run") -> None:
        self.path = path
        self.committed: dict[int, Manifest] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.writing = threading.Event()
        self.failures: dict[int, Exception] = {}
        self.log: list[str] = []
        self._arrays: dict[int, dict[Key, np.ndarray]] = {}
        self._process_items: dict[tuple[int, int], str] = {}
        self._set_aside: list[int] = []

    @cached_property
    def bases(self) -> MemoryStorage:
        return MemoryStorage(f"{self.path}/base")

    epoch = 1

    def create(self, *, takeover: bool = False) -> None: ...

    def release(self) -> None: ...

    def check_owned(self) -> None: ...

    def is_own(self, step: int) -> bool:
        return True

    def check_files(self, manifest: Manifest, *, digests: Collection[str]) -> None: ...

    def is_other_run(self, identity: str) -> bool:
        return False

    def written_files(self, folders: Folders, process: int) -> dict[str, FileDigest]:
        return {}

    def check_visible(self) -> None: ...

    def identity(self) -> str:
        return f"the run at {self.path}"

    def steps(self) -> list[int]:
        return sorted(self.committed)

    def existing_steps(self) -> list[int]:
        if not self.committed:
            raise CheckpointNotFoundError(self.path)
        return self.steps()

    def manifest(self, step: int) -> Manifest:
        if step not in self.committed:
            raise CheckpointNotFoundError(self.path, step, self.steps())
        return self.committed[step]

    def as_seen_by(self, manifest: Manifest, process: int) -> tuple[Manifest, Mapping[str, HostItem]]:
        if str(process) not in manifest.own:
            return manifest, {}
        own = per_process.from_text(self._process_items[manifest.step, process])
        return per_process.as_seen_by(manifest, own), own

    def read(
        self,
        step: int,
        leaves: Mapping[Key, LeafMeta],
        targets: Mapping[Key, Sharding | None],
        when_read: Callable[[Key, Any], object] | None = None,
    ) -> dict[Key, Any]:
        found: dict[Key, Any] = {}
        for key, target in targets.items():
            base = leaves[key].base
            arrays = (self._arrays if base is None else self.bases._arrays)[step if base is None else base]
            if key not in arrays:
                raise CorruptCheckpointError(self.path, {step: f"item {key[0]}: {key[1]} is missing"})
            found[key] = arrays[key].copy() if target is None else jax.device_put(arrays[key], target)
            if when_read is not None and arrays[key].size:
                when_read(key, found[key])
        return found

    def write(self, step: int, arrays: Mapping[Key, Array], fill: Callable[[Folders], Manifest]) -> Manifest:
        self.writing.set()
        if not self.gate.wait(30):
            raise TimeoutError("the test never opened the gate")
        try:
            if step in self.committed:
                raise SaveError(step, self.path, "somebody else has saved it meanwhile")
            if step in self.failures:
                raise self.failures[step]
            self._arrays[step] = {}
            manifest = fill({item: str(step) for item in {item for item, _ in arrays} | {"manifest"}})
        except SaveError:
            raise
        except Exception as error:
            raise SaveError(step, self.path, f"{type(error).__name__}: {error}") from error
        self.committed[step] = manifest
        self.log.append(f"commit {step}")
        return manifest

    def write_arrays(
        self, folders: Folders, arrays: MutableMapping[Key, Array], process: int, *, alone: bool
    ) -> dict[Key, Sums]:
        sums: dict[Key, Sums] = {}
        for key in list(arrays):
            array = np.array(arrays.pop(key))
            sums[key] = fingerprint.start(array)()
            self._arrays[int(folders["manifest"])][key] = array
        return sums

    def write_process_items(self, folders: Folders, items: Mapping[str, HostItem], process: int) -> str:
        text = self._process_items[int(folders["manifest"]), process] = per_process.to_text(items)
        return per_process.digest_of(text)

    def set_aside(self, step: int) -> None:
        del self.committed[step]
        self._set_aside.append(step)
        self.log.append(f"set aside {step}")

    def has_set_aside(self) -> bool:
        return bool(self._set_aside)

    def delete(self, step: int) -> None:
        del self.committed[step]
        del self._arrays[step]
        self.log.append(f"delete {step}")

    def unfinished(self) -> list[int]:
        return []

    def remove_leftovers(self) -> None:
        self.log.append("clean")
