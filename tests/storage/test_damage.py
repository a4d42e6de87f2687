"""Which errors of reading prove damage."""

from __future__ import annotations

import errno

import jax
import pytest
from torchorbax._src.storage.damage import is_proof_of_damage

PROOFS = [
    FileNotFoundError(errno.ENOENT, "No such file"),
    ValueError("w is missing from the array data"),
    ValueError("DATA_LOSS: Error decoding: CRC-32C checksum verification failed"),
    ValueError('NOT_FOUND: Error opening "zarr" driver: Error reading local file: [OS error 2: ENOENT No such file]'),
    ValueError("OUT_OF_RANGE: Requested byte range is not valid for value of size 3"),
    NotImplementedError("UNIMPLEMENTED: a codec that nobody has"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    RecursionError("maximum recursion depth exceeded"),
]
NO_PROOFS = [
    OSError(errno.EIO, "Input/output error"),
    PermissionError(errno.EACCES, "Permission denied"),
    TimeoutError(),
    ConnectionResetError(),
    MemoryError(),
    KeyError("a mistake of our own"),
    TypeError("another"),
    ValueError("PERMISSION_DENIED: Error opening file: [OS error 13: EACCES Permission denied]"),
    ValueError("UNKNOWN: Error reading local file [OS error 5: EIO Input/output error]"),
    ValueError("RESOURCE_EXHAUSTED: [OS error 24: EMFILE Too many open files]"),
    ValueError("FAILED_PRECONDITION: [OS error 116: ESTALE Stale file handle]"),
    ValueError("UNAVAILABLE: 503 from the server"),
    ValueError("UNAUTHENTICATED: 401"),
    jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory on the device"),
]


@pytest.mark.parametrize("error", PROOFS, ids=str)
def test_what_proves_damage(error: Exception) -> None:
    assert is_proof_of_damage(error)


@pytest.mark.parametrize("error", NO_PROOFS, ids=repr)
def test_what_says_nothing_about_the_files(error: Exception) -> None:
    assert not is_proof_of_damage(error)
