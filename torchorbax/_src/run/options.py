"""Every option of a run, parsed and checked once."""

from __future__ import annotations

import datetime
import operator
from typing import Any

from torchorbax.errors import ConfigError
from torchorbax.policies import (
    ContinuousPolicy,
    FixedIntervalPolicy,
    LatestN,
    NeverPolicy,
    PreservationPolicy,
    PreserveAll,
    SaveDecisionPolicy,
    TimeIntervalPolicy,
)


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
