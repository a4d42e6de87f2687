"""The optimizer's part of a jitted training step, for both kinds of optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import torch
from jax.sharding import Sharding

from torchorbax._src.tensors.optimizers import OptaxOptimizer, Optimizer
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
        self._expected: tuple[tuple[str, ...], Any] | None = None  # trained names, and the structure of their state

    def trained(self) -> dict[str, torch.Tensor]:
        # Walking the modules and tracing the transformation take milliseconds, so both are done when something changes.
        if not self._params:
            self._params = dict(self._optimizer.model.named_parameters())
        params = {name: param for name, param in self._params.items() if param.requires_grad}
        state = self._optimizer.state
        if params and state is not None:
            if self._expected is None or self._expected[0] != tuple(params):
                self._expected = tuple(params), jax.tree.structure(self._optimizer.abstract_state())
            if jax.tree.structure(state) != self._expected[1]:
                raise ConfigError(
                    "the state of the OptaxOptimizer does not fit the parameters that require a gradient; have they "
                    "changed since it was made? Use optax.multi_transform or optax.masked to freeze some"
                )
        return params

    def look_again(self) -> None:
        self._params, self._expected = {}, None

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
