"""JAX's cache of compiled programs, which the tests turn off, for those that are about it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax._src import compilation_cache
from torchorbax._src.run import programs_ahead


@pytest.fixture
def jax_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """As in a new process of a user who has set nothing up."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for module, name in ((compilation_cache, "get_executable_and_time"), (programs_ahead, "_current")):
        monkeypatch.setattr(module, name, getattr(module, name))  # puts back what the test changes
    shortest_s = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", shortest_s)
    compilation_cache.reset_cache()
