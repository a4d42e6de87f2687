"""A consistent copy of the state at one step, taken without stalling the loop.

JAX arrays are immutable, so a reference to one is a snapshot, unless the loop donates it. Then it takes a copy on the
devices, which is dispatched here and not waited for; or, on the CPU, a numpy view of the array's memory: JAX's CPU
backend gives memory that somebody looks at to no other array. CPU torch tensors and numpy arrays can change at any time
and are copied at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import jax
import numpy as np
import torch

from torchorbax._src.arrays.dtypes import dtype_name
from torchorbax._src.arrays.leaves import Array
from torchorbax._src.arrays.sharding_rules import describe
from torchorbax._src.format.manifest import ItemMeta, Key, LeafMeta
from torchorbax._src.save.frozen import NEW_BASE, Identities, Look
from torchorbax._src.save.staging import Staged, Staging, as_array, stage
from torchorbax._src.state.item import Captured
from torchorbax._src.tensors.live import host_copy, live_array, live_dtype, raise_if_deleted


class Snapshot:
    """The arrays to write, what the manifest says of all leaves, and which the frozen ones are.

    Its properties do their work when they are first asked for, which is on the thread that saves.

    Attributes:
        identities: the frozen arrays.
    """

    def __init__(
        self, captured: Mapping[str, Captured], held: Mapping[Key, Any], staged: dict[Key, Staged], look: Look
    ) -> None:
        self.identities: Identities = look.identities
        self._frozen = look.known
        self._to_write = list(staged)
        self._captured = {item: (one.kind, list(one.leaves), one.ties, one.values) for item, one in captured.items()}
        self._held = held
        self._staged = staged

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all arrays, each counted once however many devices hold it."""
        return sum(self.items[item].leaves[name].nbytes for item, name in self._to_write)

    @cached_property
    def arrays(self) -> dict[Key, Array]:
        """The arrays to write. Whoever takes one out has the only reference to it."""
        staged, self._staged = self._staged, {}
        return {
            (item, name): as_array(staged.pop((item, name)))
            for item, (_, names, _, _) in self._captured.items()
            for name in names
            if (item, name) in staged
        }

    @cached_property
    def items(self) -> dict[str, ItemMeta]:
        """By item, without fingerprints."""
        held, self._held = self._held, {}  # live arrays, which must not be kept alive
        return {
            item: ItemMeta(kind, {name: self._meta(item, name, held) for name in names}, ties, values)
            for item, (kind, names, ties, values) in self._captured.items()
        }

    def _meta(self, item: str, name: str, held: Mapping[Key, Any]) -> LeafMeta:
        known = self._frozen.get((item, name))
        return known or _meta(held[item, name], NEW_BASE if (item, name) in self._frozen else None)


def _meta(held: jax.Array | np.ndarray | torch.Tensor, base: int | None) -> LeafMeta:
    if isinstance(held, jax.Array):  # which says these things when it has been donated, too
        sharding, weak_type = describe(held.sharding), held.weak_type
        return LeafMeta(tuple(held.shape), dtype_name(held.dtype), "jax", sharding, base=base, weak_type=weak_type)
    dtype = live_dtype(held) if isinstance(held, torch.Tensor) else held.dtype
    return LeafMeta(tuple(held.shape), dtype_name(dtype), "host")


def take(captured: Mapping[str, Captured], staging: Staging, look: Look | None = None) -> Snapshot:
    """The state of this moment.

    Args:
        captured: live leaves by item.
        staging: `reference` keeps references to jax arrays (right only where nothing is donated; a donated one makes
            the save fail, never wrong); `device` copies them on their devices, dispatched and not waited for, as far as
            there is memory; `host` copies them to host memory before it returns; `auto` takes views of what is computed
            and lies on CPU devices, and is `device` for the rest.
        look: the frozen leaves, of which those that the run's base area has are left out.

    Raises:
        UnsupportedLeafError, DeletedArrayError: a leaf cannot be saved; nothing has been copied.
    """
    look = look or Look({}, {})
    leaves = {(item, name): leaf for item, one in captured.items() for name, leaf in one.leaves.items()}
    try:
        held = {
            key: live_array(f"{key[0]}.{key[1]}", leaf) for key, leaf in leaves.items() if look.known.get(key) is None
        }
        on_device = {key: array for key, array in held.items() if isinstance(array, jax.Array)}
        gone = any(array.is_deleted() for array in on_device.values())
    except RuntimeError:  # a view of an array that has been deleted
        raise_if_deleted(_named(leaves))
        raise
    if gone:
        raise_if_deleted(_named(leaves))
    staged = stage(on_device, staging)
    for key, array in held.items():
        if not isinstance(array, jax.Array):
            staged[key] = host_copy(array)
    return Snapshot(captured, held, staged, look)


def _named(leaves: Mapping[Key, Any]) -> dict[str, Any]:
    return {f"{item}.{name}": leaf for (item, name), leaf in leaves.items()}
