"""What every kind of storage does alike: on disk, and in memory for the tests above it."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from torchorbax import CheckpointNotFoundError, SaveError
from torchorbax._src.arrays import fingerprint
from torchorbax._src.arrays.fingerprint import fingerprints
from torchorbax._src.format.manifest import ItemMeta, Key, LeafMeta, Manifest
from torchorbax._src.format.per_process import HostItem
from torchorbax._src.storage.opening import open_storage
from torchorbax._src.storage.storage import Folders, Storage

from tests.helpers.memory_storage import MemoryStorage
from tests.helpers.tensors import bits


@pytest.fixture(params=["disk", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    found: Storage = MemoryStorage() if request.param == "memory" else open_storage(str(tmp_path / "run"))
    found.create()
    return found


def manifest_of(step: int, arrays: Mapping[Key, Any], base: int | None = None) -> Manifest:
    leaves: dict[str, dict[str, LeafMeta]] = {}
    for (item, name), array in arrays.items():
        leaf = LeafMeta(tuple(array.shape), str(array.dtype), "jax", base=base)
        leaves.setdefault(item, {})[name] = leaf
    items = {item: ItemMeta("pytree", of_item) for item, of_item in leaves.items()}
    return Manifest(step, datetime.datetime.now(datetime.UTC), {}, items)


def write(storage: Storage, step: int, arrays: Mapping[Key, Any]) -> None:
    """One step, as a process that is alone writes it."""
    mine = dict(arrays)

    def fill(folders: Folders) -> Manifest:
        sums = storage.write_arrays(folders, mine, 0, alone=True)
        assert not mine, "each array is taken out when it is written"
        return manifest_of(step, arrays).with_fingerprints(
            {key: fingerprint.text(found) for key, found in sums.items()}
        )

    storage.write(step, mine, fill)


def some_arrays(seed: int = 0) -> dict[Key, Any]:
    random = np.random.default_rng(seed)
    return {
        ("model", "large"): jax.numpy.asarray(random.standard_normal((256, 128), np.float32)),
        ("model", "small"): jax.numpy.asarray(random.standard_normal(3).astype(np.float32)),
        ("model", "empty"): np.empty((0, 3), np.float32),
        ("state", "on the host"): random.integers(0, 100, (4, 4)),
    }


def test_what_is_written_is_read_bit_for_bit_into_any_sharding(storage: Storage, mesh: Mesh) -> None:
    arrays = some_arrays()
    write(storage, 3, arrays)
    manifest = storage.manifest(3)
    assert {key: leaf.fingerprint for key, leaf in manifest.leaves.items()} == fingerprints(arrays)
    seen: list[Key] = []
    targets = dict.fromkeys(arrays) | {("model", "large"): NamedSharding(mesh, P("fsdp"))}
    found = storage.read(3, manifest.leaves, targets, lambda key, array: seen.append(key))
    assert {key: bits(array) for key, array in found.items()} == {key: bits(array) for key, array in arrays.items()}
    assert found["model", "large"].sharding == targets["model", "large"]
    assert sorted(seen) == sorted(key for key, array in arrays.items() if array.size)


def test_frozen_leaves_are_read_from_the_bases(storage: Storage) -> None:
    frozen, trained = {("model", "frozen"): np.arange(4.0)}, {("model", "trained"): np.ones(2)}
    write(storage.bases, 7, frozen)
    write(storage, 0, trained)
    leaves = manifest_of(0, trained).leaves | manifest_of(0, frozen, base=7).leaves
    found = storage.read(0, leaves, dict.fromkeys(leaves))
    assert {key: array.tolist() for key, array in found.items()} == {
        ("model", "trained"): [1.0, 1.0],
        ("model", "frozen"): [0.0, 1.0, 2.0, 3.0],
    }
    assert (storage.steps(), storage.bases.steps()) == ([0], [7])


def test_steps_come_and_go(storage: Storage) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint found"):
        storage.existing_steps()
    for step in (10, 2):
        write(storage, step, some_arrays(step))
    assert storage.steps() == storage.existing_steps() == [2, 10]
    storage.delete(2)
    assert storage.steps() == [10]
    with pytest.raises(CheckpointNotFoundError, match=r"no step 2 found; steps there: 10"):
        storage.manifest(2)


def test_a_step_that_was_set_aside_gives_way(storage: Storage) -> None:
    write(storage, 1, some_arrays())
    assert not storage.has_set_aside()
    storage.set_aside(1)
    assert storage.has_set_aside()
    assert storage.steps() == []
    write(storage, 1, some_arrays(1))
    assert storage.steps() == [1]


def test_a_failed_write_is_no_step(storage: Storage) -> None:
    def fill(folders: Folders) -> Manifest:
        raise OSError("disk full")

    with pytest.raises(SaveError, match="step 4 was not saved: OSError: disk full") as caught:
        storage.write(4, some_arrays(), fill)
    assert isinstance(caught.value.__cause__, OSError)
    assert storage.steps() == []
    write(storage, 4, some_arrays())
    with pytest.raises(SaveError, match="somebody else has saved it meanwhile"):
        write(storage, 4, some_arrays())


def test_a_process_finds_what_it_has_for_itself(storage: Storage) -> None:
    arrays, own = some_arrays(), {"state": HostItem({"epoch": 2}, {}, {}, ("on the host",))}
    mine = dict(arrays)
    digests: dict[str, str] = {}

    def fill(folders: Folders) -> Manifest:
        storage.write_arrays(folders, mine, 0, alone=True)
        digests["1"] = storage.write_process_items(folders, own, 1)
        return dataclasses.replace(
            manifest_of(5, arrays).with_fingerprints(fingerprints(arrays)), processes=2, own=digests
        )

    storage.write(5, mine, fill)
    manifest = storage.manifest(5)
    assert storage.as_seen_by(manifest, 0) == (manifest, {})
    seen, found = storage.as_seen_by(manifest, 1)
    assert (seen.items["state"].values, found["state"].values) == ({"epoch": 2}, {"epoch": 2})
