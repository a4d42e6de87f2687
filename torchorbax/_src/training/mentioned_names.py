"""The names that code mentions, or may make of the strings in it."""

from __future__ import annotations

import dis
import functools
import re
import sysconfig
import types

LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


@functools.cache
def loaded(code: types.CodeType, *instructions: str) -> frozenset[str]:
    """The names that code, and the functions defined in it, use by these instructions."""
    names = {one.argval for one in dis.get_instructions(code) if one.opname in instructions}
    inner = (one for one in code.co_consts if isinstance(one, types.CodeType))
    return frozenset(names.union(*(loaded(one, *instructions) for one in inner)))


@functools.cache
def looks_up_names(code: types.CodeType) -> bool:
    """Does code read attributes by names that are strings?"""
    used = loaded(code, "LOAD_GLOBAL", "LOAD_DEREF") | loaded(code, "LOAD_ATTR", "LOAD_METHOD")
    return bool(used & {"getattr", "vars", "attrgetter", "__dict__"})


@functools.cache
def written_out(code: types.CodeType) -> frozenset[str]:
    """The strings that code writes out, those with dots split: what `getattr` and `attrgetter` may be asked for."""
    return frozenset(part for one in _strings(code) for part in one.split("."))


@functools.cache
def parts(code: types.CodeType) -> frozenset[str]:
    """The beginnings and ends of names that code may make of strings: `scale` in `f"scale{i}"`, `"scale%d" % i`."""
    if not _builds_strings(code):
        return frozenset()
    pieces = (part for one in _strings(code) for part in re.split(r"%\w|\{.*?\}|\.", one))
    return frozenset(part for part in pieces if re.fullmatch(r"\w+", part))


@functools.cache
def _strings(code: types.CodeType) -> frozenset[str]:
    """The strings in code, and in the functions defined in it."""
    found: set[str] = set()
    for one in code.co_consts:
        if isinstance(one, types.CodeType):
            found |= _strings(one)
        elif isinstance(one, str | tuple):
            found |= {part for part in (one if isinstance(one, tuple) else (one,)) if isinstance(part, str)}
    return frozenset(found)


@functools.cache
def _builds_strings(code: types.CodeType) -> bool:
    if {one.opname for one in dis.get_instructions(code)} & {"BUILD_STRING", "BINARY_OP", "FORMAT_VALUE"}:
        return True
    inner = (one for one in code.co_consts if isinstance(one, types.CodeType))
    return "format" in loaded(code, "LOAD_ATTR", "LOAD_METHOD") or any(map(_builds_strings, inner))


@functools.cache
def is_installed(code: types.CodeType) -> bool:
    """Is this the code of an installed library, whose globals are its own affair?"""
    return code.co_filename.startswith((*LIBRARIES, "<frozen"))
