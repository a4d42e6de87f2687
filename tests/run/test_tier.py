"""Two tiers: frequent saves to a fast folder of each host, rarer ones to the path, and where a restore takes a step."""

from __future__ import annotations

import logging
import shutil
import threading
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from torchorbax import Checkpointer, ConfigError, CorruptCheckpointError, SaveError, load, verify

from tests.helpers.several import RunProcesses

# ---------------------------------------------------------------------------------------------------------- one process


def tree(value: float) -> dict[str, Any]:
    return {"w": jnp.full((64, 64), value), "count": np.int64(value)}


def opened(folder: Path, value: float = -1, **options: Any) -> Checkpointer:
    return Checkpointer(
        folder / "rare",
        {"state": tree(value)},
        rng=False,
        local=folder / "fast",
        **{"save": 4, "local_save": 1} | options,
    )


def train(run: Checkpointer, start: int, stop: int) -> None:
    for step in range(start, stop):
        run.save(step, {"state": tree(step)}, metrics={"loss": step})
    run.wait()


def value_of(run: Checkpointer) -> float:
    tree = run.state["state"]
    assert float(tree["w"][0, 0]) == tree["count"]
    return float(tree["count"])


def host(folder: Path) -> str:
    return str(folder / "fast" / "process_0")


def test_each_tier_has_policies_of_its_own(tmp_path: Path) -> None:
    with opened(tmp_path, keep=None) as run:
        train(run, 0, 11)
        assert run.all_steps() == [0, 4, 8]
        assert verify(host(tmp_path)) == [9, 10]
        assert sorted((record.step, Path(record.path).name) for record in run.history) == sorted(
            [(step, "process_0") for step in range(11)] + [(step, "rare") for step in (0, 4, 8)]
        )
        assert all(record.commit_s is not None for record in run.history)
    assert verify(str(tmp_path / "rare")) == [0, 4, 8]


def test_a_restore_takes_the_newest_step_of_either(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        train(run, 0, 11)
    with opened(tmp_path) as run:
        assert run.restore() == 10
        assert value_of(run) == 10
        assert run.next_step == 11
        train(run, 11, 12)
    shutil.rmtree(tmp_path / "fast")  # the machine was another one
    with opened(tmp_path) as run:
        assert run.restore() == 8
        assert value_of(run) == 8
        train(run, 9, 10)
        assert verify(host(tmp_path)) == [9]


def test_a_step_asked_for_comes_from_where_it_is(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        train(run, 0, 11)
        assert (run.restore(9), value_of(run)) == (9, 9)
        assert (run.restore(4), value_of(run)) == (4, 4)
        with pytest.raises(FileNotFoundError, match="no step 5"):
            run.restore(5)


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
    assert sorted(entry.name for entry in Path(host(tmp_path)).iterdir()) == ["10", "9"]
    assert verify(host(tmp_path)) == [9, 10]


def test_if_only_damaged_local_steps_are_left_that_is_an_error(tmp_path: Path) -> None:
    with opened(tmp_path, save=None) as run:
        train(run, 0, 1)
    flip(largest(Path(host(tmp_path), "0")))
    with opened(tmp_path) as run, pytest.raises(CorruptCheckpointError, match="step 0"):
        run.restore()


def test_the_fast_tier_goes_on_while_the_slow_one_is_being_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(tmp_path, save=100) as run:
        go, write = threading.Event(), run._main.storage.write

        def slow(*args: Any) -> Any:
            assert go.wait(60)
            return write(*args)

        monkeypatch.setattr(run._main.storage, "write", slow)
        for step in range(6):
            run.save(step, {"state": tree(step)})
        run._local.saver.collect()  # type: ignore[union-attr]
        assert run.all_steps() == []
        assert verify(host(tmp_path)) == [4, 5]
        go.set()
        run.wait()
        assert run.all_steps() == [0]
    assert float(load(str(tmp_path / "rare"), item="state")["w"][0, 0]) == 0


def test_both_tiers_saving_at_once_over_and_over(tmp_path: Path) -> None:
    """Orbax numbers its operations per process."""
    with opened(tmp_path, save=1, keep=None, local_keep=None) as run:
        train(run, 0, 30)
        assert run.all_steps() == list(range(30))
    assert verify(host(tmp_path)) == verify(str(tmp_path / "rare")) == list(range(30))


def test_forced_saves_go_to_the_path(tmp_path: Path) -> None:
    with opened(tmp_path, save=None, local_save=None) as run:
        assert run.save(3, {"state": tree(3)}, force=True)
        run.wait()
        assert run.all_steps() == [3]
    assert not Path(host(tmp_path), "3").exists()


def test_an_error_of_the_fast_tier_is_told_and_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(tmp_path, save=1) as run:

        def full(*args: Any) -> Any:
            raise OSError("No space left on device")

        monkeypatch.setattr(run._local.storage, "write", full)  # type: ignore[union-attr]
        run.save(0, {"state": tree(0)})
        with pytest.raises(SaveError, match="process_0: step 0 was not saved: OSError: No space left"):
            run.wait()
        monkeypatch.undo()
        assert run.all_steps() == [0]
        run.save(1, {"state": tree(1)})
        run.wait()
        assert verify(host(tmp_path)) == [1]


def test_what_another_run_has_left_in_the_folder_does_not_count(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(tmp_path) as run:
        train(run, 0, 11)
    shutil.rmtree(tmp_path / "rare")  # to start again
    with opened(tmp_path) as run, caplog.at_level(logging.WARNING):
        assert run.restore() is None
        train(run, 0, 3)
        assert run.all_steps() == [0]
    assert verify(host(tmp_path)) == [1, 2]


def test_a_step_that_the_fast_tier_has_can_still_be_forced(tmp_path: Path) -> None:
    with opened(tmp_path, save=None) as run:
        assert run.save(3, {"state": tree(3)})
        assert run.save(3, {"state": tree(3)}, force=True)
        run.wait()
        assert run.all_steps() == verify(host(tmp_path)) == [3]


def test_restoring_an_older_step_leaves_the_newer_ones_alone(tmp_path: Path) -> None:
    with opened(tmp_path) as run:
        train(run, 0, 11)
        assert run.restore(8) == 8
        assert (run.restore(), value_of(run)) == (10, 10)


def test_errors_of_both_tiers_are_told_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = opened(tmp_path, save=1)

    def full(*args: Any) -> Any:
        raise OSError("No space left on device")

    for tier in run._tiers:
        monkeypatch.setattr(tier.storage, "write", full)
    run.save(0, {"state": tree(0)})
    with pytest.raises(SaveError, match="rare: step 0 was not saved") as caught:
        run.close()
    assert "process_0: step 0 was not saved" in "".join(caught.value.__notes__)


def test_a_local_tier_is_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="local must be a folder on each host, not gs://bucket/run"):
        Checkpointer(tmp_path / "run", {"state": tree(0)}, local="gs://bucket/run")


# ---------------------------------------------------------------------------------------------------- several processes

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
        for i in run.steps(stop):
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
    assert same(first, "steps") == [0, 6]
    assert same(first, "here") == [8, 10]
    with pytest.raises(ConfigError, match="what one of several processes holds of 'model'"):
        load(str(local / "process_0"))
    for process in range(2):
        assert verify(str(local / f"process_{process}")) == [8, 10]

    again = run(12)  # all from their own folders
    assert same(again, "step") == 10
    assert same(again, "before") == same(first, "after")
    assert [one["position"] for one in again] == [one["left"] for one in first] == [11, 21]

    shutil.rmtree(local / "process_1")  # a host was replaced; the other slice has all that it held
    fed = run(13)
    assert same(fed, "step") == 10
    assert same(fed, "before") == same(first, "after")
    assert [one["position"] for one in fed] == [11, 11]  # what it had for itself is gone; that of process 0 goes on

    assert same(fed, "steps") == [0, 6, 12]
    assert [one["here"][-1] for one in fed] == [12, 12]
    flip(largest(local / "process_1" / "12"))
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
    mine = root / "fast" / f"process_{index}"

    def opened(value):
        state = {"state": {"w": spread(np.full((8, 4), value, np.float32))}}
        options = {"rng": False, "save": None, "local": str(root / "fast"), "local_save": 1, "barrier_timeout_s": 60}
        return Checkpointer(str(root / "rare"), state, **options)

    for value in (1, 2):
        with opened(value) as run:
            run.save(5)
            run.wait()
        shutil.move(mine / "5", root / f"{index}.{value}")
        meet(f"life {value}")
    found = []
    for lives in ((1, 1), (2, 1), (2, 2)):
        shutil.rmtree(mine / "5", ignore_errors=True)
        shutil.copytree(root / f"{index}.{lives[index]}", mine / "5")
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
