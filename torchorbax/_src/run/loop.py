"""The loop of `Checkpointer.steps`: its progress bar, a save after each body, its end by SIGTERM."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from tqdm.auto import tqdm

from torchorbax._src.run.step_metrics import ready
from torchorbax._src.run.tier import Tier
from torchorbax.policies import NeverPolicy

_logger = logging.getLogger(__name__)


class _ProgressBar(tqdm):  # type: ignore[misc]  # tqdm is untyped
    monitor_interval = 0  # no thread that outlives the run


class Run(Protocol):
    """What the loop uses of a `Checkpointer`."""

    next_step: int

    @property
    def preempted(self) -> bool:
        """Has SIGTERM arrived?"""

    def save(
        self,
        step: int,
        state: Mapping[str, Any] | None = None,
        *,
        metrics: Mapping[str, Any] | None = None,
        force: bool = False,
    ) -> bool:
        """Save a step if it is due."""

    def wait(self) -> None:
        """Wait for the save in flight."""


@dataclass
class StepInput:
    """What the caller has given for the step that is running.

    Attributes:
        metrics: its numbers so far, from `log` and `save`.
        state: the trees that `save` was called with.
        in_body: is the body of a loop over `steps` running? Then the input is kept until the body ends.
    """

    metrics: dict[str, Any] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)
    in_body: bool = False

    def clear(self) -> None:
        """Forget the input of this step: the next step has its own."""
        self.metrics, self.state = {}, {}


def run_steps(
    run: Run, given: StepInput, main: Tier, stop: int, *, progress: bool | None, save_last: bool
) -> Iterator[int]:
    """What `Checkpointer.steps` does."""
    save_last = save_last and not isinstance(main.policy, NeverPolicy)
    hidden = None if progress is None else not progress
    with _ProgressBar(total=stop, initial=min(run.next_step, stop), disable=hidden) as bar:
        for step in range(run.next_step, stop):
            # The body.
            given.clear()
            given.in_body = True
            try:
                yield step
            finally:
                given.in_body = False
            # The save of this step, unless the body has called `save` itself.
            metrics, state = given.metrics, given.state
            last = step == stop - 1 and save_last
            if run.next_step <= step:
                run.save(step, metrics=metrics, force=last)
            bar.update()
            bar.set_postfix(ready(metrics), refresh=False)
            # The last step is saved though it was not due, or the signal came after `save` had looked.
            if (last or run.preempted) and step not in main.steps.infos:
                run.save(step, state, metrics=metrics, force=True)
            # The end of the loop, if SIGTERM has arrived.
            if run.preempted:
                run.wait()
                _logger.warning("stopped by %s. %s", main.decider.reason, main.standing())
                return
    _warn_if_unsaved(main, run.next_step - 1)


def _warn_if_unsaved(main: Tier, last: int) -> None:
    """Say in the log that the last step of a finished loop was not due."""
    if main.newest < last and not isinstance(main.policy, NeverPolicy):
        _logger.warning(
            "%s: the last step, %d, was not due and is not saved; the newest saved is %s. To save it: "
            "run.save(%d, force=True)",
            main.storage.path,
            last,
            "none" if main.newest < 0 else main.newest,
            last,
        )
