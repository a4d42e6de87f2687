"""What a function reaches besides its arguments: found by walking its closure, globals and attributes.

A trace turns whatever it reads into a constant. So a compiled function has to know what its code can reach: tensors,
which become inputs and get their names for messages from here; and numbers, modules and functions, whose change means
that the function must be traced again.

The walk follows only names that the code mentions. A trainer's `self.loss` that reads `self.beta` is traced again when
`beta` changes, and not when the trainer counts its steps.
"""

from __future__ import annotations

import functools
import operator
import sys
import types
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sized
from typing import Any

import jax
import numpy as np
import torch

from torchorbax._src.training import mentioned_names

_NUMBERS = (bool, int, float, complex, str, bytes, type(None))
_LONGEST = 1000
"""Longer lists and dicts are data sets and vocabularies, not what a loss is computed with."""

_LARGEST_BYTES = 1 << 20
"""Larger numpy arrays are not compared at each call; see `Surroundings.large_arrays`."""

_FOREIGN = {"torch", "torchax", "jax", "jaxlib", "numpy", "optax", "flax", "orbax", "torchorbax"}
_OWN_USE = {"argparse", "types", "collections", "functools"}
"""Standard modules whose objects carry a program's own settings."""

_IMPLIED = {"__call__", "__enter__", "__getattr__", "__getitem__", "__iter__"}
"""Methods that code uses without mentioning their names."""


class _Slotted:
    """The attributes of an object whose class has `__slots__`, as `vars` gives those of others."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def __iter__(self) -> Iterator[str]:
        return (key for key in _slots(self.owner) if key in self)

    def __contains__(self, key: str) -> bool:
        return key in _slots(self.owner) and hasattr(self.owner, key)

    def get(self, key: str) -> Any:
        return getattr(self.owner, key, None)

    def __setitem__(self, key: str, value: Any) -> None:
        object.__setattr__(self.owner, key, value)  # a frozen dataclass gets back what it held


class _OfClass:
    """The attributes of a class itself."""

    def __init__(self, owner: type) -> None:
        self.owner = owner

    def get(self, key: str) -> Any:
        return vars(self.owner).get(key)


class Slot:
    """One place that holds a value: an entry of a dict, list or deque, an attribute, or a closure's variable."""

    def __init__(self, name: str, holder: Any, key: Any) -> None:
        self.name = name
        self.holder = holder
        self.key = key

    @property
    def place(self) -> tuple[int, Any]:
        """Tells it from all others."""
        return id(self.holder.owner if isinstance(self.holder, _Slotted | _OfClass) else self.holder), self.key

    @property
    def settable(self) -> bool:
        """Can another value be put in its place?"""
        return not isinstance(self.holder, types.MappingProxyType | _OfClass)

    def get(self) -> Any:
        """The value, or None if there is none any more."""
        if isinstance(self.holder, types.CellType):
            try:
                return self.holder.cell_contents
            except ValueError:  # a variable that is not set
                return None
        if isinstance(self.holder, list | deque):
            return self.holder[self.key] if self.key < len(self.holder) else None
        return self.holder.get(self.key)

    def set(self, value: Any) -> None:
        """Put another value in its place."""
        if isinstance(self.holder, types.CellType):
            self.holder.cell_contents = value
        else:
            self.holder[self.key] = value


class Surroundings:
    """What `roots` reach at the moment.

    Args:
        roots: functions, modules and other objects by the name that messages give them; "" for a root whose parts go by
            their own names.
        ignored: the places of slots to leave out: those that traced code itself changes.

    Attributes:
        slots: where the values that were found are held, `jax.Array`s aside.
        arrays: where `jax.Array`s are held, alone or in tuples.
        modules: the modules among them, by name.
        names: the names of tensors, by id.
        large_arrays: the names of numpy arrays too large to be compared at each call; of these, only that another array
            has taken their place is noticed.
    """

    def __init__(self, roots: Mapping[str, Any], ignored: Collection[tuple[int, Any]] = ()) -> None:
        self.slots: list[Slot] = []
        self.arrays: list[Slot] = []
        self.modules: dict[str, torch.nn.Module] = {}
        self.names: dict[int, str] = {}
        self.large_arrays: list[str] = []
        self._numpy: list[tuple[str, np.ndarray, np.ndarray]] = []
        self._sets: list[tuple[str, set[Any], frozenset[Any]]] = []
        self._sized: list[Sized] = []
        self._seen: dict[int, Any] = {}
        self._objects: list[tuple[str, Any, set[str]]] = []
        self._ignored = ignored
        self._attributes = {"forward", "training", *_IMPLIED}
        self._parts_of_names: set[str] = set()
        self._strings: set[str] = set()
        self._computes_names = False
        self._of_classes: set[tuple[type, str]] = set()
        self._analysed: set[int] = set()
        for name, root in roots.items():
            self._visit(name, root)
        self._follow_attributes()
        self._getters = [_getter(slot) for slot in self.slots]
        self._values = self._read()
        self._sizes = list(map(len, self._sized))

    def unchanged(self) -> bool:
        """Does every slot hold the very object that it held?"""
        return all(map(operator.is_, self._read(), self._values)) and self._same_contents()

    @functools.cached_property
    def token(self) -> tuple[Any, ...]:
        """Equal tokens mean that a trace would meet the same objects and numbers; hashable."""
        tokens = [value if isinstance(value, _NUMBERS) else id(value) for value in self._values]
        arrays = ((array.shape, array.tobytes()) for _, _, array in self._numpy)
        return (*tokens, *arrays, *(content for _, _, content in self._sets))

    def held(self) -> list[Any]:
        """The objects whose identities a token consists of."""
        return self._values

    @functools.cached_property
    def labels(self) -> list[str]:
        """What the parts of the token are, for messages."""
        contents = [name for name, _, _ in (*self._numpy, *self._sets)]
        return [*(slot.name for slot in self.slots), *contents]

    def changed(self) -> list[Slot]:
        """The slots that hold something else than they did."""
        return [slot for slot, old, new in zip(self.slots, self._values, self._read(), strict=True) if old is not new]

    def _read(self) -> list[Any]:
        return [get(key) for get, key in self._getters]

    def _same_contents(self) -> bool:
        same_sizes = all(map(operator.eq, map(len, self._sized), self._sizes))
        same_sets = all(live == copy for _, live, copy in self._sets)
        return (
            same_sizes
            and same_sets
            and all(np.array_equal(live, copy, equal_nan=False) for _, live, copy in self._numpy)
        )

    def _visit(self, name: str, value: Any) -> None:
        if isinstance(value, str):
            self._strings.add(value)
        if isinstance(value, _NUMBERS) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, torch.Tensor):
            self.names[id(value)] = name
        elif isinstance(value, torch.nn.Module):
            self._module(name, value)
        elif isinstance(value, np.ndarray):
            self._array(name, value)
        elif isinstance(value, types.FunctionType):
            self._function(name, value)
        elif isinstance(value, types.MethodType):
            self._visit("self", value.__self__)
            self._visit(name, value.__func__)
        elif isinstance(value, functools.partial):
            self._visit(name, value.func)
            self._entries(name, value.keywords)
            for index, one in enumerate(value.args):
                self._visit(f"{name}[{index}]", one)
        elif isinstance(value, dict | list | deque | tuple):
            self._entries(name, value)
        elif isinstance(value, set):
            self._set(name, value)
        elif _is_own(value):
            self._objects.append((name, value, set()))

    def _slot(self, name: str, holder: Any, key: Any) -> None:
        slot = Slot(name, holder, key)
        value = slot.get()
        if _is_library(value):
            return
        if _has_arrays(value):
            if slot.settable:
                self.arrays.append(slot)
            return
        if slot.place not in self._ignored:
            self.slots.append(slot)
        self._visit(name, value)

    def _entries(self, name: str, value: dict[Any, Any] | list[Any] | deque[Any] | tuple[Any, ...]) -> None:
        if len(value) > _LONGEST:
            return
        if isinstance(value, tuple):  # which nobody can change
            for index, one in enumerate(value):
                self._visit(f"{name}[{index}]", one)
            return
        self._sized.append(value)
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            self._slot(f"{name}[{key!r}]", value, key)

    def _set(self, name: str, value: set[Any]) -> None:
        if len(value) <= _LONGEST:
            self._sets.append((name, value, frozenset(value)))

    def _array(self, name: str, array: np.ndarray) -> None:
        if array.nbytes > _LARGEST_BYTES or array.dtype.hasobject:
            self.large_arrays.append(name)
        else:
            self._numpy.append((name, array, array.copy()))

    def _module(self, name: str, module: torch.nn.Module) -> None:
        self.modules[name] = module
        prefix = f"{name}." if name else ""
        for held in (module._parameters, module._buffers, module._modules):
            self._sized.append(held)
            for key in list(held):
                self._slot(f"{prefix}{key}", held, key)
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            self._entries(f"{prefix}forward hooks", hooks)
        self._objects.append((name, module, {"_parameters", "_buffers", "_modules"}))

    def _function(self, name: str, function: types.FunctionType) -> None:
        self._analyse(function)
        code = function.__code__
        for variable, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            self._slot(variable, cell, None)
        for index, one in enumerate(function.__defaults__ or ()):
            self._visit(f"{name}'s default {index}", one)
        if function.__kwdefaults__:
            self._entries(name, function.__kwdefaults__)
        if not mentioned_names.is_installed(code):
            for variable in mentioned_names.loaded(code, "LOAD_GLOBAL"):
                if variable in function.__globals__:
                    self._slot(variable, function.__globals__, variable)

    def _analyse(self, function: types.FunctionType) -> None:
        code = function.__code__
        if id(code) in self._analysed:
            return
        self._analysed.add(id(code))
        self._attributes |= mentioned_names.loaded(code, "LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR")
        if not mentioned_names.is_installed(code) and mentioned_names.looks_up_names(code):
            self._computes_names = True
            self._attributes |= mentioned_names.written_out(code)
            self._parts_of_names |= mentioned_names.parts(code)

    def _follow_attributes(self) -> None:
        """Visit what objects hold under names that code mentions, until no new name turns up."""
        before = -1
        while before != (before := len(self._attributes) + len(self._objects)):
            self._attributes |= self._strings if self._computes_names else set()
            for name, owner, done in list(self._objects):
                held = _attributes_of(owner)
                self._attributes |= {key for attributes in held for key in attributes if self._is_built(key)}
                for key in sorted(self._attributes - done):
                    done.add(key)
                    self._of_class(name, type(owner), key)
                    for function in _methods(type(owner), key):  # type: ignore[arg-type]  # mypy: types have no hash
                        self._method(name, function)
                    for attributes in held:
                        if key in attributes or (key == "forward" and isinstance(owner, torch.nn.Module)):
                            self._slot(f"{name}.{key}" if name else key, attributes, key)

    def _is_built(self, key: str) -> bool:
        """May code that makes names of strings mean this one, as `getattr(self, f"scale{i}")` means `scale0`?"""
        return any(key.startswith(part) or key.endswith(part) for part in self._parts_of_names)

    def _of_class(self, name: str, cls: type, key: str) -> None:
        """Watch what a class holds under a name, once for all its objects: another method may take its place."""
        owner = next((base for base in cls.__mro__ if key in vars(base)), None)
        if owner is None or (owner, key) in self._of_classes or owner in (object, torch.nn.Module):
            return
        self._of_classes.add((owner, key))
        if key == "forward" or _is_own(owner):
            slot = Slot(f"{cls.__qualname__}.{key}", _OfClass(owner), key)
            if slot.place not in self._ignored and not _has_arrays(slot.get()):
                self.slots.append(slot)
                self._visit(f"{name}.{key}" if name else key, slot.get())

    def _method(self, name: str, function: types.FunctionType) -> None:
        if mentioned_names.is_installed(function.__code__):
            self._analyse(function)
        else:
            self._visit(name, function)


def _getter(slot: Slot) -> tuple[Callable[[Any], Any], Any]:
    holder = slot.holder
    if isinstance(holder, types.CellType | list | deque):
        return (lambda _: slot.get()), None
    return holder.get, slot.key


def _attributes_of(owner: Any) -> tuple[Any, ...]:
    """Where an object holds its attributes: mappings by name."""
    return (
        *((vars(owner),) if hasattr(owner, "__dict__") else ()),
        *((_Slotted(owner),) if _slots(owner) else ()),
    )


def _slots(owner: Any) -> frozenset[str]:
    """The attributes that an object may hold in `__slots__`."""
    cls: Any = type(owner)
    return _slots_of_class(cls)


@functools.cache
def _slots_of_class(cls: type) -> frozenset[str]:
    found = (vars(base).get("__slots__", ()) for base in cls.__mro__)
    names = (one for slots in found for one in ((slots,) if isinstance(slots, str) else slots))
    return frozenset(names) - {"__dict__", "__weakref__"}


@functools.cache
def _methods(cls: type, name: str) -> tuple[types.FunctionType, ...]:
    """The functions that `name` may mean on an object of this class: a method, or a property's getter."""
    for base in cls.__mro__:
        if base in (object, torch.nn.Module):
            continue
        found = base.__dict__.get(name)
        if isinstance(found, property):
            found = found.fget
        elif isinstance(found, staticmethod | classmethod):
            found = found.__func__
        found = getattr(found, "__wrapped__", found)  # the decorated function
        if isinstance(found, types.FunctionType):
            return (found,)
    return ()


def _is_library(value: Any) -> bool:
    """Is this a module, class or function of a library? Nobody exchanges those."""
    if isinstance(value, types.BuiltinFunctionType):
        return True
    if isinstance(value, types.FunctionType):
        return mentioned_names.is_installed(value.__code__)
    if isinstance(value, type):
        return not _is_own(value)
    return isinstance(value, types.ModuleType) and not _is_own(value)


def _is_own(value: Any) -> bool:
    """Is this an object, a class or a module of the program itself, in whose attributes settings may lie?"""
    if not hasattr(value, "__dict__") and not _slots(value):
        return False
    if isinstance(value, torch.optim.Optimizer | torch.optim.lr_scheduler.LRScheduler):
        return True
    if isinstance(value, types.ModuleType):
        path = getattr(value, "__file__", None)
        return value.__name__ == "__main__" or (path is not None and not path.startswith(mentioned_names.LIBRARIES))
    owner = (value if isinstance(value, type) else type(value)).__module__.partition(".")[0]
    if owner in _FOREIGN:
        return False
    return owner in _OWN_USE or owner not in sys.stdlib_module_names


def _has_arrays(value: Any) -> bool:
    if isinstance(value, jax.Array):
        return True
    return isinstance(value, tuple) and any(isinstance(one, jax.Array) for one in jax.tree.leaves(value))
