"""Where a run without steps starts from: the whole state of another run, or its parameters only."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

import torch

from torchorbax._src.state.request import Rename, Request, request
from torchorbax._src.storage.opening import open_storage
from torchorbax._src.storage.storage import Storage
from torchorbax._src.tensors.live import module_tensors
from torchorbax.errors import ConfigError


@dataclass(frozen=True)
class Params:
    """What `params` returns: the parameters of another run, for `resume(init_from=...)`.

    Attributes:
        path: the folder or URI of that run, or of one of its steps.
        only: the item, or a part of it.
        strict: see `Checkpointer.restore`.
        rename: see `Checkpointer.restore`.
        cast: see `Checkpointer.restore`.

    Raises:
        ConfigError: an attribute of another type.
    """

    path: str | os.PathLike[str]
    only: str = "model"
    strict: bool = True
    rename: Rename | None = None
    cast: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.path, str | os.PathLike):
            raise ConfigError(f"params takes one path, not {self.path!r}")
        _request(self)


def params(
    path: str | os.PathLike[str],
    *,
    only: str | None = None,
    strict: bool = True,
    rename: Rename | None = None,
    cast: bool = False,
) -> Params:
    """Start from another run's parameters and buffers, with a fresh optimizer, at step 0: `init_from=params(path)`.

    A PEFT model (LoRA and the like) takes them from a run of the model that it wraps, under the names that they have
    there; its adapters stay as they are unless the checkpoint has them.

    Args:
        path: a run's folder or URI, of which the newest good step is taken, or that of one step (`runs/base/1000`).
        only: the item, or a part of it; None for `model`.
        strict: see `Checkpointer.restore`.
        rename: see `Checkpointer.restore`.
        cast: see `Checkpointer.restore`.

    Raises:
        ConfigError: an argument of another type.
    """
    return Params(path, only or "model", strict, rename, cast)


def _request(wanted: Params) -> Request:
    return request(wanted.only, wanted.strict, wanted.rename, wanted.cast)


def starting_point(
    init_from: str | os.PathLike[str] | Params, model: object, wanted: Request
) -> tuple[Storage, int | None, Request]:
    """The run to start from, its step (None for the newest good one), and what to restore of it.

    Args:
        init_from: a path for the full state, or `params(path)`.
        model: the live model.
        wanted: what to restore if `init_from` is a path.

    Raises:
        ConfigError: there is no checkpoint, or `init_from` is something else, such as both.
    """
    if isinstance(init_from, Params):
        wanted = dataclasses.replace(_request(init_from), strict=init_from.strict and wanted.strict)
        if isinstance(model, torch.nn.Module) and (adapted := _adapted_names(model)):
            aliases, adapters = adapted
            wanted.rename = wanted.rename or (lambda name: aliases.get(name, name))
            wanted.optional = adapters
        init_from = init_from.path
    # The path is that of a run, or that of a step; then the run is the folder above.
    path, step = os.fspath(init_from), None
    storage = open_storage(path)
    if not storage.steps():
        parent, _, last = storage.path.rstrip("/").rpartition("/")
        storage = open_storage(parent) if last.isdigit() and parent else storage
        step = int(last) if last.isdigit() else None
        if not storage.steps() or (step is not None and step not in storage.steps()):
            raise ConfigError(f"init_from: there is no checkpoint at {path}; give the folder of a run or of one step")
    return storage, step, wanted


def check_init_from(init_from: object) -> None:
    """Raise ConfigError unless it is a path, `params(path)` or None."""
    if init_from is not None and not isinstance(init_from, str | os.PathLike | Params):
        raise ConfigError(
            "init_from must be one of a path (the full state) and torchorbax.params(path) (the parameters), "
            f"not {init_from!r}"
        )


_WRAPPERS = (".base_layer.", ".original_module.")
"""What PEFT adds to the name of a wrapped tensor."""


def _adapted_names(model: torch.nn.Module) -> tuple[dict[str, str], frozenset[str]] | None:
    """The names of a PEFT model's tensors; None for any other model.

    Returns:
        The live names by the names that the tensors have in the wrapped model, and the live names of the adapters.
    """
    if not hasattr(model, "peft_config"):
        return None
    prefixes = tuple(
        f"{name}.{layer}."
        for name, module in model.named_modules()
        for layer in getattr(module, "adapter_layer_names", ())
    )
    aliases: dict[str, str] = {}
    adapters: set[str] = set()
    for name, _ in module_tensors(model):
        if name.startswith(prefixes):
            adapters.add(name)
            continue
        base = name.removeprefix("base_model.model.")
        for wrapper in _WRAPPERS:
            base = base.replace(wrapper, ".")
        aliases[base] = name
    return aliases, frozenset(adapters)
