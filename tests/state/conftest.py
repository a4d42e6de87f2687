"""Saving and restoring as two lives of one program do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torchorbax import Checkpointer

Live = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.fixture
def lives(tmp_path: Path) -> Callable[..., Any]:
    """`lives(build, change)`: build the state, open a run with it, change it and save; build it again, and restore.

    Returns both states, as they were saved and as they were restored.
    """

    def run(build: Callable[[], dict[str, Any]], change: Callable[[Any], object] = lambda state: None) -> Any:
        with Checkpointer(tmp_path / "run", build(), save=None, rng=False) as first:
            change(first.state)
            first.save(0, force=True)
        with Checkpointer(tmp_path / "run", build(), save=None, rng=False) as second:
            assert second.restore() == 0
        return first.state, second.state

    return run
