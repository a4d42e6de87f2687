"""Only=, strict=, rename=, cast=."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TypeVar

from torchorbax.errors import ConfigError

Rename = Mapping[str, str] | Callable[[str], str]


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


T = TypeVar("T")


def selected(item: str, names: Mapping[str, T], request: Request) -> dict[str, T]:
    """What is stored under `names`, by live names, as far as it is asked for.

    Raises:
        ConfigError: `rename` gives two of them one name.
    """
    found: dict[str, T] = {}
    for name, value in names.items():
        live = request.live_name(item, name)
        if live in found:
            raise ConfigError(f"rename gives two leaves of {item} the name {live!r}, one of them {name!r}")
        if request.selects(item, live):
            found[live] = value
    return found
