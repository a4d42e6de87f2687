"""CPU tensors in a trace: live ones become inputs, constants go to the devices, random ones are drawn there.

torchax computes with its own tensors only, and leaves calls on CPU tensors to torch. Their results would be constants
of the program: a teacher's logits of one batch, one sample of noise.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from torchorbax._src.tensors import torchax_tensors
from torchorbax._src.training.live_inputs import Watch, host_value
from torchorbax.errors import ConfigError

Call = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

_DRAWN_BY_SIZE = {torch.rand, torch.randn, torch.randint, torch.randperm}
_DRAWS = {
    *("rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson"),
    *("rand_like", "randn_like", "randint_like", "dropout", "alpha_dropout", "feature_dropout"),
    *("normal_", "uniform_", "bernoulli_", "exponential_", "random_", "geometric_", "cauchy_", "log_normal_"),
}


_VIEWS = ("T", "mT", "H", "mH", "real", "imag")


class HostTensors:
    """What one trace does with CPU tensors."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._made: dict[int, torch.Tensor] = {}
        self._drawn: set[int] = set()

    def call(self, call: Call, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`call(func, args, kwargs)`, with CPU tensors that were there before the trace replaced by inputs."""
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):
            return self._attribute(func, args, kwargs)
        if func in _DRAWN_BY_SIZE and _draws_many(func, args, kwargs):
            kwargs = {**kwargs, "device": "jax"}
        first = args[0] if args else None
        args, kwargs, drawn = self._substituted(args, kwargs)
        if args and args[0] is not first and name in vars(torchax_tensors.Tensor):
            func = getattr(torchax_tensors.Tensor, name)  # the method that a torchax tensor has of its own
        if kwargs.get("generator") is not None and name in _DRAWS:
            raise ConfigError(
                f"{name}(generator=...) would draw the same numbers at every step; leave generator out: the training "
                "step has a random key of its own, which is saved with the run"
            )
        result = call(func, args, kwargs)
        _each(result, lambda tensor: self._note(tensor, drawn=drawn or name in _DRAWS, moved=drawn))
        return result

    def _attribute(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Shape, dtype and device are a CPU tensor's own; `data` and views such as `T` are values."""
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")
        if args and self._is_live(args[0]):
            if attribute == "data":
                return self._watch.twin(args[0])
            if attribute in _VIEWS:
                return getattr(self._watch.twin(args[0]), attribute)
        return func(*args, **kwargs)

    def _is_live(self, value: Any) -> bool:
        return _is_host(value) and id(value) not in self._made

    def _substituted(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], bool]:
        """The arguments with inputs and constants in the place of CPU tensors; were some of these drawn?"""
        found: list[torch.Tensor] = []
        _each((args, kwargs), found.append)
        if not any(map(_is_host, found)):
            return args, kwargs, False
        mixed = any(torchax_tensors.is_torchax(one) or self._is_live(one) for one in found)
        drawn = any(id(one) in self._drawn for one in found)
        if mixed and drawn:
            raise ConfigError(_FROZEN_DRAW)

        def replace(tensor: torch.Tensor) -> torch.Tensor:
            if self._is_live(tensor):
                return self._watch.twin(tensor)
            if mixed and _is_host(tensor) and tensor.ndim:  # torchax takes 0-d tensors as numbers
                return torchax_tensors.wrap(host_value(tensor))
            return tensor

        return _replaced(args, replace), _replaced(kwargs, replace), drawn

    def _note(self, result: torch.Tensor, *, drawn: bool, moved: bool) -> None:
        if _is_host(result):
            self._made[id(result)] = result
            if drawn:
                self._drawn.add(id(result))
        elif moved:  # `drawn.to("jax")`
            raise ConfigError(_FROZEN_DRAW)


_FROZEN_DRAW = (
    "the traced code draws a tensor of random numbers on the CPU, which would be the same at every step; draw it with "
    "device=x.device, where x is a tensor of the batch"
)


def _is_host(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not torchax_tensors.is_torchax(value) and value.device.type == "cpu"


def _draws_many(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Does a call without a device draw more than the one number that Python code may decide by?"""
    device = kwargs.get("device")
    if device is not None and torch.device(device).type != "cpu":
        return False
    size = kwargs.get("size")
    if size is None:
        shapes = [one for one in args if isinstance(one, list | tuple)]
        size = shapes[0] if shapes else args
    return func is torch.randperm or math.prod(size) > 1


def _each(tree: Any, use: Callable[[torch.Tensor], Any]) -> None:
    if isinstance(tree, torch.Tensor):
        use(tree)
    elif isinstance(tree, list | tuple):
        for one in tree:
            _each(one, use)
    elif isinstance(tree, dict):
        for one in tree.values():
            _each(one, use)


def _replaced(tree: Any, replace: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(tree, torch.Tensor):
        return replace(tree)
    if isinstance(tree, dict):
        return {key: _replaced(one, replace) for key, one in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_replaced(one, replace) for one in tree)
    return tree


@contextlib.contextmanager
def noticing_draws() -> Iterator[list[str]]:
    """Yields what drew random numbers on the host inside, known at the end: a trace makes constants of those."""
    drew: list[str] = []
    before = torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)
    yield drew
    if not torch.equal(torch.get_rng_state(), before[0]):
        drew.append("torch's CPU generator")
    if random.getstate() != before[1]:
        drew.append("Python's random")
    now: Any = np.random.get_state(legacy=False)
    if now["state"]["pos"] != before[2]["state"]["pos"] or not np.array_equal(
        now["state"]["key"], before[2]["state"]["key"]
    ):
        drew.append("numpy.random")
