"""Arrays are read leaf by leaf, and never taken for what they are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tensorstore as ts
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from torchorbax import CorruptCheckpointError
from torchorbax._src.format.manifest import Key, LeafMeta
from torchorbax._src.storage import array_reader

from tests.helpers.steps import random, read, write


def test_what_differs_from_the_manifest_is_refused(tmp_path: Path) -> None:
    storage = write(tmp_path, {"large": random((256, 128)), "small": random((4, 4))})
    for name, shape in (("large", (128, 256)), ("small", (2, 8))):
        meta = LeafMeta(shape, "float32", "jax")
        with pytest.raises(
            CorruptCheckpointError, match=rf"{name} is float32\(\d+, \d+\), but the manifest says float"
        ):
            storage.read(0, {("state", name): meta}, {("state", name): None})
        with pytest.raises(CorruptCheckpointError, match="other is missing from the array data"):
            storage.read(0, {("state", "other"): meta}, {("state", "other"): None})


def test_a_missing_chunk_is_not_taken_for_zeros(mesh: Mesh, tmp_path: Path) -> None:
    storage = write(tmp_path, {"large": jax.device_put(random((256, 128)), NamedSharding(mesh, P("fsdp")))})
    database = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{tmp_path}/0/state/"}).result()
    database.delete_range(ts.KvStore.KeyRange("large/3.0", "large/3.1")).result()
    with pytest.raises(CorruptCheckpointError, match=r"item state: .*'large' has 7 chunks, expected 8"):
        read(storage, {"large": None})


def test_leaves_are_handed_on_while_others_are_read(
    mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more than `_LOCAL_READ_BYTES` are on their way when a leaf is handed on, and each of them comes once."""
    monkeypatch.setattr(array_reader, "_LOCAL_READ_BYTES", 512 << 10)
    arrays = {f"large {index}": random((256, 256)) for index in range(8)} | {"small": random((2, 3))}
    storage = write(tmp_path, arrays)
    asked, handed, ahead = [], [], []
    parts = array_reader._parts
    monkeypatch.setattr(array_reader, "_parts", lambda *args: asked.append(args[0]) or parts(*args))

    def when_read(key: Key, array: Any) -> None:
        item, name = key
        assert item == "state"
        np.testing.assert_array_equal(np.asarray(array), arrays[name])
        handed.append(name)
        ahead.append(len(asked) - sum(one.startswith("large") for one in handed))

    targets = {name: NamedSharding(mesh, P("fsdp")) if index % 2 else None for index, name in enumerate(arrays)}
    targets["small"] = None
    found = read(storage, targets, when_read=when_read)
    assert handed == list(arrays)
    assert found.keys() == arrays.keys()
    assert max(ahead) == 2
