"""How arrays travel between host memory and storage: bounds on memory, compression, replicas, time limits."""

from __future__ import annotations

from dataclasses import dataclass

from torchorbax.errors import ConfigError

_LONGEST_TIMEOUT_S = 86_400

CHUNK_BYTES = 64 << 20
"""The most bytes in a chunk. A chunk is always read whole, and always copied to the host whole to be written."""
LEAST_HOST_BYTES = CHUNK_BYTES
"""The least `max_host_bytes`."""
BATCH_BYTES = 128 << 20
"""The size of one data file: large enough for object storage, small enough that memory is freed early."""


@dataclass(frozen=True)
class Traffic:
    """How arrays travel between host memory and storage.

    Attributes:
        compressed: write with zstd, level 1. It takes several times as long, and hardly makes trained weights smaller.
        max_host_bytes: host memory for copies, per save or restore; at least one chunk (64 MiB).
        all_replicas_write: each device that holds a shard writes a share of it; otherwise the first one writes it all.
        first_replica_reads: what is replicated over processes is read by the first replica alone, which sends it to the
            others (see `arrays.broadcast`).
        timeout_s: how long to wait for the storage under a URI, in seconds.
    """

    compressed: bool = False
    max_host_bytes: int = 1 << 30
    all_replicas_write: bool = False
    first_replica_reads: bool = False
    timeout_s: float = 300.0


def traffic(
    compression: str | None,
    max_host_bytes: int,
    replicas: str = "first",
    single_replica_restore: bool = False,
    storage_timeout_s: float = Traffic.timeout_s,
) -> Traffic:
    """The `Traffic` for a user's options, which are described in `RunOptions`.

    Raises:
        ConfigError: an option has a value that is not allowed.
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
    return Traffic(
        compressed=compression is not None,
        max_host_bytes=max_host_bytes,
        all_replicas_write=replicas == "all",
        first_replica_reads=single_replica_restore,
        timeout_s=float(storage_timeout_s),
    )
