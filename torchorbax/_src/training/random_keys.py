"""The random key of a compiled step."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from torchorbax._src.arrays.leaves import put
from torchorbax._src.tensors import torchax_tensors

_WORDS = {2: "threefry2x32", 4: "rbg"}
"""The implementations of raw keys, which do not say theirs, by their length."""


def key_beside(beside: Sharding, arrays: Sequence[jax.Array]) -> jax.Array:
    """Torchax's key of this thread on the devices of a step with these arrays.

    It may have been restored, be of another mesh, or be a raw key of another implementation than JAX's default now. It
    is bound to the devices if the arrays are: the step gives it back so, and a second call with a key of another kind
    than the first would compile again.
    """
    key = torchax_tensors.rng_key()
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    implementation = _WORDS.get(key.shape[-1]) if not typed and key.ndim else None
    if implementation is not None and key.shape != jax.random.key_data(jax.random.key(0)).shape:
        key = jax.random.wrap_key_data(key, impl=implementation)
    if key.sharding.device_set != beside.device_set:
        key = put(_shared(key, beside), beside)
    elif not getattr(key, "committed", True) and getattr(next(iter(arrays), key), "committed", True):
        key = put(key, beside)
    return key


def _shared(key: jax.Array, beside: Sharding) -> jax.Array:
    """Process 0's key, for a step over several processes: each may have seeded its own, and JAX takes them for one.

    What is replicated would be something else in every process from then on. A device collective.
    """
    if beside.is_fully_addressable:
        return key
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    words: jax.Array = multihost_utils.broadcast_one_to_all(jax.random.key_data(key) if typed else key)
    return jax.random.wrap_key_data(words, impl=str(jax.random.key_impl(key))) if typed else words
