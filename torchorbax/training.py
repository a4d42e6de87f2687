"""One jitted, donating training step that leaves the module and the optimizer live after every call."""

from __future__ import annotations

import collections
import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from torchorbax import _torchax
from torchorbax.adapter import host_copy, leaf_name, live_array, raise_if_deleted
from torchorbax.errors import ConfigError, UnsupportedLeafError
from torchorbax.optimizers import OptaxOptimizer, Optimizer
from torchorbax.placement import meta_tensors, place_
from torchorbax.sharding import replicated_like, state_sharding

Arrays = dict[str, jax.Array]
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

    Forward, backward and update run as one XLA program that gives its inputs' memory to its outputs. Afterwards the module's
    parameters and buffers (BatchNorm's statistics too), the optimizer's state and torchax's random key hold the new values, in
    the same tensor objects, so `state_dict`, `torchorbax.Checkpointer` and learning-rate schedulers work as in torch.
    No torchax mode need be on. A module on the CPU is moved to the default jax device by the first call.

    Args:
        model: the module; it may still be on the CPU or on meta now, and be placed or restored before the first call.
        optimizer: a `torch.optim` optimizer that works on capturable tensors (SGD, Adam, AdamW and others), or an
            `OptaxOptimizer`.
        loss_fn: `(model, batch) -> scalar tensor`; runs under torchax, as one trace: plain Python side effects happen
            when it is traced, not at every step.
        batch_sharding: how to lay out the batch: a `Sharding`, or a `PartitionSpec` on the parameters' mesh. None leaves it to JAX
            (replicated, unless the batch is sharded already). Scalars are replicated.
        donate: give the old values' memory to the new ones. With False, old arrays stay valid as long as they are referenced.

    Returns:
        `step(batch)`: the batch is any pytree of torch tensors, numpy arrays or Python numbers; `loss_fn` gets torchax tensors.
        The loss is a 0-d torchax tensor that `float`, `.item()` and formatting can read; reading it waits for the device.

    Raises:
        ConfigError: (when called) the model is on meta, no parameter is trained, the loss is not a scalar tensor, or the optimizer
            keeps its state in Python numbers.
        DeletedArrayError: (when called) tensors whose buffers were donated elsewhere.
    """
    return TrainStep(model, optimizer, loss_fn, batch_sharding=batch_sharding, donate=donate)


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
        self._model = model
        self._loss_fn = loss_fn
        self._batch_sharding = batch_sharding
        self._donate = donate
        self._update: _OptaxUpdate | _TorchUpdate = (
            _OptaxUpdate(optimizer) if isinstance(optimizer, OptaxOptimizer) else _TorchUpdate(model, optimizer)
        )
        self._optimizer = optimizer
        self._tensors: dict[str, torch.Tensor] | None = None
        self._modules: list[torch.nn.Module] = []
        self._shardings: tuple[Sharding, ...] = ()
        self._programs: dict[Any, Callable[..., Any]] = {}

    def __call__(self, batch: Any) -> torch.Tensor:
        tensors = self._live_tensors()
        trained = self._update.trained(tensors)
        buffers = {name: tensor for name, tensor in tensors.items() if not isinstance(tensor, torch.nn.Parameter)}
        frozen = {name: tensor for name, tensor in tensors.items() if name not in trained and name not in buffers}
        self._align(tensors, trained)
        program = self._program(trained, buffers, frozen)
        arguments = (
            _torchax.rng_key(),
            _arrays(trained),
            _arrays(buffers),
            self._update.state(),
            _arrays(frozen),
            self._update.learning_rates(),
            self._device_batch(batch, next(iter(trained.values()))),
        )
        try:
            loss, key, new_trained, new_buffers, new_state = program(*arguments)
        except (RuntimeError, ValueError):
            raise_if_deleted(tensors)
            raise
        _torchax.set_rng_key(key)
        for name, array in [*new_trained.items(), *new_buffers.items()]:
            _torchax.set_array(tensors[name], array)
        self._update.set_state(new_state)
        return _torchax.readable(loss)

    def _live_tensors(self) -> dict[str, torch.Tensor]:
        """All parameters and buffers by name, on jax. Tensors keep their identity, so this is gathered once."""
        if self._tensors is None:
            if on_meta := meta_tensors(self._model):
                raise ConfigError(
                    f"{len(on_meta)} tensors of the model have no values yet ({', '.join(on_meta[:3])}): they are on meta. "
                    "Restore a checkpoint into it, or build it on the CPU"
                )
            place_(self._model, self._optimizer)
            tensors = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
            _unshare(tensors)
            self._modules = list(self._model.modules())
            self._tensors = tensors
        return self._tensors

    def _align(self, tensors: Mapping[str, torch.Tensor], trained: Mapping[str, torch.Tensor]) -> None:
        """Bring everything onto the trained parameters' devices, so that the first call compiles what later ones run."""
        if not trained:
            raise ConfigError("the optimizer has no parameter that requires a gradient, so there is nothing to train")
        self._update.prepare()
        beside = replicated_like(_torchax.array_of(next(iter(trained.values()))).sharding)
        key = _torchax.rng_key()
        if key.sharding.device_set != beside.device_set:
            _torchax.set_rng_key(jax.device_put(key, beside))
        for tensor in [*tensors.values(), *self._update.tensors()]:
            array = _torchax.array_of(tensor)
            if array.sharding.device_set != beside.device_set:
                _torchax.set_array(tensor, jax.device_put(array, beside))

    def _program(
        self, trained: Mapping[str, torch.Tensor], buffers: Mapping[str, torch.Tensor], frozen: Mapping[str, torch.Tensor]
    ) -> Callable[..., Any]:
        """The compiled step for everything that a trace turns into a constant."""
        shardings = tuple(_torchax.array_of(tensor).sharding for tensor in trained.values())
        modes = tuple(module.training for module in self._modules)
        constants = (tuple(trained), modes, shardings, self._update.constants())
        if constants not in self._programs:
            if len(self._programs) == _MANY_PROGRAMS:
                _logger.warning(
                    "this training step has been compiled %d times, because something that is a constant in it keeps "
                    "changing: hyperparameters other than lr, train/eval modes, or requires_grad",
                    _MANY_PROGRAMS,
                )
            by_name = dict(zip(trained, shardings, strict=True))
            step = self._traceable(dict(trained), dict(buffers), dict(frozen), by_name)
            self._programs[constants] = jax.jit(step, donate_argnums=(1, 2, 3) if self._donate else ())
        return self._programs[constants]

    def _traceable(
        self,
        trained: dict[str, torch.Tensor],
        buffers: dict[str, torch.Tensor],
        frozen: dict[str, torch.Tensor],
        shardings: dict[str, Sharding],
    ) -> Callable[..., Any]:
        def loss_of(params: Arrays, buffer_arrays: Arrays, frozen_arrays: Arrays, key: jax.Array, batch: Any) -> Any:
            everything = {**trained, **buffers, **frozen}
            with _holding(everything, {**params, **buffer_arrays, **frozen_arrays}), _torchax.modes(key) as key_now:
                loss = self._loss_fn(self._model, jax.tree.map(_torchax.wrap, batch))
                new_buffers = {name: _as(_torchax.array_of(t), buffer_arrays[name]) for name, t in buffers.items()}
                return _scalar(loss), (new_buffers, key_now())

        def step(
            key: jax.Array, params: Arrays, buffer_arrays: Arrays, state: Any, frozen_arrays: Arrays, lrs: Any, batch: Any
        ) -> Any:
            value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
            (loss, (new_buffers, new_key)), grads = value_and_grad(params, buffer_arrays, frozen_arrays, key, batch)
            new_params, new_state = self._update.apply(params, grads, state, lrs, shardings)
            new_params = {name: _laid_out(_as(new_params[name], params[name]), shardings[name]) for name in params}
            beside = replicated_like(next(iter(shardings.values())))
            new_buffers = {name: _laid_out(array, beside) for name, array in new_buffers.items()}
            return loss, _laid_out(new_key, beside), new_params, new_buffers, new_state

        return step

    def _device_batch(self, batch: Any, param: torch.Tensor) -> Any:
        sharding = self._batch_sharding
        if isinstance(sharding, PartitionSpec):
            of_param = _torchax.array_of(param).sharding
            if not isinstance(of_param, NamedSharding):
                raise ConfigError(f"batch_sharding={sharding} needs parameters on a mesh; place the model with shardings first")
            sharding = NamedSharding(of_param.mesh, sharding)
        flat, structure = jax.tree_util.tree_flatten_with_path(batch)
        return jax.tree.unflatten(structure, [_batch_leaf(leaf_name(path), leaf, sharding) for path, leaf in flat])


class _OptaxUpdate:
    """The optimizer's part of the step, with optax."""

    def __init__(self, optimizer: OptaxOptimizer) -> None:
        self._optimizer = optimizer

    def trained(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: t for name, t in tensors.items() if isinstance(t, torch.nn.Parameter) and t.requires_grad}

    def prepare(self) -> None:
        if self._optimizer.state is None:
            self._optimizer.init()

    def tensors(self) -> Sequence[torch.Tensor]:
        return ()

    def constants(self) -> Any:
        return None

    def learning_rates(self) -> list[float]:
        return []

    def state(self) -> Any:
        return self._optimizer.state

    def set_state(self, state: Any) -> None:
        self._optimizer.state = state

    def apply(self, params: Arrays, grads: Arrays, state: Any, lrs: Any, shardings: Mapping[str, Sharding]) -> Any:
        import optax

        updates, new_state = self._optimizer.tx.update(grads, state, params)
        layouts = self._optimizer.state_shardings(shardings)
        new_state = jax.tree.map(lambda new, old, layout: _laid_out(_as(new, old), layout), new_state, state, layouts)
        return optax.apply_updates(params, updates), new_state


class _TorchUpdate:
    """The optimizer's part of the step, by tracing `torch.optim`'s own `step`."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model = model
        self._optimizer = optimizer
        self._names: dict[int, str] = {}

    def trained(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if not self._names:
            self._names = {id(tensor): name for name, tensor in tensors.items()}
        params = [param for group in self._optimizer.param_groups for param in group["params"] if param.requires_grad]
        if strangers := sum(id(param) not in self._names for param in params):
            raise ConfigError(f"{strangers} of the optimizer's parameters are not the model's; build it from model.parameters()")
        return {self._names[id(param)]: param for param in params}

    def prepare(self) -> None:
        """Adam keeps its counter on the CPU unless it is capturable; in the program it has to be on jax."""
        for state in self._optimizer.state.values():
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and not _torchax.is_torchax(value):
                    state[key] = _torchax.wrap(jax.device_put(host_copy(value)))

    def tensors(self) -> list[torch.Tensor]:
        return [v for state in self._optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]

    def constants(self) -> Any:
        return tuple(
            tuple((key, _constant(key, value)) for key, value in group.items() if key not in ("params", "lr"))
            for group in self._optimizer.param_groups
        )

    def learning_rates(self) -> list[Any]:
        lrs = [group["lr"] for group in self._optimizer.param_groups]
        return [_torchax.array_of(lr) if _torchax.is_torchax(lr) else float(lr) for lr in lrs]

    def state(self) -> dict[str, Arrays]:
        return {
            self._names[id(param)]: {k: _torchax.array_of(v) for k, v in state.items() if isinstance(v, torch.Tensor)}
            for param, state in self._optimizer.state.items()
        }

    def set_state(self, new: Mapping[str, Arrays]) -> None:
        params = {self._names[id(p)]: p for group in self._optimizer.param_groups for p in group["params"]}
        for name, arrays in new.items():
            state = self._optimizer.state[params[name]]
            for key, array in arrays.items():
                if key in state:
                    _torchax.set_array(state[key], array)
                else:
                    state[key] = _torchax.wrap(array)

    def apply(
        self, params: Arrays, grads: Arrays, state: Mapping[str, Arrays], lrs: Sequence[Any], shardings: Mapping[str, Sharding]
    ) -> Any:
        by_name = {self._names[id(p)]: p for group in self._optimizer.param_groups for p in group["params"]}
        trained = {name: by_name[name] for name in params}
        with _holding(trained, params), self._traced(trained, grads, state, lrs), _torchax.modes(_torchax.rng_key()):
            self._optimizer.step()
            new_params = _arrays(trained)
            new_state: dict[str, Arrays] = {}
            for param, entries in self._optimizer.state.items():
                name = self._names[id(param)]
                before = state.get(name, {})
                for key, value in entries.items():
                    if not isinstance(value, torch.Tensor):
                        raise ConfigError(
                            f"{type(self._optimizer).__name__} keeps {key!r} as a Python {type(value).__name__}, which a compiled "
                            "step cannot update; use an optimizer with capturable state, or optax"
                        )
                    array = _torchax.array_of(value)
                    array = _as(array, before.get(key, array))
                    layout = state_sharding(array.shape, shardings[name], params[name].shape)
                    new_state.setdefault(name, {})[key] = _laid_out(array, layout)
        return new_params, new_state

    @contextlib.contextmanager
    def _traced(
        self, trained: Mapping[str, torch.Tensor], grads: Arrays, state: Mapping[str, Arrays], lrs: Sequence[Any]
    ) -> Iterator[None]:
        """The optimizer with traced gradients, state and learning rates, and the options that can be traced."""
        optimizer = self._optimizer
        with ExitStack() as undo:
            undo.callback(setattr, optimizer, "state", optimizer.state)
            optimizer.state = collections.defaultdict(dict)
            for name, entries in state.items():
                optimizer.state[trained[name]] = {key: _torchax.wrap(array) for key, array in entries.items()}
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                undo.callback(group.update, dict(group))
                group["lr"] = _torchax.wrap(lr)
                group.update({flag: value for flag, value in _TRACEABLE.items() if flag in group})
            for name, param in trained.items():
                undo.callback(setattr, param, "grad", param.grad)
                param.grad = _torchax.wrap(grads[name])
            yield


_TRACEABLE = {"capturable": True, "foreach": False, "fused": None}


def _constant(key: str, value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        raise ConfigError(f"hyperparameter {key!r} is a tensor; only lr may be one, make the others numbers")
    return tuple(value) if isinstance(value, list) else value


def _arrays(tensors: Mapping[str, torch.Tensor]) -> Arrays:
    return {name: _torchax.array_of(tensor) for name, tensor in tensors.items()}


@contextlib.contextmanager
def _holding(tensors: Mapping[str, torch.Tensor], arrays: Mapping[str, jax.Array]) -> Iterator[None]:
    """The live tensors hold `arrays` inside, and afterwards what they held before."""
    before = _arrays(tensors)
    try:
        for name, tensor in tensors.items():
            _torchax.set_array(tensor, arrays[name])
        yield
    finally:
        for name, tensor in tensors.items():
            _torchax.set_array(tensor, before[name])


def _as(array: jax.Array, like: jax.Array) -> jax.Array:
    """`array` with the dtype of `like`: torch's in-place arithmetic never changes a tensor's dtype, JAX's promotion does.

    Strongly typed, too; else the next call would be compiled anew.
    """
    return jax.lax.convert_element_type(array, like.dtype)


def _laid_out(array: jax.Array, sharding: Sharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(array, sharding) if isinstance(sharding, NamedSharding) else array


def _scalar(loss: Any) -> jax.Array:
    if not _torchax.is_torchax(loss):
        raise ConfigError(f"loss_fn must return a scalar tensor computed from the model's output, not a {type(loss).__name__}")
    array = _torchax.array_of(loss)
    if array.size != 1 or not jnp.issubdtype(array.dtype, jnp.floating):
        raise ConfigError(f"loss_fn must return a real scalar, not {array.dtype}{tuple(array.shape)}; take a mean or a sum")
    return array.reshape(())


def _unshare(tensors: Mapping[str, torch.Tensor]) -> None:
    """Give every tensor an array of its own: one buffer cannot be donated twice."""
    seen: set[int] = set()
    for tensor in tensors.values():
        array = _torchax.array_of(tensor)
        if id(array) in seen:
            _torchax.set_array(tensor, jnp.copy(array))
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
    return jax.device_put(array, sharding if array.ndim else None)
