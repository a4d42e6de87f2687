"""One jitted, donating training step that leaves the module and the optimizer live after every call."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import torch
from jax.sharding import PartitionSpec, Sharding

from torchorbax._src.arrays import compile_times
from torchorbax._src.arrays.jax_context import training_context
from torchorbax._src.arrays.leaves import put
from torchorbax._src.tensors import torchax_tensors
from torchorbax._src.tensors.optimizers import Optimizer
from torchorbax._src.training import in_flight, torchax_modes
from torchorbax._src.training.batches import BatchSharding, device_batch, signature
from torchorbax._src.training.live_arrays import Layout, LiveArrays
from torchorbax._src.training.live_function import LiveFunction, check_function, replicated, unshare
from torchorbax._src.training.live_inputs import LiveInputs, MoreInputs, Values, settled_values
from torchorbax._src.training.programs import Part, Programs
from torchorbax._src.training.random_keys import key_beside
from torchorbax._src.training.results import Outputs, scalar
from torchorbax._src.training.tracing import Arrays, arrays_of, laid_out, settled, without_collections
from torchorbax._src.training.updates import update_of
from torchorbax.errors import ConfigError

LossFn = Callable[[torch.nn.Module, Any], Any]


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

    Whatever else `loss_fn` reads is read anew at each call: other modules (a partner network, a teacher; those on the
    CPU are moved to the devices as well), tensors and arrays of its closure. What it writes into them is set back. What
    Python code does besides computing happens when it is traced, not at every step. It is traced again when train/eval
    modes, `requires_grad`, layers, numbers that the code mentions, shapes or layouts change.

    Args:
        model: the module; it may still be on the CPU or on meta now, and be placed or restored before the first call.
        optimizer: a `torch.optim` optimizer that can be captured (SGD, Adam, AdamW and others), or an `OptaxOptimizer`.
        loss_fn: `(model, batch) -> scalar tensor`, or `-> (scalar tensor, outputs)` with any pytree of tensors and
            numbers; runs under torchax.
        batch_sharding: how to lay out the batch: a `Sharding`, or a `PartitionSpec` on the parameters' mesh. None
            leaves it to JAX (replicated, unless the batch is sharded already). Scalars are replicated.
        donate: give the old values' memory to the new ones. With False, old arrays stay valid while they are
            referenced.

    Returns:
        `step(batch)`: the batch is any pytree of torch tensors, numpy arrays or Python numbers; `loss_fn` gets torchax
        tensors (float64 is rounded to float32 while `jax_enable_x64` is off, as everywhere in JAX). The loss is a 0-d
        torchax tensor that `float`, `.item()` and formatting can read anywhere; reading it waits for the device. With
        further outputs, `step` returns `(loss, outputs)`. On several CPU devices it waits for the step 16 calls ago.

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

    trained: LiveArrays
    buffers: LiveArrays
    frozen: LiveArrays
    frozen_by_name: dict[str, torch.Tensor]
    inputs: LiveInputs
    outputs: Outputs
    held: list[Any]  # the objects that the program's key names by their ids
    run: Callable[..., Any]


class TrainStep:
    """What `train_step` returns."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: Optimizer,
        loss_fn: LossFn,
        *,
        batch_sharding: BatchSharding,
        donate: bool,
    ) -> None:
        check_function(model, loss_fn, "loss_fn must be a function (model, batch) -> scalar tensor", batch_sharding)
        if not isinstance(optimizer, Optimizer):
            raise ConfigError(f"optimizer must be a torch.optim optimizer or an OptaxOptimizer, not {optimizer!r}")
        self._live = LiveFunction("loss_fn", model, loss_fn, optimizer)
        self._batch_sharding = batch_sharding
        self._donate = donate
        self._update = update_of(model, optimizer)
        self._layout = Layout()
        self._programs: Programs[_Program] = Programs("this training step")

    def __call__(self, batch: Any) -> Any:
        """Train on one batch; see `train_step`."""
        if self._live.refresh():
            self._update.look_again()
        with training_context(self._live.devices()):
            return self._train(batch)

    def _train(self, batch: Any) -> Any:
        trained = self._update.trained()
        if not trained:
            raise ConfigError("the optimizer has no parameter that requires a gradient, so there is nothing to train")
        self._layout.update(trained)
        shardings = self._layout.shardings
        beside = replicated(shardings.values())
        on_device = device_batch(batch, self._batch_sharding, beside)
        state, further = self._update.inputs(shardings)
        parts = self._parts(on_device)
        program = self._programs.get(parts)
        if program is not None and self._live.still_live(program.inputs):
            return self._set(program, *self._run(program, beside, state, further, on_device))
        inputs = self._live.first_inputs()
        with without_collections(), compile_times.first_call():
            while True:
                program = self._new_program(trained, shardings, inputs)
                try:
                    outputs = self._run(program, beside, state, further, on_device)
                    break
                except MoreInputs as more:
                    inputs = self._live.with_more(inputs, more, beside)
            self._live.after_trace()
        self._programs.put(self._parts(on_device), program)
        return self._set(program, *outputs)

    def _parts(self, batch: Any) -> list[Part]:
        """Everything that a trace makes constants of."""
        names = self._layout.names
        return [
            Part("requires_grad", names),
            Part("the layout of parameters", self._layout.values, names),
            *self._update.constants(),
            self._live.part(),
            Part("the shape of the batch", signature(batch)),
        ]

    def _new_program(
        self, trained: Mapping[str, torch.Tensor], shardings: Mapping[str, Sharding], inputs: LiveInputs
    ) -> _Program:
        frozen = {name: param for name, param in self._live.params.items() if name not in trained}
        buffers = dict(self._live.buffers)
        beside = replicated(shardings.values())
        for tensor in (*frozen.values(), *buffers.values()):
            array = torchax_tensors.array_of(tensor)
            if array.sharding.device_set != beside.device_set:
                torchax_tensors.set_array(tensor, put(array, beside))
        outputs = Outputs()
        step = self._traceable(trained, buffers, frozen, shardings, inputs, outputs)
        run = jax.jit(step, donate_argnums=(1, 2, 3) if self._donate else ())
        held = self._live.surroundings.held()
        live = [LiveArrays(tensors.values()) for tensors in (trained, buffers, frozen)]
        return _Program(live[0], live[1], live[2], frozen, inputs, outputs, held, run)

    def _traceable(
        self,
        trained: Mapping[str, torch.Tensor],
        buffers: Mapping[str, torch.Tensor],
        frozen: Mapping[str, torch.Tensor],
        shardings: Mapping[str, Sharding],
        inputs: LiveInputs,
        outputs: Outputs,
    ) -> Callable[..., Any]:
        """The whole step as a function of arrays."""
        held_shardings = {name: array.sharding for name, array in arrays_of({**buffers, **frozen}).items()}
        tensors = {**trained, **buffers, **frozen}

        def loss_of(params: Arrays, held: Arrays, values: Values, key: jax.Array, batch: Any) -> Any:
            given = {**params, **held}
            result, now, key, written = self._live.trace(
                tensors, given, inputs, values, key, batch, functools.partial(_loss_and_rest, outputs)
            )
            loss, rest = result
            changed = {name: now[name] for name in tensors if now[name] is not given[name]}
            _check_trained(trained.keys() & changed.keys())
            kept = {name: changed.get(name) for name in frozen}  # None for those left alone, which cost nothing
            return loss, (rest, {name: now[name] for name in buffers}, kept, key, written)

        def step(
            key: jax.Array,
            param_arrays: list[jax.Array],
            buffer_arrays: list[jax.Array],
            state: Any,
            frozen_arrays: list[jax.Array],
            values: Values,
            further: Any,
            batch: Any,
        ) -> Any:
            params, old_buffers = _named(trained, param_arrays), _named(buffers, buffer_arrays)
            constants = _named(frozen, frozen_arrays)
            (loss, (rest, new_buffers, kept, key, written)), grads = jax.value_and_grad(loss_of, has_aux=True)(
                params, {**old_buffers, **constants}, values, key, batch
            )
            new_params, state = self._update.apply(params, grads, state, further, shardings)
            compile_times.traced()
            return (
                (loss, rest),
                laid_out(key, replicated(shardings.values())),
                [settled(new_params[name], params[name], shardings[name]) for name in params],
                [settled(new_buffers[name], old_buffers[name], held_shardings[name]) for name in old_buffers],
                {
                    name: settled(array, constants[name], held_shardings[name])
                    for name, array in kept.items()
                    if array is not None
                },
                state,
                settled_values(written, values),
            )

        return step

    def _run(self, program: _Program, beside: Sharding, state: Any, further: Any, batch: Any) -> Any:
        trained, buffers, frozen = program.trained.get(), program.buffers.get(), program.frozen.get()
        if self._donate and program.inputs.tensors:
            unshare(program.inputs.tensors, (*trained, *buffers))
        values = self._live.values(program.inputs, beside)
        try:
            return program.run(key_beside(beside, trained), trained, buffers, state, frozen, values, further, batch)
        except (RuntimeError, ValueError):
            self._live.check_deleted(program.inputs)
            raise

    def _set(
        self,
        program: _Program,
        results: tuple[jax.Array, Any],
        key: jax.Array,
        trained: list[jax.Array],
        buffers: list[jax.Array],
        frozen: Arrays,
        state: Any,
        written: Values,
    ) -> Any:
        """Put what a step has computed into the live objects; returns what the caller gets."""
        torchax_tensors.set_rng_key(key)
        program.trained.set(trained)
        program.buffers.set(buffers)
        for name, array in frozen.items():
            torchax_tensors.set_array(program.frozen_by_name[name], array)
        self._update.set_state(state)
        self._live.set_written(program.inputs, written)
        loss, rest = results
        in_flight.limit(loss)
        readable = torchax_modes.readable(loss)
        return readable if rest is None else (readable, program.outputs.unflatten(rest))


def _named(names: Iterable[str], arrays: Iterable[jax.Array]) -> Arrays:
    return dict(zip(names, arrays, strict=True))


def _check_trained(written: Collection[str]) -> None:
    """Raise a `ConfigError` if the loss has written into parameters that the optimizer trains: JAX would differentiate
    through the writing, and the update would start from the values before it."""
    if written:
        raise ConfigError(
            f"loss_fn writes into {', '.join(sorted(written)[:3])}, which the optimizer trains. Change parameters "
            "between two steps, under torch.no_grad() and torchax.default_env()"
        )


def _loss_and_rest(outputs: Outputs, result: Any) -> tuple[jax.Array, Any]:
    """The loss, and what `loss_fn` returns beside it; None if that is nothing."""
    if isinstance(result, tuple) and len(result) == 2:
        return scalar(result[0]), outputs.flatten("loss_fn", result[1])
    return scalar(result), None
