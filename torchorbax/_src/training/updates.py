"""The optimizer's part of a jitted training step, for both kinds of optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import torch
from jax.sharding import Sharding

from torchorbax._src.tensors.optimizers import OptaxOptimizer, Optimizer
from torchorbax._src.training.live_arrays import REQUIRES_GRAD
from torchorbax._src.training.programs import Part
from torchorbax._src.training.torch_update import TorchUpdate
from torchorbax._src.training.tracing import Arrays, settled
from torchorbax.errors import ConfigError


class Update(Protocol):
    """One optimizer, as the training step sees it."""

    def trained(self) -> dict[str, torch.Tensor]:
        """The parameters that it updates, by name."""

    def look_again(self) -> None:
        """The model's parameters may be others than before."""

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
        self._params: dict[str, torch.Tensor] = {}
        self._trains: list[bool] = []
        self._trained: dict[str, torch.Tensor] = {}
        self._structure: Any = None

    def trained(self) -> dict[str, torch.Tensor]:
        if not self._params:  # walking the modules takes milliseconds
            self._params = dict(self._optimizer.model.named_parameters())
        trains = list(map(REQUIRES_GRAD, self._params.values()))
        if trains != self._trains:
            self._trained = {name: param for name, param in self._params.items() if param.requires_grad}
            self._trains, self._structure = trains, None
        return self._trained

    def look_again(self) -> None:
        self._params, self._trains, self._trained, self._structure = {}, [], {}, None

    def constants(self) -> list[Part]:
        return []

    def inputs(self, shardings: Mapping[str, Sharding]) -> tuple[list[Any], Any]:
        leaves, structure = jax.tree.flatten(self._optimizer.init())
        if self._structure is None:  # tracing the transformation takes milliseconds
            self._structure = jax.tree.structure(self._optimizer.abstract_state())
        if structure != self._structure:
            raise ConfigError(
                "the state of the OptaxOptimizer does not fit the parameters that require a gradient; have they "
                "changed since it was made? Use optax.multi_transform or optax.masked to freeze some"
            )
        return leaves, None

    def set_state(self, state: list[Any]) -> None:
        self._optimizer.state = jax.tree.unflatten(self._structure, state)

    def apply(
        self, params: Arrays, grads: Arrays, state: Any, further: Any, shardings: Mapping[str, Sharding]
    ) -> tuple[Arrays, Any]:
        import optax

        before = jax.tree.unflatten(self._structure, state)
        updates, after = self._optimizer.tx.update(grads, before, params)
        after = jax.tree.map(settled, after, before, self._optimizer.state_shardings(shardings))
        return optax.apply_updates(params, updates), jax.tree.leaves(after)
