"""Torchmetrics come back whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torchmetrics
from torchorbax import MismatchError

from tests.helpers.runs import restored, saved


@pytest.mark.parametrize("collection", [False, True])
def test_metrics_come_back_without_being_made_persistent(collection: bool, tmp_path: Path) -> None:
    def metric() -> Any:
        one = torchmetrics.MeanMetric()
        return torchmetrics.MetricCollection({"mean": one, "cat": torchmetrics.CatMetric()}) if collection else one

    live = metric()
    live.update(1.0)
    live.update(4.0)
    path = saved(tmp_path, metric=live)
    again = metric()
    restored(path, metric=again)
    assert str(again.compute()) == str(live.compute())
    for one in (live, again):
        one.update(7.0)
    assert str(again.compute()) == str(live.compute())
    with pytest.raises(MismatchError, match="metric: placement: expected a state that Metrics takes"):
        restored(path, metric=torchmetrics.MaxMetric())
