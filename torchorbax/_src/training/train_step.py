"""One jitted, donating training step that leaves the module and the optimizer live after every call."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from torchorbax._src.arrays.jax_context import training_context
from torchorbax._src.arrays.leaves import leaf_name, put
from torchorbax._src.arrays.sharding_rules import replicated_like
from torchorbax._src.tensors import torchax_tensors
from torchorbax._src.tensors.live import device_dtype, host_copy, live_array, raise_if_deleted
from torchorbax._src.tensors.optimizers import Optimizer
from torchorbax._src.tensors.placement import meta_tensors, place_
from torchorbax._src.training import torchax_modes
from torchorbax._src.training.tracing import Arrays, arrays_of, holding, keeping_buffers, laid_out, settled
from torchorbax._src.training.updates import update_of
from torchorbax.errors import ConfigError, UnsupportedLeafError

LossFn = Callable[[torch.nn.Module, Any], torch.Tensor]

_MANY_PROGRAMS = 8
_logger = logging.getLogger(__name__)


def train_step(
    model: torch.nn.Module,
    optimizer: Optimizer,
    loss_fn: LossFn,
    *,
    batch_sharding: Sharding | PartitionSpec | None = None,
    donate: bool = True,
) -> TrainStep:
    """A jitted training step: `step(batch) -> loss`.

    Forward, backward and update run as one XLA program that gives its inputs' memory to its outputs. Afterwards the
    module's parameters and buffers (BatchNorm's statistics too), the optimizer's state and torchax's random key hold
    the new values, in the same tensor objects, so `state_dict`, `Checkpointer` and learning-rate schedulers work as in
    torch. No torchax mode need be on. A module on the CPU is moved to the default jax device by the first call.

    What Python code does in `loss_fn` and `forward` besides computing happens when it is traced, not at every step. It
    is traced again when train/eval modes, `requires_grad`, hyperparameters other than `lr`, shapes or layouts change.

    Args:
        model: the module; it may still be on the CPU or on meta now, and be placed or restored before the first call.
        optimizer: a `torch.optim` optimizer that can be captured (SGD, Adam, AdamW and others), or an `OptaxOptimizer`.
        loss_fn: `(model, batch) -> scalar tensor`; runs under torchax.
        batch_sharding: how to lay out the batch: a `Sharding`, or a `PartitionSpec` on the parameters' mesh. None
            leaves it to JAX (replicated, unless the batch is sharded already). Scalars are replicated.
        donate: give the old values' memory to the new ones. With False, old arrays stay valid while they are
            referenced.

    Returns:
        `step(batch)`: the batch is any pytree of torch tensors, numpy arrays or Python numbers; `loss_fn` gets torchax
        tensors (float64 is rounded to float32 while `jax_enable_x64` is off, as everywhere in JAX). The loss is a 0-d
        torchax tensor that `float`, `.item()` and formatting can read anywhere; reading it waits for the device.

    Raises:
        ConfigError: an argument of another type, or an optimizer of another model; (when called) the model is on meta,
            nothing is to be trained, the loss is not a scalar tensor, or the optimizer's step cannot be traced.
        DeletedArrayError: (when called) tensors whose buffers were donated elsewhere.
        NotImplementedError: (when called) the loss uses a `torch.autograd.Function`, whose `backward` JAX would ignore.
    """
    return TrainStep(model, optimizer, loss_fn, batch_sharding=batch_sharding, donate=donate)


@dataclass(frozen=True)
class _Program:
    """A compiled step and the live tensors that go into it, by the part that they play."""

    trained: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]
    frozen: dict[str, torch.Tensor]
    shardings: dict[str, Sharding]
    run: Callable[..., Any]


class TrainStep:
    """What `train_step` returns."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: Optimizer,
        loss_fn: LossFn,
        *,
        batch_sharding: Sharding | PartitionSpec | None,
        donate: bool,
    ) -> None:
        if not isinstance(model, torch.nn.Module):
            raise ConfigError(f"model must be a torch.nn.Module, not a {type(model).__name__}")
        if not isinstance(optimizer, Optimizer):
            raise ConfigError(f"optimizer must be a torch.optim optimizer or an OptaxOptimizer, not {optimizer!r}")
        if not callable(loss_fn):
            raise ConfigError(f"loss_fn must be a function (model, batch) -> scalar tensor, not {loss_fn!r}")
        if not isinstance(batch_sharding, Sharding | PartitionSpec | None):
            raise ConfigError(f"batch_sharding must be a Sharding, a PartitionSpec or None, not {batch_sharding!r}")
        self._model = model
        self._optimizer = optimizer
        self._loss_fn = loss_fn
        self._batch_sharding = batch_sharding
        self._donate = donate
        self._update = update_of(model, optimizer)
        self._modules: list[torch.nn.Module] = []
        self._params: dict[str, torch.Tensor] = {}
        self._buffers: dict[str, torch.Tensor] = {}
        self._programs: dict[Any, _Program] = {}

    def __call__(self, batch: Any) -> torch.Tensor:
        """Train on one batch; see `train_step`."""
        if not self._modules:
            self._gather()
        first = next(iter({**self._params, **self._buffers}.values()), None)
        devices = () if first is None else torchax_tensors.array_of(first).sharding.device_set
        with training_context(devices):
            return self._train(batch)

    def _train(self, batch: Any) -> torch.Tensor:
        program = self._program()
        state, further = self._update.inputs(program.shardings)
        beside = _beside(program.shardings)
        key = torchax_tensors.rng_key()
        if key.sharding.device_set != beside.device_set:
            key = put(_shared(key, beside), beside)  # restored, or of another mesh
        trained, buffers, frozen = arrays_of(program.trained), arrays_of(program.buffers), arrays_of(program.frozen)
        on_device = self._device_batch(batch, beside)
        try:
            loss, key, trained, buffers, state = program.run(key, trained, buffers, state, frozen, further, on_device)
        except (RuntimeError, ValueError):
            raise_if_deleted({**self._params, **self._buffers})
            raise
        torchax_tensors.set_rng_key(key)
        for name, array in trained.items():
            torchax_tensors.set_array(self._params[name], array)
        for name, array in buffers.items():
            torchax_tensors.set_array(self._buffers[name], array)
        self._update.set_state(state)
        return torchax_modes.readable(loss)

    def _gather(self) -> None:
        """Find the live tensors, once: they keep their identity from here on."""
        if on_meta := meta_tensors(self._model):
            raise ConfigError(
                f"{len(on_meta)} tensors of the model ({', '.join(on_meta[:3])}) are on meta and have no values yet. "
                "Restore a checkpoint into it, or build it on the CPU"
            )
        place_(self._model, self._optimizer)
        self._params = dict(self._model.named_parameters())
        self._buffers = dict(self._model.named_buffers())
        _unshare({**self._params, **self._buffers})
        self._modules = list(self._model.modules())

    def _program(self) -> _Program:
        """The compiled step for everything that a trace turns into a constant."""
        constants = (
            tuple(param.requires_grad for param in self._params.values()),
            tuple(module.training for module in self._modules),
            tuple(torchax_tensors.array_of(param).sharding for param in self._params.values()),
            self._update.constants(),
        )
        program = self._programs.get(constants)
        if program is None:
            if len(self._programs) == _MANY_PROGRAMS:
                _logger.warning(
                    "this training step has been compiled %d times: train/eval modes, requires_grad, layouts or "
                    "hyperparameters other than lr keep changing",
                    _MANY_PROGRAMS,
                )
            program = self._programs[constants] = self._new_program()
        return program

    def _new_program(self) -> _Program:
        trained = self._update.trained()
        if not trained:
            raise ConfigError("the optimizer has no parameter that requires a gradient, so there is nothing to train")
        frozen = {name: param for name, param in self._params.items() if name not in trained}
        shardings = {name: torchax_tensors.array_of(param).sharding for name, param in trained.items()}
        beside = _beside(shardings)
        for tensor in (*frozen.values(), *self._buffers.values()):
            array = torchax_tensors.array_of(tensor)
            if array.sharding.device_set != beside.device_set:
                torchax_tensors.set_array(tensor, put(array, beside))
        step = self._traceable(trained, self._buffers, frozen, shardings)
        run = jax.jit(step, donate_argnums=(1, 2, 3) if self._donate else ())
        return _Program(trained, self._buffers, frozen, shardings, run)

    def _traceable(
        self,
        trained: Mapping[str, torch.Tensor],
        buffers: Mapping[str, torch.Tensor],
        frozen: Mapping[str, torch.Tensor],
        shardings: Mapping[str, Sharding],
    ) -> Callable[..., Any]:
        """The whole step as a function of arrays."""
        buffer_shardings = {name: torchax_tensors.array_of(buffer).sharding for name, buffer in buffers.items()}

        def loss_of(params: Arrays, old_buffers: Arrays, constants: Arrays, key: jax.Array, batch: Any) -> Any:
            held = {**params, **old_buffers, **constants}
            with (
                holding({**trained, **buffers, **frozen}, held),
                torchax_modes.no_custom_gradients(),
                torchax_modes.modes(key) as key_now,
            ):
                with keeping_buffers(self._model):
                    loss = _scalar(self._loss_fn(self._model, jax.tree.map(torchax_tensors.wrap, batch)))
                return loss, (arrays_of(buffers), key_now())

        def step(
            key: jax.Array, params: Arrays, old_buffers: Arrays, state: Any, constants: Arrays, further: Any, batch: Any
        ) -> Any:
            value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
            (loss, (new_buffers, key)), grads = value_and_grad(params, old_buffers, constants, key, batch)
            new_params, state = self._update.apply(params, grads, state, further, shardings)
            return (
                loss,
                laid_out(key, _beside(shardings)),
                {name: settled(new_params[name], params[name], shardings[name]) for name in params},
                {name: settled(new_buffers[name], old_buffers[name], buffer_shardings[name]) for name in old_buffers},
                state,
            )

        return step

    def _device_batch(self, batch: Any, beside: Sharding) -> Any:
        sharding = self._batch_sharding
        if isinstance(sharding, PartitionSpec):
            if not isinstance(beside, NamedSharding):
                raise ConfigError(
                    f"batch_sharding={sharding} needs parameters on a mesh; place the model with shardings"
                )
            sharding = NamedSharding(beside.mesh, sharding)
        if sharding is None and not beside.is_fully_addressable:
            sharding = beside  # every process has the whole batch
        flat, structure = jax.tree_util.tree_flatten_with_path(batch)
        return jax.tree.unflatten(structure, [_batch_leaf(leaf_name(path), leaf, sharding) for path, leaf in flat])


def _shared(key: jax.Array, beside: Sharding) -> jax.Array:
    """Process 0's key, for a step over several processes: each may have seeded its own, and JAX takes them for one.

    What is replicated would be something else in every process from then on. A device collective.
    """
    if beside.is_fully_addressable:
        return key
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    words: jax.Array = multihost_utils.broadcast_one_to_all(jax.random.key_data(key) if typed else key)
    return jax.random.wrap_key_data(words, impl=str(jax.random.key_impl(key))) if typed else words


def _beside(shardings: Mapping[str, Sharding]) -> Sharding:
    """Where things go that belong to no parameter: replicated over the parameters' devices."""
    return replicated_like(next(iter(shardings.values())))


def _scalar(loss: Any) -> jax.Array:
    if not torchax_tensors.is_torchax(loss):
        raise ConfigError(
            f"loss_fn must return a scalar tensor computed from the model's output, not a {type(loss).__name__}"
        )
    array = torchax_tensors.array_of(loss)
    if array.size != 1 or not jnp.issubdtype(array.dtype, jnp.floating):
        raise ConfigError(
            f"loss_fn must return a real scalar, not {array.dtype}{tuple(array.shape)}; take a mean or a sum"
        )
    return array.reshape(())


def _unshare(tensors: Mapping[str, torch.Tensor]) -> None:
    """Give every tensor an array of its own: one buffer cannot be donated twice."""
    seen: set[int] = set()
    for tensor in tensors.values():
        array = torchax_tensors.array_of(tensor)
        if id(array) in seen:
            torchax_tensors.set_array(tensor, jnp.copy(array))
        seen.add(id(array))


def _batch_leaf(name: str, leaf: Any, sharding: Sharding | None) -> jax.Array:
    if isinstance(leaf, bool | int | float | complex):
        leaf = np.asarray(leaf)
    if not isinstance(leaf, torch.Tensor | np.ndarray | np.generic | jax.Array):
        raise UnsupportedLeafError(
            f"batch.{name}" if name else "batch", f"a {type(leaf).__name__} is neither a tensor, an array nor a number"
        )
    held = live_array(f"batch.{name}" if name else "batch", leaf)
    array = held if isinstance(held, jax.Array) else host_copy(held)
    if array.dtype == np.int64 and isinstance(array, np.ndarray):
        array = array.astype(device_dtype(f"batch.{name}" if name else "batch", array.dtype, array), copy=False)
    try:
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            return array if sharding is None else jax.device_put(array, sharding)
        whole = array.ndim or (sharding is not None and not sharding.is_fully_addressable)
        return put(array, sharding if whole else None)
    except ValueError as error:
        raise ConfigError(
            f"{f'batch.{name}' if name else 'batch'} of shape {array.shape} cannot be laid out by {sharding}: {error}"
        ) from error
