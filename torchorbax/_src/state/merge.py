"""Restored values into live ones, in place as far as that is possible, so that all who refer to these see them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from typing import Any

import jax
import numpy as np
import torch

from torchorbax._src.arrays.leaves import is_key, place_like
from torchorbax._src.format.values import MAPPINGS, LayoutError, Node, key_name
from torchorbax._src.state.sharing import Restoring, is_same_view
from torchorbax._src.tensors import torchax_tensors
from torchorbax._src.tensors.live import array_in, live_dtype, settle

Path = tuple[str, ...]


class _Absent:
    """There is no live value here."""


class Merge:
    """The values of one item into its live ones.

    What is one object in two places of the restored values is one object in two places afterwards. What is two objects
    stays two, also where the live ones were one.

    Args:
        undo: gets how to undo everything.
        restoring: what the items before this one have become.
        given: those of their live objects that are among the new values, and stay as they are.
        children: what is below a live node of a type that only the program knows; nothing if it is none.
        build: makes such a node of its path, its merged children and the live value there.
        to_jax: may a live CPU tensor become one on jax, in place?
    """

    def __init__(
        self,
        undo: ExitStack,
        restoring: Restoring,
        given: Collection[Any],
        children: Callable[[Any], Mapping[str, Any]] = lambda live: {},
        build: Callable[[Path, Mapping[str, Any]], Any] | None = None,
        *,
        to_jax: bool = False,
    ) -> None:
        self._undo = undo
        self._restoring = restoring
        self._given = {id(one): one for one in given}
        self._children = children
        self._build = build
        self._to_jax = to_jax
        self._merged: dict[int, tuple[Any, Any]] = {}  # by id of a restored object: itself and what became of it
        self._taken: dict[int, Any] = {}  # live objects that have got their value, by id

    def into(self, live: Any, new: Any, path: Path = ()) -> Any:
        """What to put in the place of `live`: itself, if it could take the value of `new`."""
        if new is live:
            return live
        if id(new) in self._given:
            return live if is_same_view(live, new) else new
        if id(new) in self._merged:
            return self._merged[id(new)][1]
        if isinstance(new, Node):
            return self._node(live, new, path)
        if type(new) is tuple:
            return self._tuple(live, new, path)
        if type(new) in MAPPINGS or type(new) in (list, set):
            return self._container(live, new, path)
        if isinstance(new, torch.Tensor | np.ndarray | jax.Array):
            result = self._array(live, new)
            self._merged[id(new)] = new, result
            return result
        return new

    def became(self, objects: Mapping[str | int, Any]) -> dict[str | int, Any]:
        """What these objects, which have been among the new values, have become."""
        there = {key: self._merged.get(id(one), (one, self._given.get(id(one)))) for key, one in objects.items()}
        return {key: live for key, (_, live) in there.items() if live is not None}

    def _node(self, live: Any, new: Node, path: Path) -> Any:
        if self._build is None:
            raise LayoutError(f"a {new.type} where only plain containers can be")
        below = self._children(live)
        merged = {name: self.into(below.get(name, _Absent), one, (*path, name)) for name, one in new.children.items()}
        if merged.keys() == below.keys() and all(merged[name] is below[name] for name in merged):
            return live
        return self._build(path, merged)

    def _tuple(self, live: Any, new: tuple[Any, ...], path: Path) -> Any:
        below = live if type(live) is tuple else ()
        merged = tuple(
            self.into(below[index] if index < len(below) else _Absent, one, (*path, str(index)))
            for index, one in enumerate(new)
        )
        unchanged = below is live and [*map(id, below)] == [*map(id, merged)]
        return live if unchanged else merged

    def _container(self, live: Any, new: Any, path: Path) -> Any:
        filled = live if type(live) is type(new) and self._take(live) else type(new)()
        self._merged[id(new)] = new, filled
        below: dict[Any, Any] = {}
        if type(live) is type(new) and not isinstance(live, set):
            below = dict(live if isinstance(live, dict) else enumerate(live))
        content: Any = new
        if isinstance(new, dict):
            content = {key: self.into(below.get(key, _Absent), one, (*path, key_name(key))) for key, one in new.items()}
        elif isinstance(new, list):
            content = [self.into(below.get(key, _Absent), one, (*path, key_name(key))) for key, one in enumerate(new)]
        if filled is live:
            self._undo.callback(_refill, live, live.copy())
        _refill(filled, content)
        if isinstance(new, defaultdict):
            self._undo.callback(setattr, filled, "default_factory", filled.default_factory)
            filled.default_factory = new.default_factory
        return filled

    def _take(self, live: Any) -> bool:
        """Is the live object still free to take a value?"""
        if id(live) in self._taken or not self._restoring.is_free(live):
            return False
        self._taken[id(live)] = live
        return True

    def _array(self, live: Any, new: Any) -> Any:
        if isinstance(live, torch.Tensor) and isinstance(new, torch.Tensor):
            if not self._can_take(live, new) or not self._take(live):
                return new
            settle(live, array_in(new), self._undo)
            return live
        if isinstance(new, np.ndarray) and type(live) is np.ndarray and live.flags.writeable:
            if (live.shape, live.dtype) != (new.shape, new.dtype) or not self._take(live):
                return new
            self._undo.callback(np.copyto, live, live.copy())
            np.copyto(live, new)
            return live
        plain = isinstance(new, jax.Array) and isinstance(live, jax.Array) and not is_key(new) and not is_key(live)
        return place_like(new, live) if plain and live.shape == new.shape else new

    def _can_take(self, live: torch.Tensor, new: torch.Tensor) -> bool:
        if live.shape != new.shape or live_dtype(live) != live_dtype(new):
            return False
        if isinstance(live, torch.nn.Parameter) != isinstance(new, torch.nn.Parameter):
            return False
        if isinstance(live, torchax_tensors.Readable) != isinstance(new, torchax_tensors.Readable):
            return False
        if torchax_tensors.is_torchax(live) or torchax_tensors.is_torchax(new):
            same_side = torchax_tensors.is_torchax(live) == torchax_tensors.is_torchax(new)
            return same_side or (self._to_jax and torchax_tensors.is_torchax(new))
        in_memory = live.device.type == "cpu" and live.layout is torch.strided
        expanded = any(step == 0 and size > 1 for step, size in zip(live.stride(), live.shape, strict=True))
        return in_memory and not expanded


def _refill(container: Any, content: Any) -> None:
    if isinstance(container, list):
        container[:] = content
        return
    container.clear()
    container.update(content)
