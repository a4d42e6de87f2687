"""Plain values with tensors in them as JSON, and back: `format`'s encoding for the tensors of this stack."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch

from torchorbax._src.arrays.leaves import Array
from torchorbax._src.format import decode as decoding
from torchorbax._src.format import encode as encoding
from torchorbax._src.format.values import Json, Node, Path
from torchorbax._src.tensors import torchax_tensors
from torchorbax._src.tensors.live import as_parameter, as_readable, tensor_of
from torchorbax._src.tensors.torchax_lowerings import Detached


class _LiveTensors:
    """CPU tensors and torchax tensors; see `format.values.Tensors`."""

    def kind(self, tensor: torch.Tensor) -> Literal["tensor", "parameter", "readable"] | None:
        if isinstance(tensor, torchax_tensors.Readable):
            return "readable"
        if isinstance(tensor, torch.nn.Parameter):
            return "parameter" if type(tensor) in (torch.nn.Parameter, *torchax_tensors.TENSORS) else None
        return "tensor" if type(tensor) in (torch.Tensor, *torchax_tensors.TENSORS, Detached) else None

    def tensor(self, array: Array) -> torch.Tensor:
        return tensor_of(array)

    def parameter(self, tensor: torch.Tensor, *, requires_grad: bool) -> torch.Tensor:
        return as_parameter(tensor, requires_grad=requires_grad)

    def readable(self, tensor: torch.Tensor) -> torch.Tensor:
        return as_readable(tensor)


_TENSORS = _LiveTensors()


def encode(
    value: Any,
    leaves: dict[str, Any],
    name_of: Callable[[Path], str] = ".".join,
    path: Path = (),
    node_of: Callable[[Any, Path], Node | None] = lambda value, path: None,
    containers: list[Any] | None = None,
) -> Json:
    """`value` as JSON, with its arrays and tensors added to `leaves`; see `format.encode`."""
    return encoding.encode(value, leaves, name_of, path, node_of, tensors=_TENSORS, containers=containers)


def decode(
    json: Json,
    leaves: Mapping[str, Any],
    containers: Mapping[int, Any] | None = None,
    objects: dict[str | int, Any] | None = None,
) -> Any:
    """The value that `encode` took apart: a CPU tensor for a numpy array, a torchax tensor for a `jax.Array`."""
    return decoding.decode(json, leaves, _TENSORS, containers, objects)
