"""The command line, and what it says when its libraries are not installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torchorbax
from torchorbax._src.cli.app import app
from typer.testing import CliRunner

from tests.helpers.programs import RunPython


@pytest.fixture
def run_path(tmp_path: Path) -> str:
    with torchorbax.Checkpointer(str(tmp_path / "run"), {"x": {"a": np.ones((2, 3), np.float32)}}) as run:
        for step, loss in enumerate((2.0, 1.5)):
            run.save(step, metrics={"loss": loss}, force=True)
    return run.path


def test_ls_and_inspect(run_path: str) -> None:
    listed = CliRunner(env={"COLUMNS": "120"}).invoke(app, ["ls", run_path])
    assert listed.exit_code == 0
    assert "loss=1.5" in listed.output
    shown = CliRunner(env={"COLUMNS": "120"}).invoke(app, ["inspect", run_path, "--step", "0"])
    assert "x (pytree, 24 B)" in shown.output
    assert "(2, 3)" in shown.output


def test_a_damaged_step_is_listed_as_such(run_path: str) -> None:
    Path(run_path, "1", "manifest", "metadata").unlink()
    listed = CliRunner(env={"COLUMNS": "160"}).invoke(app, ["ls", run_path])
    assert "damaged" in listed.output
    assert "loss=2" in listed.output


def test_errors_are_messages_and_exit_code_1(tmp_path: Path, run_python: RunPython) -> None:
    program = "import sys; sys.argv[1:] = ['ls', 'nowhere']; from torchorbax.__main__ import main; main()"
    done = run_python(program, check=False)
    assert done.returncode == 1
    assert "error: " in done.stderr
    assert "no checkpoint found" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_missing_extra_is_named(run_python: RunPython) -> None:
    program = "import sys; sys.modules['typer'] = None; from torchorbax.__main__ import main; main()"
    done = run_python(program, check=False, fresh=True)
    assert done.returncode == 1
    assert "pip install 'torchorbax[cli]'" in done.stderr


def test_the_missing_optax_extra_is_named(run_python: RunPython) -> None:
    program = """
        import sys, torch, torchorbax
        sys.modules["optax"] = None
        torchorbax.OptaxOptimizer(torch.nn.Linear(1, 1), object())
    """
    assert "pip install 'torchorbax[optax]'" in run_python(program, check=False, fresh=True).stderr


def test_verify(run_path: str, run_python: RunPython) -> None:
    result = CliRunner().invoke(app, ["verify", run_path])
    assert result.exit_code == 0
    assert result.output.splitlines() == [f"step {step}: every byte is as it was saved" for step in (0, 1)]
    Path(run_path, "1", "manifest", "metadata").unlink()
    program = f"import sys; sys.argv[1:] = ['verify', {run_path!r}]; from torchorbax.__main__ import main; main()"
    done = run_python(program, check=False)
    assert done.returncode == 1
    assert "a damaged step:\n  step 1: " in done.stderr
