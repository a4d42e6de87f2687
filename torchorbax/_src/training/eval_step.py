"""A compiled evaluation of a module that is being trained."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.sharding import PartitionSpec, Sharding, SingleDeviceSharding

from torchorbax._src.arrays import compile_times
from torchorbax._src.arrays.jax_context import training_context
from torchorbax._src.arrays.leaves import put
from torchorbax._src.tensors import torchax_tensors
from torchorbax._src.training import in_flight
from torchorbax._src.training.batches import BatchSharding, device_batch, signature
from torchorbax._src.training.live_arrays import Layout, LiveArrays
from torchorbax._src.training.live_function import LiveFunction, check_function, replicated
from torchorbax._src.training.live_inputs import LiveInputs, MoreInputs, Values, names_of
from torchorbax._src.training.programs import Part, Programs
from torchorbax._src.training.random_keys import key_beside
from torchorbax._src.training.results import Outputs
from torchorbax._src.training.tracing import without_collections
from torchorbax.errors import ConfigError

EvalFn = Callable[[torch.nn.Module, Any], Any]


def eval_step(
    model: torch.nn.Module, fn: EvalFn, *, batch_sharding: Sharding | PartitionSpec | None = None
) -> EvalStep:
    """A jitted evaluation: `evaluate(batch) -> outputs`.

    It computes with the values that the module has when it is called, so it can stand beside a `train_step` of the same
    module. Nothing changes and no gradient is computed: buffers and torchax's random key stay as they are, also where
    the module is in training mode. In that mode dropout draws other numbers at each call, from the key that training
    goes on with. Call `model.eval()` before, and `model.train()` afterwards, as in torch.

    Args:
        model: the module. On the CPU, it is moved to the default jax device by the first call.
        fn: `(model, batch) -> outputs`, any pytree of tensors and numbers; runs under torchax and `torch.no_grad()`.
        batch_sharding: as for `train_step`.

    Returns:
        `evaluate(batch)`: takes a batch as `train_step` does, and returns what `fn` returns, with torchax tensors that
        `float`, `.item()` and formatting can read anywhere.

    Raises:
        ConfigError: an argument of another type; (when called) the model is on meta, `fn` returns something else, or it
            writes into tensors that are not the module's.
        DeletedArrayError: (when called) tensors whose buffers were donated elsewhere.
    """
    return EvalStep(model, fn, batch_sharding=batch_sharding)


@dataclass(frozen=True)
class _Program:
    """A compiled evaluation and the live tensors that go into it."""

    tensors: LiveArrays
    inputs: LiveInputs
    outputs: Outputs
    held: list[Any]  # the objects that the program's key names by their ids
    run: Callable[..., Any]


class EvalStep:
    """What `eval_step` returns."""

    def __init__(self, model: torch.nn.Module, fn: EvalFn, *, batch_sharding: BatchSharding) -> None:
        check_function(model, fn, "fn must be a function (model, batch) -> outputs", batch_sharding)
        self._live = LiveFunction("fn", model, fn)
        self._batch_sharding = batch_sharding
        self._layout = Layout()
        self._programs: Programs[_Program] = Programs("this evaluation step")
        self._calls = itertools.count()

    def __call__(self, batch: Any) -> Any:
        """Evaluate one batch; see `eval_step`."""
        self._live.refresh()
        with training_context(self._live.devices()):
            return self._evaluate(batch)

    def _evaluate(self, batch: Any) -> Any:
        tensors = self._live.tensors
        self._layout.update(tensors)
        shardings = self._layout.shardings
        beside = replicated(shardings.values()) if shardings else SingleDeviceSharding(jax.local_devices()[0])
        for name, sharding in shardings.items():
            if sharding.device_set != beside.device_set:
                torchax_tensors.set_array(tensors[name], put(torchax_tensors.array_of(tensors[name]), beside))
        on_device = device_batch(batch, self._batch_sharding, beside)
        program = self._programs.get(self._parts(on_device))
        if program is not None and self._live.still_live(program.inputs):
            return self._result(program, self._run(program, beside, on_device))
        inputs = self._live.first_inputs()
        with without_collections(), compile_times.first_call():
            while True:
                program = self._new_program(tensors, inputs)
                try:
                    arrays = self._run(program, beside, on_device)
                    break
                except MoreInputs as more:
                    inputs = self._live.with_more(inputs, more, beside)
            self._live.after_trace()
        self._programs.put(self._parts(on_device), program)
        return self._result(program, arrays)

    def _parts(self, batch: Any) -> list[Part]:
        """Everything that a trace makes constants of."""
        return [
            Part("the layout of parameters", self._layout.values, self._layout.names),
            self._live.part(),
            Part("the shape of the batch", signature(batch)),
        ]

    def _new_program(self, tensors: Mapping[str, torch.Tensor], inputs: LiveInputs) -> _Program:
        outputs = Outputs()

        def evaluate(key: jax.Array, call: jax.Array, held: list[jax.Array], values: Values, batch: Any) -> list[Any]:
            arrays = dict(zip(tensors, held, strict=True))
            typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
            own = jax.random.fold_in(key if typed else jax.random.wrap_key_data(key), call)
            with torch.no_grad():
                found, _, _, written = self._live.trace(
                    tensors, arrays, inputs, values, own, batch, functools.partial(outputs.flatten, "fn")
                )
            changed = [one for one, new in zip(inputs.tensors, written.tensors, strict=True) if new is not None]
            if changed or any(new is not None for new in written.slots):
                names = names_of(changed, self._live.surroundings) or "arrays that it reads"
                raise ConfigError(
                    f"fn writes into {names}; an evaluation changes nothing. Return the new values instead"
                )
            compile_times.traced()
            results: list[Any] = found
            return results

        held = self._live.surroundings.held()
        return _Program(LiveArrays(tensors.values()), inputs, outputs, held, jax.jit(evaluate))

    def _run(self, program: _Program, beside: Sharding, batch: Any) -> list[Any]:
        values = self._live.values(program.inputs, beside)
        call = put(np.asarray(next(self._calls) % 2**32, np.uint32), beside)
        try:
            tensors = program.tensors.get()
            arrays: list[Any] = program.run(key_beside(beside, tensors), call, tensors, values, batch)
        except (RuntimeError, ValueError):
            self._live.check_deleted(program.inputs)
            raise
        return arrays

    def _result(self, program: _Program, arrays: list[Any]) -> Any:
        first = next((array for array in arrays if array is not None), None)
        if first is not None:
            in_flight.limit(first)
        return program.outputs.unflatten(arrays)
