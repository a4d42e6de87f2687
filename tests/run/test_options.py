"""The options of a run: one record, which every way to open a run shows, takes and checks alike."""

from __future__ import annotations

import dataclasses
import datetime
import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import torchorbax
from hypothesis import given
from hypothesis import strategies as st
from torchorbax import Checkpointer, ConfigError, RunOptions, policies, resume
from torchorbax._src.run.options import RunKeywords, rules_of, traffic_of

from tests.helpers.fake_runs import fake_run
from tests.helpers.memory_storage import MemoryStorage

FIELDS = {field.name: field for field in dataclasses.fields(RunOptions)}


def open_run(path: Path, **options: Any) -> Checkpointer:
    return Checkpointer(path, {"w": {"a": np.zeros(3)}}, **options)


def resume_run(path: Path, **options: Any) -> Checkpointer:
    return resume(torch.nn.Linear(2, 2), None, path, **options)


WAYS = pytest.mark.parametrize("way", [open_run, resume_run], ids=["Checkpointer", "resume"])

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"save": 0}, "save must be 'continuous', a positive number of steps"),
    ({"save": "sometimes"}, "save must be 'continuous', a positive number of steps"),
    ({"local_save": True}, "save must be 'continuous', a positive number of steps"),
    ({"save": datetime.timedelta(0)}, "a positive timedelta, None or a save policy, not datetime.timedelta"),
    ({"save": policies.NeverPolicy}, "save must be .* not <class 'torchorbax.policies.NeverPolicy'>"),
    ({"keep": -1}, "keep must be a positive number of steps, None"),
    ({"local_keep": "all"}, "keep must be a positive number of steps, None"),
    ({"shardings": "fsdp"}, "shardings must be .jax.sharding.Mesh, rules by name."),
    ({"takeover": "no"}, "takeover must be True or False, not 'no'"),
    ({"read_only": 1}, "read_only must be True or False, not 1"),
    ({"verify_after_save": "last"}, "verify_after_save must be 'first', True or False, not 'last'"),
    ({"staging": "disk"}, "staging must be one of 'auto', 'reference', 'device', 'host', not 'disk'"),
    ({"compression": "gzip"}, "compression must be 'zstd' or None, not 'gzip'"),
    ({"max_host_bytes": 1 << 20}, "max_host_bytes must be an int of at least 67108864"),
    ({"replicas": "some"}, "replicas must be 'first' or 'all', not 'some'"),
    ({"storage_timeout_s": 0}, "storage_timeout_s must be a positive number of seconds"),
    ({"barrier_timeout_s": True}, "barrier_timeout_s must be a positive number of seconds"),
    ({"local": "gs://bucket/fast"}, "local must be a folder on each host, not gs://bucket/fast"),
    ({"preemption_notice": "SIGUSR1"}, "preemption_notice must be a callable .* or None, not 'SIGUSR1'"),
    ({"preemption_notice": torchorbax.GceMaintenanceNotice}, "preemption_notice must be a callable .* not <class"),
    ({"preemption_patience_s": -1}, "preemption_patience_s must be a number of seconds, not -1"),
    ({"compile_cache": None}, "compile_cache must be True, False or a folder, not None"),
]


@pytest.mark.parametrize(
    ("options", "message"), REFUSED, ids=lambda value: "-".join(value) if isinstance(value, dict) else ""
)
def test_a_value_that_cannot_work_is_refused_before_anything_is_made(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        RunOptions(**options)
    for way in (open_run, resume_run):
        with pytest.raises(ConfigError, match=message):
            way(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_every_option_that_can_be_wrong_is_among_those_refused() -> None:
    switches = {name for name, field in FIELDS.items() if field.type == "bool"}
    assert {name for options, _ in REFUSED for name in options} - switches == FIELDS.keys() - switches


@pytest.mark.parametrize("function", [Checkpointer, resume], ids=lambda function: function.__name__)
def test_every_option_is_in_the_signature_with_its_type_and_default(function: Callable[..., Any]) -> None:
    shown = inspect.signature(function).parameters
    assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in shown.values())
    for name, field in FIELDS.items():
        assert shown[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert shown[name].default == field.default
        assert shown[name].annotation == field.type


def test_type_checkers_see_the_same_names_and_types() -> None:
    assert typing.get_type_hints(RunKeywords) == typing.get_type_hints(RunOptions)


def test_every_option_is_documented() -> None:
    attributes = inspect.cleandoc(RunOptions.__doc__ or "").partition("Attributes:")[2]
    documented = [line.strip().partition(":")[0] for line in attributes.splitlines() if line[:5].strip()]
    assert [name for name in documented if name in FIELDS] == list(FIELDS)


@WAYS
@pytest.mark.parametrize(
    ("name", "hint"),
    [("barier_timeout_s", "did you mean 'barrier_timeout_s'?"), ("kep", "did you mean 'keep'?"), ("x", "it takes ")],
)
def test_an_unknown_option_is_refused_with_the_most_similar_one(
    way: Callable[..., Checkpointer], name: str, hint: str, tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match="got an unexpected keyword argument") as caught:
        way(tmp_path / "run", **{name: 3})
    assert repr(name) in str(caught.value)
    assert hint in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_an_argument_of_resume_alone_is_suggested_by_resume_alone(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"^resume\(\) got .* 'init_form'; did you mean 'init_from'"):
        resume_run(tmp_path, init_form="runs/base")
    with pytest.raises(TypeError, match=r"^Checkpointer\(\) got .* 'init_form'; it takes path, state, save"):
        open_run(tmp_path, init_form="runs/base")


@WAYS
def test_options_reach_the_run(way: Callable[..., Checkpointer], tmp_path: Path) -> None:
    options = {"save": 2, "keep": 1, "local": tmp_path / "fast", "local_save": 1, "local_keep": None, "rng": False}
    with way(tmp_path / "run", **options) as run:
        list(run.steps(5, progress=False))
    assert run.all_steps() == [4]
    assert len([record for record in run.history if "fast" in record.path]) == 5
    with way(tmp_path / "run", **options) as again:
        assert again.restore() == 4


def test_the_record_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'keep'"):
        RunOptions().keep = 5  # type: ignore[misc]
    assert dataclasses.replace(RunOptions(), keep=5).keep == 5


def test_shardings_become_rules() -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("fsdp",))
    assert rules_of(RunOptions()) is None
    rules = rules_of(RunOptions(shardings=(mesh, {"*": jax.sharding.PartitionSpec("fsdp")})))
    assert rules is not None
    assert rules("w", (8,)).spec == jax.sharding.PartitionSpec("fsdp")


@given(
    compression=st.sampled_from(["zstd", None]),
    max_host_bytes=st.integers(64 << 20, 1 << 40),
    replicas=st.sampled_from(["first", "all"]),
    single_replica_restore=st.booleans(),
    storage_timeout_s=st.floats(0.001, 86_400),
)
def test_every_word_about_storage_is_heeded(**options: Any) -> None:
    traffic = traffic_of(RunOptions(**options))
    assert traffic.compressed == (options["compression"] == "zstd")
    assert traffic.max_host_bytes == options["max_host_bytes"]
    assert traffic.all_replicas_write == (options["replicas"] == "all")
    assert traffic.first_replica_reads == options["single_replica_restore"]
    assert traffic.timeout_s == options["storage_timeout_s"]


def test_the_record_is_public() -> None:
    assert torchorbax.RunOptions is RunOptions


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
