"""The numbers that a training loop reports with a step, without waiting for the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import torch

from torchorbax import _torchax
from torchorbax.errors import ConfigError


def checked(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics as numbers and 0-d arrays, which can be read later and on another thread.

    Raises:
        ConfigError: one is neither a number nor a 0-d array or tensor.
    """
    return {name: _checked(name, value) for name, value in metrics.items()}


def _checked(name: str, value: Any) -> Any:
    if _torchax.is_torchax(value):
        value = _torchax.array_of(value)
    elif isinstance(value, torch.Tensor):
        value = value.detach().clone().numpy()
    if isinstance(value, bool | int | float | np.number) or (hasattr(value, "shape") and value.shape == ()):
        return value
    raise ConfigError(f"metric {name} must be a number or a 0-d array or tensor, not {value!r}")


def ready(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Those checked metrics that can be shown without waiting, as text."""
    return {
        name: f"{float(value):.4g}"
        for name, value in metrics.items()
        if not isinstance(value, jax.Array) or value.is_ready()  # type: ignore[attr-defined]
    }
