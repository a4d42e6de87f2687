"""Torchmetrics, whole."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from torchorbax._src.state.values import encode
from torchorbax.errors import UnsupportedLeafError

_OF_THE_CLASS = frozenset(("_defaults", "_persistent", "_reductions", "training"))
"""Attributes of a metric that say what it is, not what it has seen."""


class Metrics:
    """The state of a torchmetrics metric, collection or wrapper.

    Their own `state_dict` has it only after `persistent(True)`, and never the number of updates, without which a
    running mean goes on wrongly, nor what wrappers keep in attributes, such as the extremes of a `MinMaxMetric`. So all
    attributes are kept that can be.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._fixed = {name: dict(_fixed(one)) for name, one in self._metrics().items()}

    def _metrics(self) -> dict[str, Any]:
        return {name or "metric": one for name, one in self._module.named_modules() if is_metric(one)}

    def state_dict(self) -> dict[str, Any]:
        """The class and the attributes of every metric, by name.

        Raises:
            UnsupportedLeafError: an attribute that cannot be kept has changed since the run was opened.
        """
        metrics = self._metrics()
        for name, one in metrics.items():
            before = self._fixed.get(name, {})
            for key, value in _fixed(one) if name in self._fixed else ():
                if before.get(key) is not value:
                    reason = f"a {type(value).__qualname__} cannot be kept in a checkpoint, and it has changed"
                    raise UnsupportedLeafError(f"{name}.{key}", reason)
        return {
            name: {"class": type(one).__qualname__, "attributes": dict(_attributes(one))}
            for name, one in metrics.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back.

        Raises:
            ValueError: it is that of other metrics.
        """
        self._grow(state)
        metrics = self._metrics()
        if any("attributes" not in one for one in state.values()):
            _load_states_only(metrics, state)
            return
        live = {name: type(one).__qualname__ for name, one in metrics.items()}
        stored = {name: one["class"] for name, one in state.items()}
        if live != stored:
            raise ValueError(f"expected the metrics {live}, found {stored}")
        for name, one in metrics.items():
            for key in [key for key, _ in _attributes(one) if key not in state[name]["attributes"]]:
                del vars(one)[key]
            vars(one).update(state[name]["attributes"])

    def _grow(self, state: Mapping[str, Any]) -> None:
        """Give trackers, which get a metric an epoch, those that they had."""
        trackers = {name: one for name, one in self._metrics().items() if type(one).__name__ == "MetricTracker"}
        for name, one in trackers.items():
            prefix = "" if one is self._module else f"{name}."
            steps = {step for key in state if (step := _first_part(key, prefix)).isdecimal()}
            for step in [step for step in one._modules if step.isdecimal() and step not in steps]:
                del one._modules[step]
            while one.n_steps < len(steps):
                one.increment()


def _first_part(name: str, prefix: str) -> str:
    return name.removeprefix(prefix).partition(".")[0] if name.startswith(prefix) else ""


def _load_states_only(metrics: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """What steps have that were written before all attributes were kept."""
    metrics = {name: one for name, one in metrics.items() if hasattr(one, "_defaults")}
    names = {name: sorted(one._defaults) for name, one in metrics.items()}
    stored = {name: sorted(one["state"]) for name, one in state.items()}
    if names != stored:
        raise ValueError(f"expected the metrics {names}, found {stored}")
    for name, one in metrics.items():
        one._update_count, one._computed = state[name]["updates"], None
        for key, value in state[name]["state"].items():
            setattr(one, key, value)


def _own(metric: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """The attributes that are the metric's own, and not any module's."""
    of_any_module = vars(torch.nn.Module()).keys()
    for key, value in vars(metric).items():
        if key not in of_any_module and key not in _OF_THE_CLASS:
            yield key, value


def _attributes(metric: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """What can be kept."""
    return ((key, value) for key, value in _own(metric) if _can_be_kept(value))


def _fixed(metric: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """What cannot: functions, devices and the like, which the program gives the metric when it builds it."""
    return ((key, value) for key, value in _own(metric) if not _can_be_kept(value) and not inspect.isroutine(value))


def _can_be_kept(value: Any) -> bool:
    try:
        encode(value, {})
    except UnsupportedLeafError:
        return False
    return True


def is_metric(value: object) -> bool:
    """Is this a torchmetrics `Metric` or `MetricCollection`? They are modules, but their states are no buffers."""
    return any(cls.__module__.partition(".")[0] == "torchmetrics" for cls in type(value).__mro__)
