"""Opens the storage at a path."""

from __future__ import annotations

import os

from torchorbax._src.storage.orbax_storage import OrbaxStorage
from torchorbax._src.storage.storage import Storage
from torchorbax._src.storage.traffic import Traffic


def open_storage(path: str | os.PathLike[str], traffic: Traffic = Traffic()) -> Storage:  # noqa: B008  # immutable
    """The storage at a path. Nothing is created or read yet.

    Args:
        path: a folder or a `gs://` URI. A relative path is resolved now, against the current folder.
        traffic: how arrays are written and read.

    Raises:
        ConfigError: the path cannot name a run, or its file system needs an extra of torchorbax.
    """
    return OrbaxStorage(path, traffic)
