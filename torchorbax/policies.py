"""When to save and what to keep: Orbax's policies under their own names, and what Orbax lacks.

A save policy has the method `should_save(step, previous_steps, *, context)`, a preservation policy
`should_preserve(checkpoints, *, context)`. Any object with that method is accepted as `save=` or `keep=`. The newest
step is kept whatever the preservation policy says, because a resumed run starts from it.

The answers are bools. If a save policy raises or answers anything else, that is a warning, and the step is saved if no
save is in flight; if a preservation policy does, all steps are kept. A step that lacks a metric that the policy asks
for, though it has others, ranks below all steps that have it, as one whose metric is NaN does.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as orbax_policies

__all__ = [
    "AnyPreservationPolicy",
    "AnySavePolicy",
    "BestN",
    "ContinuousCheckpointingPolicy",
    "ContinuousPolicy",
    "CustomSteps",
    "DecisionContext",
    "EveryNSeconds",
    "EveryNSteps",
    "EveryNStepsClosest",
    "FixedIntervalPolicy",
    "InitialSavePolicy",
    "LatestDuration",
    "LatestN",
    "NeverPolicy",
    "PolicyCheckpointInfo",
    "PreemptionCheckpointingPolicy",
    "PreservationContext",
    "PreservationPolicy",
    "PreserveAll",
    "SaveDecisionPolicy",
    "SpecificStepsPolicy",
    "TimeIntervalPolicy",
]


def __dir__() -> list[str]:
    """The public names, without what this module imports."""
    return [*__all__, *(name for name in globals() if name.startswith("__"))]


AnyPreservationPolicy = orbax_policies.AnyPreservationPolicy
AnySavePolicy = orbax_policies.AnySavePolicy
BestN = orbax_policies.BestN
ContinuousCheckpointingPolicy = orbax_policies.ContinuousCheckpointingPolicy
CustomSteps = orbax_policies.CustomSteps
DecisionContext: TypeAlias = orbax_policies.DecisionContext
EveryNSeconds = orbax_policies.EveryNSeconds
EveryNSteps = orbax_policies.EveryNSteps
EveryNStepsClosest = orbax_policies.EveryNStepsClosest
FixedIntervalPolicy = orbax_policies.FixedIntervalPolicy
InitialSavePolicy = orbax_policies.InitialSavePolicy
LatestDuration = orbax_policies.LatestDuration
LatestN = orbax_policies.LatestN
PolicyCheckpointInfo: TypeAlias = orbax_policies.PolicyCheckpointInfo
PreemptionCheckpointingPolicy = orbax_policies.PreemptionCheckpointingPolicy
PreservationContext: TypeAlias = orbax_policies.PreservationContext
PreservationPolicy: TypeAlias = orbax_policies.PreservationPolicy
SaveDecisionPolicy: TypeAlias = orbax_policies.SaveDecisionPolicy
SpecificStepsPolicy = orbax_policies.SpecificStepsPolicy


@dataclass(frozen=True)
class PreserveAll:
    """Keeps every step."""

    def should_preserve(
        self, checkpoints: Sequence[PolicyCheckpointInfo], *, context: PreservationContext
    ) -> list[bool]:
        return [True] * len(checkpoints)


@dataclass(frozen=True)
class ContinuousPolicy:
    """Saves whenever no save is in flight. The newest committed step is then at most two saves old.

    It decides as Orbax's `ContinuousCheckpointingPolicy` does, without a round trip through the coordination service.

    Attributes:
        minimum_interval: the shortest time from the start of a save to the start of the next.
    """

    minimum_interval: datetime.timedelta = datetime.timedelta(0)

    def should_save(
        self, step: PolicyCheckpointInfo, previous_steps: Sequence[PolicyCheckpointInfo], *, context: DecisionContext
    ) -> bool:
        if context.is_saving_in_progress:
            return False
        if not previous_steps or not self.minimum_interval:  # spares reading the time of a step from storage
            return True
        return bool(step.time - previous_steps[-1].time >= self.minimum_interval)


@dataclass(frozen=True)
class TimeIntervalPolicy:
    """Saves the first step, and then whenever `interval` has passed since the start of the save before.

    Attributes:
        interval: the shortest time from the start of a save to the start of the next.
    """

    interval: datetime.timedelta

    def should_save(
        self, step: PolicyCheckpointInfo, previous_steps: Sequence[PolicyCheckpointInfo], *, context: DecisionContext
    ) -> bool:
        return not previous_steps or step.time - previous_steps[-1].time >= self.interval


@dataclass(frozen=True)
class NeverPolicy:
    """Saves only when `save` is called with `force=True`, and on SIGTERM."""

    def should_save(
        self, step: PolicyCheckpointInfo, previous_steps: Sequence[PolicyCheckpointInfo], *, context: DecisionContext
    ) -> bool:
        return False


# What torchorbax itself needs of policies; not public.


def decision(answer: Any) -> bool:
    """What a policy has decided, from what its method has returned.

    Raises:
        TypeError: it is no bool. A policy that returns nothing, or steps instead of decisions, has not meant `False`.
    """
    is_array = getattr(answer, "dtype", None) == np.bool_ and answer.shape == ()
    if isinstance(answer, bool) or is_array:
        return bool(answer)
    raise TypeError(f"a policy must answer with True or False, not with {type(answer).__name__}")


def decision_context(*, saving: bool, preempted: bool) -> DecisionContext:
    """What a save policy can look at besides the steps: is a save in flight, and has SIGTERM arrived?"""
    return orbax_policies.DecisionContext(
        is_saving_in_progress=saving, reached_preemption=preempted, multiprocessing_options=_one_process()
    )


@functools.cache
def _one_process() -> ocp.options.MultiprocessingOptions:
    return ocp.options.MultiprocessingOptions()
