"""The state of a torch optimizer as the arrays that go into a step and come out of it."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import jax
import torch
from jax.sharding import Sharding

from torchorbax._src.arrays.leaves import put
from torchorbax._src.arrays.sharding_rules import replicated_like
from torchorbax._src.tensors import torchax_tensors
from torchorbax._src.tensors.live import host_copy
from torchorbax._src.training.live_arrays import LiveArrays, all_same
from torchorbax._src.training.traced_state import entry_array
from torchorbax._src.training.tracing import Arrays

_COUNTER = "step"
"""Under this key torch's own optimizers count the steps of each parameter. All of them add one at every step."""



class Places(tuple[tuple[str, str, int], ...]):
    """For every entry the name of its parameter, its key, and the index of its array."""

    @functools.cached_property
    def params(self) -> frozenset[str]:
        """The names of the parameters that have entries."""
        return frozenset(name for name, _, _ in self)


@dataclass(frozen=True)
class Entries:
    """A state as a pytree.

    Attributes:
        arrays: the arrays, each once.
        places: where they belong.
    """

    arrays: list[Any]
    places: Places

    @classmethod
    def of(cls, state: Mapping[str, Arrays], like: Entries | None = None) -> Entries:
        """The entries of a state: with the places of `like`, if it has the same ones."""
        here = [(name, key) for name, entries in state.items() for key in entries]
        if like is None or set(here) != {(name, key) for name, key, _ in like.places}:
            places = Places((name, key, at) for at, (name, key) in enumerate(here))
            return cls([state[name][key] for name, key in here], places)
        arrays: list[Any] = [None] * len(like.arrays)
        for name, key, index in reversed(like.places):
            arrays[index] = state[name][key]
        return cls(arrays, like.places)

    def by_name(self) -> dict[str, Arrays]:
        """The arrays by the name of the parameter and the key."""
        state: dict[str, Arrays] = {}
        for name, key, index in self.places:
            state.setdefault(name, {})[key] = self.arrays[index]
        return state


jax.tree_util.register_dataclass(Entries, ["arrays"], ["places"])


class LiveState:
    """The state that a torch optimizer keeps of some parameters.

    To hand an array to a program costs some microseconds on every device, so counters that are equal become one array:
    what is added to them is the same, and so they stay equal until somebody sets one. They are compared when their
    tensors hold other arrays than this one.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._params: Mapping[str, torch.Tensor] = {}
        self._owners: list[dict[str, Any]] = []
        self._keys: list[str] = []
        self._live = LiveArrays(())
        self._firsts: list[int] = []  # of each array that goes into a step, the first entry that has it
        self._repeated: list[int] = []  # the other entries,
        self._originals: list[int] = []  # and the first one that has the same array
        self._indices: list[int] = []  # of the array of each entry
        self._places = Places()

    def get(self, params: Mapping[str, torch.Tensor], shardings: Mapping[str, Sharding], *, own: bool) -> Entries:
        """The entries of the parameters as they are now. What is on the CPU (Adam's counter) moves to the devices.

        Args:
            params: the parameters by name.
            shardings: where they are.
            own: is this an optimizer of torch itself?

        Raises:
            ConfigError: an entry is no tensor.
        """
        known = self._is_known(params)
        if not known:
            self._look(params, shardings)
        arrays = self._live.get()
        hold = arrays.__getitem__
        if not known or not all_same(map(hold, self._repeated), map(hold, self._originals)):
            self._share(arrays, own=own)
        return Entries(list(map(hold, self._firsts)), self._places)

    def set(self, params: Mapping[str, torch.Tensor], entries: Entries) -> None:
        """Take what a step gave back."""
        if params is self._params and entries.places == self._places:
            self._live.set(map(entries.arrays.__getitem__, self._indices))
            return
        for name, state in entries.by_name().items():
            held = self._optimizer.state[params[name]]
            for key, array in state.items():
                if key in held:
                    torchax_tensors.set_array(held[key], array)
                else:
                    held[key] = torchax_tensors.wrap(array)

    def _is_known(self, params: Mapping[str, torch.Tensor]) -> bool:
        """Are the entries the tensors that they were?"""
        if params is not self._params:
            return False
        owners = list(filter(None, map(self._optimizer.state.get, params.values())))
        return (
            len(owners) == len(self._owners)
            and all_same(owners, self._owners)
            and sum(map(len, owners)) == len(self._live)
            and all_same(chain.from_iterable(owners), self._keys)
            and all_same(chain.from_iterable(map(dict.values, owners)), self._live)
        )

    def _look(self, params: Mapping[str, torch.Tensor], shardings: Mapping[str, Sharding]) -> None:
        held = [(name, self._optimizer.state.get(param)) for name, param in params.items()]
        found = [(name, entries) for name, entries in held if entries]
        for name, entries in found:
            for key, value in entries.items():
                entries[key] = _on_devices(key, value, shardings[name])
        self._params, self._owners = params, [entries for _, entries in found]
        self._keys = [key for entries in self._owners for key in entries]
        self._live = LiveArrays(tensor for entries in self._owners for tensor in entries.values())
        self._places = Places((name, key, 0) for name, entries in found for key in entries)

    def _share(self, arrays: Sequence[jax.Array], *, own: bool) -> None:
        """Find which counters are equal."""
        counters = [at for at, key in enumerate(self._keys) if own and key == _COUNTER and _is_counter(arrays[at])]
        numbers = _numbers(arrays[at] for at in counters)
        first_of: dict[Any, int] = {}
        same = {at: first_of.setdefault((numbers[id(arrays[at])], *_kind(arrays[at])), at) for at in counters}
        self._firsts = [at for at in range(len(arrays)) if same.get(at, at) == at]
        self._repeated = [at for at, first in same.items() if at != first]
        self._originals = [same[at] for at in self._repeated]
        index = {at: number for number, at in enumerate(self._firsts)}
        self._indices = [index[same.get(at, at)] for at in range(len(arrays))]
        places = zip(self._places, self._indices, strict=True)
        self._places = Places((name, key, index) for (name, key, _), index in places)


def _on_devices(key: str, value: Any, beside: Sharding) -> Any:
    """An entry as a torchax tensor."""
    if isinstance(value, torch.Tensor) and not torchax_tensors.is_torchax(value):
        value = torchax_tensors.wrap(put(host_copy(value), replicated_like(beside)))
    entry_array(key, value)
    return value


def _is_counter(array: jax.Array) -> bool:
    return array.ndim == 0 and not array.is_deleted()


def _kind(array: jax.Array) -> tuple[Any, ...]:
    return array.dtype, array.weak_type, array.sharding


def _numbers(arrays: Iterable[jax.Array]) -> dict[int, float]:
    """The values of scalars by their ids."""
    distinct = {id(array): array for array in arrays}
    values = jax.device_get(list(distinct.values()))
    return {key: value.item() for key, value in zip(distinct, values, strict=True)}
