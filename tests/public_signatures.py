"""Every public signature as text, so that a change of one is seen: `python -m tests.public_signatures write`.

A line for each function, class, method and property, and one for the attributes that a docstring promises. Of Orbax's
policies, whose signatures are Orbax's, only the names.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torchorbax

FILE = Path(__file__).with_suffix(".txt")


def text() -> str:
    """All of them."""
    return "".join(f"{line}\n" for module in (torchorbax, torchorbax.policies) for line in _module(module))


def _module(module: ModuleType) -> Iterator[str]:
    for name in sorted(module.__all__):
        value = getattr(module, name)
        if isinstance(value, ModuleType):
            yield f"{module.__name__}.{name}: module"
        elif not isinstance(value, type | FunctionType):
            yield f"{module.__name__}.{name}: type alias"
        elif value.__module__ != module.__name__:
            yield f"{module.__name__}.{name}: of Orbax"
        elif isinstance(value, type):
            yield from _class(f"{module.__name__}.{name}", value)
        else:
            yield f"{module.__name__}.{name}{_signature(value)}"


def _class(name: str, cls: type) -> Iterator[str]:
    bases = ", ".join(base.__name__ for base in cls.__bases__ if base is not object)
    yield f"class {name}{_signature(cls)}" + (f" of {bases}" if bases else "")
    if attributes := re.findall(r"^ {4}(\w+): ", inspect.cleandoc(cls.__doc__ or "").partition("Attributes:")[2], re.M):
        yield f"{name}: attributes {', '.join(attributes)}"
    for member, value in sorted(vars(cls).items()):
        if member.startswith("_") and member not in ("__call__", "__enter__", "__exit__"):
            continue
        if isinstance(value, property):
            yield f"{name}.{member} -> {value.fget.__annotations__['return']}"
        elif isinstance(value, FunctionType | classmethod | staticmethod):
            yield f"{name}.{member}{_signature(getattr(cls, member))}"


def _signature(value: Any) -> str:
    """As in the source: annotations unevaluated, so that it does not depend on versions."""
    if isinstance(value, type) and not isinstance(value.__init__, FunctionType):
        return "(*args)"  # an exception that takes what Exception takes
    parts, marked = [], False
    signature = inspect.signature(value)
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not marked:
            parts.append("*")
        marked |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        annotation = "" if parameter.annotation is parameter.empty else f": {_annotation(parameter.annotation)}"
        default = "" if parameter.default is parameter.empty else f" = {_default(parameter.default)}"
        parts.append(f"{stars}{parameter.name}{annotation}{default}")
    returns = signature.return_annotation
    shown = "" if returns is signature.empty or isinstance(value, type) else f" -> {_annotation(returns)}"
    whole = f"({', '.join(parts)}){shown}"
    return whole if len(whole) <= 80 else "(\n" + "".join(f"    {part},\n" for part in parts) + f"){shown}"


def _annotation(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _default(default: object) -> str:
    return "a factory" if "factory" in repr(default) else repr(default)


if __name__ == "__main__":
    if sys.argv[1:] == ["write"]:
        FILE.write_text(text())
    else:
        print(text(), end="")
