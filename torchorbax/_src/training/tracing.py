"""Small helpers for tracing torch code that works on live tensors."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping

import jax
import torch
from jax.sharding import NamedSharding, Sharding

from torchorbax._src.tensors import torchax_tensors

Arrays = dict[str, jax.Array]


def arrays_of(tensors: Mapping[str, torch.Tensor]) -> Arrays:
    """The arrays of live torchax tensors."""
    return {name: torchax_tensors.array_of(tensor) for name, tensor in tensors.items()}


@contextlib.contextmanager
def holding(tensors: Mapping[str, torch.Tensor], arrays: Mapping[str, jax.Array]) -> Iterator[None]:
    """The live tensors hold `arrays` inside, and afterwards what they held before."""
    before = arrays_of(tensors)
    try:
        for name, tensor in tensors.items():
            torchax_tensors.set_array(tensor, arrays[name])
        yield
    finally:
        for name, tensor in tensors.items():
            torchax_tensors.set_array(tensor, before[name])


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Inside, Python's garbage collector does not look for cycles.

    A trace makes many objects, so that it would look several times, each time at all that torch and transformers have
    loaded: a sixth of the time of a first step.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def settled(array: jax.Array, like: jax.Array, sharding: Sharding) -> jax.Array:
    """A traced result that takes the place of `like` in the next call without a new compilation.

    It gets the dtype of `like` (torch's in-place arithmetic never changes a dtype, JAX's promotion does), is strongly
    typed and, on a mesh, laid out by `sharding`.
    """
    return laid_out(jax.lax.convert_element_type(array, like.dtype), sharding)


def laid_out(array: jax.Array, sharding: Sharding) -> jax.Array:
    """`array`, with its layout over a mesh fixed; left to JAX where there is no mesh."""
    return jax.lax.with_sharding_constraint(array, sharding) if isinstance(sharding, NamedSharding) else array
