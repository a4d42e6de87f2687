"""The two kinds of optimizer: `torch.optim`, and optax behind `OptaxOptimizer`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import jax
import torch
from jax.sharding import Sharding

from torchorbax._src.arrays.jax_context import training_context
from torchorbax._src.arrays.leaves import leaf_name, put
from torchorbax._src.arrays.sharding_rules import replicated_like, state_sharding
from torchorbax._src.tensors.convert import to_jax
from torchorbax._src.tensors.live import live_dtype
from torchorbax.errors import ConfigError

State = Any


class OptaxOptimizer:
    """An optax transformation for the trainable parameters of a module, as `train_step` and `resume` take it.

    Its state is made when it is first needed, on the devices and in the layout of the parameters, so it may be built
    while the module is still on the CPU or on meta.

    Args:
        model: the module; its parameters with `requires_grad` are trained.
        tx: any optax gradient transformation; its `init` gets `{parameter name: jax.Array}`.

    Attributes:
        state: optax's state, a pytree of `jax.Array`; None until it is first needed.

    Raises:
        ConfigError: `tx` is not a gradient transformation, or optax is not installed.
    """

    def __init__(self, model: torch.nn.Module, tx: Any) -> None:
        try:
            import optax  # noqa: F401  # train_step applies its updates
        except ImportError as error:
            raise ConfigError("OptaxOptimizer needs optax: pip install 'torchorbax[optax]'") from error
        if not callable(getattr(tx, "init", None)) or not callable(getattr(tx, "update", None)):
            raise ConfigError(f"tx must be an optax gradient transformation with init and update, not {tx!r}")
        if not isinstance(model, torch.nn.Module):
            raise ConfigError(f"model must be a torch.nn.Module, not a {type(model).__name__}")
        self.model = model
        self.tx = tx
        self.state: State = None
        self._made_for: tuple[str, ...] | None = None

    def params(self) -> dict[str, torch.Tensor]:
        """The trained tensors by name."""
        return {name: param for name, param in self.model.named_parameters() if param.requires_grad}

    def state_params(self) -> dict[str, torch.Tensor]:
        """The tensors that the state is for, by name: those that were trained when it was made, frozen since or not."""
        if self.state is None or self._made_for is None:
            return self.params()
        made_for = set(self._made_for)
        return {name: param for name, param in self.model.named_parameters() if name in made_for}

    def adopt(self, state: State, names: Iterable[str]) -> None:
        """Take over a state that was made for the parameters of these names."""
        self.state, self._made_for = state, tuple(names)

    def init(self) -> State:
        """The state. If there is none yet, it is made on the devices of the parameters; for CPU ones, the default."""
        if self.state is None:
            arrays = to_jax(self.params())
            shardings = self.state_shardings({name: array.sharding for name, array in arrays.items()})
            committed = all(getattr(array, "committed", True) for array in arrays.values())
            devices = next(iter(arrays.values())).sharding.device_set if arrays else ()
            with training_context(devices):
                self._made_for = tuple(arrays)
                self.state = jax.jit(self.tx.init, out_shardings=shardings if committed else None)(arrays)
        return self.state

    def abstract_state(self, names: Collection[str] | None = None) -> State:
        """The structure of a state: a pytree of `jax.ShapeDtypeStruct`. Nothing is allocated.

        Args:
            names: the names of the parameters that the state is for; None for those that are trained now.
        """
        params = {
            name: jax.ShapeDtypeStruct(tuple(param.shape), live_dtype(param))
            for name, param in self._named(names).items()
        }
        return jax.eval_shape(self.tx.init, params)

    def _named(self, names: Collection[str] | None) -> dict[str, torch.Tensor]:
        if names is None:
            return self.params()
        return {name: param for name, param in self.model.named_parameters() if name in names}

    def leaf_names(self, state: State) -> list[tuple[str, str | None]]:
        """For each leaf of `state`, its name (`fc.weight.0.mu`, `0.count`) and the parameter it belongs to, if any."""
        params = dict(self.model.named_parameters())  # one that is frozen now may have been trained
        names: list[tuple[str, str | None]] = []
        for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]:
            # The innermost entry that is a parameter's name: an outer one may be a label of optax.multi_transform.
            owner = next((entry for entry in reversed(path) if getattr(entry, "key", None) in params), None)
            rest = leaf_name(tuple(entry for entry in path if entry is not owner))
            param = None if owner is None else str(owner.key)
            names.append((f"{param}.{rest}" if param else rest, param))
        return names

    def state_shardings(self, params: Mapping[str, Sharding], names: Collection[str] | None = None) -> State:
        """Where a state's leaves belong when the parameters are at `params`; a pytree like the state.

        Args:
            params: where the parameters are, by name.
            names: as in `abstract_state`.
        """
        abstract = self.abstract_state(names)
        leaves, structure = jax.tree.flatten(abstract)
        shapes = {name: tuple(param.shape) for name, param in self._named(names).items()}
        if not params:
            raise ConfigError("the model has no parameter that requires a gradient, so there is nothing to optimise")
        any_sharding = next(iter(params.values()))
        shardings = [
            state_sharding(tuple(leaf.shape), params[param], shapes[param])
            if param is not None
            else replicated_like(any_sharding)
            for leaf, (_, param) in zip(leaves, self.leaf_names(abstract), strict=True)
        ]
        return jax.tree.unflatten(structure, shardings)

    def place_state(self) -> None:
        """Move existing state to where the parameters are."""
        if self.state is not None:
            arrays = to_jax(self.state_params())
            shardings = self.state_shardings({name: array.sharding for name, array in arrays.items()}, arrays)
            bound = any(getattr(array, "committed", True) for array in arrays.values())
            self.state = jax.tree.map(lambda leaf, at: put(leaf, at if bound else None), self.state, shardings)


Optimizer = torch.optim.Optimizer | OptaxOptimizer


def state_tensors(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """The tensors in a torch optimizer's state: key, parameter, tensor."""
    for param, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                yield key, param, value
