"""Small arrays of one shape and layout are taken together."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from torchorbax._src.arrays import stacks as gathering
from torchorbax._src.arrays.dtypes import BY_NAME, fits_on_device
from torchorbax._src.storage import array_writer

from tests.helpers.steps import random, read, write
from tests.helpers.tensors import bits


@pytest.mark.parametrize("spec", [P(), P("fsdp"), P(None, "fsdp")], ids=str)
def test_many_small_leaves_alike(spec: P, mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are stacked on their devices, which must not tidy up a bit of them."""
    monkeypatch.setattr(gathering, "AT_ONCE", (4, 1))
    monkeypatch.setattr(array_writer, "_STACKED", 4)
    sharding = NamedSharding(mesh, spec)
    dtypes = [dtype for dtype in BY_NAME if fits_on_device(BY_NAME[dtype])]
    hosts = {
        f"{dtype}.{index}": np.roll(random((8, 16), BY_NAME[dtype]), index) for dtype in dtypes for index in range(9)
    }
    storage = write(tmp_path, {name: jax.device_put(host, sharding) for name, host in hosts.items()})
    found = read(storage, dict.fromkeys(hosts, sharding))
    assert {name: bits(array) for name, array in found.items()} == {name: bits(host) for name, host in hosts.items()}
    assert {array.sharding for array in found.values()} == {sharding}
