"""The optimizer's part of a jitted training step, for both kinds of optimizer."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import torch
from jax.sharding import Sharding

from torchorbax._src.arrays.leaves import put
from torchorbax._src.arrays.sharding_rules import replicated_like, state_sharding
from torchorbax._src.tensors import torchax_tensors
from torchorbax._src.tensors.live import host_copy
from torchorbax._src.tensors.optimizers import OptaxOptimizer, Optimizer
from torchorbax._src.training import torchax_modes
from torchorbax._src.training.programs import Part
from torchorbax._src.training.tracing import Arrays, arrays_of, holding, laid_out, settled
from torchorbax.errors import ConfigError


class Update(Protocol):
    """One optimizer, as the training step sees it."""

    def trained(self) -> dict[str, torch.Tensor]:
        """The parameters that it updates, by name."""

    def constants(self) -> list[Part]:
        """What a trace of `apply` turns into constants."""

    def inputs(self, shardings: Mapping[str, Sharding]) -> tuple[Any, Any]:
        """The state, which `apply` gives back anew, and further inputs. Makes the state if there is none yet."""

    def set_state(self, state: Any) -> None:
        """Take the state that `apply` gave back."""

    def apply(
        self, params: Arrays, grads: Arrays, state: Any, further: Any, shardings: Mapping[str, Sharding]
    ) -> tuple[Arrays, Any]:
        """New parameters and state; traced."""


def update_of(model: torch.nn.Module, optimizer: Optimizer) -> Update:
    """The update of an optimizer of either kind."""
    return OptaxUpdate(model, optimizer) if isinstance(optimizer, OptaxOptimizer) else TorchUpdate(model, optimizer)


class OptaxUpdate:
    """An optax transformation and `optax.apply_updates`."""

    def __init__(self, model: torch.nn.Module, optimizer: OptaxOptimizer) -> None:
        if optimizer.model is not model:
            raise ConfigError("the OptaxOptimizer was built for another model (or for a part of this one)")
        self._optimizer = optimizer

    def trained(self) -> dict[str, torch.Tensor]:
        params, state = self._optimizer.params(), self._optimizer.state
        if params and state is not None:
            expected: Any = jax.tree.structure(self._optimizer.abstract_state())
            if jax.tree.structure(state) != expected:
                raise ConfigError(
                    "the state of the OptaxOptimizer does not fit the parameters that require a gradient; have they "
                    "changed since it was made? Use optax.multi_transform or optax.masked to freeze some"
                )
        return params

    def constants(self) -> list[Part]:
        return []

    def inputs(self, shardings: Mapping[str, Sharding]) -> tuple[Any, Any]:
        return self._optimizer.init(), None

    def set_state(self, state: Any) -> None:
        self._optimizer.state = state

    def apply(
        self, params: Arrays, grads: Arrays, state: Any, further: Any, shardings: Mapping[str, Sharding]
    ) -> tuple[Arrays, Any]:
        import optax

        updates, new_state = self._optimizer.tx.update(grads, state, params)
        new_state = jax.tree.map(settled, new_state, state, self._optimizer.state_shardings(shardings))
        return optax.apply_updates(params, updates), new_state


class TorchUpdate:
    """A `torch.optim` optimizer's own `step`, traced.

    Learning rates are inputs, so that schedulers work; other hyperparameters are constants of the trace.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model = model
        self._optimizer = optimizer
        self._names: dict[int, str] = {}
        self._stateless = False

    def trained(self) -> dict[str, torch.Tensor]:
        params = [param for group in self._optimizer.param_groups for param in group["params"]]
        if any(id(param) not in self._names for param in params):
            self._names = {id(param): name for name, param in self._model.named_parameters()}
        names = self._names
        if strangers := sum(id(param) not in names for param in params):
            raise ConfigError(
                f"{strangers} of the optimizer's {len(params)} parameters are not the model's; build it from "
                "model.parameters(), after model.to('jax') if you call that"
            )
        return {names[id(param)]: param for param in params if param.requires_grad}

    def constants(self) -> list[Part]:
        values = tuple(
            tuple(
                (key, _constant(key, value))
                for key, value in group.items()
                if key not in ("params", "lr", "initial_lr")
            )
            for group in self._optimizer.param_groups
        )
        return [Part("hyperparameters", values)]

    def inputs(self, shardings: Mapping[str, Sharding]) -> tuple[dict[str, Arrays], list[Any]]:
        by_name = self.trained()
        states = self._optimizer.state
        if not self._stateless and not any(states.get(param) for param in by_name.values()):
            first = self._first_state(by_name, shardings)
            self._stateless = not first
            self.set_state(first)
        state: dict[str, Arrays] = {}
        for name, param in by_name.items():
            if entries := states.get(param):
                state[name] = {key: _on_device(entries, key, shardings[name]) for key in entries}
        rates = [group["lr"] for group in self._optimizer.param_groups]
        return state, [torchax_tensors.array_of(lr) if torchax_tensors.is_torchax(lr) else float(lr) for lr in rates]

    def set_state(self, state: Mapping[str, Arrays]) -> None:
        by_name = self.trained()
        for name, arrays in state.items():
            entries = self._optimizer.state[by_name[name]]
            for key, array in arrays.items():
                if key in entries:
                    torchax_tensors.set_array(entries[key], array)
                else:
                    entries[key] = torchax_tensors.wrap(array)

    def apply(
        self,
        params: Arrays,
        grads: Arrays,
        state: Mapping[str, Arrays],
        further: Sequence[Any],
        shardings: Mapping[str, Sharding],
    ) -> tuple[Arrays, Any]:
        by_name = self.trained()
        with holding(by_name, params), self._traced(by_name, grads, further, _State(by_name, state)) as traced:
            self._step()
            return arrays_of(by_name), traced.arrays(by_name, state, shardings)

    def _first_state(self, by_name: Mapping[str, torch.Tensor], shardings: Mapping[str, Sharding]) -> Any:
        """The state that `step` starts from, which torch optimizers make within their first step.

        A step on zero parameters and gradients is traced to see what each entry is first set to; nothing else of it is
        computed. Where the first step differs from later ones (SGD with dampening) there is none, and the step is
        compiled twice.
        """
        groups = self._optimizer.param_groups
        if any(group.get("dampening") for group in groups):
            return {}

        def first_values() -> Any:
            zeros = {name: jnp.zeros_like(torchax_tensors.array_of(param)) for name, param in by_name.items()}
            rates = [jnp.asarray(float(group["lr"])) for group in groups]
            with holding(by_name, zeros), self._traced(by_name, zeros, rates, _State(by_name, {})) as traced:
                self._step()
                return traced.first_arrays(by_name, shardings)

        return jax.jit(first_values)()

    def _step(self) -> None:
        try:
            self._optimizer.step()
        except ConfigError:
            raise
        except Exception as error:  # whatever the optimizer's code makes of traced values
            name, reason = type(self._optimizer).__name__, str(error).strip().splitlines()[:1]
            raise ConfigError(
                f"the step of {name} cannot be traced: {type(error).__name__}: {''.join(reason)} Use an optimizer that "
                "can be (SGD, Adam, AdamW, RMSprop, NAdam, RAdam, Adadelta), or optax with torchorbax.OptaxOptimizer"
            ) from error

    @contextlib.contextmanager
    def _traced(
        self, by_name: Mapping[str, torch.Tensor], grads: Arrays, rates: Sequence[Any], state: _State
    ) -> Iterator[_State]:
        """The optimizer with traced gradients, state and learning rates, and with options that can be traced."""
        with ExitStack() as undo:
            undo.callback(setattr, self._optimizer, "state", self._optimizer.state)
            self._optimizer.state = state
            for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
                undo.callback(group.update, dict(group))
                group["lr"] = torchax_tensors.wrap(rate)
                group.update({flag: value for flag, value in _TRACEABLE.items() if flag in group})
            for name, param in by_name.items():
                undo.callback(setattr, param, "grad", param.grad)
                param.grad = torchax_tensors.wrap(grads[name])
            undo.enter_context(torchax_modes.modes(torchax_tensors.rng_key()))
            yield state


_TRACEABLE = {"capturable": True, "foreach": False, "fused": None}


class _State(defaultdict[torch.Tensor, "_Entries"]):
    """An optimizer's state in a trace."""

    def __init__(self, by_name: Mapping[str, torch.Tensor], arrays: Mapping[str, Arrays]) -> None:
        super().__init__(_Entries)
        for name, entries in arrays.items():
            self[by_name[name]].update({key: torchax_tensors.wrap(array) for key, array in entries.items()})

    def arrays(
        self, by_name: Mapping[str, torch.Tensor], before: Mapping[str, Arrays], shardings: Mapping[str, Sharding]
    ) -> dict[str, Arrays]:
        """Its arrays now, ready to take the place of `before`."""
        found: dict[str, Arrays] = {}
        for name, param in by_name.items():
            for key, value in self.get(param, {}).items():
                array = _entry_array(key, value)
                sharding = state_sharding(array.shape, shardings[name], tuple(param.shape))
                found.setdefault(name, {})[key] = settled(array, before.get(name, {}).get(key, array), sharding)
        return found

    def first_arrays(self, by_name: Mapping[str, torch.Tensor], shardings: Mapping[str, Sharding]) -> dict[str, Arrays]:
        """What each of its entries was first set to."""
        found: dict[str, Arrays] = {}
        for name, param in by_name.items():
            if param in self:
                found[name] = {
                    key: laid_out(array, state_sharding(array.shape, shardings[name], tuple(param.shape)))
                    for key, array in self[param].first.items()
                }
        return found


class _Entries(dict[str, Any]):
    """One parameter's state, which remembers the arrays that its entries were first set to."""

    def __init__(self) -> None:
        super().__init__()
        self.first: Arrays = {}

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in self and value is not None:
            self.first[key] = _entry_array(key, value)
        super().__setitem__(key, value)


def _entry_array(key: str, value: Any) -> jax.Array:
    if not torchax_tensors.is_torchax(value):
        raise ConfigError(
            f"the optimizer keeps {key!r} as a {type(value).__name__}, which a compiled step cannot update; use an "
            "optimizer with capturable state, or optax"
        )
    return torchax_tensors.array_of(value)


def _on_device(entries: dict[str, Any], key: str, beside: Sharding) -> jax.Array:
    """The array of an entry of the live state; moved beside its parameter if on the CPU (Adam's counter)."""
    value = entries[key]
    if isinstance(value, torch.Tensor) and not torchax_tensors.is_torchax(value):
        value = entries[key] = torchax_tensors.wrap(put(host_copy(value), replicated_like(beside)))
    return _entry_array(key, value)


def _constant(key: str, value: Any) -> Any:
    parts = value if isinstance(value, tuple | list) else (value,)
    if any(isinstance(part, torch.Tensor) for part in parts):
        raise ConfigError(f"hyperparameter {key!r} is a tensor; only lr may be one, make the others numbers")
    return tuple(value) if isinstance(value, list) else value
