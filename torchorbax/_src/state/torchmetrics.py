"""Torchmetrics, whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


class Metrics:
    """The state of a torchmetrics metric or collection.

    Their own `state_dict` has it only after `persistent(True)`, and never the number of updates, without which a
    running mean goes on wrongly.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._metrics: dict[str, Any] = {
            name or "metric": one
            for name, one in module.named_modules()
            if is_metric(one) and hasattr(one, "_defaults")
        }

    def state_dict(self) -> dict[str, Any]:
        """The state of every metric by name."""
        return {
            name: {"updates": one._update_count, "state": {key: getattr(one, key) for key in one._defaults}}
            for name, one in self._metrics.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back.

        Raises:
            ValueError: it is that of other metrics.
        """
        names = {name: sorted(one._defaults) for name, one in self._metrics.items()}
        stored = {name: sorted(one["state"]) for name, one in state.items()}
        if names != stored:
            raise ValueError(f"expected the metrics {names}, found {stored}")
        for name, one in self._metrics.items():
            one._update_count, one._computed = state[name]["updates"], None
            for key, value in state[name]["state"].items():
                setattr(one, key, value)


def is_metric(value: object) -> bool:
    """Is this a torchmetrics `Metric` or `MetricCollection`? They are modules, but their states are no buffers."""
    return any(cls.__module__.partition(".")[0] == "torchmetrics" for cls in type(value).__mro__)
