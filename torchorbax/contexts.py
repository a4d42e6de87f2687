"""JAX as it is without what a caller has set for a thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jax


@contextmanager
def own_context() -> Iterator[None]:
    """For programs of this library: they get arrays of any mesh, of one device and of 64 bits, whatever mesh the caller
    has set with `jax.set_mesh`, which would be taken for theirs, and whether or not 64 bits are enabled."""
    with jax.set_mesh(None), jax.enable_x64(True):
        yield
