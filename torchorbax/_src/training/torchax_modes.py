"""What torchax's lowerings leave out."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import torch._ops
import torch.utils.checkpoint
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from torchorbax._src.tensors.torchax_import import Tensor, View, torchax
from torchorbax._src.tensors.torchax_tensors import array_of, is_torchax, rng_key, set_array
from torchorbax._src.tensors.torchax_tensors import readable as readable
from torchorbax._src.training.host_tensors import HostTensors
from torchorbax._src.training.live_inputs import Watch
from torchorbax.errors import ConfigError


@contextlib.contextmanager
def modes(key: jax.Array, watch: Watch | None = None) -> Iterator[Callable[[], jax.Array]]:
    """Torch code inside runs on torchax, drawing random numbers from `key`; yields a reader of the key as it stands.

    With `watch`, CPU tensors that the code uses become inputs of the program.

    The key must not stay in the environment after a trace: torchax would keep a tracer.
    """
    env = torchax.default_env()
    enabled = env.enabled  # torchax's own exit turns this off even when an outer block had it on
    with env.override_property(prng=key):
        with env, _Mended(None if watch is None else HostTensors(watch)):
            yield rng_key
        env.enabled = enabled


class _Mended(TorchFunctionMode):
    """What torchax's lowerings leave out, and a training step cannot do without."""

    def __init__(self, host: HostTensors | None) -> None:
        super().__init__()
        self._host = host

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        _refuse_autocast()
        result = _call(func, args, kwargs) if self._host is None else self._host.call(_call, func, args, kwargs)
        if not torch.is_grad_enabled():  # which JAX does not know of: it differentiates whatever is computed
            jax.tree.map(lambda leaf: _stop_gradient(leaf, args), result)
        return result


def _refuse_autocast() -> None:
    for device in ("cpu", "cuda", torch._C._get_privateuse1_backend_name()):
        if torch.is_autocast_enabled(device):
            raise ConfigError(
                f"torch.autocast({device!r}) has no effect on torchax tensors: everything would be computed in the "
                "dtype of the weights. Leave it out, and train in bfloat16 by model.bfloat16(), or by casting in "
                "loss_fn"
            )
    if torchax.default_env().param.autocast_dtype is not None:
        raise ConfigError(
            "torchax.amp.autocast leaves out linear layers and most other functions, so it would compute partly in "
            "float32. Leave it out, and train in bfloat16 by model.bfloat16(), or by casting in loss_fn"
        )


def _call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func in _KEEP_STATISTICS:
        _update_running_statistics(**_KEEP_STATISTICS[func].bind(*args, **kwargs).arguments)
    elif isinstance(kwargs.get("alpha"), torch.Tensor) and len(args) == 2:
        # torch would read alpha (SGD's learning rate) as a number, which a traced value is not
        return func(args[0], args[1] * kwargs["alpha"])
    elif isinstance(kwargs.get("value"), torch.Tensor) and func in (torch.Tensor.addcdiv_, torch.Tensor.addcmul_):
        product = kwargs["value"] * args[1]  # the same of value, in RMSprop and Adam
        return args[0].add_(product / args[2] if func is torch.Tensor.addcdiv_ else product * args[2])
    return func(*args, **kwargs)


def _stop_gradient(result: Any, inputs: tuple[Any, ...]) -> None:
    """Make a constant of a new tensor; one that an in-place operation has changed stays what it was."""
    if any(result is one for one in inputs):
        return
    if isinstance(result, View):
        result.parent = result.parent.detach()
    elif isinstance(result, Tensor):
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


@contextlib.contextmanager
def checkpoints_are_reported() -> Iterator[None]:
    """Inside, `torch.utils.checkpoint` warns that it has no effect: JAX stores the activations all the same."""
    kept_apart = torch.utils.checkpoint._checkpoint_without_reentrant_generator
    recomputed = torch.utils.checkpoint.CheckpointFunction

    def without_reentrant(*args: Any, **kwargs: Any) -> Any:
        _warn_of_checkpoint()
        return kept_apart(*args, **kwargs)

    class Plain:
        @staticmethod
        def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
            _warn_of_checkpoint()
            return function(*args)

    torch.utils.checkpoint._checkpoint_without_reentrant_generator = without_reentrant
    torch.utils.checkpoint.CheckpointFunction = Plain  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        torch.utils.checkpoint._checkpoint_without_reentrant_generator = kept_apart
        torch.utils.checkpoint.CheckpointFunction = recomputed  # type: ignore[misc]


def _warn_of_checkpoint() -> None:
    warnings.warn(
        "torch.utils.checkpoint has no effect in a compiled step: the activations are stored all the same", stacklevel=3
    )


@contextlib.contextmanager
def cumulative_averages() -> Iterator[None]:
    """Inside, `BatchNorm(momentum=None)` can be traced: torch reads its momentum, 1 / (batches seen), as a number.

    The number given to torchax has no effect there; `_update_running_statistics` gets the tensor.
    """
    norm = torch.nn.modules.batchnorm._BatchNorm
    original = norm.forward

    def forward(self: Any, input: Any) -> Any:
        counted = self.training and self.track_running_stats and self.num_batches_tracked is not None
        if self.momentum is not None or not counted or not is_torchax(self.num_batches_tracked):
            return original(self, input)
        self._check_input_dim(input)
        self.num_batches_tracked.add_(1)
        momentum = 1.0 / array_of(self.num_batches_tracked).astype(jnp.float32)
        _update_running_statistics(input, self.running_mean, self.running_var, True, momentum=momentum)
        return functional.batch_norm(input, None, None, self.weight, self.bias, True, 0.0, self.eps)

    setattr(norm, "forward", forward)  # noqa: B010  # to mypy, a method is for ever
    try:
        yield
    finally:
        setattr(norm, "forward", original)  # noqa: B010


_KEEP_STATISTICS = {func: inspect.signature(func) for func in (functional.batch_norm, functional.instance_norm)}


def _update_running_statistics(
    input: Any,
    running_mean: Any = None,
    running_var: Any = None,
    training: bool | None = None,
    use_input_stats: bool = True,
    momentum: Any = 0.1,
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
