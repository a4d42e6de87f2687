"""Snapshots, taken without a run around them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from torchorbax._src.save import snapshot
from torchorbax._src.state.item import Captured

STAGINGS = ["auto", "device", "reference", "host"]


def take(leaves: Mapping[str, Any], staging: Any = "device") -> Mapping[str, Any]:
    return by_name(snapshot.take({"state": Captured("pytree", leaves)}, staging))


def by_name(taken: snapshot.Snapshot) -> dict[str, Any]:
    """The arrays of a snapshot of one item."""
    return {name: array for (_, name), array in taken.arrays.items()}


donate = jax.jit(lambda arrays: [~array for array in arrays], donate_argnums=0)
"""Uses the memory of its arguments (integers) for its results."""


@contextlib.contextmanager
def nothing_read_from_devices(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """JAX's own guard does nothing on its CPU backend, where there is no transfer; so values are guarded as well."""

    def read(array: Any) -> Any:
        raise AssertionError("an array has been read from its device")

    with jax.transfer_guard_device_to_host("disallow"), patch.context() as inner:
        inner.setattr(type(jnp.zeros(())), "_value", property(read))
        inner.setattr(type(jnp.zeros(())), "block_until_ready", read)
        yield
