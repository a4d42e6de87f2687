"""Sharding rules by parameter name, and the `jax.sharding.NamedSharding` that they give every leaf."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from torchorbax.errors import ConfigError

Rules = Mapping[str, PartitionSpec] | Callable[[str, tuple[int, ...]], PartitionSpec]
Shardings = tuple[Mesh, Rules]

_logger = logging.getLogger(__name__)


class ShardingRules:
    """A mesh, and rules that say how each array is sharded over it.

    Args:
        shardings: `(mesh, rules)`. `rules` is a mapping of name patterns (`*` and `?` as in file names; the first that
            matches counts; a name that matches none is replicated) to `PartitionSpec`, or a callable
            `(name, shape) -> PartitionSpec`. A scalar is always replicated.

    Raises:
        ConfigError: `shardings` is not such a pair.
    """

    def __init__(self, shardings: Shardings) -> None:
        match shardings:
            case (Mesh() as mesh, rules) if callable(rules) or isinstance(rules, Mapping):
                pass
            case _:
                raise ConfigError(f"shardings must be (jax.sharding.Mesh, rules by name), not {shardings!r}")
        # The same mesh with Auto axes. `jax.make_mesh` gives Explicit axes, over which torchax cannot trace: its
        # embedding raises ShardingTypeError.
        self.mesh = Mesh(mesh.devices, mesh.axis_names)
        self._rules: Rules = rules

    @property
    def replicated(self) -> NamedSharding:
        """The whole array on every device of the mesh."""
        return NamedSharding(self.mesh, PartitionSpec())

    def __call__(self, name: str, shape: tuple[int, ...]) -> NamedSharding:
        """The sharding of one leaf. See `for_leaves` for the errors."""
        return self.for_leaves({name: shape})[name]

    def for_leaves(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, NamedSharding]:
        """The shardings of several leaves.

        Raises:
            ConfigError: a spec has more entries than its leaf has dimensions, names an axis that the mesh lacks or uses
                one twice, or does not divide a dimension evenly. The message lists every leaf concerned.
        """
        specs = {name: self._spec(name, shape) for name, shape in shapes.items()}
        problems = [problem for name, spec in specs.items() if (problem := self._problem(name, shapes[name], spec))]
        if problems:
            raise ConfigError("the sharding rules do not fit:\n  " + "\n  ".join(problems))
        return {name: NamedSharding(self.mesh, spec) for name, spec in specs.items()}

    def warn_of_unused(self, names: Collection[str]) -> None:
        """Log every pattern that matches none of `names`: it is most likely misspelt."""
        if isinstance(self._rules, Mapping):
            for pattern in self._rules:
                if not any(fnmatchcase(name, pattern) for name in names):
                    _logger.warning("sharding rule %r matches no parameter or buffer", pattern)

    def _spec(self, name: str, shape: tuple[int, ...]) -> PartitionSpec:
        if not shape:
            return PartitionSpec()
        if isinstance(self._rules, Mapping):
            found = next((spec for pattern, spec in self._rules.items() if fnmatchcase(name, pattern)), None)
            return PartitionSpec() if found is None else found
        return self._rules(name, shape)

    def _problem(self, name: str, shape: tuple[int, ...], spec: object) -> str | None:
        if not isinstance(spec, PartitionSpec):
            return f"{name}: expected a PartitionSpec, got {spec!r}"
        if len(spec) > len(shape):
            return f"{name}: {spec} has {len(spec)} entries, but the shape is {shape}"
        sizes: dict[str, int] = dict(self.mesh.shape)
        used: list[str] = []
        for dimension, entry in enumerate(spec):
            axes = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
            if unknown := [axis for axis in axes if axis not in sizes]:
                return f"{name}: {spec} names axis {unknown[0]!r}; the mesh has {', '.join(map(repr, sizes))}"
            parts = 1
            for axis in axes:
                parts *= sizes[axis]
            if shape[dimension] % parts:
                return f"{name}: dimension {dimension} of {shape} is not divisible by {parts} ({spec} on {sizes})"
            used += axes
        if len(set(used)) < len(used):
            return f"{name}: {spec} uses a mesh axis twice"
        return None


def state_sharding(shape: tuple[int, ...], param: Sharding, param_shape: tuple[int, ...]) -> Sharding:
    """The sharding of optimizer state: its parameter's if it has the parameter's shape, else replicated."""
    return param if shape == param_shape else replicated_like(param)


def replicated_like(sharding: Sharding) -> Sharding:
    """A sharding that puts the whole array on every device of `sharding`."""
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding


def describe(sharding: Sharding) -> dict[str, Any] | None:
    """A named sharding as JSON, for people to read: `{"mesh": {axis: size}, "spec": [axis | [axes] | None]}`.

    None for any other sharding. No restore uses it: the live objects or the caller's rules decide the shardings.
    """
    if not isinstance(sharding, NamedSharding):
        return None
    spec = [list(entry) if isinstance(entry, tuple) else entry for entry in sharding.spec]
    return {"mesh": dict(sharding.mesh.shape), "spec": spec}
