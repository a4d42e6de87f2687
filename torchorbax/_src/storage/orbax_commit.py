"""One step as an Orbax checkpoint: Orbax makes the folders, the metadata and the commit, `array_writer` the arrays."""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Sharding
from orbax.checkpoint._src.metadata import sharding as sharding_metadata

from torchorbax._src.arrays.leaves import Array
from torchorbax._src.format.manifest import Key, Manifest
from torchorbax._src.storage import array_writer
from torchorbax._src.storage.run_folder import MANIFEST
from torchorbax._src.storage.storage import Folders
from torchorbax._src.storage.traffic import Traffic


def save(
    folder: Any,
    leaves: Mapping[str, Mapping[str, Leaf]],
    traffic: Traffic,
    fill: Callable[[Folders], Manifest],
) -> Manifest:
    """Write a step and commit it. Only one process calls it: Orbax gets to know no other.

    Args:
        folder: where to; an epath.
        leaves: by item, what Orbax's metadata is to say about the arrays.
        traffic: how arrays are written.
        fill: writes all arrays into the folders given by item, which exist, and returns what the step says about
            itself. When it returns, the step is complete but for its commit.

    Returns:
        What `fill` has returned.
    """
    folders: dict[str, str] = {}
    shardings: dict[str, dict[str, Sharding]] = {}
    manifests: list[Manifest] = []

    def content() -> Any:
        for item, by_name in shardings.items():
            _write_shardings(folders[item], by_name)
        manifests.append(fill(folders))
        return manifests[0].to_json()

    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    handlers: dict[str, Any] = {
        item: _item_handler(item, folders, shardings.setdefault(item, {}), traffic, alone) for item in leaves
    }
    handlers[MANIFEST] = _manifest_handler(content, folders, alone)
    options = ocp.options.AsyncOptions(create_directories_asynchronously=False)  # they must be there to be written to
    composite = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(async_options=options, multiprocessing_options=alone), **handlers
    )
    args = {item: ocp.args.PyTreeSave(dict(tree)) for item, tree in leaves.items()}
    with _Checkpointer(composite, multiprocessing_options=alone) as checkpointer:
        checkpointer.save(folder, args=ocp.args.Composite(**args, **{MANIFEST: ocp.args.JsonSave({})}))
    return manifests[0]


class _Checkpointer(ocp.Checkpointer):  # type: ignore[misc]  # Orbax is untyped
    def synchronize_next_awaitable_signal_operation_id(self) -> None:
        """Do not count this save as an operation.

        Orbax numbers the operations of each process, and the numbers must be the same in all of them. These saves run
        in process 0 alone. Nor could two saves run at once: each would take the newest number for its own.
        """


@dataclass(frozen=True)
class Leaf:
    """Stands for an array in the tree that Orbax gets. Orbax would keep the array itself in memory."""

    nbytes: int


@dataclass(frozen=True)
class _HostLeaf(Leaf):
    """Read back as a numpy array by those who do not say what they want."""


@dataclass(frozen=True)
class _DeviceLeaf(Leaf):
    """Read back as a `jax.Array`, with this sharding for those who name no other."""

    sharding: Sharding


def described(arrays: Mapping[Key, Array]) -> dict[str, dict[str, Leaf]]:
    """What Orbax's metadata says about arrays, by item. Orbax cannot store arrays without elements."""
    leaves: dict[str, dict[str, Leaf]] = {}
    for (item, name), array in arrays.items():
        if array.size:
            leaves.setdefault(item, {})[name] = _leaf_of(array)
    return leaves


def _leaf_of(array: Array) -> Leaf:
    if isinstance(array, jax.Array) and not array_writer.is_gathered(array):
        return _DeviceLeaf(array.nbytes, array.sharding)
    return _HostLeaf(array.nbytes)


class _LeafHandler(ocp.type_handlers.TypeHandler):  # type: ignore[misc]  # Orbax is untyped
    """Stands in for Orbax's own handler of one kind of leaf. It describes the leaves and writes nothing."""

    def __init__(self, typestr: str, item: str, folders: dict[str, str], shardings: dict[str, Sharding]) -> None:
        self._typestr = typestr
        self._item = item
        self._folders = folders
        self._shardings = shardings

    def typestr(self) -> str:
        """What Orbax's metadata says that the leaf is."""
        return self._typestr

    async def serialize(
        self, values: Sequence[Leaf], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        """Note the item's folder and the shardings. `fill` writes the arrays."""
        if self._item not in self._folders:  # the first leaf says it for all; working it out is slow
            self._folders[self._item] = str(infos[0].parent_dir)
        for value, info in zip(values, infos, strict=True):
            if isinstance(value, _DeviceLeaf):
                self._shardings[info.name] = value.sharding
        return []

    async def deserialize(self, infos: Sequence[Any], args: Sequence[Any] | None = None) -> Sequence[Any]:
        """Orbax does not call this: `array_reader` reads."""
        raise NotImplementedError

    async def metadata(self, infos: Sequence[Any]) -> Sequence[Any]:
        """Orbax does not call this: the manifest has the metadata."""
        raise NotImplementedError


def _write_shardings(folder: str, shardings: Mapping[str, Sharding]) -> None:
    """Write the file of shardings that Orbax keeps beside the arrays. Orbax would write it anew for every leaf."""
    texts = {name: text for name, sharding in shardings.items() if (text := _sharding_text(sharding)) is not None}
    if texts:
        encoded = {base64.urlsafe_b64encode(name.encode()).decode(): text for name, text in texts.items()}
        (epath.Path(folder) / "_sharding").write_text(json.dumps(encoded))


@functools.lru_cache(maxsize=1024)
def _sharding_text(sharding: Sharding) -> str | None:
    """A sharding as Orbax writes it; None if it has no words for it."""
    metadata = sharding_metadata.from_jax_sharding(sharding)
    return None if metadata is None else str(metadata.to_serialized_string())


def _item_handler(
    item: str,
    folders: dict[str, str],
    shardings: dict[str, Sharding],
    traffic: Traffic,
    processes: ocp.options.MultiprocessingOptions,
) -> ocp.PyTreeCheckpointHandler:
    handlers = [
        (kind, _LeafHandler(typestr, item, folders, shardings))
        for kind, typestr in ((_HostLeaf, "np.ndarray"), (_DeviceLeaf, "jax.Array"))
    ]
    # Orbax asks the handler of jax.Array where further metadata of such arrays lies. There is none.
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, ocp.type_handlers.ArrayHandler()), *handlers)
    handler = ocp.PyTreeCheckpointHandler(
        use_compression=traffic.compressed, type_handler_registry=registry, multiprocessing_options=processes
    )
    # Orbax's own method looks for the files to merge with a glob. It finds none where the path has a `[`, and says
    # nothing. Under a URI it tries again for a quarter of an hour.
    handler.finalize = lambda directory: array_writer.merge(directory, traffic)
    return handler


def _manifest_handler(
    content: Callable[[], Any], folders: dict[str, str], processes: ocp.options.MultiprocessingOptions
) -> ocp.JsonCheckpointHandler:
    """A handler that writes JSON which is known only when everything else has been written.

    It is an instance of Orbax's own class with another method, for the class says in Orbax's metadata what reads the
    item.
    """
    handler = ocp.JsonCheckpointHandler(multiprocessing_options=processes)

    async def async_save(directory: Any, args: Any) -> list[Any]:
        folders[MANIFEST] = str(directory)
        return [_ManifestWrite(directory / "metadata", content)]

    handler.async_save = async_save
    return handler


@dataclass(frozen=True)
class _ManifestWrite:
    """Writes the manifest when Orbax waits for it. Orbax waits for the items in their order; this is the last one."""

    file: Any
    content: Callable[[], Any]

    def result(self, timeout: int | None = None) -> None:
        """Write the manifest."""
        self.file.write_text(json.dumps(self.content()))
