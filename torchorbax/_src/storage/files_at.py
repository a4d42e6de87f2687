"""The files at a path, whatever kind of storage it is on."""

from __future__ import annotations

from torchorbax._src.storage import gcs
from torchorbax._src.storage.files import Files
from torchorbax._src.storage.gcs_files import GcsFiles
from torchorbax._src.storage.local_files import LocalFiles


def files_at(root: str, timeout_s: float) -> Files:
    """The files below an absolute path or a `gs://` URI.

    Args:
        root: the path or URI.
        timeout_s: how long to wait for an answer under a URI.
    """
    return GcsFiles(root, timeout_s) if gcs.is_uri(root) else LocalFiles(root)
