"""An optimizer's hyperparameters as inputs of a program, so that a schedule of any of them compiles nothing.

torch's optimizers compute with Python floats (`1 - beta1`), decide by them (`if weight_decay != 0`) and hand them to
tensors. To trace them as arrays would round `1 - beta1` another way. So they stay floats, which remember what was
computed from them, and what reaches a tensor becomes an input: at each call it is computed anew, in Python, from the
hyperparameters of that call.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import torch
from torch.overrides import TorchFunctionMode

from torchorbax.errors import ConfigError

Values = Sequence[float]


class Hyperparameter(float):
    """A hyperparameter, or a number computed from some, in a trace.

    Attributes:
        text: the expression, in which `h0`, `h1` … are the hyperparameters; equal texts mean equal numbers.
        compute: gives its value for other values of the hyperparameters.
        of: the indices of those that it depends on.
        exact: gets the indices of those by whose very values code decides, so that each value needs its own program.
    """

    text: str
    compute: Callable[[Values], float]
    of: frozenset[int]
    exact: set[int]

    @classmethod
    def input(cls, value: float, index: int, exact: set[int]) -> Hyperparameter:
        """The hyperparameter with this index."""
        return cls._made(value, f"h{index}", lambda values: values[index], frozenset({index}), exact)

    @classmethod
    def _made(
        cls, value: float, text: str, compute: Callable[[Values], float], of: frozenset[int], exact: set[int]
    ) -> Hyperparameter:
        made = cls(value)
        made.text, made.compute, made.of, made.exact = text, compute, of, exact
        return made

    def _decide(self, compare: Callable[[float, Any], bool], other: Any) -> bool:
        """Whether a hyperparameter is zero, and its sign, are part of what a program is compiled for anyway."""
        if other != 0 or not self.text.startswith("h"):
            self.exact |= self.of
            if isinstance(other, Hyperparameter):
                self.exact |= other.of
        return compare(float(self), float(other) if isinstance(other, Hyperparameter) else other)

    def __eq__(self, other: object) -> bool:
        return self._decide(operator.eq, other)

    def __ne__(self, other: object) -> bool:
        return self._decide(operator.ne, other)

    def __lt__(self, other: Any) -> bool:
        return self._decide(operator.lt, other)

    def __le__(self, other: Any) -> bool:
        return self._decide(operator.le, other)

    def __gt__(self, other: Any) -> bool:
        return self._decide(operator.gt, other)

    def __ge__(self, other: Any) -> bool:
        return self._decide(operator.ge, other)

    def __bool__(self) -> bool:
        return self._decide(operator.ne, 0)

    def __hash__(self) -> int:
        self.exact |= self.of
        return hash(float(self))

    def __neg__(self) -> Hyperparameter:
        compute = self.compute
        return self._made(-float(self), f"(-{self.text})", lambda values: -compute(values), self.of, self.exact)


def _arithmetic(sign: str, compute: Callable[[float, float], float], *, reflected: bool) -> Callable[..., Any]:
    def method(self: Hyperparameter, other: Any) -> Any:
        if not isinstance(other, int | float):
            return NotImplemented
        theirs = other.compute if isinstance(other, Hyperparameter) else lambda values: other
        of = self.of | other.of if isinstance(other, Hyperparameter) else self.of
        mine, text = self.compute, other.text if isinstance(other, Hyperparameter) else repr(other)
        left, right = (theirs, mine) if reflected else (mine, theirs)
        expression = f"({text}{sign}{self.text})" if reflected else f"({self.text}{sign}{text})"
        first, second = (float(other), float(self)) if reflected else (float(self), float(other))
        return self._made(
            compute(first, second), expression, lambda values: compute(left(values), right(values)), of, self.exact
        )

    return method


for _name, _sign in {"add": "+", "sub": "-", "mul": "*", "truediv": "/", "pow": "**"}.items():
    setattr(Hyperparameter, f"__{_name}__", _arithmetic(_sign, getattr(operator, _name), reflected=False))
    setattr(Hyperparameter, f"__r{_name}__", _arithmetic(_sign, getattr(operator, _name), reflected=True))


class Feeding(TorchFunctionMode):
    """Inside, what reaches a tensor of a hyperparameter is given by `feed`."""

    def __init__(self, feed: Callable[[Hyperparameter], torch.Tensor]) -> None:
        super().__init__()
        self._feed = feed

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        given = [one for one in (*args, *options.values()) if isinstance(one, Hyperparameter)]
        if not given:
            return func(*args, **options)
        try:
            return func(*map(self._fed, args), **{key: self._fed(one) for key, one in options.items()})
        except jax.errors.ConcretizationTypeError:  # a lowering of torchax that takes only numbers, such as addmm's
            for number in given:
                number.exact |= number.of
            return func(*map(_plain, args), **{key: _plain(one) for key, one in options.items()})

    def _fed(self, value: Any) -> Any:
        return self._feed(value) if isinstance(value, Hyperparameter) else value


def _plain(value: Any) -> Any:
    return float(value) if isinstance(value, Hyperparameter) else value


def floats_in(group: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """The hyperparameters of a group that are floats or tuples of them; `lr` aside, which is an array."""
    found: dict[str, tuple[float, ...]] = {}
    for key, value in group.items():
        numbers = value if isinstance(value, tuple | list) else (value,)
        if key not in ("params", "lr", "initial_lr") and numbers and all(type(one) is float for one in numbers):
            found[key] = tuple(numbers)
    return found


def check_groups(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> None:
    """Raise a `ConfigError` if a step has changed its groups."""
    for old, new in zip(before, after, strict=True):
        changed = [key for key in new if key not in old or new[key] is not old[key]]
        if changed:
            raise ConfigError(
                f"the step of the optimizer changes {changed[0]!r} in its param_groups, which a compiled step cannot "
                "do; use an optimizer that keeps what changes in its state, or optax"
            )


def constant(key: str, value: Any) -> Any:
    """A hyperparameter in a hashable form; a `ConfigError` for a tensor."""
    parts = value if isinstance(value, tuple | list) else (value,)
    if any(isinstance(part, torch.Tensor) for part in parts):
        raise ConfigError(f"hyperparameter {key!r} is a tensor; only lr may be one, make the others numbers")
    return tuple(value) if isinstance(value, list) else value


def sign(number: float) -> int:
    """-1, 0 or 1."""
    return (number > 0) - (number < 0)
