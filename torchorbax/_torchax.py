"""The only module that imports torchax: makes it importable, and wraps the few facts about its tensors that we use.

torchax 0.0.13 registers its lowerings under aten operators and overloads by name, and later torch releases have dropped
some of them (the named-dimension overloads in 2.13, `aten.qr` and `aten.cholesky` in 2.14), so that `import torchax`
raises AttributeError there. A name that is gone can never be called; all torchax needs is a key for its registry. So
while torchax is being imported, a name that its own code asks for and torch lacks yields a placeholder. Nothing is
registered with torch, code outside torchax sees no difference, and afterwards nothing stays patched. This module's
import runs it, so Python's import lock makes it happen once, whatever the number of threads.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import torch
import torch._ops
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_SUBMODULES = ("torchax", "torchax.decompositions", "torchax.ops.jaten", "torchax.ops.jtorch", "torchax.ops.jc10d")


class _MissingOp:
    """Stands for an aten operator or overload that this torch does not have: a registry key that nothing ever looks
    up."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, overload: str) -> _MissingOp:
        if overload.startswith("__"):
            raise AttributeError(overload)
        return _MissingOp(f"{self._name}.{overload}")

    def __repr__(self) -> str:
        return f"<aten operator missing in torch {torch.__version__}: {self._name}>"


def _or_missing(lookup: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    """`lookup`, answering torchax's requests for what is missing in aten with a placeholder."""

    def __getattr__(self: Any, key: str) -> Any:
        try:
            return lookup(self, key)
        except AttributeError:
            asking = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
            owner: str = self.name if isinstance(self, torch._ops._OpNamespace) else self._qualified_op_name
            if asking != "torchax" or key.startswith("__") or owner.partition("::")[0] != "aten":
                raise
            return _MissingOp(f"{owner}.{key}")

    return __getattr__


@contextlib.contextmanager
def _placeholders_for_missing_ops() -> Iterator[None]:
    patched: tuple[Any, ...] = (torch._ops._OpNamespace, torch._ops.OpOverloadPacket)
    originals = [cls.__getattr__ for cls in patched]
    for cls, original in zip(patched, originals, strict=True):
        cls.__getattr__ = _or_missing(original)  # undone below
    try:
        yield
    finally:
        for cls, original in zip(patched, originals, strict=True):
            cls.__getattr__ = original


with _placeholders_for_missing_ops():
    for _name in _SUBMODULES:  # torchax itself imports some of them late, when the patch would be gone
        importlib.import_module(_name)

import torchax  # noqa: E402  # importable only now
from torchax.ops import mappings  # noqa: E402
from torchax.tensor import Tensor as Tensor  # noqa: E402
from torchax.view import View as View  # noqa: E402

VERSION: str = torchax.__version__


class Readable(Tensor):  # type: ignore[misc]  # torchax is untyped
    """A torchax tensor whose value can be read anywhere, also where no torchax mode is on.

    torchax refuses `float(t)`, `t.item()` and formatting outside its modes; a training loop wants them for its loss.
    """

    def item(self) -> Any:
        return self._elem.item()

    def __float__(self) -> float:
        return float(self._elem)

    def __format__(self, spec: str) -> str:
        return format(self._elem.item() if self._elem.ndim == 0 else self._elem, spec)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return self._elem.__array__(dtype, copy=copy)


def is_torchax(value: object) -> bool:
    """Is `value` a torchax tensor or a view of one?"""
    return isinstance(value, _TENSORS)


_TENSORS = (Tensor, View)
"""A tuple, as `adapter.ARRAY_TYPES`."""


@functools.cache
def can_hold(dtype: torch.dtype) -> bool:
    """Can a torchax tensor have this dtype? Not all that a `jax.Array` and torch have in common."""
    try:
        return bool(mappings.j2t_dtype(jnp.dtype(mappings.t2j_dtype(dtype))) == dtype)
    except RuntimeError:
        return False


def array_of(tensor: torch.Tensor) -> jax.Array:
    """The `jax.Array` behind a torchax tensor (no copy), or the one that a View describes."""
    array: jax.Array = tensor.jax()  # type: ignore[attr-defined]
    return array


def wrap(array: jax.Array, *, requires_grad: bool = False) -> torch.Tensor:
    """A torchax tensor that holds `array` (no copy)."""
    tensor: torch.Tensor = Tensor(array, torchax.default_env(), requires_grad=requires_grad)
    return tensor


def readable(array: jax.Array) -> Readable:
    """A torchax tensor that holds `array` (no copy) and can be read outside torchax's modes."""
    return Readable(array, torchax.default_env())


def set_array(tensor: torch.Tensor, array: jax.Array) -> None:
    """Put `array` into a torchax tensor or View, seen by every alias. Checks nothing.

    Assigning `_elem` is the write that reaches the tensor; `_jax_array`, `data = array` and a View's `_elem` do
    nothing.
    """
    if isinstance(tensor, View):
        tensor.update(array)
    else:
        tensor._elem = array  # type: ignore[attr-defined]


def become_torchax(tensor: torch.Tensor, array: jax.Array) -> torch.Tensor:
    """Turn a CPU or meta tensor into a torchax tensor holding `array`, keeping its identity for all that refer to it.

    Returns:
        What the tensor was; `torch.utils.swap_tensors` of both undoes it.

    Raises:
        RuntimeError: torch cannot swap this tensor (something holds a weak reference to it, or it is part of a graph).
    """
    new = wrap(array, requires_grad=tensor.requires_grad)
    vars(new).update({name: value for name, value in vars(tensor).items() if name not in vars(new)})
    if isinstance(tensor, torch.nn.Parameter):
        new._is_param = True  # how torch tells a Parameter that is a tensor subclass
    torch.utils.swap_tensors(tensor, new)
    return new


def rng_key() -> jax.Array:
    """Torchax's random key of this thread: a typed key, or raw `uint32[2]` after `manual_seed`."""
    key: jax.Array = torchax.default_env().param.prng
    return key


def set_rng_key(key: jax.Array) -> None:
    """Set torchax's random key of this thread."""
    torchax.default_env().param.prng = key


@contextlib.contextmanager
def modes(key: jax.Array) -> Iterator[Callable[[], jax.Array]]:
    """Torch code inside runs on torchax, drawing random numbers from `key`; yields a reader of the key as it stands.

    The key must not stay in the environment after a trace: torchax would keep a tracer.
    """
    env = torchax.default_env()
    enabled = env.enabled  # torchax's own exit turns this off even when an outer block had it on
    with env.override_property(prng=key):
        with env, _Mended():
            yield rng_key
        env.enabled = enabled


class _Mended(TorchFunctionMode):
    """What torchax's lowerings leave out, and a training step cannot do without."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _KEEP_STATISTICS:
            _update_running_statistics(**_KEEP_STATISTICS[func].bind(*args, **kwargs).arguments)
        elif isinstance(kwargs.get("alpha"), torch.Tensor) and len(args) == 2:
            # torch would read alpha (SGD's learning rate) as a number, which a traced value is not
            return func(args[0], args[1] * kwargs["alpha"])
        elif isinstance(kwargs.get("value"), torch.Tensor) and func is torch.Tensor.addcdiv_:
            return args[0].add_(kwargs["value"] * args[1] / args[2])  # the same of value, in RMSprop
        result = func(*args, **kwargs)
        if not torch.is_grad_enabled():  # which JAX does not know of: it differentiates whatever is computed
            jax.tree.map(lambda leaf: _stop_gradient(leaf, args), result)
        return result


def _stop_gradient(result: Any, inputs: tuple[Any, ...]) -> None:
    """Make a constant of a new tensor; one that an in-place operation has changed stays what it was."""
    if isinstance(result, Tensor) and not any(result is one for one in inputs):
        result._elem = jax.lax.stop_gradient(result._elem)


@contextlib.contextmanager
def no_custom_gradients() -> Iterator[None]:
    """Inside, a `torch.autograd.Function` of torchax tensors raises: JAX would not call its `backward`.

    Raises:
        NotImplementedError: from `apply` of the function.
    """
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if any(is_torchax(one) for one in (*args, *kwargs.values())):
            raise NotImplementedError(f"{cls.__name__}: a torch.autograd.Function has no gradient under torchax")
        return original.__get__(None, cls)(*args, **kwargs)

    setattr(torch.autograd.Function, "apply", classmethod(apply))  # noqa: B010  # to mypy, a method is for ever
    try:
        yield
    finally:
        setattr(torch.autograd.Function, "apply", original)  # noqa: B010


_KEEP_STATISTICS = {func: inspect.signature(func) for func in (functional.batch_norm, functional.instance_norm)}


def _update_running_statistics(
    input: Any,
    running_mean: Any = None,
    running_var: Any = None,
    training: bool | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    **others: Any,
) -> None:
    """The side effect of batch and instance normalisation in training: torchax computes their output only.

    running = (1 - momentum) * running + momentum * batch, with the unbiased variance; instance normalisation averages
    the statistics of the instances (torch.nn.BatchNorm1d and InstanceNorm1d, `track_running_stats`).
    """
    per_instance = training is None  # only batch_norm has this argument, and its callers always give it
    if running_mean is None or not (use_input_stats if per_instance else training):
        return
    x = jax.lax.stop_gradient(array_of(input))
    axes = tuple(range(2, x.ndim)) if per_instance else tuple(axis for axis in range(x.ndim) if axis != 1)
    count = math.prod(x.shape[axis] for axis in axes)
    for running, statistic in (
        (running_mean, jnp.mean),
        (running_var, functools.partial(jnp.var, ddof=min(1, count - 1))),
    ):
        before = array_of(running)
        batch = statistic(x, axes, dtype=before.dtype)
        batch = batch.mean(0) if per_instance else batch
        set_array(running, ((1 - momentum) * before + momentum * batch).astype(before.dtype))
