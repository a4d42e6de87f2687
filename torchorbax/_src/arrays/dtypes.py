"""The table of dtypes that can be saved: torch's, numpy's (with ml_dtypes), and the name used in the manifest.

A torch dtype that is not in the table (packed float4, complex32, quantised and sub-byte types) has no numpy counterpart
that keeps its bits. A leaf of such a dtype raises `UnsupportedLeafError`.
"""

from __future__ import annotations

import functools

import jax
import ml_dtypes
import numpy as np
import torch

_NUMPY_NAMES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
)
_ML_NAMES = ("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")

TORCH_TO_NUMPY: dict[torch.dtype, np.dtype] = {
    **{getattr(torch, name): np.dtype(name) for name in _NUMPY_NAMES},
    **{getattr(torch, name): np.dtype(getattr(ml_dtypes, name)) for name in _ML_NAMES},
}
NUMPY_TO_TORCH: dict[np.dtype, torch.dtype] = {numpy: torch_ for torch_, numpy in TORCH_TO_NUMPY.items()}
BY_NAME: dict[str, np.dtype] = {dtype.name: dtype for dtype in NUMPY_TO_TORCH}


@functools.cache
def dtype_name(dtype: np.dtype) -> str:
    """The name of a dtype. Cached, because numpy takes some microseconds to compose it."""
    return str(dtype)


def fits_on_device(dtype: np.dtype) -> bool:
    """Can a `jax.Array` hold `dtype`? It cannot hold 64-bit dtypes while `jax_enable_x64` is off: JAX narrows them."""
    return np.dtype(jax.dtypes.canonicalize_dtype(dtype)) == dtype


def host_to_torch(array: np.ndarray) -> torch.Tensor:
    """A CPU torch tensor with the values, shape and dtype of `array`, in memory of its own."""
    tensor = torch.empty(array.shape, dtype=NUMPY_TO_TORCH[array.dtype], device="cpu")
    tensor.reshape(-1).view(torch.uint8).numpy()[...] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return tensor


def torch_to_host(tensor: torch.Tensor) -> np.ndarray:
    """A numpy array with the values, shape and dtype of a CPU torch tensor, in memory of its own."""
    dense = tensor.detach().resolve_conj().resolve_neg().contiguous()
    bits = bits_of(dense)
    own = bits.copy() if dense.data_ptr() == tensor.data_ptr() else bits
    return own.view(TORCH_TO_NUMPY[tensor.dtype]).reshape(tuple(tensor.shape))


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    """The memory of a contiguous CPU tensor, as uint8.

    numpy copies it with one thread. torch would wake its own for a few kilobytes, which takes milliseconds where other
    threads need the processors, such as those that load programs during a restore.
    """
    # A single value counts as contiguous whatever its stride, so the strides are said anew. Not by `Tensor.numpy`:
    # after it torch refuses to resize the storage, which FSDP does.
    return np.from_dlpack(tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8))
