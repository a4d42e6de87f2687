"""What to say when code cannot be traced: which operation, in which module, and what to do instead."""

from __future__ import annotations

import contextlib
import traceback
import types
from collections.abc import Callable, Iterator, Mapping

import jax
import torch
from torch.overrides import resolve_name

from torchorbax._src.tensors import torchax_tensors
from torchorbax.errors import ConfigError

_NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)
_UNKNOWN_VALUES = (
    "needs the values of tensors while they are only known when the compiled program runs: to decide (`if`), to count "
    "(a loop, `.item()`), or for the shape of a result (nonzero, a mask as an index). Compute with torch.where and "
    "masks as factors, and return what is to be read beside the loss"
)


@contextlib.contextmanager
def explained(what: str, modules: Callable[[], Mapping[str, torch.nn.Module]]) -> Iterator[None]:
    """Errors that say in JAX's or torchax's terms that code cannot be traced come out in the program's terms.

    Args:
        what: the function that is traced.
        modules: gives the modules that it reaches, by name; only called when there is an error.

    Raises:
        ConfigError: from the error, which stays its cause.
    """
    try:
        yield
    except _NEEDS_VALUES as error:
        module = _module(error)
        advice = None if module is None else _advice(module)
        where = _where(error, module, modules())
        raise ConfigError(f"{what} cannot be compiled: {where} {advice or _UNKNOWN_VALUES}") from error
    except torchax_tensors.OperatorNotFound as error:
        where = _where(error, _module(error), modules())
        raise ConfigError(
            f"{what} cannot be compiled: {where} cannot be computed on jax ({error} in torchax "
            f"{torchax_tensors.VERSION}). Compute it by other operations of torch, or write it for jax.Arrays and call "
            "it with torchax.interop.call_jax"
        ) from error


def _advice(module: torch.nn.Module) -> str | None:
    """What is wrong with this module, and what to do, where that is known."""
    if isinstance(module, torch.nn.Embedding | torch.nn.EmbeddingBag) and module.max_norm is not None:
        return (
            "writes into its weight because of max_norm. Build it without max_norm, and call this before each step: "
            "with torch.no_grad(), torchax.default_env(): "
            f"weight.copy_(torch.renorm(weight, {module.norm_type}, 0, {module.max_norm}))"
        )
    if getattr(getattr(module, "config", None), "_experts_implementation", None) == "eager":
        return (
            "chooses tokens by values, expert after expert. Call model.set_experts_implementation('grouped_mm') before "
            "the first step"
        )
    return None


def _where(error: BaseException, module: torch.nn.Module | None, modules: Mapping[str, torch.nn.Module]) -> str:
    """The operation and the module in which an error was raised."""
    calls = [call for frame in _frames(error) if (call := _torch_call(frame)) is not None]
    operation = (resolve_name(calls[-1]) or "") if calls else ""
    parts = [operation] if operation else []
    if module is not None:
        name = next((name for name, one in _named(modules) if one is module), "")
        parts.append(f"in {name} ({type(module).__name__})" if name else f"in the {type(module).__name__}")
    return " ".join(parts) or "the code"


def _module(error: BaseException) -> torch.nn.Module | None:
    """The innermost module in whose method an error was raised."""
    owners = [frame.f_locals.get("self") for frame in _frames(error)]
    return next((one for one in reversed(owners) if isinstance(one, torch.nn.Module)), None)


def _frames(error: BaseException) -> Iterator[types.FrameType]:
    return (frame for frame, _ in traceback.walk_tb(error.__traceback__))


def _torch_call(frame: types.FrameType) -> Callable[..., object] | None:
    """The function of torch that is being called in this frame, if it is one that passes such calls on."""
    return frame.f_locals.get("func") if frame.f_code.co_name == "__torch_function__" else None


def _named(modules: Mapping[str, torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Module]]:
    for name, module in modules.items():
        yield from module.named_modules(prefix=name)
