"""Objects with `state_dict` and `load_state_dict`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import Any, ClassVar, Protocol

import jax
import torch

from torchorbax._src.arrays.leaves import Array
from torchorbax._src.arrays.sharding_rules import ShardingRules
from torchorbax._src.format.manifest import ItemMeta
from torchorbax._src.format.values import built, how_built
from torchorbax._src.state.compare import compare_values
from torchorbax._src.state.item import Captured, ItemPlan, below_item, calling
from torchorbax._src.state.live_leaves import as_typed, on_their_side, target_beside
from torchorbax._src.state.request import Request
from torchorbax._src.state.sharing import Restoring, leaves_among
from torchorbax._src.state.values import decode, encode
from torchorbax._src.tensors import torchax_tensors
from torchorbax._src.tensors.live import host_copy, live_array
from torchorbax.errors import MismatchError, Problem, TorchorbaxError

_logger = logging.getLogger(__name__)


class Stateful(Protocol):
    """What torch calls stateful: schedulers, data loaders, metrics and many others."""

    def state_dict(self) -> Any:
        """Its state: containers, tensors, arrays and plain values."""

    def load_state_dict(self, state: Any, /) -> Any:
        """Take a state that `state_dict` gave."""


class ObjectItem:
    """Anything with `state_dict` and `load_state_dict`; restored as a whole or not at all."""

    kind: ClassVar[str] = "object"

    def __init__(self, name: str, obj: Stateful) -> None:
        self._name = name
        self._obj = obj
        # Where the same arrays were on jax when the run was opened, the program has been built the same.
        self._how: dict[str, Any] = {"class": type(obj).__qualname__, "on jax": self._on_jax()}

    def _on_jax(self) -> list[str]:
        """The names of its arrays that are on jax."""
        leaves = self._live_leaves().items()
        return [name for name, leaf in leaves if isinstance(leaf, jax.Array) or torchax_tensors.is_torchax(leaf)]

    def _state(self) -> Any:
        with calling(self._name, f"state_dict of {type(self._obj).__name__}"):
            return self._obj.state_dict()

    def capture(self, handed: Any = None) -> Captured:
        leaves: dict[str, Any] = {}
        state = self._state() if handed is None else handed
        encoded = encode(state, leaves, below_item, (self._name,))
        return Captured(self.kind, leaves, values=built(self._how, encoded))

    def plan(self, saved: ItemMeta, rules: ShardingRules | None, request: Request) -> ItemPlan:
        if not request.selects(self._name):
            return ItemPlan()
        plan = ItemPlan(problems=self._compare(saved))
        if not plan.problems:
            live = self._live_leaves()
            stays = how_built(saved.values) == self._how  # what was on the host does, whatever was in its place
            plan.targets = {
                name: None if stays and meta.residence == "host" else target_beside(live.get(name), meta)
                for name, meta in saved.leaves.items()
            }
            plan.values = {"": ""}
        return plan

    def _live_leaves(self) -> Mapping[str, Any]:
        """The arrays that it has now; none while it is not ready to say, or if that would start a loader's workers."""
        leaves: dict[str, Any] = {}
        if not isinstance(self._obj, torch.utils.data.DataLoader):
            with suppress(TorchorbaxError):
                encode(self._state(), leaves)
        return leaves

    def _compare(self, saved: ItemMeta) -> list[Problem]:
        """A torch scheduler takes the state of any other without a word. So it must be of the same class, whatever has
        been added since; or have the same names in its state."""
        scheduler = isinstance(self._obj, torch.optim.lr_scheduler.LRScheduler)
        how = how_built(saved.values)
        if not scheduler or (isinstance(how, dict) and how.get("class") == self._how["class"]):
            return []
        stored = decode(saved.values, dict.fromkeys(saved.leaves))
        return compare_values(self._name, sorted(self._state()), sorted(stored))

    def apply(
        self, saved: ItemMeta, plan: ItemPlan, arrays: Mapping[str, Array], undo: ExitStack, restoring: Restoring
    ) -> None:
        if not plan.values:
            return
        given = leaves_among(restoring.given(saved))
        became: dict[str | int, Any] = {}
        state = decode(saved.values, {**as_typed(saved, on_their_side(saved, arrays)), **given}, objects=became)
        self._register_undo(undo)
        try:
            self._obj.load_state_dict(state)
            if isinstance(self._obj, torch.utils.data.DataLoader):
                # Makes the iterator now, before the random numbers are restored, of which it takes some: the run that
                # nobody interrupted took them at the start of the epoch.
                self._obj.state_dict()
            restoring.finish(self._name, became)
        except Exception as error:  # whatever the object thinks of it, nothing is changed and the caller reads why
            refused = f"one that it refuses: {type(error).__name__}: {error}"
            problem = Problem("placement", self._name, "", f"a state that {type(self._obj).__name__} takes", refused)
            raise MismatchError("the checkpoint", [problem], "Build the object as it was when it was saved.") from error

    def _register_undo(self, undo: ExitStack) -> None:
        """By its state; by its attributes where making one has effects, or it has none yet."""
        if isinstance(self._obj, torch.utils.data.DataLoader):  # its state_dict would start the workers
            self._undo_by_attributes(undo)
            return
        before: dict[str, Any] = {}
        try:
            values = encode(self._state(), before)
        except TorchorbaxError:
            self._undo_by_attributes(undo)
            return
        held = {name: live_array(name, leaf) for name, leaf in before.items()}
        kept = {name: array if isinstance(array, jax.Array) else host_copy(array) for name, array in held.items()}
        undo.callback(lambda: self._put_back(decode(values, kept)))

    def _undo_by_attributes(self, undo: ExitStack) -> None:
        attributes = getattr(self._obj, "__dict__", {})
        before = dict(attributes)

        def put_back() -> None:
            attributes.clear()
            attributes.update(before)

        undo.callback(put_back)

    def _put_back(self, state: Any) -> None:
        try:
            self._obj.load_state_dict(state)
        except Exception:  # an error is on its way to the caller already, and says what is wrong
            _logger.exception("%s: its state before the failed restore could not be put back", self._name)
