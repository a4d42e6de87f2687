"""What was compiled in one life of a run is found in the next, whole, or not at all."""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax._src import compilation_cache
from torchorbax import Checkpointer, ConfigError
from torchorbax._src.run import compile_cache
from torchorbax._src.run.compile_cache import ProgramCache, use_compile_cache

from tests.helpers.programs import RunPython

LIFE = """
    import json, os, signal, sys
    import jax
    jax.config.update("jax_enable_compilation_cache", True)  # which the tests turn off
    import numpy as np
    import torchorbax
    from jax.sharding import Mesh
    from tests.helpers.models import RULES, batch_of, loss_fn, objects

    found = []
    jax.monitoring.register_event_listener(lambda event, **_: found.append(event))
    path, programs, sharded, stop = sys.argv[1:]
    model, optimizer, _ = objects("adamw")
    step = torchorbax.train_step(model, optimizer, loss_fn)
    shardings = (Mesh(np.array(jax.devices()), ("fsdp",)), RULES) if sharded == "True" else None
    run = torchorbax.resume(model, optimizer, path, shardings=shardings, compile_cache=programs)
    del found[:]
    losses = [float(step(batch_of(run.next_step)))]
    hits = found.count("/jax/compilation_cache/cache_hits")
    run.save(run.next_step, force=True)
    run.wait()
    print(json.dumps({"losses": losses, "hits": hits, "next": run.next_step}), flush=True)
    if run.next_step < int(stop):
        os.kill(os.getpid(), signal.SIGKILL)
    run.close()
"""

Live = Callable[..., tuple[list[float], int]]


@pytest.fixture
def live(run_python: RunPython, tmp_path: Path) -> Live:
    """One life of a run, which is killed after its step, or ends: the losses, and how many programs were found."""

    def life(name: str, programs: str = "programs", *, sharded: bool, stop: int = 99) -> tuple[list[float], int]:
        done = run_python(LIFE, tmp_path / name, tmp_path / programs, sharded, stop, devices=8, check=False)
        assert done.stdout, done.stderr
        said = json.loads(done.stdout)
        assert (done.returncode == 0) == (said["next"] >= stop), done.stderr
        return said["losses"], said["hits"]

    return life


@pytest.mark.parametrize("sharded", [False, True], ids=["one device", "a mesh"])
def test_a_killed_run_finds_its_programs_again_and_computes_the_same(live: Live, sharded: bool) -> None:
    first, hits = live("run", sharded=sharded)
    assert hits == 0
    second, hits = live("run", sharded=sharded)
    assert hits > 0
    assert live("plain", "elsewhere", sharded=sharded)[0] == first
    assert live("plain", "another", sharded=sharded) == (second, 0)


def test_damaged_entries_are_compiled_again_without_a_warning(live: Live, tmp_path: Path) -> None:
    live("run", sharded=False)
    entries = sorted((tmp_path / "programs").iterdir())
    for index, entry in enumerate(entries):
        content = entry.read_bytes()
        flipped = bytes([content[-1] ^ 1])
        entry.write_bytes([b"garbage", b"", content[:-9], content[:-1] + flipped][index % 4])
    _, hits = live("run", sharded=False)  # warnings are errors there
    assert hits == 0
    _, hits = live("run", sharded=False, stop=3)
    assert hits > 0


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(program=st.binary(min_size=1, max_size=200), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_program_comes_back_whole_or_not_at_all(tmp_path: Path, program: bytes, where: float, bit: int) -> None:
    cache = ProgramCache(tmp_path)
    cache.put("jit_step/1", program)
    assert cache.get("jit_step/1") == program
    assert cache.get("jit_step/2") is None
    (entry,) = tmp_path.iterdir()
    content = bytearray(entry.read_bytes())
    content[int(where * len(content))] ^= 1 << bit
    entry.write_bytes(content)
    assert cache.get("jit_step/1") is None
    assert list(tmp_path.iterdir()) == []  # or JAX's next entry would not be told from it
    entry.write_bytes(bytes(content[: int(where * len(content))]))
    assert cache.get("jit_step/1") is None


def test_programs_of_another_machine_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ProgramCache(tmp_path).put("a", b"program")
    monkeypatch.setattr(compile_cache, "_machine", lambda: b"x86_64 flags: avx512")
    assert ProgramCache(tmp_path).get("a") is None


def test_the_programs_used_longest_ago_go_first(tmp_path: Path) -> None:
    cache = ProgramCache(tmp_path, most_bytes=1000)
    (tmp_path / ".partial").write_bytes(bytes(300))  # of a process that was killed
    for age, key in enumerate(("a", "b")):
        cache.put(key, bytes(300))
        os.utime(next(path for path in tmp_path.iterdir() if path.stat().st_mtime > 100), (age, age))
    os.utime(tmp_path / ".partial", (2, 2))
    assert cache.get("a") is not None  # used now
    cache.put("c", bytes(300))
    assert [cache.get(key) is not None for key in ("a", "b", "c")] == [True, False, True]
    cache.put("d", bytes(300))
    assert not (tmp_path / ".partial").exists()
    cache.put("too large", bytes(1001))
    assert cache.get("too large") is None
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1000


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(0, 600), min_size=1, max_size=30))
def test_the_folder_never_holds_more_than_it_may(tmp_path: Path, sizes: list[int]) -> None:
    cache = ProgramCache(tmp_path, most_bytes=1000)
    for index, size in enumerate(sizes):
        cache.put(str(index), bytes(size))
        assert cache.get(str(index)) == bytes(size)
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 1000


def test_a_folder_that_fails_costs_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = ProgramCache(tmp_path / "gone")
    for _ in range(2):
        cache.put("a", b"program")
        assert cache.get("a") is None
    assert [record.getMessage().partition(": [")[0] for record in caplog.records] == [
        f"{tmp_path / 'gone'}: compiled programs are not kept"
    ]


# What is set up in JAX.


@pytest.mark.usefixtures("jax_cache")
def test_a_run_keeps_programs_in_the_users_cache_folder(tmp_path: Path) -> None:
    Checkpointer(tmp_path / "run", {"w": {"a": np.zeros(3)}}).close()
    assert jax.config.jax_persistent_cache_min_compile_time_secs == compile_cache.SHORTEST_S
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.jit(lambda x: x @ x.T)(np.ones((7, 5)))
    folder = tmp_path / "cache" / "torchorbax" / "programs"
    assert [stat.S_IMODE(path.stat().st_mode) & 0o077 for path in (folder, *folder.iterdir())] == [0] * 2
    Checkpointer(tmp_path / "run", {"w": {"a": np.zeros(3)}}, compile_cache=False).close()
    assert compilation_cache._cache is None


@pytest.mark.usefixtures("jax_cache")
def test_the_folder_that_was_given_last_counts(tmp_path: Path) -> None:
    for name in ("one", "two"):
        use_compile_cache(tmp_path / name)
        assert isinstance(compilation_cache._cache, ProgramCache)
        assert compilation_cache._cache.folder == tmp_path / name


@pytest.mark.usefixtures("jax_cache")
@pytest.mark.parametrize("setting", ["a folder", "off"])
def test_what_the_user_has_set_up_for_jax_is_left_alone(tmp_path: Path, setting: str) -> None:
    if setting == "off":
        jax.config.update("jax_enable_compilation_cache", False)
    else:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
    use_compile_cache(True)
    use_compile_cache(False)
    assert compilation_cache._cache is None
    assert not (tmp_path / "cache").exists()
    with pytest.raises(ConfigError, match=r"JAX's compilation cache (is turned off|has a folder already); leave one"):
        use_compile_cache(tmp_path / "ours")


@pytest.mark.usefixtures("jax_cache")
def test_no_program_is_taken_from_where_others_can_write(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "cache" / "torchorbax" / "programs"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    use_compile_cache(True)
    assert compilation_cache._cache is None
    assert "can be written to by others, so no compiled program is taken from there" in caplog.text


@pytest.mark.usefixtures("jax_cache")
def test_without_a_cache_folder_nothing_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("a file")
    use_compile_cache(True)
    assert compilation_cache._cache is None
    assert caplog.records[-1].levelno == logging.WARNING
    with pytest.raises(ConfigError, match=r"compile_cache='.*cache/programs' cannot be used: .*Not a directory"):
        use_compile_cache(str(tmp_path / "cache" / "programs"))


def test_uris_are_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"must be a folder, not gs://bucket/x; .* set jax_compilation_cache_dir"):
        compile_cache.check_compile_cache("gs://bucket/x")
