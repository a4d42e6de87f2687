"""One step as an Orbax checkpoint: Orbax makes folders, metadata and commit, `_orbax_arrays` writes the arrays."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Sharding
from orbax.checkpoint._src.serialization import jax_array_handlers  # private: how a sharding is told

from torchorbax import _orbax_arrays, fingerprint
from torchorbax._orbax_arrays import Traffic
from torchorbax.adapter import Array
from torchorbax.manifest import Manifest

MANIFEST = "manifest"


def save(
    folder: Any, manifest: Manifest, arrays: Mapping[str, MutableMapping[str, Array]], traffic: Traffic
) -> dict[str, dict[str, str]]:
    """Write a step and commit it.

    Args:
        folder: where to; an epath.
        manifest: what the step says about itself; fingerprints are filled in.
        arrays: by item and leaf; each is taken out as soon as it is written. Empty ones are left out.
        traffic: how.

    Returns:
        The fingerprints by item and leaf.
    """
    fingerprints: dict[str, dict[str, str]] = {item: {} for item in arrays}
    trees: dict[str, dict[str, _Leaf]] = {}
    handlers: dict[str, Any] = {}
    for item, leaves in arrays.items():
        for name in [name for name, array in leaves.items() if not array.size]:
            fingerprints[item].update(fingerprint.fingerprints({name: leaves.pop(name)}))
        if leaves:
            trees[item] = {name: _leaf_of(array) for name, array in leaves.items()}
            handlers[item] = _item_handler(leaves, traffic, fingerprints[item])
    handlers[MANIFEST] = _manifest_handler(lambda: manifest.stamped(fingerprints).to_json())
    options = ocp.options.AsyncOptions(create_directories_asynchronously=False)  # they must be there to be written to
    composite = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(async_options=options), **handlers
    )
    args = {item: ocp.args.PyTreeSave(tree) for item, tree in trees.items()}
    with ocp.Checkpointer(composite) as checkpointer:
        checkpointer.save(folder, args=ocp.args.Composite(**args, **{MANIFEST: ocp.args.JsonSave({})}))
    return fingerprints


@dataclass(frozen=True)
class _Leaf:
    """Stands for an array in the tree that Orbax gets, which would hold on to the array itself."""

    nbytes: int


@dataclass(frozen=True)
class _HostLeaf(_Leaf):
    """Read back as a numpy array by those who do not say what they want."""


@dataclass(frozen=True)
class _DeviceLeaf(_Leaf):
    """Read back as a `jax.Array`, with this sharding for those who name no other."""

    sharding: Sharding


def _leaf_of(array: Array) -> _Leaf:
    if isinstance(array, jax.Array) and not _orbax_arrays.is_gathered(array):
        return _DeviceLeaf(array.nbytes, array.sharding)
    return _HostLeaf(array.nbytes)


class _LeafHandler(ocp.type_handlers.TypeHandler):  # type: ignore[misc]  # Orbax is untyped
    """Writes leaves of one kind in place of Orbax's own handler."""

    def __init__(
        self, typestr: str, arrays: MutableMapping[str, Array], traffic: Traffic, fingerprints: dict[str, str]
    ) -> None:
        self._typestr = typestr
        self._arrays = arrays
        self._traffic = traffic
        self._fingerprints = fingerprints

    def typestr(self) -> str:
        """What Orbax's metadata says that the leaf is."""
        return self._typestr

    async def serialize(
        self, values: Sequence[_Leaf], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        """Write the leaves; all is written when it returns, for this is the thread of the save."""
        folder = infos[0].parent_dir
        mine = {info.name: self._arrays.pop(info.name) for info in infos}
        self._fingerprints.update(_orbax_arrays.write(str(folder), mine, self._traffic))
        shardings = [value.sharding if isinstance(value, _DeviceLeaf) else None for value in values]
        await jax_array_handlers._async_serialize_shardings(shardings, infos, primary_host=0)
        return []

    async def deserialize(self, infos: Sequence[Any], args: Sequence[Any] | None = None) -> Sequence[Any]:
        """Never asked for: `_orbax_arrays.read` reads."""
        raise NotImplementedError

    async def metadata(self, infos: Sequence[Any]) -> Sequence[Any]:
        """Never asked for: the manifest tells."""
        raise NotImplementedError


def _item_handler(
    leaves: MutableMapping[str, Array], traffic: Traffic, fingerprints: dict[str, str]
) -> ocp.PyTreeCheckpointHandler:
    handlers = [
        (kind, _LeafHandler(typestr, leaves, traffic, fingerprints))
        for kind, typestr in ((_HostLeaf, "np.ndarray"), (_DeviceLeaf, "jax.Array"))
    ]
    # Orbax looks for a handler of jax.Array to learn where further metadata of such arrays is: nowhere.
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, ocp.type_handlers.ArrayHandler()), *handlers)
    return ocp.PyTreeCheckpointHandler(use_compression=traffic.compressed, type_handler_registry=registry)


def _manifest_handler(content: Callable[[], Any]) -> ocp.JsonCheckpointHandler:
    """Writes JSON that is complete only when everything else has been written.

    An instance of Orbax's own class with another method: Orbax goes by the class to know what reads the item.
    """
    handler = ocp.JsonCheckpointHandler()

    async def async_save(directory: Any, args: Any) -> list[Any]:
        return [_Late(directory / "metadata", content)]

    handler.async_save = async_save
    return handler


@dataclass(frozen=True)
class _Late:
    """Orbax waits for the items' futures in their order, and this is the last of them."""

    file: Any
    content: Callable[[], Any]

    def result(self, timeout: int | None = None) -> None:
        """Write it."""
        self.file.write_text(json.dumps(self.content()))
