"""The numbers that a training loop reports with a step, without waiting for the device."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from torchorbax._src.tensors import torchax_tensors
from torchorbax.errors import ConfigError


def checked(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics as floats and 0-d arrays, whose values can be read later and on another thread.

    Raises:
        ConfigError: a value is neither a real number nor a 0-d array or tensor of one.
    """
    return {name: _checked(name, value) for name, value in metrics.items()}


def _checked(name: str, value: Any) -> Any:
    """A float, or a 0-d `jax.Array`, whose value can be read later."""
    if not isinstance(name, str):
        raise ConfigError(f"the name of a metric must be a string, not {name!r}")
    held = torchax_tensors.array_of(value) if torchax_tensors.is_torchax(value) else value
    if isinstance(held, jax.Array):
        real = (
            held.dtype == np.bool_ or jnp.issubdtype(held.dtype, np.integer) or jnp.issubdtype(held.dtype, np.floating)
        )
        if real and held.shape == ():
            return held
    elif not isinstance(held, str) and getattr(held, "shape", ()) == ():
        with contextlib.suppress(TypeError, ValueError, OverflowError, RuntimeError):
            return float(held)
    raise ConfigError(f"metric {name} must be a real number or a 0-d array or tensor of one, not {value!r}")


def ready(metrics: Mapping[str, Any]) -> dict[str, str]:
    """The metrics that can be shown without waiting for the device, as text; `metrics` have been `checked`."""
    return {
        name: f"{float(value):.4g}"
        for name, value in metrics.items()
        if not isinstance(value, jax.Array) or value.is_ready()  # type: ignore[attr-defined]
    }
