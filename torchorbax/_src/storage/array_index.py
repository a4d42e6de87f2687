"""The index of array data under a URI: kept in memory while it grows, and created as one object when it is complete.

TensorStore would read the index before it changes it, write it under a precondition, and, if somebody else has written
one meanwhile, merge both. A save that was given up, or whose program has been taken over, would then change a later
save of the same number: its last requests may arrive at any time. Data files have names of their own, so they change
nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import tensorstore as ts

from torchorbax._src.storage import gcs
from torchorbax._src.storage.at_once import at_once
from torchorbax._src.storage.files_at import files_at
from torchorbax._src.storage.traffic import Traffic
from torchorbax._src.storage.zarr import context_of, longest_wait_s

INDEX = "manifest.ocdbt"
"""OCDBT's name for the object."""


class Indexes:
    """The indexes that a process writes below some folders, all on a local disk or all under a URI.

    On a local disk, where a step has a folder that no other save can know, TensorStore writes them itself.

    Args:
        anywhere: one of the folders.
        traffic: how arrays are written.

    Attributes:
        context: TensorStore's context, in which they are kept.
        wait_s: how long to wait for a result; None for ever.
    """

    def __init__(self, anywhere: str, traffic: Traffic) -> None:
        self._traffic = traffic
        self._is_uri = gcs.is_uri(anywhere)
        self._folders: set[str] = set()
        self.wait_s = longest_wait_s(anywhere, traffic)
        context = context_of(anywhere, traffic)
        self.context = ts.Context({**context.spec.to_json(), "memory_key_value_store": {}}) if self._is_uri else context

    def spec(self, folder: str, spec: Mapping[str, Any], below: str = "") -> dict[str, Any]:
        """The spec of a database whose index is kept.

        Args:
            folder: its folder.
            spec: the spec of the database as it is on storage.
            below: a folder in it; the database there is opened by way of the same folder, to be merged into it.
        """
        if not self._is_uri:
            return dict(spec)
        self._folders.add(folder)
        bucket, _, path = folder.removeprefix("gs://").partition("/")
        objects = {"driver": "gcs", "bucket": bucket, "path": f"{path}/"}
        kept = {"driver": "memory", "path": f"{folder}/{INDEX}"}
        base = {"driver": "kvstack", "layers": [{"base": objects}, {"base": kept, "exact": INDEX}]}
        return {**spec, "base": {**base, "path": f"{below}/"} if below else base}

    def create(self) -> None:
        """Create the objects of all indexes that have something in them.

        Raises:
            FileExistsError: there is one already.
            StorageError: they cannot be written.
        """
        if not self._folders:
            return
        memory = ts.KvStore.open({"driver": "memory"}, context=self.context).result(self.wait_s)
        found = {folder: memory.read(f"{folder}/{INDEX}").result(self.wait_s) for folder in sorted(self._folders)}
        writes = [
            functools.partial(files_at(folder, self._traffic.timeout_s).create, INDEX, bytes(read.value))
            for folder, read in found.items()
            if read.state == "value"
        ]
        if writes:
            at_once(writes)
