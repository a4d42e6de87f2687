"""Damage on storage: what is found, what is skipped, what is told, and what is left alone."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
import torchorbax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from torch import nn
from torchorbax import Checkpointer, CheckpointNotFoundError, CorruptCheckpointError, verify
from torchorbax._src.restore import verify as integrity

from tests.conftest import DTYPES, bits, tensor_of_bits
from tests.models import RULES, batch_of, loss_fn, seeded


def state_of_every_dtype() -> dict[str, Any]:
    return {
        "tensors": {
            str(dtype).removeprefix("torch."): tensor_of_bits(dtype, (3, 5), bytes(range(1, 100))) for dtype in DTYPES
        },
        "arrays": {"scalar": jnp.float32(2.5), "empty": jnp.zeros((0, 3)), "half": jnp.ones((8, 4), jnp.bfloat16)},
        "weights": {"sharded": random_array(0, (16, 1024)), "host": np.asarray(random_array(1, (64, 64)))},
        "plain": {"epoch": 3, "name": "run", "rate": 0.1},
    }


def random_array(seed: int, shape: tuple[int, ...]) -> jax.Array:
    """Large enough to be in a file of its own: smaller ones are within OCDBT's nodes, which have a checksum."""
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return jax.device_put(values, NamedSharding(Mesh(np.array(jax.devices()), ("fsdp",)), P("fsdp")))


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two steps of a sharded model, an optimizer, and values of every dtype."""
    path = tmp_path_factory.mktemp("integrity") / "run"
    mesh = Mesh(np.array(jax.devices()), ("fsdp",))
    model = seeded()
    optimizer = torch.optim.AdamW(model.parameters())
    train_step = torchorbax.train_step(model, optimizer, loss_fn)
    with torchorbax.resume(
        model, optimizer, str(path), state=state_of_every_dtype(), save=1, shardings=(mesh, RULES)
    ) as run:
        for step in run.steps(2):
            train_step(batch_of(step))
    return path


@pytest.fixture
def run_path(saved_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved_run, tmp_path / "run"))


def resumed(path: Path, **options: Any) -> tuple[nn.Module, Checkpointer]:
    model = seeded()
    optimizer = torch.optim.AdamW(model.parameters())
    return model, torchorbax.resume(model, optimizer, str(path), state=state_of_every_dtype(), save=None, **options)


def data_of(step: Path, name: str) -> tuple[Path, int]:
    """The file that has the first values of a large array of the item `weights`, and where in it."""
    values = bits(torchorbax.load(str(step.parent), int(step.name), item="weights", verify=False)[name])[:1024]
    for file in (step / "weights").rglob("*"):
        if file.is_file() and (position := file.read_bytes().find(values)) >= 0:
            return file, position
    raise AssertionError(f"the values of {name} are in no file")


def flip(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def flip_in(step: Path, name: str) -> None:
    file, position = data_of(step, name)
    flip(file, 8 * position + 77)


# --------------------------------------------------------------------------------------------------- what verify finds


def test_verify_answers_with_the_good_steps(run_path: Path) -> None:
    assert verify(str(run_path)) == [0, 1]
    assert verify(str(run_path), 1) == [1]


def test_verify_writes_nothing(run_path: Path) -> None:
    def content() -> dict[Path, bytes | None]:
        return {file: file.read_bytes() if file.is_file() else None for file in run_path.rglob("*")}

    before = content()
    verify(str(run_path))
    assert content() == before


def test_every_leaf_has_a_fingerprint_whatever_its_dtype(run_path: Path) -> None:
    manifest = integrity.Storage(str(run_path)).manifest(1)
    leaves = {f"{item}.{name}": leaf for item, meta in manifest.items.items() for name, leaf in meta.leaves.items()}
    assert {leaf.dtype for leaf in leaves.values()} >= {str(dtype).removeprefix("torch.") for dtype in DTYPES}
    assert all(len(leaf.fingerprint) == 32 for leaf in leaves.values())
    assert len({leaf.fingerprint for leaf in leaves.values() if leaf.nbytes > 8}) > len(DTYPES)


def test_verify_names_every_damaged_leaf_of_every_step(run_path: Path) -> None:
    flip_in(run_path / "0", "sharded")
    flip_in(run_path / "1", "sharded")
    flip_in(run_path / "1", "host")
    with pytest.raises(CorruptCheckpointError, match="2 damaged steps") as caught:
        verify(str(run_path))
    assert caught.value.reasons == {
        0: "the data of weights: sharded is not what was saved",
        1: "the data of weights: sharded, weights: host is not what was saved",
    }
    with pytest.raises(CorruptCheckpointError, match=r"a damaged step:\n  step 0: the data of weights: sharded"):
        verify(str(run_path), 0)


def test_verify_in_small_pieces(run_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity, "_BATCH_BYTES", 300)
    flip_in(run_path / "0", "host")
    flip_in(run_path / "0", "sharded")
    with pytest.raises(CorruptCheckpointError, match=r"0: the data of weights: host .* of weights: sharded is"):
        verify(str(run_path))
    monkeypatch.setattr(integrity, "_BATCH_BYTES", 1 << 40)
    assert verify(str(run_path), 1) == [1]


def test_verify_where_there_is_nothing(tmp_path: Path, run_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint found"):
        verify(str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointNotFoundError, match="no step 7 found; steps there: 0, 1"):
        verify(str(run_path), 7)


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


# ------------------------------------------------------------------------------------------------ what a restore proves


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
    start, fingerprints = integrity.start, integrity.fingerprints
    monkeypatch.setattr(integrity, "start", lambda array: started.append(array.shape) or start(array))
    monkeypatch.setattr(integrity, "fingerprints", lambda arrays: left.extend(arrays) or fingerprints(arrays))
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


# ------------------------------------------------------------------------------------------------------ choice of step


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "bit flip in the data": (lambda step: flip_in(step, "host"), "the data of weights: host is not"),
    "truncated data": (lambda step: truncate(data_of(step, "sharded")[0]), "item weights: "),
    "truncated manifest": (lambda step: truncate(step / "manifest" / "metadata"), "JSONDecodeError"),
    "changed manifest": (lambda step: flip(step / "manifest" / "metadata", 80), ""),
    "no manifest": (lambda step: shutil.rmtree(step / "manifest"), "it has no manifest, so it is half deleted"),
    "no item": (lambda step: shutil.rmtree(step / "optimizer"), "item optimizer: "),
    "no database": (lambda step: (step / "model" / "manifest.ocdbt").unlink(), "item model: "),
    "no data": (lambda step: data_of(step, "sharded")[0].unlink(), "item weights: "),
    "emptied": (lambda step: [shutil.rmtree(step), step.mkdir()], "the folder is empty"),
    "another step's": (
        lambda step: [shutil.rmtree(step), shutil.copytree(step.parent / "0", step)],
        "its manifest is that of step 0",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_step_is_skipped_with_one_warning_and_gives_way(damage: str, run_path: Path) -> None:
    expected = bits(torchorbax.load(str(run_path), 0)["hidden.bias"])
    break_, reason = DAMAGES[damage]
    break_(run_path / "1")
    with pytest.warns(UserWarning, match=rf"skipped damaged step 1: .*{reason}") as caught:
        model, run = resumed(run_path)
    assert len(caught) == 1
    assert (run.step, run.next_step, run.all_steps()) == (0, 1, [0])
    assert bits(model.hidden.bias) == expected
    assert run.save(1, force=True)  # the step that the damaged one stands in the way of
    run.close()
    assert verify(str(run_path)) == [0, 1]
    assert [entry.name for entry in run_path.iterdir() if "damaged" in entry.name] == ["1.torchorbax-damaged"]


def test_damaged_steps_do_not_count_for_retention(run_path: Path) -> None:
    """Or the good one would be let go to keep the damaged one."""
    shutil.copytree(run_path / "0", run_path / "5")
    with pytest.warns(UserWarning, match="skipped damaged step 5"):
        _, run = resumed(run_path, keep=2)
    assert (run.step, run.all_steps()) == (1, [0, 1])
    run.save(2, force=True)
    run.wait()
    assert run.all_steps() == [1, 2]
    run.save(5, force=True)
    run.close()
    assert run.all_steps() == [2, 5]
    assert verify(str(run_path)) == [2, 5]


def test_all_bad_is_an_error_with_every_reason_and_no_fresh_start(run_path: Path) -> None:
    flip_in(run_path / "1", "host")
    shutil.rmtree(run_path / "0" / "manifest")
    model = seeded()
    before = bits(model.hidden.bias)
    with pytest.raises(CorruptCheckpointError, match="2 damaged steps") as caught:
        torchorbax.resume(model, torch.optim.AdamW(model.parameters()), str(run_path), state=state_of_every_dtype())
    assert caught.value.reasons.keys() == {0, 1}
    assert "weights: host" in caught.value.reasons[1]
    assert "no manifest" in caught.value.reasons[0]
    assert bits(model.hidden.bias) == before


def test_a_mismatch_is_never_skipped(run_path: Path) -> None:
    with pytest.raises(torchorbax.MismatchError, match="step 1 does not fit"):
        torchorbax.resume(nn.Linear(2, 2), None, str(run_path))


def test_strangers_in_the_folder(run_path: Path) -> None:
    (run_path / "notes.txt").write_text("mine")
    (run_path / "7").write_text("a file")
    (run_path / "08").mkdir()
    (run_path / "-3").mkdir()
    (run_path / "٣").mkdir()  # a digit to Python, too
    (run_path / "step_9").mkdir()
    (run_path / "12.orbax-checkpoint-tmp").mkdir()
    (run_path / "11").mkdir()
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as plain:
        plain.save(run_path / "10", {"a": np.ones(3)})
    with pytest.warns(UserWarning, match="skipped damaged step 1[01]: ") as caught:
        _, run = resumed(run_path)
    told = sorted(str(warning.message) for warning in caught)
    assert len(told) == 2
    assert "step 10: ValueError: it has no manifest" in told[0]
    assert "was not written by torchorbax (there is " in told[0]
    assert "step 11: ValueError: the folder is empty" in told[1]
    assert run.step == 1
    run.save(2, force=True)
    run.close()
    assert verify(str(run_path), 2) == [2]
    left = {entry.name for entry in run_path.iterdir()}
    assert left == {"0", "1", "2", "7", "08", "-3", "٣", "step_9", "10", "11", "notes.txt"}


def test_another_layout_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "run" / "step_100").mkdir(parents=True)
    with pytest.raises(torchorbax.ConfigError, match=r"holds no run but other things \(step_100\)"):
        torchorbax.resume(nn.Linear(2, 2), None, str(tmp_path / "run"))


def test_a_damaged_step_makes_way_for_the_next_commit_above_it(run_path: Path) -> None:
    """Or the next process would count it again, and let a good one go for it."""
    flip_in(run_path / "1", "host")
    with pytest.warns(UserWarning, match="skipped damaged step 1"):
        _, run = resumed(run_path, keep=2)
    run.save(4, force=True)
    run.close()
    assert sorted(entry.name for entry in run_path.iterdir()) == ["0", "1.torchorbax-damaged", "4"]
    _, run = resumed(run_path, keep=2)
    run.save(5, force=True)
    run.close()
    assert run.all_steps() == [4, 5]


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), MemoryError()], ids=repr)
def test_a_shortage_is_no_damage(error: Exception, run_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files may be good all the same, and training from an older step would lose work."""

    def fail(*args: Any) -> Any:
        raise error

    monkeypatch.setattr("torchorbax._orbax_arrays.read", fail)
    with pytest.raises(type(error)):
        resumed(run_path)
    monkeypatch.undo()
    _, run = resumed(run_path)
    assert run.step == 1
    run.close()
