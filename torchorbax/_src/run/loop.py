"""Steps(): the loop, its progress bar, its end by SIGTERM."""

from __future__ import annotations

from tqdm.auto import tqdm


class _ProgressBar(tqdm):  # type: ignore[misc]  # tqdm is untyped
    monitor_interval = 0  # no thread that outlives the run
