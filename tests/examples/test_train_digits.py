"""The example trains as several processes on gs://, and goes on with another number of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import gcs_server
from tests.helpers.programs import run_program

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_digits.py"


def train(folder: Path, path: str, *options: object, env: dict[str, str]) -> dict[str, Any]:
    summary = folder / "summary.json"
    run_program(
        folder, EXAMPLE, "--path", path, "--summary", summary, *options, env=env, warnings="default", timeout=240
    )
    found: dict[str, Any] = json.loads(summary.read_text())
    return found


def test_two_processes_on_gs_and_then_one(tmp_path: Path) -> None:
    with gcs_server.Server(buckets=["bucket"]) as server:
        env = gcs_server.environment(server.port)
        path = "gs://bucket/runs/digits"
        losses = [tmp_path / "two.jsonl", tmp_path / "one.jsonl"]
        two = train(tmp_path, path, "--processes", 2, "--devices", 4, "--steps", 12, "--log-losses", losses[0], env=env)
        assert two["devices"] == 8
        assert two["resumed_from"] is None
        assert two["steps_on_disk"][-1] == 11
        one = train(tmp_path, path, "--processes", 1, "--devices", 8, "--steps", 16, "--log-losses", losses[1], env=env)
        assert one["resumed_from"] == 11
        assert one["steps_on_disk"][-1] == 15
    lines = [json.loads(line) for file in losses for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(16))
    whole = tmp_path / "whole.jsonl"
    train(tmp_path, str(tmp_path / "whole"), "--devices", 8, "--steps", 2, "--log-losses", whole, env={})
    alone = [json.loads(line)["loss"] for line in whole.read_text().splitlines()]
    # Later ones differ: sums over processes round in another order, and Adam's first steps make much of it.
    assert [line["loss"] for line in lines[:2]] == pytest.approx(alone, abs=1e-4)
