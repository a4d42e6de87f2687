"""What a live leaf would be saved as, and where a stored one goes."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import torch
from jax.sharding import Sharding, SingleDeviceSharding

from torchorbax._src.arrays.dtypes import BY_NAME, dtype_name, fits_on_device
from torchorbax._src.format.manifest import LeafMeta, Residence
from torchorbax._src.tensors import torchax_tensors
from torchorbax._src.tensors.live import live_dtype


def target_beside(live: Any, saved: LeafMeta) -> jax.sharding.Sharding | None:
    """Where a stored leaf goes: where its live counterpart is, if there is one on jax; else as it was when saved."""
    if torchax_tensors.is_torchax(live):
        live = torchax_tensors.array_of(live)
    if not fits_on_device(BY_NAME[saved.dtype]):
        return None
    if isinstance(live, jax.Array):
        return live.sharding
    return default_device() if saved.residence == "jax" else None


def array_meta(leaf: Any) -> LeafMeta:
    """What a live tensor or array would be saved as."""
    if isinstance(leaf, torch.Tensor):
        return live_meta(leaf)
    return LeafMeta(
        tuple(leaf.shape), dtype_name(np.dtype(leaf.dtype)), "jax" if isinstance(leaf, jax.Array) else "host"
    )


def default_device() -> Sharding:
    """Where arrays go that nothing else is known of."""
    return SingleDeviceSharding(jax.local_devices()[0])


def live_meta(tensor: torch.Tensor) -> LeafMeta:
    """What a live tensor would be saved as."""
    residence: Residence = "jax" if torchax_tensors.is_torchax(tensor) or tensor.is_meta else "host"
    return LeafMeta(tuple(tensor.shape), dtype_name(live_dtype(tensor)), residence)
