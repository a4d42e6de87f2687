"""What is restored from the fast folders of hosts, and what in them does not count."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from torchorbax import Checkpointer, ConfigError, CorruptCheckpointError, load, verify

from tests.helpers.runs import visible
from tests.helpers.several import RunProcesses
from tests.helpers.tiers import host, opened, train, tree


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)


def largest(folder: Path) -> Path:
    return max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def test_a_damaged_local_step_is_skipped_and_gives_its_memory_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(tmp_path) as run:
        train(run, 0, 11)
    flip(largest(Path(host(tmp_path), "10")))
    with opened(tmp_path) as run, caplog.at_level(logging.WARNING):
        assert run.restore() == 9
        assert "step 10" in caplog.text
        train(run, 10, 11)
    assert visible(host(tmp_path)) == ["10", "9"]
    assert verify(host(tmp_path)) == [9, 10]


def test_if_only_damaged_local_steps_are_left_that_is_an_error(tmp_path: Path) -> None:
    with opened(tmp_path, save=None) as run:
        train(run, 0, 1)
    flip(largest(Path(host(tmp_path), "0")))
    with opened(tmp_path) as run, pytest.raises(CorruptCheckpointError, match="step 0"):
        run.restore()


def test_runs_may_share_a_folder_and_leave_each_other_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(tmp_path) as run:
        train(run, 0, 11)
    first = host(tmp_path)
    shutil.rmtree(tmp_path / "rare")  # to start again
    with opened(tmp_path) as run, caplog.at_level(logging.WARNING):
        assert run.restore() is None
        train(run, 0, 3)
        assert run.all_steps() == [0]
    (second,) = {str(path) for path in (tmp_path / "fast").glob("*/process_0")} - {first}
    assert verify(first) == [9, 10]
    assert verify(second) == [1, 2]
    assert "has steps of other runs" in caplog.text


def test_a_copy_of_a_run_has_local_steps_of_its_own(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        train(run, 0, 3)
    shutil.copytree(tmp_path / "rare", tmp_path / "copy" / "rare")
    with opened(tmp_path) as run:
        run.restore()
        train(run, 3, 8)
    options = {"local": tmp_path / "fast", "save": 4, "local_save": 1, "rng": False}
    with Checkpointer(tmp_path / "copy" / "rare", {"state": tree(-1)}, **options) as copy:
        assert copy.restore() == 0, "the other run's steps 6 and 7 are not its own"
        train(copy, 3, 5)
    with opened(tmp_path) as run:
        assert run.restore() == 7


TRAIN = """
    import torch, torchorbax, optax
    from tests.helpers.models import RULES, batch_of, loss_fn, seeded
    from tests.helpers.several_state import Loader, all_devices, whole

    path, local, stop = sys.argv[1], sys.argv[2], int(sys.argv[3])
    model = seeded()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    step = torchorbax.train_step(model, optimizer, loss_fn)
    loader = Loader(10 * index)
    mesh = all_devices("slice", "fsdp", first=2)
    with torchorbax.resume(
        model, optimizer, path, state={"loader": loader}, shardings=(mesh, RULES), barrier_timeout_s=60,
        local=local, save=6, local_save=2,
    ) as run:
        before = whole(torchorbax.to_jax(model)) if run.step is not None else None
        position = loader.position
        for i in run.steps(stop, save_last=False):
            loader.position += 1
            float(step(batch_of(i)))
        run.wait()
        after = whole(torchorbax.to_jax(model))
        note(step=run.step, before=before, after=after, position=position, left=loader.position,
             steps=run.all_steps(), here=run._local.steps.good(), devices=mesh.size)
"""


def test_hosts_restore_from_their_own_folders_and_feed_each_other(tmp_path: Path, run_processes: RunProcesses) -> None:
    path, local = tmp_path / "rare", tmp_path / "fast"

    def run(stop: int, **options: Any) -> list[dict[str, Any]]:
        return [one.facts for one in run_processes(TRAIN, path, local, stop, timeout=180, **options)]

    def same(facts: list[dict[str, Any]], key: str) -> Any:
        assert all(one[key] == facts[0][key] for one in facts), [one[key] for one in facts]
        return facts[0][key]

    first = run(11)
    (own,) = local.iterdir()
    assert same(first, "steps") == [0, 6]
    assert same(first, "here") == [8, 10]
    with pytest.raises(ConfigError, match="what one of several processes holds of 'model'"):
        load(str(own / "process_0"))
    for process in range(2):
        assert verify(str(own / f"process_{process}")) == [8, 10]

    again = run(12)  # all from their own folders
    assert same(again, "step") == 10
    assert same(again, "before") == same(first, "after")
    assert [one["position"] for one in again] == [one["left"] for one in first] == [11, 21]

    shutil.rmtree(own / "process_1")  # a host was replaced; the other slice has all that it held
    fed = run(13)
    assert same(fed, "step") == 10
    assert same(fed, "before") == same(first, "after")
    assert [one["position"] for one in fed] == [11, 11]  # what it had for itself is gone; that of process 0 goes on

    assert same(fed, "steps") == [0, 6, 12]
    assert [one["here"][-1] for one in fed] == [12, 12]
    flip(largest(own / "process_1" / "12"))
    damaged = run(13)  # one has 12 damaged, so the local 12 is of no use to anybody
    assert same(damaged, "step") == 12
    assert same(damaged, "before") == same(fed, "after")

    other = run(15, devices=2)  # another layout: what the folders have does not fit it
    assert same(other, "devices") == 4
    assert same(other, "step") == 12
    assert same(other, "before") == same(fed, "after")
    assert [one["here"][-1] for one in other] == [14, 14]


LIVES = """
    import pathlib, shutil
    import numpy as np
    from torchorbax import Checkpointer
    from tests.helpers.several_state import spread

    root = pathlib.Path(sys.argv[1])
    def mine():
        (found,) = (root / "fast").glob(f"*/process_{index}")
        return found

    def opened(value):
        state = {"state": {"w": spread(np.full((8, 4), value, np.float32))}}
        options = {"rng": False, "save": None, "local": str(root / "fast"), "local_save": 1, "barrier_timeout_s": 60}
        return Checkpointer(str(root / "rare"), state, **options)

    for value in (1, 2):
        with opened(value) as run:
            run.save(5)
            run.wait()
        shutil.move(mine() / "5", root / f"{index}.{value}")
        meet(f"life {value}")
    found = []
    for lives in ((1, 1), (2, 1), (2, 2)):
        shutil.rmtree(mine() / "5", ignore_errors=True)
        shutil.copytree(root / f"{index}.{lives[index]}", mine() / "5")
        meet(f"copied {lives}")
        with opened(0) as run:
            step = run.restore()
            found.append([step, float(np.asarray(run.state["state"]["w"].addressable_data(0))[0, 0])])
    note(found=found)
"""


def test_steps_of_one_number_from_two_lives_are_not_mixed(tmp_path: Path, run_processes: RunProcesses) -> None:
    """The life before may have been killed when only some hosts had committed a step."""
    for ended in run_processes(LIVES, tmp_path, devices=2):
        assert ended.facts["found"] == [[5, 1.0], [None, 0.0], [5, 2.0]]
