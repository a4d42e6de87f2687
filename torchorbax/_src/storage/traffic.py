"""How arrays travel: memory, compression, time limits."""

from __future__ import annotations

from dataclasses import dataclass

from torchorbax.errors import ConfigError

_LONGEST_TIMEOUT_S = 86_400


CHUNK_BYTES = 64 << 20
"""The largest chunk: what is read at least for any part of it, and held in host memory at most for each."""
LEAST_HOST_BYTES = CHUNK_BYTES
BATCH_BYTES = 128 << 20
"""What goes into one data file: large enough for object storage, small enough to let memory go early."""


@dataclass(frozen=True)
class Traffic:
    """How arrays travel between host memory and storage.

    Attributes:
        compressed: zstd, level 1. Costs far more time than it saves bytes, for trained weights.
        max_host_bytes: host memory for copies on their way, per save or restore; one chunk at least (64 MiB).
        all_write: of a part that several devices hold, each writes its share; else the first one writes all of it.
        timeout_s: how long to wait for a URI's storage.
        one_reads: what several processes hold is read by the first replica's alone (`torchorbax.replicas`).
    """

    compressed: bool = False
    max_host_bytes: int = 1 << 30
    all_write: bool = False
    one_reads: bool = False
    timeout_s: float = 300.0


def traffic(
    compression: str | None,
    max_host_bytes: int,
    replicas: str = "first",
    single_replica_restore: bool = False,
    storage_timeout_s: float = Traffic.timeout_s,
) -> Traffic:
    """How arrays travel, in a user's words.

    Raises:
        ConfigError: a word that is not known, or too little memory.
    """
    if compression not in (None, "zstd"):
        raise ConfigError(f"compression must be 'zstd' or None, not {compression!r}")
    if isinstance(max_host_bytes, bool) or not isinstance(max_host_bytes, int) or max_host_bytes < LEAST_HOST_BYTES:
        raise ConfigError(f"max_host_bytes must be an int of at least {LEAST_HOST_BYTES}, not {max_host_bytes!r}")
    if replicas not in ("first", "all"):
        raise ConfigError(f"replicas must be 'first' or 'all', not {replicas!r}")
    if (
        isinstance(storage_timeout_s, bool)
        or not isinstance(storage_timeout_s, int | float)
        or not 0 < storage_timeout_s <= _LONGEST_TIMEOUT_S
    ):
        raise ConfigError(
            f"storage_timeout_s must be a positive number of seconds, {_LONGEST_TIMEOUT_S} at most, "
            f"not {storage_timeout_s!r}"
        )
    all_write = replicas == "all"
    return Traffic(compression is not None, max_host_bytes, all_write, single_replica_restore, float(storage_timeout_s))
