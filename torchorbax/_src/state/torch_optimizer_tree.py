"""The tree that a torch optimizer is saved as, and where what is in it goes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

import torch
from jax.sharding import Sharding

from torchorbax._src.arrays.sharding_rules import replicated_like, state_sharding
from torchorbax._src.format.manifest import LeafMeta, is_possible
from torchorbax._src.format.values import LayoutError, Path, StoredLeaf
from torchorbax._src.state.live_leaves import live_meta
from torchorbax._src.tensors.live import live_dtype
from torchorbax._src.tensors.placement import placed_dtype
from torchorbax.errors import UnsupportedLeafError


def checked_tree(tree: Any) -> dict[str, Any]:
    """`tree`, if it is laid out as `capture` does.

    Raises:
        LayoutError: it is not, so somebody else wrote it.
    """
    match tree:
        case {"class": str(), "state": dict(state), "param_groups": list(groups), "params": dict(params)}:
            named = all(isinstance(name, str) and name in params for name in state)
            grouped = all(isinstance(group, dict) and _all_names(group.get("params"), params) for group in groups)
            known = all(isinstance(name, str) and _is_shape_and_dtype(one) for name, one in params.items())
            if named and grouped and known and isinstance(tree.get("others", {}), dict):
                return dict(tree)
    raise LayoutError("not the state of a torch.optim optimizer")


def _all_names(names: Any, known: Collection[str]) -> bool:
    return isinstance(names, list) and all(isinstance(name, str) and name in known for name in names)


def _is_shape_and_dtype(meta: Any) -> bool:
    match meta:
        case [list(shape), str(dtype)] | [list(shape), str(dtype), "jax" | "host"]:
            return is_possible(shape, dtype)
    return False


def described(param: torch.Tensor) -> list[Any]:
    """Shape, dtype and side of a parameter, in JSON."""
    meta = live_meta(param)
    return [list(meta.shape), meta.dtype, meta.residence]


def placed_meta(name: str, param: torch.Tensor, sharding: Sharding | None) -> LeafMeta:
    """What a parameter is once it is placed; if that is impossible, the module says so."""
    dtype = live_dtype(param)
    if sharding is not None:
        with suppress(UnsupportedLeafError):
            dtype = placed_dtype(name, param)
    return LeafMeta(tuple(param.shape), str(dtype), "host" if sharding is None else "jax")


def leaves_in(value: Any) -> list[str]:
    """The names of the stored leaves in a value, as keys of mappings, too."""
    if isinstance(value, StoredLeaf):
        return [value.name]
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        return [leaf for one in value for leaf in leaves_in(one)]
    return []


def short_name(path: Path) -> str:
    """The name of a leaf: state of a parameter is called after it."""
    return ".".join(path[2:] if path[1] == "state" else path[1:])


def beside(saved: LeafMeta, param: Sharding | None, param_shape: tuple[int, ...], moved: bool) -> Sharding | None:
    """On the host where it was there (Adam's counter) or its parameter is; else beside its parameter.

    What has its parameter's shape moves with that from the host to jax.
    """
    if param is None or (saved.residence == "host" and not (moved and saved.shape == param_shape)):
        return None
    return state_sharding(saved.shape, param, param_shape)


def anywhere(placed: Mapping[str, Sharding | None]) -> Sharding | None:
    """Where something goes that belongs to no parameter."""
    first = next(iter(placed.values()))
    return None if first is None else replicated_like(first)


def reset(container: dict[Any, Any], content: Mapping[Any, Any]) -> None:
    """Give a mapping another content."""
    container.clear()
    container.update(content)
