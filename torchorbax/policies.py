"""When to save and what to keep: Orbax's policies under their own names, and what Orbax lacks.

A save policy answers `should_save(step, previous_steps, *, context)`, a preservation policy
`should_preserve(checkpoints, *, context)`; any object that does is accepted as `save=` and `keep=`. Whatever a
preservation policy says, the newest step is kept: it is what a resumed run starts from.
"""

from __future__ import annotations

import datetime
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torchorbax._orbax import orbax_policies
from torchorbax.errors import ConfigError

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


_STEP_POLICIES = (FixedIntervalPolicy, NeverPolicy, SpecificStepsPolicy)
_TIME_POLICIES = (
    ContinuousCheckpointingPolicy,
    ContinuousPolicy,
    InitialSavePolicy,  # which looks at the saves there were: when one fails, not all processes know at once
    PreemptionCheckpointingPolicy,
    TimeIntervalPolicy,
)


def knows_step_alone(policy: object) -> bool:
    """Does a save policy look at steps alone, so that every process comes to the same decision?"""
    return _consists_of(policy, _STEP_POLICIES)


def knows_time_alone(policy: object) -> bool:
    """Does a save policy look at the time and the saves there were, so that a few steps later will do as well?"""
    return _consists_of(policy, _TIME_POLICIES)


def _consists_of(policy: Any, kinds: tuple[type, ...]) -> bool:
    if type(policy) is AnySavePolicy:
        return all(_consists_of(part, kinds) for part in policy.policies)
    return type(policy) in kinds


@dataclass(frozen=True)
class Candidate:
    """The step that a save policy decides about."""

    step: int
    time: datetime.datetime
    metrics: dict[str, float] | None = None


def step_number(step: Any) -> int:
    """`step` as an int; anything that can be an index is taken, such as numpy's integers.

    Raises:
        ConfigError: it is no step.
    """
    try:
        number = operator.index(step)
    except TypeError:
        raise ConfigError(f"a step is a whole number, not {step!r}") from None
    if number < 0:
        raise ConfigError(f"a step cannot be negative: {number}")
    return number


def save_policy(save: Any) -> SaveDecisionPolicy:
    """The policy that `save=` stands for: `"continuous"`, a number of steps, a timedelta, None (never), or a policy
    itself.

    Raises:
        ConfigError: none of these.
    """
    if save == "continuous":
        return ContinuousPolicy()
    if save is None:
        return NeverPolicy()
    if isinstance(save, int) and not isinstance(save, bool) and save > 0:
        return FixedIntervalPolicy(save)
    if isinstance(save, datetime.timedelta) and save > datetime.timedelta(0):
        return TimeIntervalPolicy(save)
    if callable(getattr(save, "should_save", None)) and not isinstance(save, type):
        return save
    raise ConfigError(
        "save must be 'continuous', a positive number of steps, a positive timedelta, None or a save policy, "
        f"not {save!r}"
    )


def preservation_policy(keep: Any) -> PreservationPolicy:
    """The policy that `keep=` stands for: the number of newest steps, None (all), or a policy itself.

    Raises:
        ConfigError: none of these.
    """
    if keep is None:
        return PreserveAll()
    if isinstance(keep, int) and not isinstance(keep, bool) and keep > 0:
        return LatestN(keep)
    if callable(getattr(keep, "should_preserve", None)) and not isinstance(keep, type):
        return keep
    raise ConfigError(f"keep must be a positive number of steps, None (all) or a preservation policy, not {keep!r}")
