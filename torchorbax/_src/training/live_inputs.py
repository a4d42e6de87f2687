"""Finds the live values that a trace reads besides what it is given, so that they become inputs of the program.

A teacher, a partner network, an average of weights, a queue: a loss reads them through its closure, and a trace would
turn their values at that moment into constants. So a trace is watched. Every tensor that holds a concrete array and was
there before the trace is live. When the function has run through and has met such tensors, the trace is given up
(`MoreInputs`), and the next one takes them as inputs that are read anew at each call; what it writes into them comes
out again and is set back.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import torch
from jax.sharding import Sharding
from torch.utils._mode_utils import no_dispatch

from torchorbax._src.tensors import torchax_tensors
from torchorbax._src.training.batches import device_leaf
from torchorbax._src.training.surroundings import Slot, Surroundings
from torchorbax.errors import ConfigError


@dataclass
class LiveInputs:
    """What a program reads besides the model, the optimizer and the batch.

    Attributes:
        tensors: torchax tensors.
        host: CPU tensors that no module holds; copied to the devices at each call.
        slots: where `jax.Array`s are held.
        complete: further CPU tensors are none that were there before the trace: the code makes them by ways that cannot
            be seen (`torch.from_numpy`), new ones in each trace. They are constants.
    """

    tensors: list[torch.Tensor] = field(default_factory=list)
    host: list[torch.Tensor] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)
    complete: bool = False


@dataclass
class Values:
    """The values of `LiveInputs`, in their order; after a trace, None for those that it has left alone."""

    tensors: list[Any]
    host: list[Any]
    slots: list[Any]


jax.tree_util.register_dataclass(Values, ["tensors", "host", "slots"], [])


class MoreInputs(Exception):  # no error: it starts the next trace
    """A trace has met live values that it did not get as inputs.

    Attributes:
        tensors: torchax tensors that it read.
        host: CPU tensors that it read.
        written: CPU tensors that it wrote.
        unused: CPU tensors that it got and did not read.
    """

    def __init__(
        self,
        tensors: list[torch.Tensor],
        host: list[torch.Tensor],
        written: list[torch.Tensor],
        unused: list[torch.Tensor],
    ) -> None:
        super().__init__()
        self.tensors = tensors
        self.host = host
        self.written = written
        self.unused = unused


class Watch:
    """Looks on while a function of live values is traced; see `watched`."""

    def __init__(self, inputs: LiveInputs, values: Values) -> None:
        self._inputs = inputs
        self._values = values
        self._made: dict[int, torch.Tensor] = {}
        self._before: dict[int, tuple[torch.Tensor, jax.Array]] = {}
        self._met: dict[int, torch.Tensor] = {}
        self._twins: dict[int, tuple[torch.Tensor, torch.Tensor, jax.Array]] = {}
        self._new_host: list[torch.Tensor] = []
        self._used: set[int] = set()
        self._written: list[torch.Tensor] = []
        for live, array in zip(inputs.host, values.host, strict=True):
            self._twins[id(live)] = (live, torchax_tensors.wrap(array), array)

    def read(self, tensor: torch.Tensor, array: Any) -> None:
        """A torchax tensor's array is being read."""
        if not isinstance(array, jax.core.Tracer) and id(tensor) not in self._made:
            self._met.setdefault(id(tensor), tensor)

    def write(self, tensor: torch.Tensor, before: Any) -> None:
        """A torchax tensor is getting another array; `before` is None for a new tensor."""
        if before is None:
            self._made[id(tensor)] = tensor  # kept, or its id could become another's
        elif id(tensor) not in self._made:
            self.read(tensor, before)
            self._before.setdefault(id(tensor), (tensor, before))

    def twin(self, live: torch.Tensor) -> torch.Tensor:
        """The torchax tensor that stands for a CPU tensor in this trace."""
        self._used.add(id(live))
        if id(live) not in self._twins:
            if not self._inputs.complete:
                self._new_host.append(live)
            array = host_value(live)
            self._twins[id(live)] = (live, torchax_tensors.wrap(array), array)
        return self._twins[id(live)][1]

    def hand_over(self, old: torch.Tensor, new: torch.Tensor) -> None:
        """`new` has taken the place of `old` in the program's objects: `old` gets its value."""
        if torchax_tensors.is_torchax(old):
            torchax_tensors.set_array(old, torchax_tensors.array_of(new))
        else:
            self._written.append(old)

    def has_read(self, tensor: torch.Tensor) -> bool:
        """Has the function read this tensor? True for every torchax tensor, whose reads are not told apart."""
        return torchax_tensors.is_torchax(tensor) or id(tensor) in self._twins

    def finish(self) -> list[Any]:
        """What the function has written into the inputs' tensors; None for one that it has left alone.

        Raises:
            MoreInputs: it has met others.
        """
        known = {id(tensor) for tensor in self._inputs.tensors}
        tensors = [tensor for key, tensor in self._met.items() if key not in known]
        written = self._written + [
            live for live, twin, array in self._twins.values() if torchax_tensors.array_of(twin) is not array
        ]
        if tensors or self._new_host or written:
            unused = [live for live in self._inputs.host if id(live) not in self._used]
            raise MoreInputs(tensors, self._new_host, written, unused)
        now = map(torchax_tensors.array_of, self._inputs.tensors)
        return [None if array is given else array for array, given in zip(now, self._values.tensors, strict=True)]

    def undo(self) -> None:
        """Give the tensors that were there before the trace their arrays back."""
        for tensor, array in self._before.values():
            vars(tensor)["_elem"] = array


_state = threading.local()
_lock = threading.Lock()
_watching = 0


class _Elem:
    """Stands in for the attribute that holds a torchax tensor's array while some thread watches a trace.

    There is no other way to a tensor's values, so nothing that is read or written escapes it.
    """

    def __get__(self, tensor: Any, owner: Any = None) -> Any:
        if tensor is None:
            return self
        try:
            array = vars(tensor)["_elem"]
        except KeyError:
            raise AttributeError("_elem") from None
        watch: Watch | None = getattr(_state, "watch", None)
        if watch is not None:
            watch.read(tensor, array)
        return array

    def __set__(self, tensor: Any, array: Any) -> None:
        watch: Watch | None = getattr(_state, "watch", None)
        if watch is not None:
            watch.write(tensor, vars(tensor).get("_elem"))
        vars(tensor)["_elem"] = array


@contextlib.contextmanager
def watched(inputs: LiveInputs, values: Values) -> Iterator[Watch]:
    """Inside, this thread's reads and writes of tensors are watched, and the inputs hold `values`."""
    global _watching
    watch = Watch(inputs, values)
    with _lock:
        _watching += 1
        if _watching == 1:
            torchax_tensors.Tensor._elem = _Elem()
    outer, _state.watch = getattr(_state, "watch", None), watch
    try:
        for tensor, array in zip(inputs.tensors, values.tensors, strict=True):
            torchax_tensors.set_array(tensor, array)
        yield watch
    finally:
        watch.undo()
        _state.watch = outer
        with _lock:
            _watching -= 1
            if _watching == 0:
                del torchax_tensors.Tensor._elem


def host_value(tensor: torch.Tensor, name: str = "a tensor on the CPU", beside: Sharding | None = None) -> jax.Array:
    """A CPU tensor's value now; weakly typed if it is 0-d, which in torch changes no other tensor's dtype either."""
    with torch._C.DisableTorchFunction(), no_dispatch():
        plain = tensor.detach()
        if plain.ndim == 0 and plain.dtype is not torch.bool:
            number: jax.Array = jax.device_put(plain.item(), beside)
            return number
        return device_leaf(name, plain, beside)


@contextlib.contextmanager
def kept(surroundings: Surroundings, watch: Watch, inputs: LiveInputs, values: Values) -> Iterator[list[Values]]:
    """The objects around a trace stay those that they are; yields what the trace has written, known in the end.

    Code such as `self.center = 0.9 * self.center + x` makes a new tensor, which would hold a tracer after the trace. So
    the one that was there gets its value and stays. If the trace fails, everything is as it was before.

    Raises:
        ConfigError: the new one has another shape, or is none.
        MoreInputs: the trace has met live values that are not among the inputs.
    """
    slots = [slot for slot in surroundings.slots if slot.settable]
    before = [slot.get() for slot in slots]
    arrays = [slot.get() for slot in inputs.slots]
    outcome: list[Values] = []
    try:
        for slot, value in zip(inputs.slots, values.slots, strict=True):
            slot.set(value)
        yield outcome
        for slot, old in zip(slots, before, strict=True):
            now = slot.get()
            if now is not old and isinstance(old, torch.Tensor) and watch.has_read(old):
                _check_replacement(slot, old, now)
                watch.hand_over(old, now)
                slot.set(old)
        new = [slot.get() for slot in inputs.slots]
        written = [None if now is given else now for now, given in zip(new, values.slots, strict=True)]
        outcome.append(Values(watch.finish(), [], written))
    except BaseException:
        for slot, old in zip(slots, before, strict=True):
            if slot.get() is not old:
                slot.set(old)
        raise
    finally:
        for slot, array in zip(inputs.slots, arrays, strict=True):
            slot.set(array)


def _check_replacement(slot: Slot, old: torch.Tensor, now: Any) -> None:
    if not torchax_tensors.is_torchax(now) or now.shape != old.shape:
        shown = f"one of shape {tuple(now.shape)}" if isinstance(now, torch.Tensor) else f"a {type(now).__name__}"
        raise ConfigError(
            f"the traced code replaces {slot.name!r} of shape {tuple(old.shape)} by {shown}. What it keeps for the "
            "next call must be a tensor of the same shape"
        )


def settled_values(written: Values, before: Values) -> Values:
    """What a trace has written, ready to take the place of `before` without a new compilation."""

    def settle(new: Any, old: jax.Array) -> Any:
        return None if new is None else jax.lax.convert_element_type(new, old.dtype)

    tensors = [settle(new, old) for new, old in zip(written.tensors, before.tensors, strict=True)]
    return Values(tensors, [], written.slots)


def names_of(tensors: list[torch.Tensor], surroundings: Surroundings) -> str:
    """Tensors as a message names them."""
    shown = [surroundings.names.get(id(one)) or f"a tensor of shape {tuple(one.shape)}" for one in tensors]
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")


def module_of(tensor: torch.Tensor, modules: Mapping[str, torch.nn.Module]) -> torch.nn.Module | None:
    """The outermost of these modules that has `tensor` as a parameter or buffer."""
    for module in modules.values():
        if any(tensor is one for held in (module.parameters(), module.buffers()) for one in held):
            return module
    return None
