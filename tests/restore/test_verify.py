"""Damage on storage: what is found, what is skipped, what is told, and what is left alone."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

import pytest
from torchorbax import CheckpointNotFoundError, CorruptCheckpointError, verify
from torchorbax._src.verification import checked_read, step_check

from tests.helpers.damage import flip_in

verify_module = importlib.import_module("torchorbax._src.restore.verify")  # the function hides the module


def test_verify_answers_with_the_good_steps(run_path: Path) -> None:
    assert verify(str(run_path)) == [0, 1]
    assert verify(str(run_path), 1) == [1]


def test_verify_writes_nothing(run_path: Path) -> None:
    def content() -> dict[Path, bytes | None]:
        return {file: file.read_bytes() if file.is_file() else None for file in run_path.rglob("*")}

    before = content()
    verify(str(run_path))
    assert content() == before


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
    monkeypatch.setattr(checked_read, "_BATCH_BYTES", 300)
    flip_in(run_path / "0", "host")
    flip_in(run_path / "0", "sharded")
    with pytest.raises(CorruptCheckpointError, match=r"0: the data of weights: sharded .* of weights: host is"):
        verify(str(run_path))
    monkeypatch.setattr(checked_read, "_BATCH_BYTES", 1 << 40)
    assert verify(str(run_path), 1) == [1]


def test_verify_where_there_is_nothing(tmp_path: Path, run_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint found"):
        verify(str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointNotFoundError, match="no step 7 found; steps there: 0, 1"):
        verify(str(run_path), 7)


def test_a_step_that_is_let_go_meanwhile_is_no_damage(run_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = step_check.check_step

    def let_go_then_check(storage: Any, manifest: Any) -> None:
        if manifest.step == 0:
            shutil.rmtree(run_path / "0")
        check(storage, manifest)

    monkeypatch.setattr(verify_module, "check_step", let_go_then_check)
    steps = verify(str(run_path))
    assert 0 not in steps
    assert steps
    with pytest.raises(CheckpointNotFoundError, match="no step 0"):
        verify(str(run_path), 0)
