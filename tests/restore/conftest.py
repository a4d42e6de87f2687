"""A run to restore from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.restores import Net, save


@pytest.fixture
def saved(tmp_path: Path) -> str:
    torch.manual_seed(1)
    return save(tmp_path / "run", Net())
