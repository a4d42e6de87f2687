"""Tensors of every dtype with any bits, and their bytes to compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from hypothesis import strategies as st
from torchorbax import to_jax
from torchorbax._src.tensors import torchax_tensors as _torchax


def bits(value: object) -> bytes:
    """The bytes of a tensor's or an array's values, so that NaNs with payloads and signed zeros compare, too."""
    if isinstance(value, torch.Tensor):
        if not _torchax.is_torchax(value):
            return value.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        value = _torchax.array_of(value)
    return np.asarray(value).tobytes()


def tensor_of_bits(dtype: torch.dtype, shape: tuple[int, ...], raw: bytes) -> torch.Tensor:
    """A CPU tensor with these bits, as many as it needs and over again if they are too few."""
    tensor = torch.empty(shape, dtype=dtype)
    memory = tensor.reshape(-1).view(torch.uint8).numpy()
    memory[...] = np.resize(np.frombuffer(raw, np.uint8), memory.shape)
    if dtype is torch.bool:
        memory &= 1  # other bytes are no bool
    return tensor


def aligned(array: np.ndarray) -> np.ndarray:
    """A copy where JAX's CPU backend could use the memory as it is, without a copy."""
    memory = np.empty(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


DTYPES = [
    getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "complex64", "complex128", "bool"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
        *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    )
]

WIDE = {torch.float64, torch.int64, torch.uint64, torch.complex128}
"""What a jax.Array cannot hold while jax_enable_x64 is off."""

shapes = st.lists(st.sampled_from([0, 1, 2, 3, 5]), max_size=3).map(tuple)

_PATTERNS = st.sampled_from([b"\xff", b"\x00", b"\x80\x7f", b"\x01\xfc", b"\x01\x00\x80\x7f", b"\x01\x02\xf8\xff"])


@st.composite
def tensors(draw: st.DrawFn, dtypes: Sequence[torch.dtype] = DTYPES) -> torch.Tensor:
    """CPU tensors of any dtype and small shape, with any bits: NaNs with payloads, infinities, zero-size and 0-d."""
    raw = draw(_PATTERNS | st.binary(min_size=1, max_size=64))
    return tensor_of_bits(draw(st.sampled_from(dtypes)), draw(shapes), raw)


NO_TORCHAX = {torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu}
"""What JAX can hold and a torchax tensor cannot."""


def torchax_tensor(value: Any, dtype: Any = np.float32) -> torch.Tensor:
    return _torchax.wrap(jnp.asarray(value, dtype))


def donated(shape: tuple[int, ...] = (3,)) -> jax.Array:
    array = jnp.zeros(shape)
    array.delete()
    return array


def shards(tensor: torch.Tensor) -> set[tuple[int, ...]]:
    array = to_jax(tensor)
    assert len(array.addressable_shards) == 8
    return {shard.data.shape for shard in array.addressable_shards}
