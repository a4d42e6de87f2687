"""JAX as it is without what a caller has set for a thread."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import jax
from jax.sharding import Mesh


@contextmanager
def own_context() -> Iterator[None]:
    """For programs of this library: they get arrays of any mesh, of one device and of 64 bits, whatever mesh the caller
    has set with `jax.set_mesh`, which would be taken for theirs, and whether or not 64 bits are enabled."""
    with jax.set_mesh(None), jax.enable_x64(True):
        yield


@contextmanager
def training_context(devices: Collection[jax.Device]) -> Iterator[None]:
    """For programs of torchax over these devices: the caller's mesh if it is over the same, with all axes Auto.

    torchax cannot be traced over Explicit axes, which `jax.make_mesh` gives; and arrays of other devices than the
    mesh's cannot be used under it.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        yield
        return
    same = set(mesh.devices.flat) == set(devices)
    with jax.set_mesh(Mesh(mesh.devices, mesh.axis_names) if same else None):
        yield
