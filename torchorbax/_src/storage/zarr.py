"""What reading and writing share of Orbax's layout of arrays: zarr v2 metadata, keys of chunks, TensorStore's
context."""

from __future__ import annotations

import functools
import json
from typing import Any

import numpy as np
import tensorstore as ts
from orbax.checkpoint._src.serialization import tensorstore_utils  # private: Orbax has no public access to its context

from torchorbax._src.arrays.dtypes import BY_NAME
from torchorbax._src.storage import gcs
from torchorbax._src.storage.traffic import Traffic

Index = tuple[slice, ...]


def context_of(folder: str, traffic: Traffic) -> ts.Context:
    """TensorStore's context for the data in a folder."""
    context = tensorstore_utils.get_ts_context(use_ocdbt=True)
    return gcs.context(context.spec.to_json(), traffic.timeout_s) if gcs.is_uri(folder) else context


def longest_wait_s(folder: str, traffic: Traffic) -> float | None:
    """How long to wait for a result of TensorStore; None, for ever, on a local disk."""
    return traffic.timeout_s if gcs.is_uri(folder) else None


def first_chunk(ndim: int) -> str:
    """The key of the first chunk of an array with this number of dimensions."""
    return ".".join(["0"] * max(ndim, 1))


def zarr_metadata(dtype: np.dtype, shape: tuple[int, ...], chunks: tuple[int, ...], compressed: bool) -> bytes:
    """The zarr v2 metadata of an array."""
    content = {**_metadata_of(str(dtype)), "shape": shape, "chunks": chunks}
    content["compressor"] = {"id": "zstd", "level": 1} if compressed else None
    return json.dumps(content).encode()


@functools.cache
def dtypes_by_zarr_name() -> dict[str, str]:
    """The names of all dtypes that can be saved, by what zarr metadata calls them."""
    return {_metadata_of(name)["dtype"]: name for name in BY_NAME}


@functools.cache
def _metadata_of(dtype: str) -> dict[str, Any]:
    """The metadata that TensorStore itself writes for a dtype. Zarr has no names for bfloat16 and the like."""
    spec = {"driver": "zarr", "kvstore": "memory://", "dtype": dtype, "metadata": {"shape": [1], "chunks": [1]}}
    context = ts.Context()
    ts.open(spec, create=True, context=context).result()
    database = ts.KvStore.open("memory://", context=context).result()
    found: dict[str, Any] = json.loads(database[".zarray"])
    return found
