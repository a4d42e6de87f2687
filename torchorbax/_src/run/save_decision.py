"""Whether to save now, decided by process 0 for all.

A policy that looks at the step number alone decides the same in every process, so each process asks it. Any other
policy is asked in process 0, which publishes the answer. A policy about time need not be asked after every step, so
process 0 also publishes when it will be asked next: after about half a second, but after 16 steps at the latest. Until
then the processes exchange no message, and a step without a save costs no more than in a single process. The same
message says that SIGTERM has arrived in some process, so that all of them save the same step.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

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
"""Seconds between two messages from process 0, roughly."""
_MOST_CALLS = 16
"""Steps between two messages, at most: steps may become slow at any time, and SIGTERM must be noticed soon."""
_ROUNDS_KEPT = 256
"""Messages after which process 0 waits until all processes have read them, and then deletes them."""
_PREEMPTED = "preempted"


class _Answer(NamedTuple):
    """What process 0 publishes. Its fields are JSON values.

    Attributes:
        due: this step is to be saved.
        next_call: the call of `due` at which process 0 publishes again.
        preempted: SIGTERM has arrived in some process.
        left: processes that have left the run.
        reason: why they have left.
    """

    due: bool
    next_call: int
    preempted: bool
    left: tuple[int, ...] = ()
    reason: str = ""


class Decider:
    """Says at every call whether to save.

    Args:
        processes: all processes of the run; each must call `due` equally often.
        name: the name of the decision in messages between the processes; each policy needs a name of its own.
        policy: the save policy. Only its type is used here; `due` is given the function that asks it.
        notice: says whether SIGTERM has arrived in this process.
    """

    def __init__(self, processes: Processes, name: str, policy: object, notice: PreemptionNotice) -> None:
        self._processes = processes
        self._channel = Channel(processes, name)
        self._notice = notice
        self._announced = False  # whether this process has told the others of its SIGTERM
        self._preempted = False
        self._asked_everywhere = looks_at_steps_only(policy)
        self._asked_at_each_call = not self._asked_everywhere and not looks_at_time_only(policy)
        # Process 0 publishes at the call `_next`. The lease is the number of calls from one message to the next.
        self._calls = 0
        self._next = 1
        self._lease = 1
        self._lease_began = 0.0
        self._rounds = 0

    @property
    def preempted(self) -> bool:
        """SIGTERM has arrived in some process, and all processes have learnt of it."""
        return self._preempted if self._processes.count > 1 else self._notice.received

    @property
    def is_asked_everywhere(self) -> bool:
        """Are there several processes, each of which asks the policy?"""
        return self._processes.count > 1 and self._asked_everywhere

    @property
    def watched(self) -> bool:
        """Is somebody waiting for SIGTERM in this process, so that a step that is not due may have to be saved?"""
        return self._notice.watched

    @property
    def reason(self) -> str:
        """What says, in this process or another, that the machine is about to go away."""
        return self._notice.reason

    def due(self, ask: Callable[[], bool]) -> bool:
        """Is this step to be saved?

        Args:
            ask: asks the policy about this step. It is not called in every process, nor at every step.

        Raises:
            ProcessError: another process has left, or process 0 does not answer.
        """
        if self._processes.count == 1:
            return ask()
        self._calls += 1
        mine = self._asked_everywhere and ask()
        if self._calls < self._next:
            return mine
        if self._notice.received and not self._announced:
            self._processes.tell(_PREEMPTED)
            self._announced = True
        answer = _Answer(*self._channel.first("decide", lambda: self._answer(ask)))
        self._next, self._preempted = answer.next_call, answer.preempted
        if answer.left:
            raise ProcessError(answer.left, "decide", answer.reason)
        self._delete_old_messages()
        return mine or bool(answer.due)

    def _answer(self, ask: Callable[[], bool]) -> _Answer:
        """Ask the policy, in process 0, and look whether SIGTERM has arrived or a process has left."""
        notes = self._processes.told()
        preempted = self._preempted or _PREEMPTED in notes
        due, next_call = not self._asked_everywhere and ask(), self._calls + self._next_lease()
        try:
            self._processes.check_failures("decide", notes)
        except ProcessError as error:
            return _Answer(False, next_call, preempted, error.processes, error.reason)
        return _Answer(due, next_call, preempted)

    def _next_lease(self) -> int:
        """The number of calls that take about `_LEASE_S`, estimated from the previous lease.

        It doubles at most, because the first calls may be fast only because the loop runs ahead of its devices.
        """
        now = time.monotonic()
        if self._asked_at_each_call:
            return 1
        per_call_s = (now - self._lease_began) / self._lease if self._lease_began else _LEASE_S
        self._lease_began = now
        self._lease = max(1, min(2 * self._lease, int(_LEASE_S / max(per_call_s, 1e-9)), _MOST_CALLS))
        return self._lease

    def _delete_old_messages(self) -> None:
        """Once in `_ROUNDS_KEPT` messages, wait until all processes have come here: then they have read them."""
        self._rounds += 1
        if self._rounds % _ROUNDS_KEPT == 0:
            try:
                self._channel.gather("decide", None)
            except ProcessError as error:  # raised in process 0, which publishes it as its next answer
                answer = _Answer(False, self._calls, self._preempted, error.processes, error.reason)
                self._channel.first("decide", lambda: answer)
                raise


_STEP_POLICIES = (FixedIntervalPolicy, NeverPolicy, SpecificStepsPolicy)
_TIME_POLICIES = (
    ContinuousCheckpointingPolicy,
    ContinuousPolicy,
    InitialSavePolicy,  # it looks at earlier saves, and not all processes learn at the same time that one has failed
    PreemptionCheckpointingPolicy,
    TimeIntervalPolicy,
)


def looks_at_steps_only(policy: object) -> bool:
    """Does the policy look at step numbers alone, so that every process comes to the same decision?"""
    return _consists_of(policy, _STEP_POLICIES)


def looks_at_time_only(policy: object) -> bool:
    """Does the policy look at the time and at earlier saves alone, so that it can be asked a few steps later?"""
    return _consists_of(policy, _TIME_POLICIES)


def _consists_of(policy: Any, kinds: tuple[type, ...]) -> bool:
    if type(policy) is AnySavePolicy:
        return all(_consists_of(part, kinds) for part in policy.policies)
    return type(policy) in kinds


@dataclass(frozen=True)
class ProposedStep:
    """The step that a save policy decides about."""

    step: int
    time: datetime.datetime
    metrics: dict[str, float] | None = None
