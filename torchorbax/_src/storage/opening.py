"""Which kind of storage a path stands for."""

from __future__ import annotations

import os

from torchorbax._src.storage.orbax_storage import OrbaxStorage
from torchorbax._src.storage.storage import Storage
from torchorbax._src.storage.traffic import Traffic


def open_storage(path: str | os.PathLike[str], traffic: Traffic = Traffic()) -> Storage:  # noqa: B008  # immutable
    """The storage at a path. Nothing is made, read or asked for yet.

    Args:
        path: a folder (relative paths are taken from the current folder, now) or a `gs://` URI.
        traffic: how arrays are written and read.

    Raises:
        ConfigError: the path is none, or its file system needs an extra.
    """
    return OrbaxStorage(path, traffic)
