"""Which step is restored: the newest good one; damage is skipped with a warning, a shortage is not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
import torchorbax
from torch import nn
from torchorbax import Checkpointer, CorruptCheckpointError, verify

from tests.helpers.damage import data_of, flip, flip_in, resumed, state_of_every_dtype
from tests.helpers.models import objects, seeded
from tests.helpers.runs import visible
from tests.helpers.tensors import bits


# Orbax closes its event loop while TensorStore still has reads under way that are going to fail.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_step_is_skipped_with_a_reason_and_all_bad_is_an_error(trained_run: str) -> None:
    for file in Path(trained_run, "1", "model", "d").iterdir():
        file.write_bytes(b"")
    model, optimizer, _ = objects("adamw")
    with (
        pytest.warns(UserWarning, match="skipped damaged step 1"),
        torchorbax.resume(model, optimizer, trained_run) as run,
    ):
        assert run.step == 0
    with pytest.raises(torchorbax.CorruptCheckpointError, match="step 1") as one:
        run.restore(1)
    assert list(one.value.reasons) == [1]
    Path(trained_run, "0", "manifest", "metadata").write_text("{")
    before = bits(model.hidden.weight.detach().numpy())
    with pytest.raises(torchorbax.CorruptCheckpointError, match="2 damaged steps") as caught:
        torchorbax.resume(model, optimizer, trained_run)
    assert set(caught.value.reasons) == {0, 1}
    assert bits(model.hidden.weight.detach().numpy()) == before


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
    strangers = {"7", "08", "-3", "٣", "step_9", "10", "11", "12.orbax-checkpoint-tmp", "notes.txt"}
    assert set(visible(run_path)) == {"0", "1", "2", *strangers}


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
    assert visible(run_path) == ["0", "1.torchorbax-damaged", "4"]
    _, run = resumed(run_path, keep=2)
    run.save(5, force=True)
    run.close()
    assert run.all_steps() == [4, 5]


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), MemoryError()], ids=repr)
def test_a_shortage_is_no_damage(error: Exception, run_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files may be good all the same, and training from an older step would lose work."""

    def fail(*args: Any, **options: Any) -> Any:
        raise error

    monkeypatch.setattr("torchorbax._src.storage.array_reader.read", fail)
    with pytest.raises(type(error)):
        resumed(run_path)
    monkeypatch.undo()
    _, run = resumed(run_path)
    assert run.step == 1
    run.close()


def test_who_moves_steps_is_told_where_a_step_comes_from(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    tree = {"x": torch.zeros(3)}
    for name in ("one", "other"):
        with Checkpointer(tmp_path / name, {"x": tree}, save=None, rng=False) as run:
            run.save(1 if name == "one" else 2, force=True)
    shutil.copytree(tmp_path / "other" / "2", tmp_path / "one" / "2")
    with Checkpointer(tmp_path / "one", {"x": tree}, save=None, rng=False, read_only=True) as run:
        assert run.restore() == 2
        assert "step 2, which has been restored, was saved by another run" in caplog.text
        caplog.clear()
        assert run.restore(1) == 1
        assert "another run" not in caplog.text
        assert "is newer" not in caplog.text  # who only reads saves nothing anyway
    with Checkpointer(tmp_path / "one", {"x": tree}, save=None, rng=False) as run:
        assert run.restore(1) == 1
    assert "step 1 has been restored, and step 2 is newer" in caplog.text
    # With a local tier, a newer step there wins.
    local = tmp_path / "local"
    with Checkpointer(tmp_path / "two", {"x": tree}, save=None, rng=False, local=local, local_save=1) as run:
        run.save(5, force=True)
        run.wait()
        run.save(6)
    with Checkpointer(tmp_path / "two", {"x": tree}, save=None, rng=False, local=local, local_save=1) as run:
        assert run.restore() == 6
    assert "step 6 comes from the local tier; the newest step here is 5. To go back to it: restore(5)" in caplog.text
