"""Random number generators of torch, numpy and Python, each as an object with a state."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

_TYPES = (torch.Generator, np.random.Generator, np.random.BitGenerator, np.random.RandomState, random.Random)


def is_generator(value: object) -> bool:
    """Is it a generator that has a state? One of the operating system has none."""
    return isinstance(value, _TYPES) and not isinstance(value, random.SystemRandom)


class Generator:
    """A generator of one of these kinds, with `state_dict` and `load_state_dict`."""

    def __init__(self, generator: Any) -> None:
        self._generator = generator.bit_generator if isinstance(generator, np.random.Generator) else generator

    def state_dict(self) -> dict[str, Any]:
        """Where it stands."""
        one = self._generator
        if isinstance(one, torch.Generator):
            return {"torch": one.get_state()}
        if isinstance(one, np.random.BitGenerator):
            return {"numpy": dict(one.state)}
        if isinstance(one, np.random.RandomState):
            return {"numpy legacy": dict(one.get_state(legacy=False))}
        return {"python": python_state(one)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError, KeyError, TypeError, RuntimeError: it is the state of a generator of another kind.
        """
        one = self._generator
        if isinstance(one, torch.Generator):
            one.set_state(state["torch"])
        elif isinstance(one, np.random.BitGenerator):
            one.state = state["numpy"]
        elif isinstance(one, np.random.RandomState):
            one.set_state(state["numpy legacy"])
        else:
            set_python_state(one, state["python"])


def python_state(generator: random.Random) -> dict[str, Any]:
    """The state of one of Python's generators, its words as an array."""
    version, words, gauss = generator.getstate()
    return {"version": version, "words": np.asarray(words, np.uint32), "gauss": gauss}


def set_python_state(generator: random.Random, state: Mapping[str, Any]) -> None:
    """The reverse."""
    generator.setstate((state["version"], tuple(int(word) for word in state["words"]), state["gauss"]))
