"""Asks a preservation policy which steps it preserves: once, in full, and before anything is deleted."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence

from torchorbax._src.storage.step_info import StepInfo
from torchorbax.policies import PreservationContext, PreservationPolicy, decision


def preserved(policy: PreservationPolicy, infos: Sequence[StepInfo]) -> list[bool]:
    """For each step, whether the policy preserves it.

    NaN has no place in an order, so a policy that sorts by a metric would keep random steps and might delete the best
    one. A metric that a step does not have, while it has others, is taken for NaN, too. The policy is asked twice, with
    infinity and with minus infinity in place of every NaN. A step with a NaN is preserved if both answers preserve it;
    any other step if one of them does. So a step without the metric ranks below all steps that have it.

    Raises:
        Exception: what the policy raises.
        TypeError, ValueError: the policy has not answered with one bool for each step.
    """
    high, low = ([_AskedStep(info, number) for info in infos] for number in (math.inf, -math.inf))
    with_high = _ask(policy, high)
    if not any(step.was_replaced for step in high):  # every metric that the policy has asked for is a number
        return with_high
    with_low = _ask(policy, low)
    return [
        by_high and by_low if step.was_replaced else by_high or by_low
        for step, by_high, by_low in zip(high, with_high, with_low, strict=True)
    ]


def _ask(policy: PreservationPolicy, steps: Sequence[_AskedStep]) -> list[bool]:
    answer = [decision(one) for one in policy.should_preserve(steps, context=PreservationContext())]
    if len(answer) != len(steps):
        raise ValueError(f"should_preserve must return one bool for each of {len(steps)} steps, not {len(answer)}")
    return answer


class _AskedStep:
    """A `StepInfo` in which a number replaces every metric that is NaN or missing.

    Attributes:
        was_replaced: has the policy been given the number? False until it asks for the metrics.
    """

    def __init__(self, info: StepInfo, number: float) -> None:
        self.step = info.step
        self.was_replaced = False
        self._info = info
        self._number = number

    @property
    def time(self) -> datetime.datetime:
        """When the step was saved."""
        return self._info.time

    @property
    def metrics(self) -> dict[str, float] | None:
        """The metrics saved with the step; None if there are none at all."""
        found = self._info.metrics
        if found is None:
            return None
        self.was_replaced = self.was_replaced or any(map(math.isnan, found.values()))
        return _Metrics(self, {name: self._number if math.isnan(value) else value for name, value in found.items()})

    def replacement(self) -> float:
        """The number in place of a metric that the step does not have."""
        self.was_replaced = True
        return self._number


class _Metrics(dict[str, float]):
    """The metrics of a step; looking up one that it does not have gives the number that replaces NaN."""

    def __init__(self, step: _AskedStep, values: dict[str, float]) -> None:
        super().__init__(values)
        self._step = step

    def __missing__(self, name: str) -> float:
        return self._step.replacement()
