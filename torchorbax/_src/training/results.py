"""What traced functions return."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.utils import _pytree as torch_pytree  # what torch's own containers, and transformers' outputs, register with

from torchorbax._src.tensors import torchax_tensors
from torchorbax._src.training import torchax_modes
from torchorbax.errors import ConfigError


def scalar(loss: Any) -> jax.Array:
    """The array of a loss.

    Raises:
        ConfigError: it is no real scalar tensor.
    """
    if not torchax_tensors.is_torchax(loss):
        raise ConfigError(
            f"loss_fn must return a scalar tensor computed from the model's output, not a {type(loss).__name__}; or "
            "such a tensor and further outputs, as a pair"
        )
    array = torchax_tensors.array_of(loss)
    if array.size != 1 or not jnp.issubdtype(array.dtype, jnp.floating):
        raise ConfigError(
            f"loss_fn must return a real scalar, not {array.dtype}{tuple(array.shape)}; take a mean or a sum"
        )
    return array.reshape(())


class Outputs:
    """Takes a pytree of tensors through a compiled program."""

    def __init__(self) -> None:
        self._structure: Any = None

    def flatten(self, what: str, result: Any) -> list[Any]:
        """The arrays of the tensors and numbers in a result; traced.

        Raises:
            ConfigError: something else is in it.
        """
        leaves, self._structure = torch_pytree.tree_flatten(result)
        return [_array(what, leaf) for leaf in leaves]

    def unflatten(self, arrays: list[Any]) -> Any:
        """The result again, of tensors that can be read anywhere."""
        leaves = [None if array is None else torchax_modes.readable(array) for array in arrays]
        return torch_pytree.tree_unflatten(leaves, self._structure)


def _array(what: str, leaf: Any) -> Any:
    if leaf is None:
        return None
    if torchax_tensors.is_torchax(leaf):
        return torchax_tensors.array_of(leaf)
    if isinstance(leaf, torch.Tensor):
        leaf = leaf.detach().numpy()
    if isinstance(leaf, bool | int | float | complex | np.ndarray | np.generic | jax.Array):
        return jnp.asarray(leaf)
    raise ConfigError(f"{what} returns a {type(leaf).__name__} among its outputs; they must be tensors or numbers")
