"""Every error that torchorbax raises on purpose.

```
TorchorbaxError
├── ConfigError              an argument, a path or a combination of objects that cannot work
├── CheckpointNotFoundError  no checkpoint where one was asked for
├── CorruptCheckpointError   a step is damaged, or none of the steps is good
├── MismatchError            the checkpoint and the live objects differ; `.problems` has every difference
├── UnsupportedLeafError     a value that a checkpoint cannot hold, or a device cannot
├── DeletedArrayError        a live tensor whose buffer was donated to a jitted function
├── OwnershipError           another program writes to the run, or has taken it over; `.owner` says who
├── ProcessError             other processes of the run have failed, left or are late; `.processes`, `.phase`
├── SaveError                a save failed; `.step` says which
└── StorageError             the storage does not answer or refuses; `.path`
```

Errors of Orbax, TensorStore and the file system arrive as one of these, with the original as `__cause__`.
"""

from __future__ import annotations

import copyreg
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

_LINES_PER_KIND = 5
_LONGEST_NAME = 200

ProblemKind = Literal["missing", "unexpected", "shape", "dtype", "ties", "groups", "placement"]


class TorchorbaxError(Exception):
    """Base of all errors of this package. They can be pickled, with their attributes and notes."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception would call `__init__` with the message alone, which is not what the subclasses take.
        return copyreg.__newobj__, (type(self),), {"args": self.args, **vars(self)}  # type: ignore[attr-defined]


class ConfigError(TorchorbaxError, ValueError):
    """An argument, a path or a combination of objects cannot work. Raised before anything is changed."""


class CheckpointNotFoundError(TorchorbaxError, FileNotFoundError):
    """There is no checkpoint at `path`, or no step `step`.

    Attributes:
        path: the run's folder or URI.
        step: the step asked for; None if any step was.
    """

    def __init__(self, path: str, step: int | None = None, available: Sequence[int] = (), hint: str = "") -> None:
        wanted = "no checkpoint" if step is None else f"no step {step}"
        listed = f"; steps there: {', '.join(map(str, available))}" if available else ""
        super().__init__(f"{path}: {wanted} found{listed}{hint}")
        self.path = path
        self.step = step


class CorruptCheckpointError(TorchorbaxError):
    """Steps that cannot be read back as they were saved: the step asked for, or all steps under a path.

    Attributes:
        path: the run's folder or URI.
        reasons: what is wrong with each step.
    """

    def __init__(self, path: str, reasons: Mapping[int, str]) -> None:
        lines = "".join(f"\n  step {step}: {reason}" for step, reason in sorted(reasons.items(), reverse=True))
        what = "a damaged step" if len(reasons) == 1 else f"{len(reasons)} damaged steps"
        super().__init__(
            f"{path}: {what}:{lines}\nNothing was changed. Restore the files from a copy, or start a new run elsewhere."
        )
        self.path = path
        self.reasons = dict(reasons)


@dataclass(frozen=True)
class Problem:
    """One difference between a checkpoint and the live objects.

    Attributes:
        kind: `missing` (live, not in the checkpoint), `unexpected` (in the checkpoint, not live), `shape`, `dtype`,
            `ties` (names share one tensor on one side only), `groups` (an optimizer's param_groups) or `placement` (the
            value cannot go where it should).
        item: the item, such as `model`; empty where there are no items (`assign_`).
        name: the leaf's name within the item; empty if the whole tree is a single leaf.
        expected: what the live object has.
        found: what the checkpoint has.
        nearest: for a missing leaf, the most similar name in the checkpoint that no live leaf has, if there is one.
    """

    kind: ProblemKind
    item: str
    name: str
    expected: str = ""
    found: str = ""
    nearest: str = ""

    def __str__(self) -> str:
        label = ": ".join(_printable(part) for part in (self.item, self.name) if part) or "the value"
        expected, found = _printable(self.expected), _printable(self.found)
        if self.kind == "missing":
            hint = f" (was it {_printable(self.nearest)}?)" if self.nearest else ""
            return f"{label}: expected {expected}, but it is missing{hint}"
        if self.kind == "unexpected":
            return f"{label}: found {found}, but there is no such live value"
        return f"{label}: {self.kind}: expected {expected}, found {found}"


def _printable(text: str) -> str:
    """`text` without control characters and of bounded length: it may come from a file that somebody else wrote."""
    shown = text if text.isprintable() else text.encode("unicode_escape").decode("ascii")
    return shown if len(shown) <= _LONGEST_NAME else f"{shown[:_LONGEST_NAME]}... ({len(text)} characters)"


class MismatchError(TorchorbaxError):
    """The checkpoint (or the arrays handed over) and the live objects differ. Nothing was changed.

    Attributes:
        problems: every difference found, not only the first.
    """

    def __init__(self, source: str, problems: Sequence[Problem], advice: str = "") -> None:
        counts, lines = summary(problems)
        super().__init__(
            f"{source} does not fit the live objects: {counts}\n{lines}\n" + f"Nothing was changed. {advice}".rstrip()
        )
        self.problems = tuple(problems)


def summary(problems: Sequence[Problem], more: str = ".problems") -> tuple[str, str]:
    """How many problems there are of each kind, and the first lines of each kind."""
    counts = Counter(problem.kind for problem in problems)
    lines: list[str] = []
    for kind, count in counts.items():
        of_kind = [problem for problem in problems if problem.kind == kind]
        lines += [f"  {problem}" for problem in of_kind[:_LINES_PER_KIND]]
        if count > _LINES_PER_KIND:
            lines.append(f"  ... and {count - _LINES_PER_KIND} more of kind {kind} (see {more})")
    return ", ".join(f"{count} {kind}" for kind, count in counts.items()), "\n".join(lines)


class UnsupportedLeafError(TorchorbaxError, TypeError):
    """A value that a checkpoint cannot hold bit for bit, or that its destination cannot.

    Attributes:
        name: the leaf's name.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name or 'the value'}: {reason}")
        self.name = name


class DeletedArrayError(TorchorbaxError, RuntimeError):
    """Live tensors whose buffers are gone, because they were donated to a jitted function.

    Attributes:
        names: all leaves concerned.
    """

    def __init__(self, names: Sequence[str]) -> None:
        shown = ", ".join(names[:_LINES_PER_KIND]) + (", ..." if len(names) > _LINES_PER_KIND else "")
        super().__init__(
            f"{len(names)} array(s) have been deleted, most likely donated to a jitted function: {shown}. "
            "Hand over what that function returned (run.save(step, {'model': weights, ...})), write it back with "
            "torchorbax.assign_, or let torchorbax.train_step run the step."
        )
        self.names = tuple(names)


class StorageError(TorchorbaxError, OSError):
    """The storage does not answer, or refuses, or something is lacking. This says nothing about the checkpoints there.

    Attributes:
        path: the run's folder or URI.
        reason: what the storage says.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: the storage does not answer or refuses: {reason}")
        self.path = path
        self.reason = reason


class OwnershipError(TorchorbaxError):
    """Another program writes to the run, or has taken it over from this one.

    Attributes:
        path: the run's folder or URI.
        reason: what is known about it, and what to do.
        owner: who does: its process, its host, and since when; empty if nobody does.
    """

    def __init__(self, path: str, reason: str, owner: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason
        self.owner = owner

    @classmethod
    def of_owner(cls, path: str, owner: str) -> OwnershipError:
        """The error for a run that another program, which is alive, writes to."""
        advice = (
            "end that program first; or, to make it stop writing, open the run with takeover=True; "
            "to look at its steps, open it with read_only=True"
        )
        return cls(path, f"{owner}, writes to this run; {advice}", owner)

    @classmethod
    def taken_over(cls, path: str, owner: str) -> OwnershipError:
        """The error for a run that another program has taken over."""
        reason = f"{owner}, has taken this run over; this process writes, commits and deletes nothing more there"
        return cls(path, reason, owner)


class ProcessError(TorchorbaxError, RuntimeError):
    """Other processes of the same run have failed, have left it, or did not reach a phase in time.

    Attributes:
        processes: their indices, in ascending order.
        phase: what all processes were to do together, such as `write`.
        reason: what is known about it.
    """

    def __init__(self, processes: Iterable[int], phase: str, reason: str) -> None:
        super().__init__(f"{phase}: {reason}")
        self.processes = tuple(sorted(processes))
        self.phase = phase
        self.reason = reason

    @classmethod
    def of_failures(cls, failures: Mapping[int, str], phase: str) -> ProcessError:
        """The error for processes that have failed, given why by process."""
        return cls(failures, phase, "; ".join(f"process {process}: {why}" for process, why in failures.items()))


class SaveError(TorchorbaxError):
    """A save failed. Older steps are untouched, and later saves are tried as usual.

    Attributes:
        step: the step concerned.
        path: the run's folder or URI.
        reason: why.
        committed: the step itself was saved; what failed comes after it (the preservation policy).
    """

    def __init__(self, step: int, path: str, reason: str, *, committed: bool = False) -> None:
        what = "was saved, but letting older steps go failed" if committed else "was not saved"
        super().__init__(f"{path}: step {step} {what}: {reason}")
        self.step = step
        self.path = path
        self.reason = reason
        self.committed = committed
