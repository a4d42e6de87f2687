"""An exception on its way from one process to the others: as JSON, and as the exception that they raise.

Errors that say something about the run are the same everywhere: a damaged step, a failed save, processes that are
missing. Of any other exception the rest learn in which process it was raised, and its text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchorbax.errors import CorruptCheckpointError, ProcessError, SaveError

Failure = dict[str, Any]
"""JSON: `error`, the text, and `kind` with `about` for errors that are the same everywhere."""


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
        case "processes":
            return ProcessError(**failure["about"])
    return ProcessError([process], phase, f"process {process}: {failure['error']}")


def combined(failures: Mapping[int, Failure], phase: str) -> Exception:
    """The exception for what some processes have described, by process: damage if all of them have found damage."""
    others = {process: failure["error"] for process, failure in failures.items() if failure["kind"] != "damage"}
    if others:
        return ProcessError.of_failures(others, phase)
    found: dict[int, list[str]] = {}
    for process, failure in failures.items():
        for step, reason in failure["about"]["reasons"]:
            found.setdefault(step, []).append(f"process {process} found: {reason}")
    path = next(iter(failures.values()))["about"]["path"]
    return CorruptCheckpointError(path, {step: "; ".join(reasons) for step, reasons in found.items()})
