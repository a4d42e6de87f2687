"""The JAX settings under which programs run, whatever the caller has set for its thread."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager

import jax
import numpy as np
from jax.sharding import Mesh


def transfers_allowed() -> AbstractContextManager[None]:
    """Saving and restoring move arrays between host and devices, whatever `jax_transfer_guard` says of the loop."""
    return jax.transfer_guard("allow")


def context_here() -> Callable[[], AbstractContextManager[None]]:
    """Makes, on another thread, the settings of this one that matter to where arrays go and what becomes of 64 bits."""
    with_64_bits = jax.dtypes.canonicalize_dtype(np.float64) == np.float64

    @contextmanager
    def there() -> Iterator[None]:
        with jax.enable_x64(with_64_bits), transfers_allowed():
            yield

    return there


@contextmanager
def own_context() -> Iterator[None]:
    """The settings for programs of this library: no mesh, and 64-bit dtypes enabled.

    They take arrays of any mesh, of a single device, and of 64 bits. A mesh that the caller has set with `jax.set_mesh`
    would be taken for the mesh of those arrays.
    """
    with jax.set_mesh(None), jax.enable_x64(True), transfers_allowed():
        yield


@contextmanager
def training_context(devices: Collection[jax.Device]) -> Iterator[None]:
    """The settings for programs of torchax over these devices.

    If the caller has set a mesh of the same devices, it is kept with all axes Auto: torchax cannot be traced over
    Explicit axes, which `jax.make_mesh` gives. A mesh of other devices is left out, because arrays on other devices
    cannot be used under it.
    """
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        yield
        return
    same = set(mesh.devices.flat) == set(devices)
    with jax.set_mesh(Mesh(mesh.devices, mesh.axis_names) if same else None):
        yield
