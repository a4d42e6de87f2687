"""Options and steps that are refused, and what the error says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchorbax import Checkpointer, ConfigError

from tests.helpers.fake_runs import fake_run, weights
from tests.helpers.memory_storage import MemoryStorage


def test_duplicate_and_older_steps(storage: MemoryStorage) -> None:
    with fake_run(storage) as run:
        run.save(5)
        for _ in range(2):  # in flight, and committed
            with pytest.raises(ConfigError, match="step 5 is already saved"):
                run.save(5, force=True)
            with pytest.raises(ConfigError, match="step 4 is below the newest step 5"):
                run.save(4, force=True)
            run.wait()
        assert run.save(6)
    assert storage.steps() == [5, 6]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save": "sometimes"}, "save must be"),
        ({"save": 0}, "save must be"),
        ({"save": True}, "save must be"),
        ({"keep": 0}, "keep must be"),
        ({"keep": "best"}, "keep must be"),
        ({"staging": "magic"}, "staging must be one of"),
        ({"shardings": "fsdp"}, "shardings must be"),
    ],
)
def test_bad_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Checkpointer(str(tmp_path / "run"), {"w": weights()}, **options)
    assert not (tmp_path / "run").exists()


def test_compression_and_memory_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="compression must be 'zstd' or None, not 'gzip'"):
        Checkpointer(str(tmp_path), {}, compression="gzip")  # type: ignore[arg-type]
    for wrong in (0, 1.5, True, None):
        with pytest.raises(ConfigError, match="max_host_bytes must be an int of at least"):
            Checkpointer(str(tmp_path), {}, max_host_bytes=wrong)  # type: ignore[arg-type]
    state = {"w": {"w": np.zeros(1 << 20, np.float32)}}
    with Checkpointer(str(tmp_path), state, compression="zstd", max_host_bytes=64 << 20) as run:
        run.save(0)
        run.wait()
        state["w"]["w"][:] = 1
        run.restore()
    assert not state["w"]["w"].any()
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 100_000


def test_a_step_is_a_whole_number(storage: MemoryStorage) -> None:
    with fake_run(storage) as run:
        assert run.save(np.int64(7), force=True)  # type: ignore[arg-type]
        for wrong in (7.5, "7", None):
            with pytest.raises(ConfigError, match="a step is a whole number, not"):
                run.save(wrong)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="a step cannot be negative: -1"):
            run.save(-1)
    assert type(storage.committed[7].step) is int
