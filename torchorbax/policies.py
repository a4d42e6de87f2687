"""When to save and what to keep: Orbax's policies under their own names, and what Orbax lacks.

A save policy answers `should_save(step, previous_steps, *, context)`, a preservation policy
`should_preserve(checkpoints, *, context)`; any object that does is accepted as `save=` and `keep=`. Whatever a
preservation policy says, the newest step is kept: it is what a resumed run starts from.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as orbax_policies


def decision_context(*, saving: bool, preempted: bool) -> orbax_policies.DecisionContext:
    """What Orbax's save policies get to know besides the steps."""
    return orbax_policies.DecisionContext(
        is_saving_in_progress=saving, reached_preemption=preempted, multiprocessing_options=_one_process()
    )


@functools.cache
def _one_process() -> ocp.options.MultiprocessingOptions:
    return ocp.options.MultiprocessingOptions()


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
    """Saves whenever no save is in flight, so the newest committed step is at most two saves' durations old.

    The same decision as Orbax's `ContinuousCheckpointingPolicy`, without its round trip through the coordination
    service.

    Attributes:
        minimum_interval: the least time from the start of one save to the start of the next.
    """

    minimum_interval: datetime.timedelta = datetime.timedelta(0)

    def should_save(
        self, step: PolicyCheckpointInfo, previous_steps: Sequence[PolicyCheckpointInfo], *, context: DecisionContext
    ) -> bool:
        if context.is_saving_in_progress:
            return False
        if not previous_steps or not self.minimum_interval:  # the time of a step may have to be read from storage
            return True
        return bool(step.time - previous_steps[-1].time >= self.minimum_interval)


@dataclass(frozen=True)
class TimeIntervalPolicy:
    """Saves when at least `interval` has passed since the start of the previous save, and at the first step there
    is."""

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
