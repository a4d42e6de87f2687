"""The example: a base, then adapters on top of it, killed in mid-run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.helpers.programs import RunPython, start_program

SCRIPT = Path(__file__).parents[2] / "examples" / "finetune_lora.py"


def losses(file: Path) -> dict[int, float]:
    lines = file.read_text().splitlines() if file.exists() else []
    return {entry["step"]: entry["loss"] for entry in map(json.loads, lines)}


def committed(run: Path) -> bool:
    return run.exists() and any(entry.name.isdigit() for entry in run.iterdir())


def test_adapters_resume_across_a_kill_and_cost_little(tmp_path: Path, run_python: RunPython) -> None:
    def run(stage: str, path: Path, steps: int, *more: object) -> str:
        return run_python(
            SCRIPT, "--stage", stage, "--path", path, "--steps", steps, *more, devices=1, warnings="default"
        ).stdout

    killed, whole = tmp_path / "killed", tmp_path / "whole"
    assert "base: starts" in run("base", killed, 5)
    whole.mkdir()
    (whole / "base").symlink_to(killed / "base")

    log = tmp_path / "killed.jsonl"
    arguments = ("--stage", "lora", "--path", killed, "--steps", 5000, "--log-losses", log)
    nowhere = subprocess.DEVNULL
    process = start_program(
        tmp_path, SCRIPT, *arguments, env=os.environ, warnings="default", stdout=nowhere, stderr=nowhere
    )
    while process.poll() is None and not (len(losses(log)) > 5 and committed(killed / "lora")):
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.05)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    before = losses(log)
    stop = max(before) + 4

    resumed = tmp_path / "resumed.jsonl"
    told = run("lora", killed, stop, "--log-losses", resumed)
    assert "goes on from step" in told
    wrote, has = (int(line.split()[-2]) for line in told.splitlines() if line.endswith(" kB"))
    assert wrote < has / 10, "adapters and their moments only"
    uninterrupted = tmp_path / "whole.jsonl"
    assert "lora: starts" in run("lora", whole, stop, "--log-losses", uninterrupted)
    assert {**before, **losses(resumed)} == losses(uninterrupted)
    assert losses(uninterrupted)[0] < 5.5, "the base was there: untrained, it is above"
