"""The life of a run: what saves, when, what is kept, what comes back, and how failures are told."""

from __future__ import annotations

import datetime
import gc
import logging
import math
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import torch
import torchorbax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from torch import nn
from torchorbax import Checkpointer, ConfigError, SaveError, policies, to_jax
from torchorbax._src.format.manifest import Manifest
from torchorbax._src.run import checkpointer
from torchorbax._src.storage.store import Storage
from torchorbax._src.tensors import torchax_tensors as _torchax

from tests.models import RULES, TiedNet, batch_of, bits, loss_fn, seeded


def weights(value: float = 0.0) -> dict[str, jax.Array]:
    return {"w": jnp.full((4,), value)}


class FakeStorage:
    """Steps in memory, committed when the test says so."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.committed: dict[int, Manifest] = {}
        self.failures: dict[int, Exception] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.writing = threading.Event()
        self.log: list[str] = []

    def check(self) -> None: ...

    def create(self) -> None: ...

    def check_visible(self) -> None: ...

    def remove_leftovers(self) -> None:
        self.log.append("clean")

    def has_set_aside(self) -> bool:
        return False

    def steps(self) -> list[int]:
        return sorted(self.committed)

    def bases(self) -> set[int]:
        return set()

    def next_base(self) -> int:
        return 0

    def manifest(self, step: int) -> Manifest:
        return self.committed[step]

    def write(self, manifest: Manifest, arrays: Mapping[str, Any], channel: Any = None) -> Manifest:
        self.writing.set()
        if not self.gate.wait(30):
            raise TimeoutError("the test never opened the gate")
        if manifest.step in self.failures:
            raise self.failures[manifest.step]
        self.committed[manifest.step] = manifest
        self.log.append(f"commit {manifest.step}")
        return manifest

    def delete(self, step: int) -> None:
        del self.committed[step]
        self.log.append(f"delete {step}")


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeStorage]:
    fake = FakeStorage("run")
    monkeypatch.setattr(checkpointer, "Storage", lambda path, traffic: fake)
    yield fake
    fake.gate.set()


def fake_run(storage: FakeStorage, **options: Any) -> Checkpointer:
    return Checkpointer("run", {"w": weights()}, rng=False, **options)


# --------------------------------------------------------------------------------------------------------- when to save


def test_continuous_saves_start_when_the_one_before_is_committed(storage: FakeStorage) -> None:
    with fake_run(storage) as run:
        storage.gate.clear()
        assert run.save(0)
        assert [run.save(step) for step in (1, 2, 3)] == [False] * 3
        assert storage.steps() == []
        storage.gate.set()
        run.wait()
        assert storage.steps() == [0]
        assert run.save(4)
        run.wait()
        assert run.all_steps() == [0, 4]


def test_intervals_wait_for_the_save_in_flight_and_never_overlap(storage: FakeStorage) -> None:
    with fake_run(storage, save=2) as run:
        storage.gate.clear()
        assert run.save(0)
        assert not run.save(1)
        threading.Timer(0.2, storage.gate.set).start()
        assert run.save(2)
        assert "commit 0" in storage.log
    assert storage.steps() == [0, 2]


def test_force_saves_whatever_the_policy_says(storage: FakeStorage) -> None:
    with fake_run(storage, save=None) as run:
        assert not run.save(0)
        assert run.save(1, force=True)
        run.wait()
    assert storage.steps() == [1]


def test_a_save_policy_sees_steps_times_and_context(storage: FakeStorage) -> None:
    seen: list[tuple[int, list[int], bool, bool]] = []

    class Recorder:
        def should_save(self, step: Any, previous_steps: Any, *, context: Any) -> bool:
            assert all(info.time.tzinfo is not None for info in [step, *previous_steps])
            previous = [info.step for info in previous_steps]
            seen.append((step.step, previous, context.is_saving_in_progress, context.reached_preemption))
            return step.step in (0, 2)

    with fake_run(storage, save=Recorder()) as run:
        for step in range(3):
            run.save(step)
            run.wait()
        storage.gate.clear()
        run.save(3, force=True)
        run.save(4)
        storage.gate.set()
    assert seen == [
        (0, [], False, False),
        (1, [0], False, False),
        (2, [0], False, False),
        (4, [0, 2, 3], True, False),
    ]


def test_a_step_without_a_save_costs_microseconds(storage: FakeStorage) -> None:
    """Structurally: nothing of the state is looked at, and nothing is allocated for it."""
    looked: list[str] = []

    class Watched:
        def state_dict(self) -> dict[str, Any]:
            looked.append("state_dict")
            return {}

        def load_state_dict(self, state: Any) -> None: ...

    with Checkpointer("run", {"watched": Watched()}, save=1000, rng=False) as run:
        run.save(0)
        run.wait()
        looked.clear()
        for step in range(1, 100):
            run.save(step)
    assert looked == []


def test_timedelta_policy(storage: FakeStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_run(storage, save=datetime.timedelta(hours=1)) as run:
        assert run.save(0)
        run.wait()
        assert not run.save(1)


# ------------------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (1, [5]),
        (3, [3, 4, 5]),
        (None, [0, 1, 2, 3, 4, 5]),
        (policies.EveryNSteps(2), [0, 2, 4, 5]),
        (policies.AnyPreservationPolicy([policies.LatestN(1), policies.CustomSteps([1])]), [1, 5]),
        (policies.BestN(get_metric_fn=lambda metrics: -metrics["loss"], n=1), [2, 5]),
    ],
)
def test_preservation(storage: FakeStorage, keep: Any, left: list[int]) -> None:
    losses = [5.0, 4.0, 1.0, 3.0, 2.0, 6.0]
    with fake_run(storage, keep=keep) as run:
        for step, loss in enumerate(losses):
            run.save(step, metrics={"loss": loss}, force=True)
        run.wait()
        assert run.all_steps() == left


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("at", range(6))
def test_a_step_whose_loss_is_nan_is_never_the_best(at: int, reverse: bool, storage: FakeStorage) -> None:
    losses = {0: 0.9, 1: 0.2, 2: 0.5, 3: 0.1, 4: 0.4, 5: 0.7, 6: 0.8} | {at: math.nan}
    sign = 1 if reverse else -1
    keep = policies.BestN(get_metric_fn=lambda metrics: sign * metrics["loss"], reverse=reverse, n=2)
    with fake_run(storage, save=1, keep=keep) as run:
        for step, loss in losses.items():
            run.save(step, metrics={"loss": loss})
            run.wait()
        numbers = [step for step in losses if step != at]
        assert run.all_steps() == sorted({*sorted(numbers, key=losses.__getitem__)[:2], 6})


def test_a_policy_that_asks_for_no_metrics_reads_no_manifest(
    storage: FakeStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many steps on object storage that takes long."""
    with fake_run(storage, save=1, keep=None) as run:
        list(run.steps(4))
    read: list[int] = []
    manifest = storage.manifest
    monkeypatch.setattr(storage, "manifest", lambda step: (read.append(step), manifest(step))[1])
    with fake_run(storage, save=1, keep=2) as run:
        run.save(9)
        run.wait()
        assert run.all_steps() == [3, 9]
    assert set(read) <= {3}


def test_the_new_step_is_committed_before_an_old_one_goes(storage: FakeStorage) -> None:
    with fake_run(storage, keep=1) as run:
        run.save(0, force=True)
        run.save(1, force=True)
    assert storage.log == ["clean", "commit 0", "commit 1", "delete 0"]


def test_best_step_and_metrics_of_any_kind(storage: FakeStorage) -> None:
    with fake_run(storage, keep=None) as run:
        assert run.best_step("loss") is None
        for step, value in enumerate((3.0, torch.tensor(1.0), jnp.float32(2.0), np.float64(4.0))):
            run.save(step, metrics={"loss": value}, force=True)
        run.save(4, metrics={"other": _torchax.readable(jnp.float32(0.5))}, force=True)
        run.wait()
        assert run.best_step("loss") == 1
        assert run.best_step("loss", mode="max") == 3
        assert run.best_step("other") == 4
        with pytest.raises(ConfigError, match="mode must be"):
            run.best_step("loss", mode="median")
        with pytest.raises(ConfigError, match="metric loss must be a real number"):
            run.save(5, metrics={"loss": "low"}, force=True)
    assert storage.committed[1].metrics == {"loss": 1.0}


def test_a_step_that_cannot_be_deleted_is_tried_again(storage: FakeStorage, caplog: pytest.LogCaptureFixture) -> None:
    delete = storage.delete

    def failing(step: int) -> None:
        storage.delete = delete  # type: ignore[method-assign]
        raise PermissionError("not now")

    storage.delete = failing  # type: ignore[method-assign]
    with fake_run(storage, keep=1) as run:
        for step in range(3):
            run.save(step, force=True)
        run.wait()
        assert run.all_steps() == [2]
    assert "step 0 could not be deleted" in caplog.text


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("ask", ["save", "wait", "close"])
def test_errors_of_background_saves_are_raised_once_with_the_step(storage: FakeStorage, ask: str) -> None:
    storage.failures[0] = OSError("disk full")
    run = fake_run(storage)
    run.save(0)
    run._main.saver._work_in_flight.exception()
    calls: dict[str, Callable[[], Any]] = {"save": lambda: run.save(1), "wait": run.wait, "close": run.close}
    with pytest.raises(SaveError, match="step 0 was not saved: OSError: disk full") as caught:
        calls[ask]()
    assert caught.value.step == 0
    assert isinstance(caught.value.__cause__, OSError)
    run.close()
    assert storage.steps() == ([1] if ask == "save" else [])
    assert [record.error is None for record in run.history] == ([False, True] if ask == "save" else [False])


def test_a_preservation_policy_that_fails_is_told_and_loses_nothing(storage: FakeStorage) -> None:
    keep = policies.BestN(get_metric_fn=lambda metrics: metrics["accuracy"], n=1)
    run = fake_run(storage, keep=keep)
    run.save(0, metrics={"loss": 1.0})
    run.wait()
    run.save(1, metrics={"loss": 2.0})
    with pytest.raises(SaveError, match="step 1 was saved, but letting older steps go failed: KeyError") as caught:
        run.close()
    assert caught.value.committed
    assert storage.steps() == [0, 1]


def test_a_failed_save_never_stops_later_ones(storage: FakeStorage) -> None:
    storage.failures = {step: OSError("full") for step in (1, 2)}
    errors = []
    with fake_run(storage) as run:
        for step in range(5):
            try:
                run.save(step)
            except SaveError as error:
                errors.append(error.step)
            run._main.saver.collect()
    assert errors == [1, 2]
    assert storage.steps() == [0, 3, 4][-3:]


def test_a_failed_step_can_be_saved_again(storage: FakeStorage) -> None:
    storage.failures[3] = OSError("full")
    with fake_run(storage) as run:
        run.save(3)
        with pytest.raises(SaveError, match="step 3"):
            run.wait()
        storage.failures.clear()
        assert run.save(3)
    assert storage.steps() == [3]


def test_an_error_at_the_end_does_not_hide_the_loop_s_own(storage: FakeStorage) -> None:
    storage.failures[0] = OSError("full")

    def loop() -> None:
        with fake_run(storage) as run:
            run.save(0)
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as caught:
        loop()
    assert any("step 0 was not saved" in note for note in caught.value.__notes__)
    with pytest.raises(SaveError, match="step 0"), fake_run(storage) as run:
        run.save(0)


def test_duplicate_and_older_steps(storage: FakeStorage) -> None:
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


def test_a_closed_checkpointer_says_so(storage: FakeStorage) -> None:
    run = fake_run(storage)
    run.close()
    run.close()
    with pytest.raises(ConfigError, match="closed"):
        run.save(0)


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


@pytest.mark.parametrize("name", ["manifest", "rng", "a/b", "", ".hidden", 3])
def test_bad_item_names(tmp_path: Path, name: Any) -> None:
    with pytest.raises(ConfigError, match="cannot name an item"):
        Checkpointer(str(tmp_path / "run"), {name: weights()})


def test_bad_paths(tmp_path: Path) -> None:
    a_file = tmp_path / "file"
    a_file.write_text("not a run")
    other = tmp_path / "other"
    (other / "photos").mkdir(parents=True)
    classes = tmp_path / "classes"
    (classes / "3").mkdir(parents=True)
    (classes / "3" / "image.png").write_text("")
    for path, message in [
        (a_file, "is a file"),
        (a_file / "below", "cannot be used for a run"),
        (other, r"holds no run but other things \(photos\)"),
        (classes, "holds no run but other things"),
        (Path("/proc/none/run"), "cannot be used for a run"),
        ("s3://bucket/run", "only local folders and gs:// are supported"),
    ]:
        with pytest.raises(ConfigError, match=message):
            torchorbax.resume(nn.Linear(1, 1), None, str(path))


def test_missing_gcs_extra_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'torchorbax\[gcs\]'"):
        Checkpointer("gs://bucket/run", {"w": weights()})


# ----------------------------------------------------------------------------------------------- real files, real loops


def train(run: Checkpointer, step: Any, steps: int) -> list[float]:
    losses = []
    for i in run.steps(steps):
        loss = step(batch_of(i))
        run.log(loss=loss)
        losses.append(float(loss))
    return losses


def objects(kind: str, *, meta: bool = False) -> tuple[TiedNet, Any, dict[str, Any]]:
    torch.manual_seed(0)
    with torch.device("meta" if meta else "cpu"):
        model = TiedNet()
    if kind == "optax":
        return model, torchorbax.OptaxOptimizer(model, optax.adamw(0.01)), {}
    cls = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}[kind]
    optimizer = cls(model.parameters(), lr=0.01, **({"momentum": 0.9} if kind == "sgd" else {}))
    return model, optimizer, {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2)}


@pytest.mark.parametrize("meta", [False, True], ids=["cpu", "meta"])
@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd", "optax"])
def test_a_resumed_run_is_the_same_run(kind: str, meta: bool, tmp_path: Path, mesh: Mesh) -> None:
    shardings = (mesh, RULES)

    def run_to(path: Path, steps: int, *, meta: bool = False) -> tuple[list[float], dict[str, bytes], TiedNet, Any]:
        model, optimizer, state = objects(kind, meta=meta)
        step = torchorbax.train_step(model, optimizer, loss_fn, batch_sharding=P("fsdp"))
        with torchorbax.resume(model, optimizer, str(path), state=state, shardings=shardings) as run:
            losses = []
            for i in run.steps(steps):
                losses.append(float(step(batch_of(i))))
                for scheduler in state.values():
                    scheduler.step()
        return losses, {name: bits(array) for name, array in to_jax(model).items()}, model, optimizer

    _torchax.set_rng_key(jax.random.key(1))
    expected, parameters, _, _ = run_to(tmp_path / "whole", 6)
    _torchax.set_rng_key(jax.random.key(1))
    first, _, _, _ = run_to(tmp_path / "parts", 3)
    _torchax.set_rng_key(jax.random.key(99))  # whatever the new process had
    second, resumed, model, optimizer = run_to(tmp_path / "parts", 6, meta=meta)
    assert first + second == expected
    assert resumed == parameters
    assert model.head.weight is model.embed.weight
    if kind != "optax":
        assert optimizer.param_groups[0]["params"][0] is model.embed.weight
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 0.1**3)


def test_the_run_reports_where_it_stands(tmp_path: Path) -> None:
    model, optimizer, _ = objects("sgd")
    step = torchorbax.train_step(model, optimizer, loss_fn)
    with torchorbax.resume(model, optimizer, str(tmp_path / "run")) as run:
        assert (run.step, run.next_step) == (None, 0)
        train(run, step, 3)
        assert run.next_step == 3
        train(run, step, 5)
    assert run.all_steps()[-1] == 4, "the last step of a continuous run is saved"
    for record in run.history:
        assert 0 < record.stall_s <= record.commit_s
        assert record.nbytes > sum(array.nbytes for array in to_jax(model).values())
        assert record.metrics["loss"] > 0
    model, optimizer, _ = objects("sgd")
    run = torchorbax.resume(model, optimizer, str(tmp_path / "run"))
    assert (run.step, run.next_step) == (4, 5)
    assert list(run.steps(5)) == []
    run.close()


def test_hand_written_loop_with_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, optimizer, _ = objects("sgd")
    step = torchorbax.train_step(model, optimizer, loss_fn)
    run = torchorbax.resume(model, optimizer, "runs/a", save=2, keep=None)
    monkeypatch.chdir("/")
    started = [run.save(i, metrics={"loss": step(batch_of(i))}) for i in range(run.next_step, 5)]
    run.close()
    assert started == [True, False, True, False, True]
    assert Checkpointer(str(tmp_path / "runs" / "a"), {}, rng=False).all_steps() == [0, 2, 4]


def test_functional_loop(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    params = {name: jnp.asarray(value.detach().numpy()) for name, value in model.named_parameters()}
    tx = optax.adam(0.1)
    opt_state = tx.init(params)
    torchorbax.place_(model)

    @jax.jit
    def step(params: Any, opt_state: Any) -> Any:
        grads = jax.grad(lambda p: (p["weight"] ** 2).sum() + p["bias"].sum())(params)
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state

    path = str(tmp_path / "run")
    with torchorbax.resume(model, None, path, state={"opt": tx.init(params)}) as run:
        for i in range(3):
            params, opt_state = step(params, opt_state)
            run.save(i, {"model": params, "opt": opt_state}, force=True)
        with pytest.raises(ConfigError, match="save got state for optimiser"):
            run.save(9, {"optimiser": opt_state}, force=True)
        with pytest.raises(torchorbax.MismatchError, match="weight: shape"):
            run.save(9, {"model": {"weight": params["bias"]}}, force=True)
        with pytest.raises(torchorbax.MismatchError, match="wieght: found float32"):
            run.save(9, {"model": {"wieght": params["weight"]}}, force=True)

    fresh = nn.Linear(3, 2)
    with torchorbax.resume(fresh, None, path, state={"opt": tx.init(params)}) as run:
        assert run.step == 2
        jax.tree.map(np.testing.assert_array_equal, run.state["opt"], opt_state)
    np.testing.assert_array_equal(fresh.weight.detach().numpy(), params["weight"])


@pytest.mark.parametrize("staging", ["auto", "device", "host"])
@pytest.mark.parametrize("spec", [P(), P("fsdp")], ids=str)
@pytest.mark.parametrize("size", [1 << 21, 1 << 10])
def test_donation_right_after_save_leaves_the_checkpoint_right(
    staging: Any, spec: P, size: int, mesh: Mesh, tmp_path: Path
) -> None:
    w = jax.device_put(jnp.arange(size, dtype=jnp.float32), NamedSharding(mesh, spec))
    expected = bits(w)
    overwrite = jax.jit(lambda w: w * 0 - 1, donate_argnums=0)
    with Checkpointer(str(tmp_path / "run"), {"w": {"w": w}}, rng=False, staging=staging) as run:
        w = jax.block_until_ready(w + 0)  # a program's result, in memory that donation can take
        run.save(0, {"w": {"w": w}})
        for _ in range(3):  # in the memory of the saved one, where that is not refused
            w = overwrite(w)
        assert float(w.max()) == -1
    assert bits(torchorbax.load(str(tmp_path / "run"), item="w")["w"]) == expected


def test_nothing_grows_over_many_saves(mesh: Mesh, tmp_path: Path) -> None:
    sharding = NamedSharding(mesh, P("fsdp"))
    change = jax.jit(lambda tree: jax.tree.map(lambda array: array + 1, tree), donate_argnums=0)
    tree = {str(index): jax.device_put(jnp.ones((64, 1 << (6 + index % 6))), sharding) for index in range(100)}
    counts = []
    with Checkpointer(str(tmp_path / "run"), {"tree": tree}, save=None, keep=2, rng=False) as run:
        for step in range(8):
            tree = jax.block_until_ready(change(tree))
            for offset in range(50):
                assert not run.save(100 * step + offset, {"tree": tree})  # nothing to do
            assert run.save(100 * step + 99, {"tree": tree}, force=True)
            run.wait()
            gc.collect()
            files = len([path for path in tmp_path.rglob("*") if path.is_file()])
            counts.append((threading.active_count(), len(jax.live_arrays()), len(os.listdir("/proc/self/fd")), files))
    for what in range(3):
        assert max(count[what] for count in counts[3:]) <= max(count[what] for count in counts[:3]), counts
    assert counts[-1][3] < 2 * counts[1][3], counts  # so many files has OCDBT, give or take some


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


def test_cpu_tensors_changed_right_after_save(tmp_path: Path) -> None:
    model = nn.Linear(256, 256)
    expected = bits(model.weight.detach().numpy())
    with torchorbax.resume(model, None, str(tmp_path / "run")) as run:
        run.save(0)
        with torch.no_grad():
            model.weight.zero_()
    assert bits(torchorbax.load(run.path)["weight"]) == expected


def test_reference_staging_fails_aloud_when_arrays_are_donated(storage: FakeStorage, tmp_path: Path) -> None:
    storage.gate.clear()
    state = {"w": {"w": jnp.ones(4)}}
    real = Storage(str(tmp_path / "run"))
    write = storage.write

    def write_for_real(manifest: Manifest, arrays: Mapping[str, Any], channel: Any = None) -> Manifest:
        write(manifest, arrays)
        return real.write(manifest, arrays)

    storage.write = write_for_real  # type: ignore[method-assign]
    run = Checkpointer("run", state, rng=False, staging="reference")
    run.save(0)
    jax.jit(lambda w: w + 1, donate_argnums=0)(state["w"]["w"])
    storage.gate.set()
    with pytest.raises(SaveError, match="deleted"):
        run.close()
    assert real.steps() == []


def test_deleted_arrays_are_named_and_nothing_is_lost(tmp_path: Path) -> None:
    model = seeded()
    torchorbax.place_(model)
    with torchorbax.resume(model, None, str(tmp_path / "run")) as run:
        run.save(0)
        run.wait()
        jax.jit(lambda w: w + 1, donate_argnums=0)(model.hidden.weight.jax())
        with pytest.raises(torchorbax.DeletedArrayError, match=r"model\.hidden\.weight"):
            run.save(1)
        assert run.all_steps() == [0]
        run.restore()
        assert not model.hidden.weight.jax().is_deleted()
        assert run.save(1)


# ---------------------------------------------------------------------------------------------------------- restore


@pytest.fixture
def saved(tmp_path: Path) -> str:
    """A run with two steps of a small network."""
    model, optimizer, _ = objects("adamw")
    step = torchorbax.train_step(model, optimizer, loss_fn)
    with torchorbax.resume(model, optimizer, str(tmp_path / "saved"), save=None) as run:
        for i in range(2):
            step(batch_of(i))
            run.save(i, force=True)
    return run.path


def test_restore_an_older_step(saved: str) -> None:
    model, optimizer, _ = objects("adamw")
    with torchorbax.resume(model, optimizer, saved) as run:
        newest = bits(model.hidden.weight.detach().numpy())
        assert run.restore(0) == 0
        assert bits(model.hidden.weight.detach().numpy()) != newest
        assert (run.step, run.next_step) == (0, 1)
        with pytest.raises(torchorbax.CheckpointNotFoundError, match="no step 7 found; steps there: 0, 1") as caught:
            run.restore(7)
        assert caught.value.step == 7


def test_a_mismatch_lists_everything_and_changes_nothing(saved: str) -> None:
    class Other(TiedNet):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = nn.Linear(32, 16)
            self.norm = nn.LayerNorm(32)
            self.extra = nn.Parameter(torch.zeros(2, dtype=torch.float16))
            self.head.weight = nn.Parameter(torch.zeros(64, 32))

    model = Other()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    before = {name: bits(value.detach().numpy()) for name, value in model.state_dict().items()}
    with pytest.raises(torchorbax.MismatchError, match="step 1 does not fit the live objects") as caught:
        torchorbax.resume(model, optimizer, saved)
    found = {(problem.kind, problem.item, problem.name) for problem in caught.value.problems}
    assert {
        ("missing", "model", "extra"),
        ("unexpected", "model", "norm.running_mean"),
        ("shape", "model", "hidden.weight"),
        ("shape", "model", "hidden.bias"),
        ("ties", "model", "head.weight"),
        ("missing", "optimizer", "extra"),
        ("missing", "optimizer", "head.weight"),
    } <= found
    assert {name: bits(value.detach().numpy()) for name, value in model.state_dict().items()} == before
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert not optimizer.state


def test_items_and_kinds_must_agree(saved: str) -> None:
    model, _, _ = objects("adamw")
    with pytest.raises(torchorbax.MismatchError, match=r"whole item: found a torch\.optim item, but there is no such"):
        torchorbax.resume(model, None, saved)
    with pytest.raises(
        torchorbax.MismatchError,
        match=r"optimizer: the whole item: placement: expected optax, found a torch\.optim item",
    ):
        torchorbax.resume(model, torchorbax.OptaxOptimizer(model, optax.sgd(0.1)), saved)
    with pytest.raises(torchorbax.MismatchError, match="ema: the whole item: expected pytree, but it is missing"):
        torchorbax.resume(model, torch.optim.AdamW(model.parameters()), saved, state={"ema": weights()})


def test_dtypes_are_never_cast(saved: str) -> None:
    model = TiedNet().bfloat16()
    with pytest.raises(torchorbax.MismatchError, match=r"embed\.weight: dtype: expected bfloat16, found float32"):
        torchorbax.resume(model, torch.optim.AdamW(model.parameters()), saved)


def test_the_one_widening_that_loses_nothing(saved: str) -> None:
    """Training made BatchNorm's counter int32 on jax; a CPU model has int64."""
    model, optimizer, _ = objects("adamw")
    with torchorbax.resume(model, optimizer, saved):
        assert model.norm.num_batches_tracked.dtype == torch.int64
        assert model.norm.num_batches_tracked.item() == 2


# Orbax closes its event loop while TensorStore still has reads under way that are going to fail.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_step_is_skipped_with_a_reason_and_all_bad_is_an_error(saved: str) -> None:
    for file in Path(saved, "1", "model", "ocdbt.process_0", "d").iterdir():
        file.write_bytes(b"")
    model, optimizer, _ = objects("adamw")
    with pytest.warns(UserWarning, match="skipped damaged step 1"), torchorbax.resume(model, optimizer, saved) as run:
        assert run.step == 0
    with pytest.raises(torchorbax.CorruptCheckpointError, match="step 1") as one:
        run.restore(1)
    assert list(one.value.reasons) == [1]
    Path(saved, "0", "manifest", "metadata").write_text("{")
    before = bits(model.hidden.weight.detach().numpy())
    with pytest.raises(torchorbax.CorruptCheckpointError, match="2 damaged steps") as caught:
        torchorbax.resume(model, optimizer, saved)
    assert set(caught.value.reasons) == {0, 1}
    assert bits(model.hidden.weight.detach().numpy()) == before


def test_a_model_on_meta_needs_a_checkpoint(tmp_path: Path) -> None:
    model, optimizer, _ = objects("adamw", meta=True)
    with pytest.raises(
        ConfigError, match=r"8 tensors of the model are on meta \(embed\.weight, \.\.\.\) and .* has no"
    ):
        torchorbax.resume(model, optimizer, str(tmp_path / "new"))
    assert model.embed.weight.is_meta


def test_buffers_that_no_checkpoint_has_are_reported(tmp_path: Path) -> None:
    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.register_buffer("angles", torch.ones(2), persistent=False)

    path = str(tmp_path / "run")
    with torchorbax.resume(Rotary(), None, path) as run:
        run.save(0)
    with torch.device("meta"):
        model = Rotary()
    with pytest.warns(UserWarning, match="still on meta after the restore.*: angles"):
        torchorbax.resume(model, None, path).close()
    assert model.angles.is_meta
    assert not _torchax.array_of(model.weight).is_deleted()


def test_an_optimizer_of_another_model(tmp_path: Path) -> None:
    model, other = TiedNet(), TiedNet()
    with pytest.raises(ConfigError, match="5 of the optimizer's 5 parameters belong to no model that is saved"):
        torchorbax.resume(model, torch.optim.SGD(other.parameters(), lr=0.1), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_without_shardings_live_tensors_stay_where_they_are(saved: str, mesh: Mesh) -> None:
    model, optimizer, _ = objects("adamw")
    with torchorbax.resume(model, optimizer, saved):
        assert not _torchax.is_torchax(model.embed.weight)
        assert optimizer.state[model.embed.weight]["exp_avg"].device.type == "cpu"
    model, optimizer, _ = objects("adamw")
    torchorbax.place_(model, optimizer, (mesh, RULES))
    with torchorbax.resume(model, optimizer, saved):
        assert model.embed.weight.jax().sharding == NamedSharding(mesh, P("fsdp"))
        assert optimizer.state[model.embed.weight]["exp_avg"].jax().sharding == NamedSharding(mesh, P("fsdp"))


def test_rng_can_be_left_out(tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    model = nn.Linear(1, 1)
    with torchorbax.resume(model, None, path) as run:
        run.save(0)
    torch.manual_seed(5)
    expected = torch.get_rng_state()
    with torchorbax.resume(model, None, path, rng=False):
        assert torch.equal(torch.get_rng_state(), expected)
    with torchorbax.resume(model, None, path):
        assert not torch.equal(torch.get_rng_state(), expected)


def test_plain_orbax_reads_every_item(saved: str) -> None:
    model, optimizer, _ = objects("adamw")
    with torchorbax.resume(model, optimizer, saved):
        pass
    with ocp.CheckpointManager(saved) as manager:
        assert list(manager.all_steps()) == [0, 1]
        restored = manager.restore(
            1, args=ocp.args.Composite(model=ocp.args.PyTreeRestore(), optimizer=ocp.args.PyTreeRestore())
        )
    assert set(restored["model"]) == {name for name, _ in model.named_parameters()} | {
        name for name, _ in model.named_buffers()
    }
    assert bits(restored["model"]["hidden.weight"]) == bits(model.hidden.weight.detach().numpy())
    exp_avg = optimizer.state[model.hidden.weight]["exp_avg"]
    assert bits(restored["optimizer"]["hidden.weight.exp_avg"]) == bits(exp_avg.numpy())


def test_load(saved: str, mesh: Mesh) -> None:
    arrays = torchorbax.load(saved)
    assert arrays["head.weight"] is arrays["embed.weight"]
    older = torchorbax.load(saved, step=0)
    assert bits(older["hidden.weight"]) != bits(arrays["hidden.weight"])
    sharded = torchorbax.load(saved, shardings=(mesh, RULES))
    assert sharded["embed.weight"].sharding == NamedSharding(mesh, P("fsdp"))
    assert {name: bits(array) for name, array in sharded.items()} == {
        name: bits(array) for name, array in arrays.items()
    }
    assert "hidden.weight.exp_avg" in torchorbax.load(saved, item="optimizer")
    with pytest.raises(ConfigError, match="no item 'ema'; it has model, optimizer, rng"):
        torchorbax.load(saved, item="ema")
    with pytest.raises(torchorbax.CheckpointNotFoundError, match="no step 9"):
        torchorbax.load(saved, step=9)
    with pytest.raises(torchorbax.CheckpointNotFoundError, match="no checkpoint found"):
        torchorbax.load(saved + "-not")


def test_leftovers_of_a_killed_run_are_removed_before_the_next_save(tmp_path: Path) -> None:
    root = tmp_path / "run"
    for leftover in ("3.orbax-checkpoint-tmp", ".torchorbax-deleted-1"):
        (root / leftover).mkdir(parents=True)
        (root / leftover / "data").write_text("x")
    (root / "notes.txt").write_text("mine")
    with Checkpointer(str(root), {"w": weights()}) as run:
        assert run.all_steps() == []
        assert (root / "3.orbax-checkpoint-tmp").exists()
        run.save(0)
    assert sorted(entry.name for entry in root.iterdir()) == ["0", "notes.txt"]


def test_the_caller_never_waits_for_the_device(tmp_path: Path) -> None:
    """No array is read back on the caller's thread: JAX would refuse it here."""
    state = {"w": {"w": jax.device_put(jnp.ones((8, 8)))}}
    run = Checkpointer(str(tmp_path / "run"), state, rng=False)
    with jax.transfer_guard_device_to_host("disallow"):
        run.save(0, metrics={"loss": jnp.float32(1.0)})
    run.close()
    assert run.all_steps() == [0]


def test_progress_bar_shows_metrics_that_are_ready(storage: FakeStorage, capsys: pytest.CaptureFixture[str]) -> None:
    with fake_run(storage) as run:
        for _ in run.steps(3, progress=True):
            run.log(loss=0.25)
    shown = capsys.readouterr().err
    assert "loss=0.25" in shown
    assert "3/3" in shown


def test_a_body_that_saves_itself_is_left_to_it(storage: FakeStorage) -> None:
    with fake_run(storage) as run:
        for step in run.steps(3):
            if step != 1:
                run.save(step, {"w": weights(float(step))}, force=True)
                run.wait()
    assert [record.step for record in run.history] == [0, 1, 2]


def test_sigterm_that_arrives_when_save_has_already_looked(
    storage: FakeStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_run(storage, save=None) as run:
        save = run.save

        def save_then_signal(step: int, *args: Any, **kwargs: Any) -> bool:
            saved = save(step, *args, **kwargs)
            run._preemption.received = run.preempted or step == 1
            return saved

        monkeypatch.setattr(run, "save", save_then_signal)
        assert list(run.steps(5)) == [0, 1]
    assert storage.steps() == [1]


def test_breaking_out_of_the_loop_saves_no_half_step(storage: FakeStorage) -> None:
    with fake_run(storage) as run:
        for step in run.steps(10):
            run.wait()
            if step == 2:
                break
        assert run.next_step == 2
    assert storage.steps() == [0, 1]


def test_log_messages_name_what_is_waited_for(storage: FakeStorage, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "torchorbax")
    run = fake_run(storage)
    storage.gate.clear()
    run.save(4)
    timer = threading.Timer(0.2, storage.gate.set)
    timer.start()
    run.close()
    assert "waiting for step 4 to be committed" in caplog.text


def test_a_step_is_a_whole_number(storage: FakeStorage) -> None:
    with fake_run(storage) as run:
        assert run.save(np.int64(7), force=True)  # type: ignore[arg-type]
        for wrong in (7.5, "7", None):
            with pytest.raises(ConfigError, match="a step is a whole number, not"):
                run.save(wrong)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="a step cannot be negative: -1"):
            run.save(-1)
    assert type(storage.committed[7].step) is int


def test_a_last_step_that_was_not_due_is_told(storage: FakeStorage, caplog: pytest.LogCaptureFixture) -> None:
    with fake_run(storage, save=5) as run:
        assert len(list(run.steps(8))) == 8
        assert "the last step, 7, was not due and is not saved; the newest saved is 5" in caplog.text
        caplog.clear()
        assert list(run.steps(11)) == [8, 9, 10]
        assert not caplog.records


def test_two_runs_on_one_path(tmp_path: Path) -> None:
    with Checkpointer(str(tmp_path), {"w": weights(1)}) as one, Checkpointer(str(tmp_path), {"w": weights(2)}) as other:
        one.save(0, force=True)
        one.wait()
        other.save(0, force=True)
        with pytest.raises(
            SaveError, match="step 0 was not saved: somebody else has saved it meanwhile; is another run"
        ):
            other.wait()
    assert torchorbax.load(str(tmp_path), item="w")["w"][0] == 1


@pytest.mark.parametrize(
    "name", ["lr=[0.1,0.2]", "a*b", "what?", "{x}", "50%", "a b", "über/日本", "a,b;c", "[", "$HOME"]
)
def test_a_path_may_have_any_name(name: str, tmp_path: Path) -> None:
    state = {"x": {"small": jnp.ones(3), "large": jnp.arange(1 << 17), "frozen": np.arange(4)}}
    with Checkpointer(str(tmp_path / name), state) as run:
        run.save(0, force=True)
    blank = jax.tree.map(lambda leaf: leaf * 0, state)
    with Checkpointer(str(tmp_path / name), blank) as run:
        assert run.restore() == 0
    assert jax.tree.all(jax.tree.map(lambda one, other: bool((one == other).all()), state, blank))
    assert torchorbax.verify(str(tmp_path / name)) == [0]


def test_a_path_with_a_backslash_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a path with a backslash in it; choose another"):
        Checkpointer(str(tmp_path / "a\\b"), {})


def test_a_path_beside_the_run_gives_a_hint(saved: str) -> None:
    above, name = os.path.split(saved)
    with pytest.raises(
        torchorbax.CheckpointNotFoundError, match=rf"no checkpoint found; there are runs below it: .*{name}"
    ):
        torchorbax.load(above)
    step = Checkpointer(saved, {}, rng=False).all_steps()[-1]
    with pytest.raises(torchorbax.CheckpointNotFoundError, match=rf"it is step {step} of the run {saved}"):
        torchorbax.verify(f"{saved}/{step}")


def test_sigterm_saves_what_the_body_handed_over(storage: FakeStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes after `save` has said that nothing is due; the live values are stale in a functional loop."""
    seen: list[float] = []
    write = storage.write
    monkeypatch.setattr(
        storage, "write", lambda m, a, c: (seen.append(float(np.asarray(a["w"]["w"])[0])), write(m, a, c))[1]
    )
    with fake_run(storage, save=100) as run:
        for step in run.steps(9):
            run.save(step, {"w": weights(step + 1.0)}, metrics={"loss": step})
            run._preemption.received = step == 7
    assert storage.steps() == [0, 7]
    assert seen == [1.0, 8.0]
    assert storage.committed[7].metrics == {"loss": 7.0}


def test_what_was_logged_belongs_to_the_save_that_follows(storage: FakeStorage) -> None:
    with fake_run(storage) as run:
        run.log(loss=1.0, top=2.0)
        run.save(0, metrics={"top": 3.0}, force=True)
        run.save(1, force=True)
        run.wait()
        for step in run.steps(3):
            run.log(loss=5.0)
            run.save(step, force=True)
    assert [storage.committed[step].metrics for step in (0, 1, 2)] == [{"loss": 1.0, "top": 3.0}, {}, {"loss": 5.0}]


def test_the_best_of_nan_and_of_deleted_steps(storage: FakeStorage) -> None:
    with fake_run(storage, keep=None) as run:
        for step, loss in enumerate([float("nan"), 3.0, 1.0]):
            run.save(step, metrics={"loss": loss}, force=True)
        run.wait()
        assert (run.best_step("loss"), run.best_step("loss", "max")) == (2, 1)
        del storage.committed[2]  # by somebody else
        assert run.best_step("loss") == 1


def test_a_step_that_somebody_deleted_stops_nothing(tmp_path: Path) -> None:
    with Checkpointer(str(tmp_path), {"w": weights()}, rng=False) as run:
        run.save(0, force=True)
    with Checkpointer(str(tmp_path), {"w": weights()}, rng=False) as run:
        shutil.rmtree(tmp_path / "0")
        assert run.save(1)
        assert run.best_step("loss") is None
    assert run.all_steps() == [1]


METRICS: list[Any] = [
    "1",
    None,
    [1],
    1j,
    10**400,
    np.ones(2),
    jnp.ones(2),
    torch.ones((), device="meta"),
    np.array("x"),
]


@pytest.mark.parametrize("value", METRICS, ids=repr)
def test_what_is_no_metric(storage: FakeStorage, value: Any) -> None:
    with fake_run(storage) as run:
        with pytest.raises(ConfigError, match="metric loss must be a real number"):
            run.log(loss=value)
        with pytest.raises(ConfigError, match="the name of a metric must be a string, not 9"):
            run.save(0, metrics={9: 1.0})  # type: ignore[dict-item]
        assert run.all_steps() == []


def test_metrics_are_of_the_moment(storage: FakeStorage) -> None:
    changing = {"numpy": np.array(1.0), "torch": torch.tensor(1.0, dtype=torch.bfloat16)}
    storage.gate.clear()
    with fake_run(storage) as run:
        run.save(0, metrics=changing, force=True)
        changing["numpy"][...] = changing["torch"][...] = 99
        storage.gate.set()
    assert storage.committed[0].metrics == {"numpy": 1.0, "torch": 1.0}


def test_several_runs_in_one_process(tmp_path: Path) -> None:
    runs = [Checkpointer(str(tmp_path / str(index)), {"w": weights(index)}, keep=None) for index in range(3)]
    for step in range(4):
        for run in runs:
            run.save(step, force=True)
    for index, run in enumerate(runs):
        run.close()
        assert run.all_steps() == torchorbax.verify(run.path) == [0, 1, 2, 3]
        assert torchorbax.load(run.path, item="w")["w"][0] == index


@pytest.mark.parametrize(
    "path", [None, 123, True, b"abc", ["x"], "", "a\0b", "gs:/bucket/x", "~nosuchuser/x"], ids=repr
)
def test_what_is_no_path(path: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"a path must be|a URI has two slashes: gs://|nosuchuser"):
        Checkpointer(path, {"w": weights()})
    assert not list(tmp_path.iterdir())


def test_an_optimizer_of_another_class_is_a_mismatch(tmp_path: Path) -> None:
    """Its state and hyperparameters would mean something else, or nothing."""
    model = nn.Linear(2, 2)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with torchorbax.resume(model, sgd, tmp_path, save=None) as run:
        run.save(0, force=True)
    adam = torch.optim.AdamW(model.parameters())
    with pytest.raises(torchorbax.MismatchError, match="the optimizer: placement: expected a AdamW, found a SGD"):
        torchorbax.resume(model, adam, tmp_path)
    assert adam.param_groups[0]["lr"] == 1e-3
    with torchorbax.resume(model, adam, tmp_path, strict=False) as run:
        assert [problem.item for problem in run.left_out] == ["optimizer"]
        assert adam.param_groups[0]["lr"] == 1e-3


def test_typed_keys_in_optax_states_and_in_objects(tmp_path: Path) -> None:
    class Sampler:
        def __init__(self, seed: int) -> None:
            self.key = jax.random.key(seed)

        def state_dict(self) -> dict[str, Any]:
            return {"key": self.key}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.key = state["key"]

    def build(seed: int) -> tuple[nn.Module, torchorbax.OptaxOptimizer, Sampler]:
        model = seeded()
        tx = optax.chain(optax.add_noise(0.1, 0.5, key=jax.random.key(seed)), optax.sgd(0.1))
        return model, torchorbax.OptaxOptimizer(model, tx), Sampler(seed)

    model, optimizer, sampler = build(1)
    step = torchorbax.train_step(model, optimizer, loss_fn)
    with torchorbax.resume(model, optimizer, tmp_path, state={"sampler": sampler}) as run:
        step(batch_of(0))
        run.save(0, force=True)
    expected = float(step(batch_of(1))), float(step(batch_of(2)))
    model, optimizer, sampler = build(2)
    with torchorbax.resume(model, optimizer, tmp_path, state={"sampler": sampler}):
        step = torchorbax.train_step(model, optimizer, loss_fn)
        assert (float(step(batch_of(1))), float(step(batch_of(2)))) == expected
    assert bits(jax.random.key_data(sampler.key)) == bits(jax.random.key_data(jax.random.key(1)))


def test_a_cpu_model_goes_on_on_a_mesh(tmp_path: Path, mesh: Mesh) -> None:
    """Its BatchNorm counters are int64 on the CPU, and int32 on the devices."""
    model = nn.BatchNorm1d(8)
    model.num_batches_tracked.fill_(7)
    with torchorbax.resume(model, None, tmp_path, save=None) as run:
        run.save(0, force=True)
        model.num_batches_tracked.fill_(2**40)
        run.save(1, force=True)
        run.wait()
        model = nn.BatchNorm1d(8)
        run.close()
    with Checkpointer(tmp_path, {"model": model}, shardings=(mesh, {})) as run:
        with pytest.raises(torchorbax.MismatchError, match="expected values that fit into int32, found larger ones"):
            run.restore(1)
        run.restore(0)
    assert to_jax(model.num_batches_tracked).dtype == np.int32
    assert to_jax(model.num_batches_tracked) == 7


def test_a_resume_that_cannot_place_everything_restores_nothing(tmp_path: Path, mesh: Mesh) -> None:
    model = nn.Linear(8, 8)
    model.register_buffer("wide", torch.zeros(3, dtype=torch.float64), persistent=False)
    with torchorbax.resume(model, None, tmp_path, save=None) as run:
        run.save(0, force=True)
    before = bits(model.weight.detach().zero_())
    with pytest.raises(torchorbax.UnsupportedLeafError, match="wide: float64 would lose bits"):
        torchorbax.resume(model, None, tmp_path, shardings=(mesh, {"weight": P("fsdp")}))
    assert not _torchax.is_torchax(model.weight)
    assert bits(model.weight.detach()) == before


BAD_ARGUMENTS: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "optimizer": (lambda model, path: torchorbax.resume(model, 3, path), "optimizer must be a torch.optim or optax"),
    "state": (lambda model, path: torchorbax.resume(model, None, path, state=[1]), "state must be a mapping"),
    "handed": (lambda model, path: Checkpointer(path, {"m": model}).save(0, ["m"]), "save takes state= and metrics="),
    "metrics": (lambda model, path: Checkpointer(path, {"m": model}).save(0, metrics=[1]), "save takes state= and"),
    "tied": (
        lambda model, path: Checkpointer(path, {"m": model}).save(
            0, {"m": {"embed.weight": jnp.zeros((64, 32)), "head.weight": jnp.ones((64, 32))}}, force=True
        ),
        r"m: head\.weight is tied to embed\.weight, but was handed over as another array",
    ),
    "names": (lambda model, path: Checkpointer(path, {"_CHECKPOINT_METADATA": model}), "cannot name an item"),
}


@pytest.mark.parametrize("what", BAD_ARGUMENTS)
def test_bad_arguments(what: str, tmp_path: Path) -> None:
    call, message = BAD_ARGUMENTS[what]
    with pytest.raises(ConfigError, match=message):
        call(seeded(), tmp_path)


def test_values_with_arrays_in_them_are_compared_to_the_end(tmp_path: Path) -> None:
    live, wrong = Counter({"a": np.int64(1)}), Counter({"a": np.float32(1)})
    with (
        Checkpointer(tmp_path, {"seen": live}, rng=False) as run,
        pytest.raises(torchorbax.MismatchError, match="the state handed to save does not fit"),
    ):
        run.save(0, {"seen": wrong}, force=True)


def test_a_tree_handed_over_must_fit_the_live_one(tmp_path: Path) -> None:
    run = Checkpointer(tmp_path, {"moments": {"count": jnp.zeros(()), "epoch": 0}}, rng=False)
    for wrong in ({"cnt": jnp.ones(()), "epoch": 1}, {"count": jnp.ones(2), "epoch": 1}, {"count": jnp.ones(())}):
        with pytest.raises(torchorbax.MismatchError, match="the state handed to save does not fit"):
            run.save(0, {"moments": wrong}, force=True)
    assert run.save(0, {"moments": {"count": jnp.ones(()), "epoch": 1}}, force=True)
    run.wait()
    run.restore(0)
    assert (float(run.state["moments"]["count"]), run.state["moments"]["epoch"]) == (1, 1)
    run.close()
