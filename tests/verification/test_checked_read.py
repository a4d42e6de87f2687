"""A wrong byte is never restored: what was read is compared with the fingerprints of the save."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torchorbax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from torchorbax import CorruptCheckpointError, verify
from torchorbax._src.arrays import fingerprint
from torchorbax._src.storage.opening import open_storage

from tests.helpers.damage import data_of, flip, flip_in, random_array, resumed
from tests.helpers.models import RULES
from tests.helpers.tensors import DTYPES, bits


def test_every_leaf_has_a_fingerprint_whatever_its_dtype(run_path: Path) -> None:
    manifest = open_storage(str(run_path)).manifest(1)
    leaves = {f"{item}.{name}": leaf for item, meta in manifest.items.items() for name, leaf in meta.leaves.items()}
    assert {leaf.dtype for leaf in leaves.values()} >= {str(dtype).removeprefix("torch.") for dtype in DTYPES}
    assert all(len(leaf.fingerprint) == 32 for leaf in leaves.values())
    assert len({leaf.fingerprint for leaf in leaves.values() if leaf.nbytes > 8}) > len(DTYPES)


def test_forty_flipped_bits_forty_found(run_path: Path) -> None:
    """Where Orbax, torch.save and torch's distributed checkpoint find none: bits of array data."""
    chance = random.Random(0)
    places = [data_of(run_path / "1", name) for name in ("sharded", "host")]
    for _ in range(40):
        file, position = chance.choice(places)
        bit = 8 * position + chance.randrange(8 * 1024)
        flip(file, bit)
        with pytest.raises(CorruptCheckpointError, match="is not what was saved"):
            verify(str(run_path), 1)
        flip(file, bit)
    assert verify(str(run_path), 1) == [1]


@pytest.mark.parametrize("way", ["restore", "resume", "load"])
def test_a_wrong_byte_is_never_restored(way: str, run_path: Path, mesh: Mesh) -> None:
    model, run = resumed(run_path)
    model.hidden.bias.data.zero_()
    flip_in(run_path / "1", "sharded")
    reason = "step 1: the data of weights: sharded is not what was saved"
    if way == "restore":
        with pytest.raises(CorruptCheckpointError, match=reason):
            run.restore(1)
    elif way == "load":
        with pytest.raises(CorruptCheckpointError, match=reason):
            torchorbax.load(str(run_path), item="weights", shardings=(mesh, {"sharded": P(None, "fsdp")}))
        assert set(torchorbax.load(str(run_path), item="weights", verify=False)) == {"sharded", "host"}
    else:
        with pytest.warns(UserWarning, match=rf"skipped damaged {reason}"):
            _, other = resumed(run_path, shardings=(mesh, RULES))
        assert (other.step, other.next_step, other.all_steps()) == (0, 1, [0])
        other.close()
    assert not model.hidden.bias.any()
    run.close()


@pytest.mark.parametrize("way", ["restore", "load", "verify"])
def test_what_was_summed_while_it_was_read_is_not_summed_again(
    way: str, run_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only empty leaves, of which nothing is read, are left for the end."""
    started: list[Any] = []
    left: list[Any] = []
    start, fingerprints = fingerprint.start, fingerprint.fingerprints
    monkeypatch.setattr(fingerprint, "start", lambda array: started.append(array.shape) or start(array))
    monkeypatch.setattr(fingerprint, "fingerprints", lambda arrays: left.extend(arrays) or fingerprints(arrays))
    step = verify(run_path)[-1] if way != "verify" else None
    del started[:], left[:]
    actions: dict[str, Callable[[], Any]] = {
        "restore": lambda: resumed(run_path)[1].close(),
        "load": lambda: [torchorbax.load(run_path, step, item) for item in ("tensors", "arrays", "weights")],
        "verify": lambda: verify(run_path),
    }
    actions[way]()
    assert len(started) > 3
    assert set(left) <= {("arrays", "empty")}


def test_verification_can_be_turned_off(run_path: Path) -> None:
    flip_in(run_path / "1", "sharded")
    _, run = resumed(run_path, verify=False)
    assert run.step == 1
    assert bits(run.state["weights"]["sharded"]) != bits(random_array(0, (16, 1024)))
    assert bits(run.state["weights"]["host"]) == bits(random_array(1, (64, 64)))
    run.close()
