"""Whether to save now, decided by process 0 for all.

A policy that knows the step alone says the same in every process, and is asked in each. Any other is asked in process
0, and the rest are told. A policy about time need not be asked after every step, so process 0 also says when it will be
asked next: about twice a second, or 16 steps later if they are faster. In between, nobody says anything to anybody, and
a step without a save costs no more than in one process. The same message says that SIGTERM has arrived in some process,
so all of them save the same step.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torchorbax._src.distributed.channel import Channel
from torchorbax._src.distributed.processes import Processes
from torchorbax._src.run.preemption import PreemptionNotice
from torchorbax.errors import ProcessError
from torchorbax.policies import (
    AnySavePolicy,
    ContinuousCheckpointingPolicy,
    ContinuousPolicy,
    FixedIntervalPolicy,
    InitialSavePolicy,
    NeverPolicy,
    PreemptionCheckpointingPolicy,
    SpecificStepsPolicy,
    TimeIntervalPolicy,
)

_LEASE_S = 0.5
"""How long the processes go on without hearing from process 0, about."""
_MOST_CALLS = 16
"""Steps may become slow at any time, and SIGTERM must not go unnoticed for many of them."""
_TIDY_ROUNDS = 256
"""After so many messages process 0 waits until all have read them, and deletes them."""
_PREEMPTED = "preempted"


class Decider:
    """Says at every call whether to save.

    Args:
        processes: all of them; each must call equally often.
        name: of what is decided, one for each policy.
        policy: the save policy, to know what it looks at.
        notice: of SIGTERM in this process.

    Attributes:
        preempted: SIGTERM has arrived, in some process, and all know.
    """

    def __init__(self, processes: Processes, name: str, policy: object, notice: PreemptionNotice) -> None:
        self._processes = processes
        self._channel = Channel(processes, name)
        self._notice = notice
        self._told = False
        self._preempted = False
        self._everywhere = knows_step_alone(policy)
        self._each_call = not self._everywhere and not knows_time_alone(policy)
        self._calls = 0
        self._next = 1
        self._lease = 1
        self._since = 0.0
        self._rounds = 0

    @property
    def preempted(self) -> bool:
        """In one process, what its notice says."""
        return self._preempted if self._processes.count > 1 else self._notice.received

    def due(self, ask: Callable[[], bool]) -> bool:
        """What the policy says, by `ask`, of this step.

        Raises:
            ProcessError: another process has left, or process 0 does not answer.
        """
        if self._processes.count == 1:
            return ask()
        self._calls += 1
        mine = self._everywhere and ask()
        if self._calls < self._next:
            return mine
        if self._notice.received and not self._told:
            self._processes.tell(_PREEMPTED)
            self._told = True
        due, self._next, self._preempted, left, reason = self._channel.first("decide", lambda: self._decision(ask))
        if left:
            raise ProcessError(left, "decide", reason)
        self._tidy()
        return mine or bool(due)

    def _decision(self, ask: Callable[[], bool]) -> tuple[bool, int, bool, tuple[int, ...], str]:
        """In process 0."""
        notes = self._processes.told()
        preempted = self._preempted or _PREEMPTED in notes
        due, next_call = not self._everywhere and ask(), self._calls + self._next_lease()
        try:
            self._processes.check_failures("decide", notes)
        except ProcessError as error:
            return False, next_call, preempted, error.processes, error.reason
        return due, next_call, preempted, (), ""

    def _next_lease(self) -> int:
        """How many calls make up `_LEASE_S`, by how long the last ones took. Grows slowly: a loop may run ahead of its
        devices at first."""
        now = time.monotonic()
        if self._each_call:
            return 1
        per_call_s = (now - self._since) / self._lease if self._since else _LEASE_S
        self._since = now
        self._lease = max(1, min(2 * self._lease, int(_LEASE_S / max(per_call_s, 1e-9)), _MOST_CALLS))
        return self._lease

    def _tidy(self) -> None:
        self._rounds += 1
        if self._rounds % _TIDY_ROUNDS == 0:
            try:
                self._channel.gather("decide", None)
            except ProcessError as error:  # in process 0, which says so where the others will look next
                answer = (False, self._calls, self._preempted, error.processes, error.reason)
                self._channel.first("decide", lambda: answer)
                raise


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
