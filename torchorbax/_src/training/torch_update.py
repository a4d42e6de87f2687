"""A `torch.optim` optimizer's own `step`, traced."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import torch
import torch.optim.optimizer as torch_optimizer
from jax.sharding import Sharding

from torchorbax._src.arrays.sharding_rules import replicated_like, state_sharding
from torchorbax._src.tensors import torchax_tensors
from torchorbax._src.training import torchax_modes
from torchorbax._src.training.batches import number_on_devices
from torchorbax._src.training.hyperparameters import Feeding, Hyperparameter, check_groups, constant, floats_in, sign
from torchorbax._src.training.programs import Part
from torchorbax._src.training.traced_state import TracedState, entry_on_device
from torchorbax._src.training.tracing import Arrays, arrays_of, holding, laid_out, settled
from torchorbax.errors import ConfigError

_TRACEABLE = {"capturable": True, "foreach": False, "fused": None}

Derived = dict[str, Hyperparameter]
"""The numbers that a group's step hands to tensors, by their expressions."""


class Further(NamedTuple):
    """What a traced step reads besides parameters, gradients and state; an entry a group.

    Attributes:
        rates: the learning rates.
        derived: the values of `Derived`, in its order.
    """

    rates: list[Any]
    derived: list[list[Any]]


class TorchUpdate:
    """A `torch.optim` optimizer's own `step`, traced.

    The hyperparameters of torch's own optimizers are inputs, so that schedulers work; of others only the learning rates
    are. torch's own optimizers treat each parameter by itself, so those alike are traced once.
    """

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model = model
        self._optimizer = optimizer
        self._names: dict[int, str] = {}
        self._trained: dict[str, torch.Tensor] = {}
        self._looks_again = True
        self._stateless = False
        self._exact: set[int] = set()
        self._derived: dict[Any, list[Derived]] = {}
        self._on_device: dict[tuple[int, int], tuple[Any, jax.Array]] = {}

    def trained(self) -> dict[str, torch.Tensor]:
        params = [param for group in self._optimizer.param_groups for param in group["params"]]
        names = self._names
        if self._looks_again or any(id(param) not in names for param in params):
            names = {id(param): name for name, param in self._model.named_parameters()}
        if strangers := [param for param in params if id(param) not in names]:
            gone = [self._names[id(param)] for param in strangers if id(param) in self._names]
            of = f" ({', '.join(gone[:3])}, which the model had before)" if gone else ""
            raise ConfigError(
                f"{len(strangers)} of the optimizer's {len(params)} parameters are not the model's{of}; build it from "
                "model.parameters(), after model.to('jax') if you call that, and after layers were replaced"
            )
        self._names, self._looks_again = names, False
        self._trained = {names[id(param)]: param for param in params if param.requires_grad}
        return self._trained

    def look_again(self) -> None:
        self._looks_again = True

    def constants(self) -> list[Part]:
        values: list[Any] = []
        labels: list[str] = []
        index = 0
        for group in self._optimizer.param_groups:
            inputs = floats_in(group) if self._is_torchs_own() else {}
            for key, value in group.items():
                if key in ("params", "lr", "initial_lr"):
                    continue
                labels.append(key)
                if key in inputs:
                    indices = range(index, index := index + len(inputs[key]))
                    known = zip(inputs[key], indices, strict=True)
                    values.append(tuple(one if at in self._exact else sign(one) for one, at in known))
                else:
                    values.append(constant(key, value))
        return [Part("hyperparameters", tuple(values), tuple(labels))]

    def inputs(self, shardings: Mapping[str, Sharding]) -> tuple[dict[str, Arrays], Further]:
        by_name = self._trained
        states = self._optimizer.state
        if not self._stateless and not any(states.get(param) for param in by_name.values()):
            first = self._first_state(by_name, shardings)
            self._stateless = not first
            self.set_state(first)
        state: dict[str, Arrays] = {}
        for name, param in by_name.items():
            if entries := states.get(param):
                state[name] = {key: entry_on_device(entries, key, param, shardings[name]) for key in entries}
        beside = replicated_like(next(iter(shardings.values())))
        return state, self._further(by_name, state, beside)

    def set_state(self, state: Mapping[str, Arrays]) -> None:
        by_name = self._trained
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
        further: Further,
        shardings: Mapping[str, Sharding],
    ) -> tuple[Arrays, Any]:
        new_params: Arrays = {}
        new_state: dict[str, Arrays] = {}
        derived = self._derived[self._kind(state)]  # found by `_further` before
        for names, step in self._steps(derived, state):
            mine = {name: state[name] for name in names if name in state}
            stepped, stepped_state = step(
                {name: params[name] for name in names}, {name: grads[name] for name in names}, mine, further
            )
            new_params |= stepped
            for name, entries in stepped_state.items():
                before = mine.get(name, {})
                new_state[name] = {
                    key: settled(
                        array, before.get(key, array), state_sharding(array.shape, shardings[name], params[name].shape)
                    )
                    for key, array in entries.items()
                }
        return new_params, new_state

    def _is_torchs_own(self) -> bool:
        """Is this an optimizer of torch itself, without hooks? Others may do what they like with all parameters."""
        hooks = (
            self._optimizer._optimizer_step_pre_hooks,
            self._optimizer._optimizer_step_post_hooks,
            torch_optimizer._global_optimizer_pre_hooks,
            torch_optimizer._global_optimizer_post_hooks,
        )
        return type(self._optimizer).__module__.startswith("torch.optim") and not any(hooks)

    def _steps(
        self, derived: list[Derived], state: Mapping[str, Arrays]
    ) -> Iterator[tuple[list[str], Callable[..., tuple[Arrays, dict[str, Arrays]]]]]:
        """The parameters that are updated together, and the function that does it."""
        by_name = self._trained
        if not self._is_torchs_own():
            yield list(by_name), lambda *arrays: self._stepped(by_name, derived, *arrays)
            return
        groups = {
            id(param): index for index, group in enumerate(self._optimizer.param_groups) for param in group["params"]
        }
        alike: dict[Any, Callable[..., Any]] = {}
        for name, param in by_name.items():
            array = torchax_tensors.array_of(param)
            entries = tuple((key, one.shape, one.dtype) for key, one in state.get(name, {}).items())
            signature = (groups[id(param)], array.shape, array.dtype, entries)
            if signature not in alike:
                alike[signature] = jax.jit(_of_one(self._stepped, param, derived))
            yield [name], _with_names(name, alike[signature])

    def _stepped(
        self,
        by_name: Mapping[str, torch.Tensor],
        derived: list[Derived],
        params: Arrays,
        grads: Arrays,
        state: Mapping[str, Arrays],
        further: Further,
    ) -> tuple[Arrays, dict[str, Arrays]]:
        """The parameters and the state after a step; traced."""
        traced = TracedState(by_name, state)
        with holding(by_name, params), self._traced(by_name, grads, further, derived, traced):
            self._step()
            return arrays_of(by_name), traced.arrays(by_name)

    def _first_state(self, by_name: Mapping[str, torch.Tensor], shardings: Mapping[str, Sharding]) -> Any:
        """The state that `step` starts from, which torch optimizers make within their first step.

        A step on zero parameters and gradients is traced to see what each entry is first set to; nothing else of it is
        computed. Where the first step differs from later ones (SGD with dampening) there is none, and the step is
        compiled twice.
        """
        groups = self._optimizer.param_groups
        if any(group.get("dampening") for group in groups):
            return {}
        whole = not self._is_torchs_own()
        first: dict[str, Arrays] = {}
        makers: dict[Any, Callable[[], Any]] = {}
        owner = {id(param): index for index, group in enumerate(groups) for param in group["params"]}
        for name, param in by_name.items():
            array = torchax_tensors.array_of(param)
            signature = None if whole else (owner[id(param)], array.shape, array.dtype, shardings[name])
            if signature not in makers:
                together = by_name if whole else {name: param}
                makers[signature] = jax.jit(self._first_values(together, shardings))
            if not whole:
                first[name] = next(iter(makers[signature]().values()), {})
        return makers[None]() if whole else {name: entries for name, entries in first.items() if entries}

    def _first_values(
        self, by_name: Mapping[str, torch.Tensor], shardings: Mapping[str, Sharding]
    ) -> Callable[[], dict[str, Arrays]]:
        def first_values() -> dict[str, Arrays]:
            zeros = {name: jnp.zeros_like(torchax_tensors.array_of(param)) for name, param in by_name.items()}
            rates = [jnp.asarray(float(group["lr"])) for group in self._optimizer.param_groups]
            traced = TracedState(by_name, {})
            with holding(by_name, zeros), self._traced(by_name, zeros, Further(rates, []), None, traced):
                self._step()
            return {
                name: {
                    key: laid_out(array, state_sharding(array.shape, shardings[name], tuple(by_name[name].shape)))
                    for key, array in entries.items()
                }
                for name, entries in traced.first_arrays(by_name).items()
            }

        return first_values

    def _kind(self, state: Mapping[str, Arrays]) -> Any:
        """What decides which numbers a step hands to tensors."""
        return tuple(part.value for part in self.constants()), frozenset(state)

    def _further(self, by_name: Mapping[str, torch.Tensor], state: Mapping[str, Arrays], beside: Sharding) -> Further:
        """The inputs of a step, with every hyperparameter as it is now.

        What reaches tensors is found by tracing the steps of parameters alike once, with nothing computed.
        """
        groups = self._optimizer.param_groups
        kind = self._kind(state)
        if kind not in self._derived:
            derived: list[Derived] = [{} for _ in groups]
            abstract = Further([jax.ShapeDtypeStruct((), jnp.float32, weak_type=True) for _ in groups], [])
            if self._is_torchs_own():
                seen: set[int] = set()
                for names, step in self._steps(derived, state):
                    function = step.keywords["step"]  # type: ignore[attr-defined]
                    if id(function) not in seen:
                        seen.add(id(function))
                        params = {name: torchax_tensors.array_of(by_name[name]) for name in names}
                        mine = {name: state[name] for name in names if name in state}
                        jax.eval_shape(step, params, params, mine, abstract)
            kind = self._kind(state)  # which `exact` hyperparameters are part of
            self._derived[kind] = derived
        values = [one for group in groups for numbers in floats_in(group).values() for one in numbers]
        rates = [self._put((index, -1), group["lr"], beside) for index, group in enumerate(groups)]
        return Further(
            rates,
            [
                [self._put((index, at), one.compute(values), beside) for at, one in enumerate(numbers.values())]
                for index, numbers in enumerate(self._derived[kind])
            ],
        )

    def _put(self, where: tuple[int, int], value: Any, beside: Sharding) -> jax.Array:
        """A number on the devices, weakly typed as Python's are; only put there when it changes."""
        if torchax_tensors.is_torchax(value):
            return torchax_tensors.array_of(value)
        number = float(value)
        known = self._on_device.get(where)
        if known is None or known[0] != (number, beside):
            placed = number_on_devices(number, beside)
            known = self._on_device[where] = (number, beside), placed
        return known[1]

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
        self,
        by_name: Mapping[str, torch.Tensor],
        grads: Arrays,
        further: Further,
        derived: list[Derived] | None,
        state: TracedState,
    ) -> Iterator[None]:
        """The optimizer with these parameters only, with traced gradients, state and hyperparameters, and with options
        that can be traced. With `derived` None, and for optimizers not of torch, hyperparameters are constants."""
        mine = {id(param) for param in by_name.values()}
        tracked = derived is not None and self._is_torchs_own()
        with ExitStack() as undo:
            undo.callback(setattr, self._optimizer, "state", self._optimizer.state)
            undo.callback(setattr, self._optimizer, "param_groups", self._optimizer.param_groups)
            self._optimizer.state = state
            traced, index = [], 0
            for group, rate in zip(self._optimizer.param_groups, further.rates, strict=True):
                numbers, index = _tracked(group, index, self._exact)
                options = {flag: value for flag, value in _TRACEABLE.items() if flag in group}
                params = [param for param in group["params"] if id(param) in mine or not param.requires_grad]
                traced.append(
                    {
                        **group,
                        **(numbers if tracked else {}),
                        **options,
                        "lr": torchax_tensors.wrap(rate),
                        "params": params,
                    }
                )
            self._optimizer.param_groups = traced
            before = [dict(group) for group in traced]
            for name, param in by_name.items():
                undo.callback(setattr, param, "grad", param.grad)
                param.grad = torchax_tensors.wrap(grads[name])
            undo.enter_context(torchax_modes.modes(torchax_tensors.rng_key()))
            if derived is not None and tracked:
                owner = next(
                    (at for at, group in enumerate(traced) if any(id(one) in mine for one in group["params"])), 0
                )
                given = further.derived[owner] if further.derived else None
                undo.enter_context(Feeding(_feed(derived[owner], given)))
            yield
            check_groups(before, traced)


def _of_one(
    stepped: Callable[..., tuple[Arrays, dict[str, Arrays]]], param: torch.Tensor, derived: list[Derived]
) -> Callable[..., Any]:
    """The step of one parameter, which stands for all that are like it."""

    def update(array: jax.Array, grad: jax.Array, entries: Arrays | None, further: Further) -> Any:
        state = {} if entries is None else {"": entries}
        params, new = stepped({"": param}, derived, {"": array}, {"": grad}, state, further)
        return params[""], new.get("")

    return update


class _with_names:  # used as a function, like functools.partial
    """Makes a step of named parameters of the step of one."""

    def __init__(self, name: str, step: Callable[..., Any]) -> None:
        self._name = name
        self.keywords = {"step": step}

    def __call__(
        self, params: Arrays, grads: Arrays, state: Mapping[str, Arrays], further: Further
    ) -> tuple[Arrays, dict[str, Arrays]]:
        name = self._name
        array, entries = self.keywords["step"](params[name], grads[name], state.get(name), further)
        return {name: array}, {} if entries is None else {name: entries}


def _tracked(group: Mapping[str, Any], index: int, exact: set[int]) -> tuple[dict[str, Any], int]:
    """A group's float hyperparameters as such that remember what is computed from them; the next free index."""
    found: dict[str, Any] = {}
    for key, numbers in floats_in(group).items():
        made = [Hyperparameter.input(one, index + at, exact) for at, one in enumerate(numbers)]
        index += len(made)
        found[key] = tuple(made) if isinstance(group[key], tuple | list) else made[0]
    return found, index


def _feed(derived: Derived, given: Sequence[Any] | None) -> Callable[[Hyperparameter], torch.Tensor]:
    """What a tensor gets for a number: its input, or, while they are being found, its value."""

    def feed(number: Hyperparameter) -> torch.Tensor:
        derived.setdefault(number.text, number)
        if given is None:
            return torchax_tensors.wrap(jnp.asarray(float(number)))
        return torchax_tensors.wrap(given[list(derived).index(number.text)])

    return feed
