"""A function of a module, traced with everything that it reads as inputs."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from torchorbax._src.arrays.leaves import put
from torchorbax._src.arrays.sharding_rules import replicated_like
from torchorbax._src.distributed.torch_processes import refuse_torch_processes
from torchorbax._src.tensors import torchax_tensors
from torchorbax._src.tensors.live import host_copy, raise_if_deleted, settle
from torchorbax._src.tensors.optimizers import Optimizer
from torchorbax._src.tensors.placement import meta_tensors, place_
from torchorbax._src.training import torchax_modes
from torchorbax._src.training.host_tensors import noticing_draws
from torchorbax._src.training.live_inputs import (
    LiveInputs,
    MoreInputs,
    Values,
    host_value,
    kept,
    module_of,
    names_of,
    watched,
)
from torchorbax._src.training.programs import Part
from torchorbax._src.training.surroundings import Surroundings
from torchorbax._src.training.tracing import Arrays, holding
from torchorbax._src.training.untraceable import explained
from torchorbax.errors import ConfigError

_logger = logging.getLogger(__name__)


class LiveFunction:
    """`fn(model, batch)`, with the live values of the model and of whatever else it reads.

    Args:
        what: what to call it in messages: `loss_fn`.
        model: the module.
        fn: the function.
        optimizer: the optimizer whose state is placed with the module, if any.

    Attributes:
        params, buffers, tensors: the module's tensors by name, known after `refresh`; `tensors` are both.
    """

    def __init__(
        self, what: str, model: torch.nn.Module, fn: Callable[..., Any], optimizer: Optimizer | None = None
    ) -> None:
        self.model = model
        self.params: dict[str, torch.Tensor] = {}
        self.buffers: dict[str, torch.Tensor] = {}
        self.tensors: dict[str, torch.Tensor] = {}
        self._what = what
        self._fn = fn
        self._optimizer = optimizer
        self._surroundings: Surroundings | None = None
        self._ignored: set[tuple[int, Any]] = set()

    def refresh(self) -> bool:
        """Find the live tensors, unless they are those of the call before; were they looked for?"""
        refuse_torch_processes()
        torchax_tensors.rng_key()  # made now if this thread has none yet: in a trace, it would be a tracer
        if self._surroundings is not None and self._surroundings.unchanged():
            return False
        if on_meta := meta_tensors(self.model):
            raise ConfigError(
                f"{len(on_meta)} tensors of the model ({', '.join(on_meta[:3])}) are on meta and have no values yet. "
                "Restore a checkpoint into it, or build it on the CPU"
            )
        if self._optimizer is not None:
            _check_hooks(self.model)
        place_(self.model, self._optimizer)
        self.params = dict(self.model.named_parameters())
        self.buffers = dict(self.model.named_buffers())
        self.tensors = {**self.params, **self.buffers}
        unshare(self.tensors.values())
        self._surroundings = Surroundings({self._what: self._fn, "": self.model}, self._ignored)
        return True

    @property
    def surroundings(self) -> Surroundings:
        """What the function reaches, as `refresh` has found it."""
        if self._surroundings is None:
            raise RuntimeError("refresh comes first")
        return self._surroundings

    def part(self) -> Part:
        """What of the surroundings a trace makes constants of."""
        found = self.surroundings
        return Part(f"what {self._what} reads", found.token, found.labels)

    def devices(self) -> set[jax.Device]:
        """The devices of the module."""
        first = next(iter(self.tensors.values()), None)
        return set() if first is None else torchax_tensors.array_of(first).sharding.device_set

    def _committed(self) -> bool:
        """Are the module's arrays bound to their devices? Those on the default device may go elsewhere, so that others
        beside them must not be bound to it, or the program is compiled twice."""
        first = next(iter(self.tensors.values()))
        return bool(getattr(torchax_tensors.array_of(first), "committed", True))

    def values(self, inputs: LiveInputs, beside: Sharding) -> Values:
        """The inputs as they are now."""
        for tensor in inputs.tensors:
            array = torchax_tensors.array_of(tensor)
            if len(array.sharding.device_set) == 1 and array.sharding.device_set != beside.device_set:
                torchax_tensors.set_array(tensor, put(array, beside))
        names = self.surroundings.names
        on_mesh = beside if isinstance(beside, NamedSharding) else None
        return Values(
            [torchax_tensors.array_of(tensor) for tensor in inputs.tensors],
            [host_value(tensor, names.get(id(tensor), "a tensor on the CPU"), on_mesh) for tensor in inputs.host],
            [slot.get() for slot in inputs.slots],
        )

    def still_live(self, inputs: LiveInputs) -> bool:
        """Are the inputs of the kinds that they were compiled for?"""
        return not any(torchax_tensors.is_torchax(tensor) for tensor in inputs.host)

    def first_inputs(self) -> LiveInputs:
        """The inputs that need no trace to be found."""
        return LiveInputs(slots=list(self.surroundings.arrays))

    def with_more(self, inputs: LiveInputs, more: MoreInputs, beside: Sharding) -> LiveInputs:
        """The inputs for the next trace. Modules on the CPU move to the devices, and so do tensors that are written.

        Raises:
            ConfigError: torch cannot move one of them in place.
        """
        modules = self.surroundings.modules
        for tensor in (*more.host, *more.written):
            if torchax_tensors.is_torchax(tensor):
                continue
            owner = module_of(tensor, modules)
            if owner is not None:
                _place_beside(owner, beside)
            elif any(tensor is one for one in more.written):
                self._move(tensor, beside)
        complete = bool(more.unused)
        host = [*inputs.host, *(() if complete else more.host)]
        gone = {id(one) for one in more.unused}
        host = [one for one in host if not torchax_tensors.is_torchax(one) and id(one) not in gone]
        return LiveInputs([*inputs.tensors, *more.tensors], host, inputs.slots, complete)

    def _move(self, tensor: torch.Tensor, beside: Sharding) -> None:
        try:
            with ExitStack() as undo:
                settle(tensor, put(host_copy(tensor.detach()), beside if self._committed() else None), undo)
                undo.pop_all()
        except ConfigError as error:
            name = names_of([tensor], self.surroundings)
            raise ConfigError(
                f"{self._what} writes into {name}, which is on the CPU and cannot move to the devices: {error}. "
                "Make it a buffer of a module, or a tensor on 'jax'"
            ) from error

    def set_written(self, inputs: LiveInputs, written: Values) -> None:
        """Set back what a program has written."""
        for tensor, array in zip(inputs.tensors, written.tensors, strict=True):
            if array is not None:
                torchax_tensors.set_array(tensor, array)
        for slot, value in zip(inputs.slots, written.slots, strict=True):
            if value is not None:
                slot.set(value)

    def after_trace(self) -> None:
        """Numbers that a trace itself changes are no reason to trace again, but the reader should know of them."""
        changed = self.surroundings.changed()
        numbers = [slot.name for slot in changed if isinstance(slot.get(), int | float | str)]
        if numbers:
            _logger.warning(
                "%s changes %s, which happens when it is traced and not at every step; make it a tensor (a buffer) to "
                "have it updated by the program",
                self._what,
                ", ".join(numbers[:5]),
            )
        before = {slot.place for slot in self.surroundings.slots} - {slot.place for slot in changed}
        now = Surroundings({self._what: self._fn, "": self.model}, self._ignored)
        kept = [one.name for one in now.slots if isinstance(one.get(), torch.Tensor) and one.place not in before]
        if kept:
            _logger.warning(
                "%s puts a tensor into %s when it is traced, and not at every step. If a step is to see what the step "
                "before has put there, put a tensor of the same shape there before the first one",
                self._what,
                ", ".join(kept[:5]),
            )
        if changed:
            self._ignored |= {slot.place for slot in changed}
            now = Surroundings({self._what: self._fn, "": self.model}, self._ignored)
        self._surroundings = now

    def check_deleted(self, inputs: LiveInputs) -> None:
        """Raise a `DeletedArrayError` that names those of the live tensors whose buffers were donated elsewhere."""
        names = self.surroundings.names
        others = {names.get(id(tensor), f"input {index}"): tensor for index, tensor in enumerate(inputs.tensors)}
        raise_if_deleted({**self.tensors, **others})

    def trace(
        self,
        tensors: Mapping[str, torch.Tensor],
        arrays: Arrays,
        inputs: LiveInputs,
        values: Values,
        key: jax.Array,
        batch: Any,
        use: Callable[[Any], Any],
    ) -> tuple[Any, Arrays, jax.Array, Values]:
        """Call the function with the live tensors holding traced arrays.

        Args:
            tensors: the model's tensors.
            arrays: what they hold meanwhile.
            inputs: the other live values.
            values: what these hold.
            key: the random key.
            batch: a pytree of arrays.
            use: gets what the function returns, while the tensors still hold traced arrays.

        Returns:
            What `use` returns, what `tensors` hold in the end, the key as it is then, what was written into the inputs.

        Raises:
            MoreInputs: the function reads others.
        """
        with holding(tensors, arrays), watched(inputs, values) as watch:
            with (
                kept(self.surroundings, watch, inputs, values) as outcome,
                noticing_draws() as drew,
                _int32_for_int64(),
                torchax_modes.no_custom_gradients(),
                torchax_modes.checkpoints_are_reported(),
                torchax_modes.cumulative_averages(),
                torchax_modes.modes(key, watch) as key_now,
            ):
                given = jax.tree.map(torchax_tensors.wrap, batch)
                with explained(self._what, lambda: self.surroundings.modules):
                    result = use(self._fn(self.model, given))
                key = key_now()
            now = {name: torchax_tensors.array_of(tensor) for name, tensor in tensors.items()}
        if drew:
            _logger.warning(
                "%s draws random numbers from %s while it is traced; they are the same at every step",
                self._what,
                " and ".join(drew),
            )
        return result, now, key, outcome[0]


@contextlib.contextmanager
def _int32_for_int64() -> Iterator[None]:
    """Integers are 32 bits wide on the devices while 64 are not enabled, as everywhere in torchax; no need to say it at
    every `.long()`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Explicitly requested dtype (int64|uint64)", UserWarning)
        yield


def _check_hooks(model: torch.nn.Module) -> None:
    """Raise a `ConfigError` for hooks on gradients: JAX computes them, and calls no hook."""
    hooked = [name for name, param in model.named_parameters() if _has_gradient_hooks(param)]
    hooked += [name for name, part in model.named_modules() if part._backward_hooks or part._backward_pre_hooks]
    if hooked:
        raise ConfigError(
            f"{hooked[0] or 'the model'} has a hook on its gradient, which a compiled step does not call. Remove it; "
            "to change gradients, use optimizer.register_step_pre_hook, or an optax transformation"
        )


def _has_gradient_hooks(param: torch.Tensor) -> bool:
    return bool(param._backward_hooks or getattr(param, "_post_accumulate_grad_hooks", None))


def check_function(model: object, fn: object, says: str, batch_sharding: object) -> None:
    """Raise a `ConfigError` for arguments of other types; `says` what `fn` has to be."""
    if not isinstance(model, torch.nn.Module):
        raise ConfigError(f"model must be a torch.nn.Module, not a {type(model).__name__}")
    if not callable(fn):
        raise ConfigError(f"{says}, not {fn!r}")
    if not isinstance(batch_sharding, Sharding | PartitionSpec | None):
        raise ConfigError(f"batch_sharding must be a Sharding, a PartitionSpec or None, not {batch_sharding!r}")


def _place_beside(module: torch.nn.Module, beside: Sharding) -> None:
    """Move a module's CPU tensors to the devices of another, replicated."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    there = [name for name, tensor in tensors if torchax_tensors.is_torchax(tensor)]
    mesh = beside.mesh if isinstance(beside, NamedSharding) else None
    place_(module, shardings=(mesh, {}) if isinstance(mesh, Mesh) else None, skip=there)


def unshare(tensors: Iterable[torch.Tensor], taken: Iterable[jax.Array] = ()) -> None:
    """Give every tensor an array of its own: one buffer cannot be donated twice, nor be read when it is donated."""
    seen = set(map(id, taken))
    for tensor in tensors:
        array = torchax_tensors.array_of(tensor)
        if id(array) in seen:
            torchax_tensors.set_array(tensor, jnp.copy(array))
        seen.add(id(array))


def replicated(shardings: Iterable[Sharding]) -> Sharding:
    """Where things go that belong to no parameter: replicated over the parameters' devices."""
    return replicated_like(next(iter(shardings)))
