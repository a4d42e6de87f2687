"""Live objects as items of a checkpoint: what they hold, what a checkpoint must have for them, and writing it back.

Every kind of object has one class with three methods (`Item`). None of them does I/O or knows Orbax.

All of them keep one law: what `capture` accepts, an identically built program restores, bit for bit, also when the
state has grown since it started. What cannot be restored is refused, by name, when the run is opened or when the state
is captured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from jax.sharding import Sharding

from torchorbax._src.arrays.dtypes import BY_NAME
from torchorbax._src.arrays.leaves import Array
from torchorbax._src.arrays.sharding_rules import ShardingRules
from torchorbax._src.format.manifest import ItemMeta, LeafMeta, Shared
from torchorbax._src.format.values import Json
from torchorbax._src.state.request import Request
from torchorbax._src.state.sharing import Restoring
from torchorbax.errors import ConfigError, Problem, TorchorbaxError

RNG = "rng"


class NotReadyError(ConfigError):
    """The user's object cannot say what its state is, which may be different later."""


@contextmanager
def calling(item: str, what: str) -> Iterator[None]:
    """Around code of the user's objects: its errors name the item.

    Raises:
        NotReadyError: it has raised something.
    """
    try:
        yield
    except TorchorbaxError:
        raise
    except Exception as error:  # whatever users' code raises
        raise NotReadyError(f"{item}: {what} raised {type(error).__name__}: {error}") from error


def below_item(path: tuple[str, ...]) -> str:
    """The name of a leaf whose path begins with the item's name."""
    return ".".join(path[1:])


@dataclass(frozen=True)
class Captured:
    """The live leaves of an item at this moment, by reference; the rest as in `ItemMeta`.

    Attributes:
        frozen: leaves that nothing is expected to change.
        containers: the mutable containers among its values, in the order in which they are numbered there.
        shared: what is in other items, too.
    """

    kind: str
    leaves: Mapping[str, Any]
    ties: Mapping[str, str] = field(default_factory=dict)
    values: Json = None
    frozen: frozenset[str] = frozenset()
    containers: Sequence[Any] = ()
    shared: tuple[Shared, ...] = ()


@dataclass
class ItemPlan:
    """How to restore an item, and what stands in the way.

    Attributes:
        problems: what does not fit; none of it is restored.
        sources: which stored leaf goes into which live one, `{live name: stored name}`.
        values: the same of values that are no arrays.
        targets: where each stored leaf that is needed goes; None for host memory.
        dtypes: stored leaves that are converted first.
    """

    problems: list[Problem] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)
    targets: dict[str, Sharding | None] = field(default_factory=dict)
    dtypes: dict[str, np.dtype] = field(default_factory=dict)

    def match(self, live: Mapping[str, LeafMeta], stored: Mapping[str, str], saved: ItemMeta) -> None:
        """Take every stored leaf that has a live counterpart and no problem as its source, and note conversions."""
        bad = {problem.name for problem in self.problems}
        for name in live:
            if name in stored and name not in bad:
                self.sources[name] = stored[name]
                if live[name].dtype != saved.leaves[stored[name]].dtype:
                    self.dtypes[stored[name]] = BY_NAME[live[name].dtype]

    @property
    def restores_something(self) -> bool:
        """Is anything left that fits?"""
        return bool(self.sources or self.values or self.targets)


class Item(Protocol):
    """One live object that is saved under a name of its own. The manifest has its `kind`."""

    @property
    def kind(self) -> str:
        """The kind of object."""

    def capture(self, handed: Any = None) -> Captured:
        """The leaves to save; `handed` is a tree that the caller gives instead of the live values.

        Raises:
            UnsupportedLeafError, MismatchError: it cannot be saved like this.
        """

    def plan(self, saved: ItemMeta, rules: ShardingRules | None, request: Request) -> ItemPlan:
        """Compare what is asked for of the stored item with the live object. Touches nothing."""

    def apply(
        self, saved: ItemMeta, plan: ItemPlan, arrays: Mapping[str, Array], undo: ExitStack, restoring: Restoring
    ) -> None:
        """Write what is planned, loaded and converted, into the live object; registers how to undo it.

        What it shares with the items before it, `restoring` has; those after it learn from that what it has become.
        """
