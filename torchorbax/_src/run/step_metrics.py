"""The numbers that a training loop reports with a step, without waiting for the device.

A metric that cannot be used costs a warning with its name, and never the step: that is saved without it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from torchorbax._src.arrays.jax_context import own_context
from torchorbax._src.tensors import torchax_tensors

_logger = logging.getLogger(__name__)

_NUMBER = "it must be a real number, or a 0-d array or tensor of one"


class MetricReader:
    """Takes metrics from the training loop, and warns once of each name whose value it cannot use.

    Args:
        path: the path of the run, for messages.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._warned_of: set[str] = set()

    def checked(self, metrics: Mapping[str, Any]) -> dict[str, float | jax.Array]:
        """The metrics as floats and 0-d arrays, without those that cannot be used. Waits for no device."""
        usable: dict[str, float | jax.Array] = {}
        for name, value in metrics.items():
            try:
                _check_name(name)
                usable[name] = _checked(value)
            except Exception as error:  # values of any type may raise anything when they are looked at
                self._warn(name, error)
        return usable

    def protected(self, metrics: Mapping[str, float | jax.Array]) -> dict[str, float | jax.Array]:
        """`checked` metrics as they are now, whatever the loop donates next. They can be read on another thread."""
        kept: dict[str, float | jax.Array] = {}
        for name, value in metrics.items():
            try:
                kept[name] = _protected(value) if isinstance(value, jax.Array) else value
            except Exception as error:  # of the computation that the value comes from, of any type
                self._warn(name, error)
        return kept

    def _warn(self, name: object, error: Exception) -> None:
        shown = name if isinstance(name, str) and name.isprintable() else ascii(name)
        if shown in self._warned_of:
            return
        self._warned_of.add(shown)
        why = str(error) if isinstance(error, _UnusableError) else f"it cannot be read: {type(error).__name__}: {error}"
        _logger.warning("%s: metric %s is left out, now and without further warnings: %s", self._path, shown, why)


class _UnusableError(Exception):
    """Why a metric cannot be used, in words for the user."""


def _check_name(name: object) -> None:
    if not isinstance(name, str):
        raise _UnusableError(f"its name must be a string, not a {type(name).__name__}")
    name.encode()  # raises for halves of surrogate pairs, which no terminal and no other program can take


def _checked(value: Any) -> float | jax.Array:
    """A float, or a 0-d `jax.Array` whose value can be read later."""
    held = torchax_tensors.array_of(value) if torchax_tensors.is_torchax(value) else value
    shape = tuple(getattr(held, "shape", ()))
    if shape or held is None or isinstance(held, str | bytes | bytearray | complex | np.complexfloating):
        raise _UnusableError(f"{_NUMBER}, not a {type(value).__name__}" + (f" of shape {shape}" if shape else ""))
    if not isinstance(held, jax.Array):
        return float(held)
    if not (
        held.dtype == np.bool_ or jnp.issubdtype(held.dtype, np.integer) or jnp.issubdtype(held.dtype, np.floating)
    ):
        raise _UnusableError(f"{_NUMBER}, not an array of {held.dtype}")
    _check_exists(held)
    return held


@functools.cache  # `issubdtype` takes many microseconds, at every step
def _is_real(dtype: np.dtype) -> bool:
    return dtype == np.bool_ or jnp.issubdtype(dtype, np.integer) or jnp.issubdtype(dtype, np.floating)


def _check_exists(array: jax.Array) -> None:
    if array.is_deleted():
        raise _UnusableError("its array has been deleted, most likely donated to a jitted function")


def _protected(array: jax.Array) -> float | jax.Array:
    """The value, if the host has it already; else a copy on one of its devices, which is dispatched and not waited for.

    A metric may be part of a state that the next step donates.
    """
    _check_exists(array)
    local = array.addressable_data(0)  # a 0-d array has the same value on all its devices
    with own_context():
        if all(device.platform == "cpu" for device in local.devices()) and _is_there(local):
            return float(local)
        copy: jax.Array = _copy(local)
        return copy


@jax.jit
def _copy(array: jax.Array) -> jax.Array:
    return jnp.copy(array)


def ready(metrics: Mapping[str, Any]) -> dict[str, str]:
    """The metrics that can be shown without waiting for the device, as text; `metrics` have been `checked`."""
    texts: dict[str, str] = {}
    for name, value in metrics.items():
        with contextlib.suppress(RuntimeError):  # its computation has failed
            if not isinstance(value, jax.Array) or _is_there(value):
                texts[name] = f"{float(value):.4g}"
    return texts


def _is_there(array: jax.Array) -> bool:
    """Has it been computed, and not been donated since? Python crashes if a deleted array is asked for `is_ready`."""
    return not array.is_deleted() and bool(array.is_ready())  # type: ignore[attr-defined]
