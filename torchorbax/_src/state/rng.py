"""The random number generators of a training process as one item: torchax's key, torch's CPU, numpy's and Python's."""

from __future__ import annotations

import random
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import torch

from torchorbax._src.arrays.leaves import Array
from torchorbax._src.arrays.sharding_rules import ShardingRules
from torchorbax._src.format.manifest import ItemMeta
from torchorbax._src.state.generators import python_state, set_python_state
from torchorbax._src.state.item import Captured, ItemPlan
from torchorbax._src.state.request import Request
from torchorbax._src.state.sharing import Restoring
from torchorbax._src.state.values import decode, encode
from torchorbax._src.tensors import torchax_tensors
from torchorbax.errors import ConfigError, MismatchError, Problem


class RngItem:
    """The state of all generators. The jax key is saved in either of its forms, typed or raw.

    torchax has a key for each thread: that of the thread which saves is saved, and all threads go on from it, because
    the training loop may run in another thread than the restore.
    """

    kind: ClassVar[str] = "rng"

    def __init__(self, name: str) -> None:
        self._name = name

    def capture(self, handed: Any = None) -> Captured:
        if handed is not None:
            raise ConfigError(f"{self._name}: random number generators are saved from the live process")
        leaves: dict[str, Any] = {}
        return Captured(self.kind, leaves, values=encode(_read(), leaves))

    def plan(self, saved: ItemMeta, rules: ShardingRules | None, request: Request) -> ItemPlan:
        if not request.selects(self._name):
            return ItemPlan()
        return ItemPlan(targets=dict.fromkeys(saved.leaves))  # small: loaded on the host and put where needed

    def apply(
        self, saved: ItemMeta, plan: ItemPlan, arrays: Mapping[str, Array], undo: ExitStack, restoring: Restoring
    ) -> None:
        if plan.restores_something:
            undo.callback(_write_global, _read())
            try:
                state = decode(saved.values, arrays)
                _write_global(state)
                torchax_tensors.set_rng_key_of_all_threads(_key_of(state["torchax"]), undo)
            except Exception as error:  # a file may say anything, and each generator has its own way to refuse it
                refused = f"one that they refuse: {type(error).__name__}: {error}"
                problem = Problem("placement", self._name, "", "a state that the generators take", refused)
                raise MismatchError("the checkpoint", [problem], "rng=False leaves them out.") from error


def _read() -> dict[str, Any]:
    key = torchax_tensors.rng_key()
    key = key if key.is_fully_addressable else key.addressable_data(0)  # the same on all devices
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return {
        "torchax": {
            "impl": str(jax.random.key_impl(key)) if typed else None,
            "key": jax.random.key_data(key) if typed else key,
        },
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(legacy=False),
        "python": python_state(_PYTHON),
    }


def _key_of(state: Mapping[str, Any]) -> jax.Array:
    key: jax.Array = jax.device_put(np.asarray(state["key"]))
    impl = state["impl"]
    typed: jax.Array = key if impl is None else jax.random.wrap_key_data(key, impl=impl)
    return typed


def _write_global(state: Mapping[str, Any]) -> None:
    """Write the states of the generators that the process has only one of."""
    torch.set_rng_state(state["torch"])
    np.random.set_state(state["numpy"])
    set_python_state(_PYTHON, state["python"])


_PYTHON: Any = random
"""The module has the methods of its hidden generator."""
