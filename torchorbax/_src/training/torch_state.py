"""The state of a torch optimizer as the arrays that go into a step and come out of it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
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
    """For every entry the name of its parameter, its key, and the index of its array among arrays and counters."""

    @functools.cached_property
    def params(self) -> frozenset[str]:
        """The names of the parameters that have entries."""
        return frozenset(name for name, _, _ in self)


@dataclass(frozen=True)
class Entries:
    """A state as a pytree.

    Attributes:
        arrays: an array for each entry that is no counter; donated.
        counters: those of the counters, each once; not donated, because many tensors may hold one.
        places: where they belong.
    """

    arrays: list[Any]
    counters: list[Any]
    places: Places

    @classmethod
    def of(cls, state: Mapping[str, Arrays], like: Entries | None = None) -> Entries:
        """The entries of a state: with the places of `like`, if it has the same ones."""
        here = [(name, key) for name, entries in state.items() for key in entries]
        if like is None or set(here) != {(name, key) for name, key, _ in like.places}:
            places = Places((name, key, at) for at, (name, key) in enumerate(here))
            return cls([state[name][key] for name, key in here], [], places)
        own = len(like.arrays)
        found: list[Any] = [None] * (own + len(like.counters))
        for name, key, index in reversed(like.places):
            found[index] = state[name][key]
        return cls(found[:own], found[own:], like.places)

    def by_name(self) -> dict[str, Arrays]:
        """The arrays by the name of the parameter and the key."""
        held = [*self.arrays, *self.counters]
        state: dict[str, Arrays] = {}
        for name, key, index in self.places:
            state.setdefault(name, {})[key] = held[index]
        return state


jax.tree_util.register_dataclass(Entries, ["arrays", "counters"], ["places"])


class LiveState:
    """The state that a torch optimizer keeps of some parameters.

    To hand an array to a program costs some microseconds on every device, so counters that are equal become one array:
    torch's own optimizers add one to all of them, and so they stay equal until somebody sets one. Their values are
    compared when their tensors hold other arrays than this one.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._params: Mapping[str, torch.Tensor] = {}
        self._owners: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._keys: list[str] = []
        self._live = LiveArrays(())
        self._merges = False
        self._arrays: list[int] = []  # the entries whose arrays go into a step as they are
        self._counters: list[int] = []  # and the first entry of those that are equal
        self._repeated: list[int] = []  # the others of those,
        self._originals: list[int] = []  # and the first one of each
        self._indices: list[int] = []
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
        known = self._is_known(params) and self._merges == own
        if not known:
            self._look(params, shardings)
        held = self._live.get()
        take = held.__getitem__
        if not known or not all_same(map(take, self._repeated), map(take, self._originals)):
            self._merge(held, own=own)
        return Entries(list(map(take, self._arrays)), list(map(take, self._counters)), self._places)

    def set(self, params: Mapping[str, torch.Tensor], entries: Entries) -> None:
        """Take what a step gave back."""
        if params is self._params and entries.places == self._places:
            held = [*entries.arrays, *entries.counters]
            self._live.set(map(held.__getitem__, self._indices))
            return
        for name, state in entries.by_name().items():
            held_state = self._optimizer.state[params[name]]
            for key, array in state.items():
                if key in held_state:
                    torchax_tensors.set_array(held_state[key], array)
                else:
                    held_state[key] = torchax_tensors.wrap(array)

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
                entries[key] = _on_devices(key, value, params[name], shardings[name])
        self._params, self._owners = params, [entries for _, entries in found]
        self._names = [name for name, entries in found for _ in entries]
        self._keys = [key for entries in self._owners for key in entries]
        self._live = LiveArrays(tensor for entries in self._owners for tensor in entries.values())

    def _merge(self, held: Sequence[jax.Array], *, own: bool) -> None:
        """Find which counters are equal."""
        counters = [at for at, key in enumerate(self._keys) if key == _COUNTER and held[at].ndim == 0]
        first_of = _first_of_equal(held, counters) if own else {at: at for at in counters}
        self._merges = own
        self._arrays = [at for at in range(len(held)) if at not in first_of]
        self._counters = [at for at, first in first_of.items() if at == first]
        self._repeated = [at for at, first in first_of.items() if at != first]
        self._originals = [first_of[at] for at in self._repeated]
        index = {at: number for number, at in enumerate((*self._arrays, *self._counters))}
        self._indices = [index[first_of.get(at, at)] for at in range(len(held))]
        self._places = Places(zip(self._names, self._keys, self._indices, strict=True))


def _on_devices(key: str, value: Any, param: torch.Tensor, beside: Sharding) -> Any:
    """An entry as a torchax tensor.

    It is bound to its device only if the parameter is: the step gives back everything bound if something was.
    """
    if isinstance(value, torch.Tensor) and not torchax_tensors.is_torchax(value):
        committed = getattr(torchax_tensors.array_of(param), "committed", True)
        value = torchax_tensors.wrap(put(host_copy(value), replicated_like(beside) if committed else None))
    entry_array(key, value)
    return value


def _first_of_equal(held: Sequence[jax.Array], counters: Sequence[int]) -> dict[int, int]:
    """For each counter the first one that is equal."""
    distinct = {id(held[at]): held[at] for at in counters if not held[at].is_deleted()}
    values = dict(zip(distinct, jax.device_get(list(distinct.values())), strict=True))
    first: dict[Any, int] = {}
    found: dict[int, int] = {}
    for at in counters:
        array = held[at]
        value = values[id(array)].item() if id(array) in values else None
        found[at] = first.setdefault((value, array.dtype, array.weak_type, array.sharding), at)
    return found
