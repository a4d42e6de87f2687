"""Writes one step as an Orbax checkpoint.

Orbax makes the folders and the metadata; `array_writer` writes the arrays. The order within a save is: Orbax creates
the folders and calls the handlers below; the manifest's handler, which is the last, has the arrays written; Orbax has
each item's data merged, and writes the last of its metadata; then the caller writes the manifest and commits.
"""

from __future__ import annotations

import base64
import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Sharding
from orbax.checkpoint._src.metadata import checkpoint as checkpoint_metadata  # private: Orbax has no public access
from orbax.checkpoint._src.metadata import sharding as sharding_metadata
from orbax.checkpoint._src.path.atomicity import CommitFileTemporaryPath

from torchorbax._src.arrays.leaves import Array
from torchorbax._src.format.manifest import Key, Manifest
from torchorbax._src.storage import array_writer
from torchorbax._src.storage.run_layout import MANIFEST
from torchorbax._src.storage.storage import Folders
from torchorbax._src.storage.traffic import Traffic


def save(
    folder: str,
    leaves: Mapping[str, Mapping[str, Leaf]],
    traffic: Traffic,
    fill: Callable[[Folders], Manifest],
    check: Callable[[], None],
) -> Manifest:
    """Write a step without its manifest. Only one process calls it, and Orbax is told that there is no other.

    Args:
        folder: the folder of the step, which does not exist yet, or under a URI holds at most unimportant objects.
        leaves: by item, what Orbax's metadata says about the arrays.
        traffic: how arrays are written.
        fill: writes all arrays into the items' folders, which exist, and returns the manifest.
        check: called before what other programs might write, too, is written. It raises if they may.

    Returns:
        The manifest that `fill` has returned.
    """
    folders: dict[str, str] = {}
    shardings: dict[str, dict[str, Sharding]] = {}
    manifests: list[Manifest] = []

    # The last handler calls this, when all folders exist.
    def content() -> None:
        for item, by_name in shardings.items():
            _write_shardings(folders[item], by_name)
        manifests.append(fill(folders))

    # Handlers, which believe that there are no other processes.
    index = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=index, active_processes={index})
    handlers: dict[str, Any] = {
        item: _item_handler(item, folders, shardings.setdefault(item, {}), traffic, alone, check) for item in leaves
    }
    handlers[MANIFEST] = _manifest_handler(content, folders, alone)
    # The save itself. `content` needs the folders to exist, so they are not created in the background.
    options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
    composite = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(async_options=options, multiprocessing_options=alone), **handlers
    )
    args = {item: ocp.args.PyTreeSave(dict(tree)) for item, tree in leaves.items()}
    with _Checkpointer(composite, multiprocessing_options=alone) as checkpointer:
        checkpointer.save(epath.Path(folder), args=ocp.args.Composite(**args, **{MANIFEST: ocp.args.JsonSave({})}))
    return manifests[0]


class _Checkpointer(ocp.Checkpointer):  # type: ignore[misc]  # Orbax is untyped
    def get_temporary_path(self, directory: Any) -> Any:
        """The folder that Orbax writes into: the one that it was given."""
        return _Folder(directory, directory, checkpoint_metadata_store=self._metadata_store)

    def synchronize_next_awaitable_signal_operation_id(self) -> None:
        """Do not count this save among Orbax's operations.

        Orbax counts the operations in each process, and the counts must agree in all processes. But these saves run in
        process 0 alone. Besides, of two saves at the same time, each would take the newest number for its own.
        """


class _Folder(CommitFileTemporaryPath):  # type: ignore[misc]  # Orbax is untyped
    """Leaves the commit to the caller. Orbax would rename a folder onto a step of somebody else without a word."""

    async def finalize(self) -> None:
        """Write the last of Orbax's metadata: the time of the commit."""
        self._checkpoint_metadata_store.update(
            file_path=checkpoint_metadata.step_metadata_file_path(self._tmp_path), commit_timestamp_nsecs=time.time_ns()
        )


@dataclass(frozen=True)
class Leaf:
    """The placeholder for an array in the tree that Orbax gets. Orbax would keep the array itself in memory."""

    nbytes: int


@dataclass(frozen=True)
class _HostLeaf(Leaf):
    """An array that plain Orbax restores as a numpy array if it is not told otherwise."""


@dataclass(frozen=True)
class _DeviceLeaf(Leaf):
    """An array that plain Orbax restores as a `jax.Array` with this sharding if it is not told otherwise."""

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
    """Replaces Orbax's own handler of one kind of leaf. It records what Orbax's metadata needs and writes no arrays."""

    def __init__(self, typestr: str, item: str, folders: dict[str, str], shardings: dict[str, Sharding]) -> None:
        self._typestr = typestr
        self._item = item
        self._folders = folders
        self._shardings = shardings

    def typestr(self) -> str:
        """The type of the leaf in Orbax's metadata."""
        return self._typestr

    async def serialize(
        self, values: Sequence[Leaf], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        """Record the item's folder and the shardings. `fill` writes the arrays later."""
        if self._item not in self._folders:  # the same for all leaves, and slow to compute
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
    """Write the file of shardings that Orbax keeps beside the arrays. Orbax would rewrite it for every leaf."""
    texts = {name: text for name, sharding in shardings.items() if (text := _sharding_text(sharding)) is not None}
    if texts:
        encoded = {base64.urlsafe_b64encode(name.encode()).decode(): text for name, text in texts.items()}
        (epath.Path(folder) / "_sharding").write_text(json.dumps(encoded))


@functools.lru_cache(maxsize=1024)
def _sharding_text(sharding: Sharding) -> str | None:
    """A sharding in Orbax's serialized form; None if Orbax has none for it."""
    metadata = sharding_metadata.from_jax_sharding(sharding)
    return None if metadata is None else str(metadata.to_serialized_string())


def _item_handler(
    item: str,
    folders: dict[str, str],
    shardings: dict[str, Sharding],
    traffic: Traffic,
    processes: ocp.options.MultiprocessingOptions,
    check: Callable[[], None],
) -> ocp.PyTreeCheckpointHandler:
    handlers = [
        (kind, _LeafHandler(typestr, item, folders, shardings))
        for kind, typestr in ((_HostLeaf, "np.ndarray"), (_DeviceLeaf, "jax.Array"))
    ]
    # Orbax asks the handler of jax.Array where further metadata of such arrays is stored. There is none.
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, ocp.type_handlers.ArrayHandler()), *handlers)
    handler = ocp.PyTreeCheckpointHandler(
        use_compression=traffic.compressed, type_handler_registry=registry, multiprocessing_options=processes
    )

    # Orbax's own method finds the files to merge with a glob. If the path has a `[`, the glob matches nothing, and no
    # error is raised. Under a URI, it retries for a quarter of an hour.
    def finalize(directory: Any) -> None:
        check()
        array_writer.merge(str(directory), traffic)

    handler.finalize = finalize
    return handler


def _manifest_handler(
    content: Callable[[], None], folders: dict[str, str], processes: ocp.options.MultiprocessingOptions
) -> ocp.JsonCheckpointHandler:
    """A handler of JSON that has the content of the step written, and leaves its own file to the caller.

    It is an instance of Orbax's own class, with one method replaced, because Orbax's metadata names the class that
    reads the item.
    """
    handler = ocp.JsonCheckpointHandler(multiprocessing_options=processes)

    async def async_save(directory: Any, args: Any) -> list[Any]:
        folders[MANIFEST] = str(directory)
        return [_ContentWrite(content)]

    handler.async_save = async_save
    return handler


@dataclass(frozen=True)
class _ContentWrite:
    """The future of the writing of the content. It is written when Orbax waits for it.

    Orbax waits for the items in their order, and the manifest is the last one.
    """

    content: Callable[[], None]

    def result(self, timeout: int | None = None) -> None:
        """Write the content."""
        self.content()
