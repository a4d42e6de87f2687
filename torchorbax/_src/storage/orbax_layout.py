"""The files that Orbax wants beside the arrays of a step, so that plain Orbax can read it.

Orbax's own checkpointer asks the storage some seventy things in a row to write them. What is in them depends on nothing
but the names and shardings of the arrays, so they are made here, and written all at once.
"""

from __future__ import annotations

import base64
import functools
import json
import time
from collections.abc import Iterable, Mapping

import jax
from jax.sharding import Sharding
from orbax.checkpoint._src.metadata import sharding as sharding_metadata  # private: Orbax has no public access to it

from torchorbax._src.arrays.leaves import Array
from torchorbax._src.format.manifest import Key
from torchorbax._src.storage.array_writer import is_gathered
from torchorbax._src.storage.run_layout import COMMITTED, MANIFEST

_HANDLERS = "orbax.checkpoint._src.handlers"
_ARRAYS = f"{_HANDLERS}.pytree_checkpoint_handler.PyTreeCheckpointHandler"
_JSON = f"{_HANDLERS}.json_checkpoint_handler.JsonCheckpointHandler"
_KEY_OF_A_DICT = 2  # `KeyType.DICT`


def items_of(arrays: Iterable[tuple[Key, Array]]) -> dict[str, dict[str, Sharding | None]]:
    """By item and name, what plain Orbax is told about the arrays: the sharding of a `jax.Array`, None of a host array.

    Arrays without elements are left out: Orbax cannot store them.
    """
    items: dict[str, dict[str, Sharding | None]] = {}
    for (item, name), array in arrays:
        if array.size:
            of_item = items.setdefault(item, {})
            of_item[name] = array.sharding if isinstance(array, jax.Array) and not is_gathered(array) else None
    return items


def files(items: Mapping[str, Mapping[str, Sharding | None]], *, markers: bool) -> dict[str, bytes]:
    """The content of the files by path below the step.

    Args:
        items: as `items_of` returns them.
        markers: with the markers that say that an item is complete, without which Orbax reads nothing under a URI.
    """
    now = time.time_ns()
    handlers = {**dict.fromkeys(items, _ARRAYS), MANIFEST: _JSON}
    step = {
        "item_handlers": dict(sorted(handlers.items())),
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": now,
        "commit_timestamp_nsecs": now,
        "custom_metadata": {},
    }
    found = {"_CHECKPOINT_METADATA": json.dumps(step)}
    for item, leaves in items.items():
        found[f"{item}/_METADATA"] = json.dumps(_tree(leaves))
        if shardings := _shardings(leaves):
            found[f"{item}/_sharding"] = json.dumps(shardings)
    if markers:
        found |= {f"{item}/{COMMITTED}": "Checkpoint commit was successful" for item in handlers}
    return {path: text.encode() for path, text in found.items()}


def _tree(leaves: Mapping[str, Sharding | None]) -> dict[str, object]:
    """The description of a flat dict of arrays."""
    tree = {
        str((name,)): {
            "key_metadata": [{"key": name, "key_type": _KEY_OF_A_DICT}],
            "value_metadata": {
                "value_type": "np.ndarray" if sharding is None else "jax.Array",
                "skip_deserialize": False,
            },
        }
        for name, sharding in leaves.items()
    }
    return {
        "tree_metadata": tree,
        "use_ocdbt": True,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }


def _shardings(leaves: Mapping[str, Sharding | None]) -> dict[str, str]:
    texts = {
        name: text
        for name, sharding in leaves.items()
        if sharding is not None and (text := _sharding_text(sharding)) is not None
    }
    return {base64.urlsafe_b64encode(name.encode()).decode(): text for name, text in texts.items()}


@functools.lru_cache(maxsize=1024)
def _sharding_text(sharding: Sharding) -> str | None:
    """A sharding in Orbax's serialized form; None if Orbax has none for it."""
    metadata = sharding_metadata.from_jax_sharding(sharding)
    return None if metadata is None else str(metadata.to_serialized_string())
