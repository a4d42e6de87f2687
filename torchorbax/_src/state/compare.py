"""What stands between a checkpoint and the live objects, and what of it is asked for. Pure: reads metadata only."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import jax.numpy as jnp

from torchorbax._src.arrays.dtypes import BY_NAME
from torchorbax._src.format.manifest import LeafMeta
from torchorbax.errors import Problem

_SUGGESTIONS = 20
"""So many names per item get a suggestion: comparing thousands with thousands takes minutes."""


# -------------------------------------------------------------------------------------------------------- comparisons


def compare_leaves(
    item: str, live: Mapping[str, LeafMeta], saved: Mapping[str, LeafMeta], *, cast: bool = False
) -> list[Problem]:
    """Every difference of names, shapes and dtypes; with `cast`, dtypes only where no conversion makes sense."""
    problems = [Problem("missing", item, name, str(live[name])) for name in live if name not in saved]
    problems += [Problem("unexpected", item, name, "", str(saved[name])) for name in saved if name not in live]
    for name in live:
        if name not in saved:
            continue
        if live[name].shape != saved[name].shape:
            problems.append(Problem("shape", item, name, str(live[name].shape), str(saved[name].shape)))
        converts = same_integers(saved[name], live[name]) or (cast and castable(saved[name].dtype, live[name].dtype))
        if live[name].dtype != saved[name].dtype and not converts:
            problems.append(Problem("dtype", item, name, live[name].dtype, saved[name].dtype))
    return problems


def same_integers(saved: LeafMeta, live: LeafMeta) -> bool:
    """Is this int32 on jax devices on one side and int64 on the host on the other?

    The one conversion made without asking: what torchax and `place_` do to BatchNorm's int64 counter while
    `jax_enable_x64` is off, and back. It loses nothing; a value that does not fit is an error when it comes to it.
    """
    sides = {(saved.dtype, saved.residence), (live.dtype, live.residence)}
    return sides == {("int32", "jax"), ("int64", "host")}


def castable(saved: str, live: str) -> bool:
    """Does converting make sense? Within floating-point, complex and integer dtypes; integers must fit when it comes to
    it."""
    kinds = (jnp.floating, jnp.complexfloating, jnp.integer)
    return any(all(jnp.issubdtype(BY_NAME[name], kind) for name in (saved, live)) for kind in kinds)


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


# -------------------------------------------------------------------------------------------------------- suggestions


def with_suggestions(problems: Iterable[Problem]) -> list[Problem]:
    """The problems, with the nearest unexpected name of the same shape and dtype beside the first missing ones."""
    problems = list(problems)
    free: dict[tuple[str, str], list[str]] = {}
    for problem in problems:
        if problem.kind == "unexpected":
            free.setdefault((problem.item, problem.found), []).append(problem.name)
    left = {item: _SUGGESTIONS for item, _ in free}
    for index, problem in enumerate(problems):
        candidates = free.get((problem.item, problem.expected), [])
        if problem.kind == "missing" and candidates and left[problem.item]:
            left[problem.item] -= 1
            if nearest := _nearest(problem.name, candidates):
                candidates.remove(nearest)
                problems[index] = replace(problem, nearest=nearest)
    return problems


def _nearest(name: str, candidates: Collection[str]) -> str | None:
    for other in candidates:  # `module.fc.weight` and the like, whatever the length of the prefix
        if other.endswith(f".{name}") or name.endswith(f".{other}"):
            return other
    found = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
    return found[0] if found else None


def advice(problems: Collection[Problem]) -> str:
    """What to try."""
    kinds = {problem.kind for problem in problems}
    tries = []
    if renames := {problem.nearest: problem.name for problem in problems if problem.nearest}:
        shown = dict(list(renames.items())[:3])
        tries.append(f"if these were renamed, rename={shown}" + (" and so on" if len(renames) > len(shown) else ""))
    if any(
        problem.kind == "dtype"
        and {problem.expected, problem.found} <= BY_NAME.keys()
        and castable(problem.found, problem.expected)
        for problem in problems
    ):
        tries.append("cast=True converts the dtypes")
    if "shape" in kinds:
        tries.append("build the model with the sizes that it was saved with")
    if "ties" in kinds:
        tries.append("tie the weights as they were when it was saved")
    if "groups" in kinds:
        tries.append("build the optimizer with the param_groups that it was saved with")
    tries.append("strict=False restores what fits and lists the rest in `left_out`")
    return "To try: " + "; ".join(tries) + "."


def compare_values(item: str, live: Collection[str], stored: Collection[str]) -> list[Problem]:
    """Values that are no arrays, on one side only."""
    return [Problem("missing", item, name, "a value") for name in live if name not in stored] + [
        Problem("unexpected", item, name, "", "a value") for name in stored if name not in live
    ]
