"""What stands between a checkpoint and the live objects. Pure: reads metadata only."""

from __future__ import annotations

from collections.abc import Mapping

from torchorbax.errors import Problem
from torchorbax.manifest import LeafMeta


def compare_leaves(item: str, live: Mapping[str, LeafMeta], saved: Mapping[str, LeafMeta]) -> list[Problem]:
    """Every difference of names, shapes and dtypes."""
    problems = [Problem("missing", item, name, str(live[name])) for name in live if name not in saved]
    problems += [Problem("unexpected", item, name, "", str(saved[name])) for name in saved if name not in live]
    for name in live:
        if name not in saved:
            continue
        if live[name].shape != saved[name].shape:
            problems.append(Problem("shape", item, name, str(live[name].shape), str(saved[name].shape)))
        if live[name].dtype != saved[name].dtype and not widens(saved[name], live[name]):
            problems.append(Problem("dtype", item, name, live[name].dtype, saved[name].dtype))
    return problems


def widens(saved: LeafMeta, live: LeafMeta) -> bool:
    """Is this int64 on the host that was int32 on jax devices?

    The one conversion made without asking. It loses nothing, and undoes what torchax (and `place_`) did to BatchNorm's
    int64 counter while `jax_enable_x64` was off.
    """
    return (saved.dtype, live.dtype) == ("int32", "int64") and (saved.residence, live.residence) == ("jax", "host")


def compare_ties(item: str, live: Mapping[str, str], saved: Mapping[str, str]) -> list[Problem]:
    """Names that share one tensor on one side only.

    Args:
        item: the item's name.
        live: for every live name, the first name of its tensor.
        saved: the same of the checkpoint.
    """
    common = [name for name in live if name in saved]
    groups_live, groups_saved = _groups(common, live), _groups(common, saved)
    return [
        Problem("ties", item, name, _tied_with(name, groups_live[name]), _tied_with(name, groups_saved[name]))
        for name in common
        if groups_live[name] != groups_saved[name]
    ]


def _groups(names: list[str], first_of: Mapping[str, str]) -> dict[str, set[str]]:
    """For every name, all the names of its tensor."""
    by_first: dict[str, set[str]] = {}
    for name in names:
        by_first.setdefault(first_of[name], set()).add(name)
    return {name: by_first[first_of[name]] for name in names}


def _tied_with(name: str, group: set[str]) -> str:
    others = sorted(group - {name})
    return f"tied with {', '.join(others)}" if others else "not tied"
