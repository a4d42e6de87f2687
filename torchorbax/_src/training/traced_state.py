"""A torch optimizer's state in a trace."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax
import torch
from jax.sharding import Sharding

from torchorbax._src.arrays.leaves import put
from torchorbax._src.arrays.sharding_rules import replicated_like
from torchorbax._src.tensors import torchax_tensors
from torchorbax._src.tensors.live import host_copy
from torchorbax._src.training.tracing import Arrays
from torchorbax.errors import ConfigError


class TracedState(defaultdict[torch.Tensor, "_Entries"]):
    """An optimizer's state in a trace."""

    def __init__(self, by_name: Mapping[str, torch.Tensor], arrays: Mapping[str, Arrays]) -> None:
        super().__init__(_Entries)
        for name, entries in arrays.items():
            self[by_name[name]].update({key: torchax_tensors.wrap(array) for key, array in entries.items()})

    def arrays(self, by_name: Mapping[str, torch.Tensor]) -> dict[str, Arrays]:
        """Its arrays now.

        Raises:
            ConfigError: it has something that belongs to no parameter.
        """
        params = set(by_name.values())
        if strangers := [key for key in self if key not in params]:
            raise ConfigError(
                f"the optimizer keeps state under {strangers[0]!r}, which is no parameter; a compiled step cannot "
                "update it. Use an optimizer whose state belongs to parameters, or optax"
            )
        return {
            name: {key: entry_array(key, value) for key, value in self[param].items()}
            for name, param in by_name.items()
            if param in self
        }

    def first_arrays(self, by_name: Mapping[str, torch.Tensor]) -> dict[str, Arrays]:
        """What each of its entries was first set to."""
        return {name: dict(self[param].first) for name, param in by_name.items() if param in self}


class _Entries(dict[str, Any]):
    """One parameter's state, which remembers the arrays that its entries were first set to."""

    def __init__(self) -> None:
        super().__init__()
        self.first: Arrays = {}

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in self and value is not None:
            self.first[key] = entry_array(key, value)
        super().__setitem__(key, value)


def entry_array(key: str, value: Any) -> jax.Array:
    if not torchax_tensors.is_torchax(value):
        raise ConfigError(
            f"the optimizer keeps {key!r} as a {type(value).__name__}, which a compiled step cannot update; use an "
            "optimizer with capturable state, or optax"
        )
    return torchax_tensors.array_of(value)


def entry_on_device(entries: dict[str, Any], key: str, param: torch.Tensor, beside: Sharding) -> jax.Array:
    """The array of an entry of the live state; moved beside its parameter if on the CPU (Adam's counter).

    It is bound to its device only if the parameter is: the step gives back everything bound if something was.
    """
    value = entries[key]
    if isinstance(value, torch.Tensor) and not torchax_tensors.is_torchax(value):
        committed = getattr(torchax_tensors.array_of(param), "committed", True)
        placed = put(host_copy(value), replicated_like(beside) if committed else None)
        value = entries[key] = torchax_tensors.wrap(placed)
    return entry_array(key, value)
