"""How an exception reaches other processes: as JSON, from which they build the exception that they raise.

Errors about the run itself (a damaged step, a failed save, another owner, missing processes) are raised with the same
type and content in all processes. For any other exception, the other processes raise a `ProcessError` with its text and
the number of the process that raised it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchorbax.errors import CorruptCheckpointError, OwnershipError, ProcessError, SaveError

Failure = dict[str, Any]
"""JSON: `error` is the text; `kind`, if not None, an error that all processes raise, and `about` its arguments."""


def described(error: Exception) -> Failure:
    """An exception as JSON."""
    failure: Failure = {"error": f"{type(error).__name__}: {error}", "kind": None}
    if isinstance(error, CorruptCheckpointError):
        about: Any = {"path": error.path, "reasons": list(error.reasons.items())}
        return failure | {"kind": "damage", "about": about}
    if isinstance(error, SaveError):
        cause = _process_error_behind(error)
        about = {"step": error.step, "path": error.path, "reason": error.reason, "committed": error.committed}
        return failure | {"kind": "save", "about": about, "cause": None if cause is None else described(cause)}
    if isinstance(error, OwnershipError):
        about = {"path": error.path, "reason": error.reason, "owner": error.owner}
        return failure | {"kind": "owner", "about": about}
    if isinstance(error, ProcessError):
        about = {"processes": error.processes, "phase": error.phase, "reason": error.reason}
        return failure | {"kind": "processes", "about": about}
    return failure


def _process_error_behind(error: BaseException | None) -> ProcessError | None:
    while error is not None and not isinstance(error, ProcessError):
        error = None if error.__cause__ is error else error.__cause__
    return error


def rebuilt(failure: Failure, process: int, phase: str) -> Exception:
    """The exception to raise in this process for one that another process has described."""
    match failure["kind"]:
        case "damage":
            return CorruptCheckpointError(failure["about"]["path"], dict(failure["about"]["reasons"]))
        case "save":
            error = SaveError(**failure["about"])
            error.__cause__ = None if failure["cause"] is None else rebuilt(failure["cause"], process, phase)
            return error
        case "owner":
            return OwnershipError(**failure["about"])
        case "processes":
            return ProcessError(**failure["about"])
    return ProcessError([process], phase, f"process {process}: {failure['error']}")


def combined(failures: Mapping[int, Failure], phase: str) -> Exception:
    """One exception for the failures of some processes, by process.

    It is a `CorruptCheckpointError` only if all of them have found damage.
    """
    other_errors = {process: failure["error"] for process, failure in failures.items() if failure["kind"] != "damage"}
    if other_errors:
        return ProcessError.of_failures(other_errors, phase)
    found: dict[int, list[str]] = {}
    for process, failure in failures.items():
        for step, reason in failure["about"]["reasons"]:
            found.setdefault(step, []).append(f"process {process} found: {reason}")
    path = next(iter(failures.values()))["about"]["path"]
    return CorruptCheckpointError(path, {step: "; ".join(reasons) for step, reasons in found.items()})
