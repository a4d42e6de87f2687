"""Trees as nested containers: their leaves by name, and nodes of types that only the program knows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, MappingView
from typing import Any

import jax
import numpy as np
import torch

from torchorbax._src.arrays.leaves import ARRAY_TYPES, is_key, leaf_name
from torchorbax._src.format.encode import add_leaf
from torchorbax._src.format.manifest import LeafMeta
from torchorbax._src.format.values import MAPPINGS, Json, Node, key_name
from torchorbax._src.state.live_leaves import array_meta
from torchorbax._src.tensors.live import array_in, tensor_of

Path = tuple[str, ...]


def flat(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by dotted names: arrays and plain values. A list of plain values, such as the losses so far,
    is one value."""
    named: dict[str, Any] = {}

    def walk(node: Any, path: Path) -> None:
        if (found := below(node)) is None:
            add_leaf(".".join(path), node, named)
            return
        for key, child in found:
            walk(child, (*path, key_name(key)))

    walk(tree, ())
    return named


def with_leaves(tree: Any, values: Mapping[str, Any]) -> Any:
    """A tree such as `tree`, with these leaves in place of those of the same names in `flat`."""
    names = iter(flat(tree))

    def replaced(node: Any) -> Any:
        if (found := below(node)) is None:
            name = next(names)
            return _of_kind(node, values[name]) if name in values else node
        children = {key: replaced(child) for key, child in found}
        if isinstance(node, defaultdict):
            return defaultdict(node.default_factory, children)
        if isinstance(node, dict):
            return type(node)(children)
        if type(node) in (list, tuple):
            return type(node)(children.values())
        return Node(type(node).__qualname__, children)

    return replaced(tree)


def _of_kind(live: Any, value: Any) -> Any:
    """A value as what the live one is: a tensor, a numpy array, a jax array or a typed PRNG key."""
    array: Any = array_in(value) if isinstance(value, torch.Tensor) else value
    if is_key(live):
        return array if is_key(array) else jax.random.wrap_key_data(array, impl=jax.random.key_impl(live))
    if is_key(array) and isinstance(live, ARRAY_TYPES):
        array = jax.random.key_data(array)
    if isinstance(live, torch.Tensor):
        return value if isinstance(value, torch.Tensor) else tensor_of(array)
    if isinstance(live, np.ndarray):
        return np.asarray(array)
    return np.asarray(array)[()] if isinstance(live, np.generic) else array if isinstance(live, jax.Array) else value


def below(node: Any) -> list[tuple[Any, Any]] | None:
    """Keys and children of a node; None for a leaf."""
    if isinstance(node, Node):
        return list(node.children.items())
    if type(node) in MAPPINGS:
        return list(node.items())
    if type(node) in (list, tuple):
        return None if type(node) is list and all(map(_is_plain, node)) else list(enumerate(node))
    found = registered(node)
    return None if found is None else list(found[1].items())


def _is_plain(value: Any) -> bool:
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | complex | str | bytes)


def is_iterable_leaf(value: object) -> bool:
    """Is this something to iterate over that JAX would take for a leaf, with a warning?"""
    return isinstance(value, Iterator | MappingView)


def registered(value: Any) -> tuple[Any, dict[str, Any]] | None:
    """One level of a node of a type that JAX has been told of: its structure and its children by name."""
    if value is None or isinstance(value, (*ARRAY_TYPES, bool, int, float, str, bytes)) or is_iterable_leaf(value):
        return None
    found: list[tuple[Any, Any]]
    structure: Any
    found, structure = jax.tree_util.tree_flatten_with_path(value, is_leaf=lambda node: node is not value)
    if structure.num_nodes == 1 and structure.num_leaves == 1:
        return None
    children: dict[str, Any] = {}
    for path, child in found:
        add_leaf(leaf_name(path), child, children)
    return structure, children


def children_of(node: Any) -> dict[str, Any]:
    """The children by name of a node of a registered type; none of anything else."""
    found = registered(node)
    return {} if found is None else found[1]


def nodes_in(tree: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """The nodes of registered types in a tree: paths and structures."""
    for key, child in below(tree) or ():
        yield from nodes_in(child, (*path, key_name(key)))
    if type(tree) not in (*MAPPINGS, list, tuple) and (found := registered(tree)) is not None:
        yield path, found[0]


def are_alike(structure: Any, other: Any) -> bool:
    """Are these nodes of one type, with the same fixed parts?"""
    try:
        return bool(structure == other)
    except Exception:  # whatever those parts make of it; numpy arrays will not say yes or no
        (kind, fixed), (other_kind, other_fixed) = structure.node_data(), other.node_data()
        return kind is other_kind and _are_equal(fixed, other_fixed)


def _are_equal(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_are_equal, one, other))
    try:
        return bool(np.array_equal(one, other))
    except Exception:  # they cannot be compared, so nobody knows
        return False


def outline(tree: Any) -> Json:
    """What a tree looks like: its containers, the kinds, shapes and dtypes of its arrays, and where values are."""
    if (meta := meta_of(tree)) is not None:
        return [_kind(tree), list(meta.shape), meta.dtype, meta.residence]
    found = below(tree)
    return (
        None if found is None else [type(tree).__qualname__, [[key_name(key), outline(child)] for key, child in found]]
    )


def _kind(leaf: Any) -> str:
    return "torch" if isinstance(leaf, torch.Tensor) else "scalar" if isinstance(leaf, np.generic) else "array"


def meta_of(leaf: Any) -> LeafMeta | None:
    """What a leaf would be saved as; None for a value that is no array."""
    return array_meta(leaf) if isinstance(leaf, ARRAY_TYPES) else None
