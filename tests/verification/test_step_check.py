"""Whatever part of a step each process checks, all of it is checked."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import jax.numpy as jnp
import pytest
from torch import nn
from torchorbax import Checkpointer, CorruptCheckpointError, StorageError
from torchorbax._src.storage.opening import open_storage
from torchorbax._src.tensors import torchax_tensors
from torchorbax._src.verification.step_check import check_step


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a step, and a base with frozen parameters."""
    path = tmp_path_factory.mktemp("checked") / "run"
    with torchax_tensors.torchax.default_env():
        model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 2)).to("jax")
    model[0].requires_grad_(False)
    with Checkpointer(path, {"model": model, "state": {"array": jnp.arange(9000.0)}}, save=None) as run:
        run.save(7, force=True)
    assert (path / "base" / "0").exists()
    return path


@pytest.mark.parametrize("count", [1, 2, 3, 64])
def test_of_every_file_that_has_changed_one_of_the_processes_learns(
    count: int, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    storage = open_storage(run)
    files = [path for folder in ("7", "base/0") for path in (run / folder).rglob("*") if path.is_file()]
    assert len(files) > 10
    for file in files:
        content = file.read_bytes()
        if not content:
            continue
        file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        found = 0
        for index in range(count):
            try:
                check_step(storage, storage.manifest(7), share=(index, count))
            except CorruptCheckpointError:
                found += 1
        file.write_bytes(content)
        assert found, f"nobody has noticed that {file} has changed"
    for index in range(count):
        check_step(storage, storage.manifest(7), share=(index, count))


def test_what_another_process_has_written_must_be_seen_as_it_was_written(tmp_path: Path) -> None:
    """On a file system that shows each process what others write only later, a step might lack a part of itself."""
    storage = open_storage(tmp_path / "run")
    storage.create()
    (tmp_path / "run" / "folder").mkdir()
    (tmp_path / "run" / "folder" / "file").write_bytes(b"123")
    folders: dict[str, str] = {}
    crc32c = "107b2fb2"
    assert storage._merged(folders, "folder", {"file": (3, crc32c)}) == {"file": (3, crc32c)}
    for nbytes, path in ((4, "file"), (3, "gone")):
        expected = re.escape(f"folder/{path} was written by another process with {nbytes} bytes")
        with pytest.raises(StorageError, match=expected):
            storage._merged(folders, "folder", {path: (nbytes, crc32c)})
    storage.release()
