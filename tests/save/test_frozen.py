"""Frozen parameters are written once, and every step still restores alone."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchorbax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from torch import nn
from torchorbax import Checkpointer, CorruptCheckpointError, SaveError, place_, resume, to_jax, train_step, verify
from torchorbax._src.save import snapshot, writer
from torchorbax._src.storage.orbax_storage import OrbaxStorage

from tests.helpers.tensors import bits

WIDTH, RANK = 512, 2


class Adapted(nn.Module):
    """14 GB of base and 40 MB of adapters, scaled down: 4 MiB and 16 KiB."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)))
        self.down = nn.Linear(WIDTH, RANK, bias=False)
        self.up = nn.Linear(RANK, WIDTH, bias=False)
        self.base.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


BASE_BYTES = 4 * WIDTH * WIDTH * 4
STEP_BYTES = 3 * 2 * WIDTH * RANK * 4
"""The adapters and two moments of each."""


def build(seed: int = 0) -> tuple[Adapted, Any, Any]:
    torch.manual_seed(seed)
    model = Adapted()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    return model, optimizer, train_step(model, optimizer, lambda model, x: model(x).square().mean())


def train(run: Checkpointer, step: Any, stop: int) -> None:
    for i in range(run.next_step, stop):
        step(torch.ones(2, WIDTH))
        run.save(i, force=True)
    run.wait()


def disk_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_a_step_costs_what_has_changed(tmp_path: Path) -> None:
    model, optimizer, step = build()
    with resume(model, optimizer, str(tmp_path), save=None, keep=None, rng=False) as run:
        train(run, step, 4)
        assert [record.nbytes - BASE_BYTES * (record.step == 0) for record in run.history] == pytest.approx(
            [STEP_BYTES] * 4, rel=0.01
        )
    assert disk_bytes(tmp_path / "base") == pytest.approx(BASE_BYTES, rel=0.05)
    assert [path.name for path in (tmp_path / "base").iterdir()] == ["0"]
    for i in range(4):
        assert disk_bytes(tmp_path / str(i)) < BASE_BYTES / 40
    assert verify(str(tmp_path)) == [0, 1, 2, 3]


@pytest.mark.parametrize("shardings", [False, True])
def test_a_step_restores_alone_and_the_base_is_not_written_again_after_a_restart(
    shardings: bool, tmp_path: Path, mesh: Mesh
) -> None:
    layout = (mesh, lambda name, shape: P("fsdp") if shape[0] % 8 == 0 else P()) if shardings else None
    model, optimizer, step = build()
    with resume(model, optimizer, str(tmp_path), save=None, keep=1, shardings=layout) as run:
        train(run, step, 3)
        assert run.all_steps() == [2]
    saved = {name: bits(array) for name, array in to_jax(model).items()}
    again, optimizer, step = build(1)
    with resume(again, optimizer, str(tmp_path), save=None, keep=1, shardings=layout) as run:
        assert run.step == 2
        assert {name: bits(array) for name, array in to_jax(again).items()} == saved
        train(run, step, 5)
        assert all(record.nbytes < BASE_BYTES / 40 for record in run.history)
        assert run.all_steps() == [4]
    assert [path.name for path in (tmp_path / "base").iterdir()] == ["0"]
    assert {name: bits(array) for name, array in torchorbax.load(str(tmp_path)).items()} == {
        name: bits(array) for name, array in to_jax(again).items()
    }


def test_a_restored_base_is_not_even_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, _ = build()
    place_(model)
    staged = []

    original = snapshot.take

    def take(*args: Any) -> snapshot.Snapshot:
        taken = original(*args)
        staged.append(taken.nbytes)
        return taken

    monkeypatch.setattr(snapshot, "take", take)  # what a save copies on the device
    for _ in range(2):
        with resume(model, None, str(tmp_path), save=None, rng=False) as run:
            run.save(run.next_step, force=True)
    assert staged[0] > BASE_BYTES
    assert staged[1] < BASE_BYTES / 40


def test_a_base_that_was_cast_is_another_one(tmp_path: Path) -> None:
    model, _, _ = build()
    place_(model)
    with resume(model, None, str(tmp_path), save=None, rng=False) as run:
        run.save(0, force=True)
    half = Adapted().to(torch.bfloat16)
    place_(half)
    with resume(half, None, str(tmp_path), save=None, rng=False, cast=True) as run:
        run.save(1, force=True)
    found = torchorbax.load(str(tmp_path), 1)
    assert {str(array.dtype) for array in found.values()} == {"bfloat16"}
    assert {name: bits(array) for name, array in found.items()} == {
        name: bits(array) for name, array in to_jax(half).items()
    }
    assert verify(str(tmp_path)) == [0, 1]


def test_what_changes_is_written_whatever_requires_grad_says(tmp_path: Path) -> None:
    model, _, _ = build()
    place_(model)
    with Checkpointer(str(tmp_path), {"model": model}, save=None, keep=None, rng=False) as run:
        for i in range(4):
            if i:  # an average of weights, say
                torchorbax.assign_(model.base[0].weight, jnp.full((WIDTH, WIDTH), float(i)))
            run.save(i, force=True)
        run.wait()
        assert [round(record.nbytes / (WIDTH * WIDTH * 4)) for record in run.history] == [4, 1, 1, 1]
    assert [path.name for path in (tmp_path / "base").iterdir()] == ["0"], "no base is made for what keeps changing"
    for i in range(1, 4):
        assert (np.asarray(torchorbax.load(str(tmp_path), i)["base.0.weight"]) == i).all()
    assert verify(str(tmp_path)) == [0, 1, 2, 3]


def test_the_base_stays_as_long_as_a_step_needs_it(tmp_path: Path) -> None:
    model, _, _ = build()
    place_(model)
    first = {name: bits(array) for name, array in to_jax(model).items()}
    with Checkpointer(str(tmp_path), {"model": model}, save=None, keep=2, rng=False) as run:
        run.save(0, force=True)
        run.wait()
    other, _, _ = build(1)  # as another process would have it
    place_(other)
    bases = []
    with Checkpointer(str(tmp_path), {"model": other}, save=None, keep=2, rng=False) as run:
        for i in range(1, 4):
            run.save(i, force=True)
            run.wait()
            bases.append(sorted(path.name for path in (tmp_path / "base").iterdir()))
            if i == 1:
                assert {name: bits(array) for name, array in torchorbax.load(run.path, 0).items()} == first
    assert bases == [["0", "1"], ["1"], ["1"]]
    assert verify(str(tmp_path)) == [2, 3]


def test_no_base_is_deleted_while_a_step_cannot_say_what_it_needs(tmp_path: Path) -> None:
    for seed in (0, 1):
        model, _, _ = build(seed)
        place_(model)
        with Checkpointer(str(tmp_path), {"model": model}, save=None, keep=None, rng=False) as run:
            run.save(seed, force=True)
    manifest = next((tmp_path / "0" / "manifest").iterdir())
    content = manifest.read_bytes()
    manifest.write_text("{")
    with Checkpointer(str(tmp_path), {"model": model}, save=None, keep=None, rng=False) as run:
        run.save(2, force=True)
    manifest.write_bytes(content)
    assert verify(str(tmp_path)) == [0, 1, 2]


def test_a_save_that_failed_after_its_base_is_no_base_to_rely_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, _ = build()
    place_(model)
    write = OrbaxStorage.write

    def fail_once(self: OrbaxStorage, step: int, arrays: Any, fill: Any) -> Any:
        if not self.path.endswith("base"):
            monkeypatch.setattr(OrbaxStorage, "write", write)
            raise SaveError(step, self.path, "disk full")
        return write(self, step, arrays, fill)

    monkeypatch.setattr(OrbaxStorage, "write", fail_once)
    with Checkpointer(str(tmp_path), {"model": model}, save=None, rng=False) as run:
        run.save(0, force=True)
        with pytest.raises(SaveError, match="disk full"):
            run.wait()
        run.save(1, force=True)
        run.wait()
        run.save(2, force=True)
        run.wait()
        assert run.history[-1].nbytes < BASE_BYTES / 40
    assert [path.name for path in (tmp_path / "base").iterdir()] == ["1"], "the first one belongs to no step"
    assert verify(str(tmp_path)) == [1, 2]


def test_frozen_again_with_other_values_after_a_save_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _, _ = build()
    place_(model)
    weight = model.base[0].weight
    with Checkpointer(str(tmp_path), {"model": model}, save=None, rng=False) as run:
        run.save(0, force=True)
        run.wait()
        torchorbax.assign_(weight.requires_grad_(True), jnp.ones((WIDTH, WIDTH)))
        with monkeypatch.context() as patched:
            patched.setattr(OrbaxStorage, "write", fail)
            run.save(1, force=True)
            with pytest.raises(SaveError, match="disk full"):
                run.wait()
        weight.requires_grad_(False)
        run.save(2, force=True)
    assert (np.asarray(torchorbax.load(str(tmp_path), 2)["base.0.weight"]) == 1).all()


def fail(storage: OrbaxStorage, step: int, *others: Any) -> None:
    raise SaveError(step, storage.path, "disk full")


def test_an_older_step_has_the_base_that_it_was_saved_with(tmp_path: Path) -> None:
    """Restored in the same process, where the arrays of the newest step are known as well."""
    model, _, _ = build()
    place_(model)
    with Checkpointer(str(tmp_path), {"model": model}, save=None, keep=None, rng=False) as run:
        run.save(0, force=True)
        run.wait()
    other, _, _ = build(1)
    place_(other)
    with Checkpointer(str(tmp_path), {"model": other}, save=None, keep=None, rng=False) as run:
        run.save(1, force=True)
        run.restore(0)
        run.save(2, force=True)
        run.wait()
        assert run.history[-1].nbytes < BASE_BYTES / 40
        run.restore(1)
        run.restore(0, only="model.base.0")
        mixed = {name: bits(array) for name, array in to_jax(other).items()}
        run.save(3, force=True)
    assert verify(str(tmp_path)) == [0, 1, 2, 3]
    found = [{name: bits(array) for name, array in torchorbax.load(str(tmp_path), i).items()} for i in range(4)]
    assert found[0] == found[2] != found[1]
    assert found[3] == mixed


@pytest.mark.parametrize("how", ["damaged", "gone"])
def test_a_damaged_base_is_found(how: str, tmp_path: Path) -> None:
    model, _, _ = build()
    place_(model)
    with Checkpointer(str(tmp_path), {"model": model}, save=None, rng=False) as run:
        run.save(0, force=True)
    if how == "gone":
        shutil.rmtree(tmp_path / "base" / "0")
    else:
        file = max((tmp_path / "base" / "0").rglob("*"), key=lambda one: one.stat().st_size)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    reason = "base 0 is missing" if how == "gone" else r"the data of model: base\.\d\.weight is not what was saved"
    with pytest.raises(CorruptCheckpointError, match=reason):
        verify(str(tmp_path))
    # A live parameter that is not what the base had cannot stand in for it.
    frozen = next(param for param in model.parameters() if not param.requires_grad)
    was = frozen.clone()
    with torch.no_grad():
        frozen.add_(1)
    before = [bits(param) for param in model.parameters()]
    with Checkpointer(str(tmp_path), {"model": model}, save=None, rng=False) as run:
        with pytest.raises(CorruptCheckpointError, match="base"):
            run.restore()
        assert [bits(param) for param in model.parameters()] == before
    # The same values can, and the next step writes them again.
    with torch.no_grad():
        frozen.copy_(was)
    expected = [bits(param) for param in model.parameters()]
    with Checkpointer(str(tmp_path), {"model": model}, save=None, rng=False) as run:
        assert run.restore() == 0
        assert [bits(param) for param in model.parameters()] == expected
        run.save(1, force=True)
    assert verify(str(tmp_path), 1) == [1]


def test_a_base_that_lacks_a_file_is_written_again(tmp_path: Path) -> None:
    """Somebody who deletes old files deletes those of bases first."""
    model, _, _ = build()
    place_(model)
    with Checkpointer(str(tmp_path), {"model": model}, save=None, rng=False) as run:
        run.save(0, force=True)
    file = max((tmp_path / "base" / "0").rglob("*"), key=lambda one: one.stat().st_size)
    file.unlink()
    with Checkpointer(str(tmp_path), {"model": model}, save=None, rng=False) as run:
        assert run.restore() == 0
        run.save(1, force=True)
    assert verify(str(tmp_path), 1) == [1]


def test_frozen_parameters_cost_the_loop_nothing(tmp_path: Path) -> None:
    """They are neither copied on the device nor kept alive."""
    model, _, _ = build()
    place_(model)
    with Checkpointer(str(tmp_path), {"model": model}, save=None, rng=False) as run:
        run.save(0, force=True)
        run.wait()
        before = len(jax.live_arrays())
        run.save(1, force=True)
        run.wait()
        assert len(jax.live_arrays()) == before
        torchorbax.assign_(model.base[0].weight, jnp.zeros((WIDTH, WIDTH)))
        assert len(jax.live_arrays()) <= before, "the old array is gone"


def test_a_base_that_is_gone_is_told_and_written_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = torch.nn.Linear(64, 64)
    model.weight.requires_grad_(False)
    torchorbax.place_(model)
    with torchorbax.resume(model, None, tmp_path, save=None) as run:
        run.save(0, force=True)
        run.wait()
        shutil.rmtree(tmp_path / "base")
        run.save(1, force=True)
        run.wait()
        assert torchorbax.verify(tmp_path) == [0, 1]  # the same values under the same number, so step 0 is whole again
        run.save(2, force=True)
        run.wait()
        assert run.history[-1].nbytes < run.history[-2].nbytes
    assert "step 1 writes all frozen parameters: base 0, which has its frozen parameters, is gone" in caplog.text


def test_a_base_whose_arrays_are_gone_by_then_fails_one_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(64, 64)
    model.weight.requires_grad_(False)
    torchorbax.place_(model)
    with torchorbax.resume(model, None, tmp_path, save=None) as run:
        run.save(0, force=True)
        run.wait()
        shutil.rmtree(tmp_path / "base")
        with monkeypatch.context() as patched:
            patched.setattr(writer, "with_frozen", lambda *others: None)
            run.save(1, force=True)
            with pytest.raises(
                SaveError, match="base 0, which has its frozen parameters, is gone; the next save writes them again"
            ):
                run.wait()
        run.save(2, force=True)
    assert torchorbax.verify(tmp_path) == [0, 2]
