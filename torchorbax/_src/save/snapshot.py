"""A snapshot: a consistent copy of the state at one step, taken without stalling the training loop.

JAX arrays are immutable, so a reference to an array is enough, unless the loop donates it. Arrays that may be donated
are staged as the module `staging` describes. CPU torch tensors and numpy arrays can change at any time, so they are
copied at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import jax

from torchorbax._src.arrays.dtypes import dtype_name
from torchorbax._src.arrays.leaves import Array
from torchorbax._src.arrays.sharding_rules import describe
from torchorbax._src.format.manifest import ItemMeta, Key, LeafMeta
from torchorbax._src.save.frozen import NEW_BASE, FrozenLeaves, Identities
from torchorbax._src.save.staging import Staged, Staging, as_array, stage
from torchorbax._src.state.item import Captured
from torchorbax._src.tensors.live import host_copy, live_array, raise_if_deleted


class Snapshot:
    """The arrays to write, the descriptions of all leaves for the manifest, and the identities of the frozen arrays.

    The properties do their work when they are first asked for, which happens on the saving thread, not in the loop.

    Args:
        captured: the live leaves by item.
        held: what holds the value of each leaf that is written, by key: its `jax.Array`, or a copy in host memory.
        staged: the arrays to write, staged.
        frozen: the frozen leaves.

    Attributes:
        identities: the frozen arrays.
    """

    def __init__(
        self,
        captured: Mapping[str, Captured],
        held: Mapping[Key, Array],
        staged: dict[Key, Staged],
        frozen: FrozenLeaves,
    ) -> None:
        self.identities: Identities = frozen.identities
        self._frozen = frozen.known
        self._to_write = list(staged)
        # Without the live leaves, which must not be kept alive.
        self._captured = {
            item: (of_item.kind, list(of_item.leaves), of_item.ties, of_item.values, of_item.shared)
            for item, of_item in captured.items()
        }
        self._held = held
        self._staged = staged

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all arrays, each counted once however many devices hold it."""
        return sum(self.items[item].leaves[name].nbytes for item, name in self._to_write)

    @cached_property
    def arrays(self) -> dict[Key, Array]:
        """The arrays to write. The snapshot keeps no other reference, so one that is removed can be freed."""
        staged, self._staged = self._staged, {}
        return {
            (item, name): as_array(staged.pop((item, name)))
            for item, (_, names, *_) in self._captured.items()
            for name in names
            if (item, name) in staged
        }

    @cached_property
    def items(self) -> dict[str, ItemMeta]:
        """The descriptions of the items for the manifest, without fingerprints."""
        held, self._held = self._held, {}  # some are live arrays, which must not be kept alive
        return {
            item: ItemMeta(kind, {name: self._meta(item, name, held) for name in names}, ties, values, shared)
            for item, (kind, names, ties, values, shared) in self._captured.items()
        }

    def _meta(self, item: str, name: str, held: Mapping[Key, Array]) -> LeafMeta:
        known = self._frozen.get((item, name))
        return known or _meta(held[item, name], NEW_BASE if (item, name) in self._frozen else None)


def _meta(held: Array, base: int | None) -> LeafMeta:
    if isinstance(held, jax.Array):  # it may have been donated by now, but still has its shape, dtype and sharding
        sharding, weak_type = describe(held.sharding), held.weak_type
        return LeafMeta(tuple(held.shape), dtype_name(held.dtype), "jax", sharding, base=base, weak_type=weak_type)
    return LeafMeta(held.shape, dtype_name(held.dtype), "host")


def take(captured: Mapping[str, Captured], staging: Staging, frozen: FrozenLeaves | None = None) -> Snapshot:
    """Take a snapshot of the live leaves.

    Args:
        captured: the live leaves by item.
        staging: how jax arrays are kept. `reference` keeps references: this is for loops that donate nothing, and if an
            array is donated all the same, the save fails and writes nothing wrong. `device` copies the arrays on their
            devices, as far as there is memory; the copies are dispatched and not waited for. `host` copies them to host
            memory before it returns. `auto` takes views of arrays on CPU devices that have been computed already, and
            does what `device` does for all others.
        frozen: the frozen leaves. Those that a base holds already are left out.

    Raises:
        UnsupportedLeafError, DeletedArrayError: a leaf cannot be saved. Nothing has been copied.
    """
    frozen = frozen or FrozenLeaves({}, {})
    # Find what holds the values of each leaf. Nothing is copied before every leaf is known to have values.
    leaves = {(item, name): leaf for item, of_item in captured.items() for name, leaf in of_item.leaves.items()}
    try:
        held = {
            key: live_array(f"{key[0]}.{key[1]}", leaf) for key, leaf in leaves.items() if frozen.known.get(key) is None
        }
        on_device = {key: array for key, array in held.items() if isinstance(array, jax.Array)}
        gone = any(array.is_deleted() for array in on_device.values())
    except RuntimeError:  # from a View of an array that has been deleted
        raise_if_deleted(_named(leaves))
        raise
    if gone:
        raise_if_deleted(_named(leaves))
    # Stage the jax arrays, and copy what is in host memory. The copies are described later, not what is live: by then
    # the loop may have given a tensor another shape or dtype.
    staged = stage(on_device, staging)
    copies = {key: host_copy(array) for key, array in held.items() if not isinstance(array, jax.Array)}
    return Snapshot(captured, {**on_device, **copies}, {**staged, **copies}, frozen)


def _named(leaves: Mapping[Key, Any]) -> dict[str, Any]:
    return {f"{item}.{name}": leaf for (item, name), leaf in leaves.items()}
