"""What stands between a checkpoint and the live objects, and what of it is asked for. Pure: reads metadata only."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import jax.numpy as jnp

from torchorbax.dtypes import BY_NAME
from torchorbax.errors import ConfigError, Problem
from torchorbax.manifest import LeafMeta

Rename = Mapping[str, str] | Callable[[str], str]

_SUGGESTIONS = 20
"""So many names per item get a suggestion: comparing thousands with thousands takes minutes."""


@dataclass
class Request:
    """What a caller asks of a restore.

    Attributes:
        only: patterns of what to restore, such as `model` or `model.encoder.*`; None for all.
        strict: is every difference an error?
        rename: from names in the checkpoint to live names; None leaves them.
        cast: convert between dtypes where they differ?
        optional: live names of module leaves that need not be in the checkpoint.
    """

    only: tuple[str, ...] | None = None
    strict: bool = True
    rename: Rename | None = None
    cast: bool = False
    optional: frozenset[str] = frozenset()
    _matched: set[str] = field(default_factory=set, init=False, repr=False)
    _renamed: set[str] = field(default_factory=set, init=False, repr=False)

    def selects(self, item: str, name: str = "") -> bool:
        """Is this leaf asked for? A pattern stands for all that lies below what it matches, too."""
        return self._any_matches(lambda pattern: _covers(pattern, f"{item}.{name}" if name else item))

    def concerns(self, item: str) -> bool:
        """Is this item, or something in it, asked for?"""
        return self._any_matches(lambda pattern: _covers(pattern, item)) or any(
            _covers(prefix, item) for pattern in self.only or () for prefix in _prefixes(pattern)
        )

    def _any_matches(self, covers: Callable[[str], bool]) -> bool:
        if self.only is None:
            return True
        found = [pattern for pattern in self.only if covers(pattern)]
        self._matched.update(found)
        return bool(found)

    def live_name(self, item: str, name: str) -> str:
        """The live name of what the checkpoint calls `name`.

        A mapping's entry stands for what lies below it, too: `{"backbone": "encoder"}` renames `backbone.weight`, and
        `{"module": ""}` takes a prefix away. Names may start with the item's.
        """
        if callable(self.rename):
            return self.rename(name)
        for old, new in (self.rename or {}).items():
            for start in ("", f"{item}.") if old.startswith(f"{item}.") else ("",):
                rest, since = _below(old, start + name), _below(new, start + name)
                if rest is None and since is None:
                    continue
                self._renamed.add(old)
                if since is None or (rest is not None and _below(old, new) is None):
                    return _join(new, rest or "").removeprefix(start)
                # else it has been saved since, under its new name
        return name

    def check_used(self) -> None:
        """Raise if a pattern or a new name has met nothing: it must be a slip of the pen.

        Raises:
            ConfigError: with the arguments concerned.
        """
        if unused := [pattern for pattern in self.only or () if pattern not in self._matched]:
            raise ConfigError(
                f"only={unused} matches nothing; a pattern is 'item' or 'item.name', with * and ?, such as 'model' or "
                "'model.encoder.*'"
            )
        if isinstance(self.rename, Mapping) and (left := [old for old in self.rename if old not in self._renamed]):
            raise ConfigError(f"rename: the checkpoint has nothing called {', '.join(map(repr, left))}")


def request(
    only: str | Iterable[str] | None = None, strict: bool = True, rename: Rename | None = None, cast: bool = False
) -> Request:
    """The request that the arguments of `restore` stand for.

    Raises:
        ConfigError: one of them is of another type.
    """
    patterns = None if only is None else (only,) if isinstance(only, str) else tuple(only)
    if patterns is not None and not (patterns and all(isinstance(one, str) and one for one in patterns)):
        raise ConfigError(f"only must be a pattern or several, such as 'model' or ['model.encoder.*'], not {only!r}")
    if rename is not None and not callable(rename) and not isinstance(rename, Mapping):
        raise ConfigError(f"rename must be a mapping {{old name: new name}} or a function, not {rename!r}")
    return Request(patterns, strict, rename, cast)


def _covers(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def _prefixes(pattern: str) -> list[str]:
    parts = pattern.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _below(prefix: str, name: str) -> str | None:
    """What is left of `name` below `prefix`; None if it is not below it."""
    if not prefix or name == prefix:
        return name if not prefix else ""
    return name[len(prefix) + 1 :] if name.startswith(f"{prefix}.") else None


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


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
