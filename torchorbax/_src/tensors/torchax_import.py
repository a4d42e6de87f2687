"""The only module that imports torchax. It makes torchax importable on torch releases on which it otherwise fails.

torchax 0.0.13 registers its lowerings under aten operators and overloads by name. Later torch releases have dropped
some of them (the named-dimension overloads in 2.13, `aten.qr` and `aten.cholesky` in 2.14), so that `import torchax`
raises AttributeError there. An operator that torch does not have can never be called: torchax only needs some key for
its registry. So while torchax is being imported, its own code gets a placeholder for every aten name that torch lacks.
Nothing is registered with torch, code outside torchax sees no difference, and nothing stays patched afterwards. All
this happens when this module is imported, so Python's import lock makes it happen once, whatever the number of threads.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch._ops

_SUBMODULES = ("torchax", "torchax.decompositions", "torchax.ops.jaten", "torchax.ops.jtorch", "torchax.ops.jc10d")


class _MissingOp:
    """A placeholder for an aten operator or overload that this torch release does not have.

    torchax uses it as a key of its registry, which nothing ever looks up.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, overload: str) -> _MissingOp:
        if overload.startswith("__"):
            raise AttributeError(overload)
        return _MissingOp(f"{self._name}.{overload}")

    def __repr__(self) -> str:
        return f"<aten operator missing in torch {torch.__version__}: {self._name}>"


def _or_missing(lookup: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    """`lookup`, except that torchax's own code gets a placeholder for an aten name that is missing."""

    def __getattr__(self: Any, key: str) -> Any:
        try:
            return lookup(self, key)
        except AttributeError:
            caller = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
            owner: str = self.name if isinstance(self, torch._ops._OpNamespace) else self._qualified_op_name
            if caller != "torchax" or key.startswith("__") or owner.partition("::")[0] != "aten":
                raise
            return _MissingOp(f"{owner}.{key}")

    return __getattr__


@contextlib.contextmanager
def _placeholders_for_missing_ops() -> Iterator[None]:
    patched: tuple[Any, ...] = (torch._ops._OpNamespace, torch._ops.OpOverloadPacket)
    originals = [cls.__getattr__ for cls in patched]
    for cls, original in zip(patched, originals, strict=True):
        cls.__getattr__ = _or_missing(original)
    try:
        yield
    finally:
        for cls, original in zip(patched, originals, strict=True):
            cls.__getattr__ = original


with _placeholders_for_missing_ops():
    for _name in _SUBMODULES:  # torchax itself imports some of them late, when the patch would be gone
        importlib.import_module(_name)

import torchax as torchax  # noqa: E402  # importable only now
from torchax.ops import mappings as mappings  # noqa: E402
from torchax.tensor import OperatorNotFound as OperatorNotFound  # noqa: E402
from torchax.tensor import Tensor as Tensor  # noqa: E402
from torchax.view import View as View  # noqa: E402
