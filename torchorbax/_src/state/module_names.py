"""What of a module is saved, and under which names: its own tensors and extra state, whatever hooks make of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from torchorbax._src.state.item import calling
from torchorbax._src.tensors import torchax_tensors
from torchorbax.errors import ConfigError

_EXTRA = "_extra_state"


def own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers under each of their names, in the order of `state_dict`."""
    for prefix, one in _modules(module):
        for name, tensor in (*one._parameters.items(), *one._buffers.items()):
            if tensor is not None and name not in one._non_persistent_buffers_set:
                yield prefix + name, tensor


def buffer_slots(module: nn.Module) -> dict[str, tuple[dict[str, torch.Tensor | None], str]]:
    """Where the persistent buffers are under each of their names, those that are None included: mapping and key."""
    return {
        prefix + name: (one._buffers, name)
        for prefix, one in _modules(module)
        for name in one._buffers
        if name not in one._non_persistent_buffers_set
    }


def extra_state_owners(module: nn.Module) -> dict[str, nn.Module]:
    """The modules that have extra state, by the name that it has in a `state_dict`."""
    default = nn.Module.get_extra_state
    return {prefix + _EXTRA: one for prefix, one in _modules(module) if type(one).get_extra_state is not default}


def saved_names(item: str, module: nn.Module) -> dict[str, str]:
    """The names in `state_dict` of own tensors that hooks or overrides give other names.

    Tensors that a pair of hooks puts in the place of own ones and back, such as the parts of a fused projection, are
    not saved: the own ones are.

    Raises:
        ConfigError: the `state_dict` has something that is made from no own tensor, so it could not be restored.
        NotReadyError: `state_dict` raises something.
    """
    if not any(_is_customized(one) for _, one in _modules(module)):
        return {}
    own = dict(own_tensors(module))
    with calling(item, f"state_dict of {type(module).__name__}"), _computing(own):
        entries: dict[str, Any] = module.state_dict(keep_vars=True)
    others: dict[int, list[str]] = {}
    for name, value in entries.items():
        if name not in own:
            others.setdefault(id(value), []).append(name)
    names = {name: others[id(one)].pop(0) for name, one in own.items() if name not in entries and others.get(id(one))}
    replaced = [name for name in own if name not in entries and name not in names]
    hooked = [prefix for prefix, one in _modules(module) if one._state_dict_hooks and one._load_state_dict_pre_hooks]
    ids = {id(tensor) for tensor in own.values()}
    extra = extra_state_owners(module)
    for name, value in entries.items():
        if id(value) in ids or name in extra:
            continue
        derived = any(name.startswith(prefix) and any(one.startswith(prefix) for one in replaced) for prefix in hooked)
        if not (isinstance(value, torch.Tensor) and (derived or _is_view(value, own))):
            raise ConfigError(
                f"{item}: {name} of its state_dict is neither a parameter nor a buffer, so it could not be restored; "
                "register it as a buffer, or give it out in get_extra_state and take it back in set_extra_state"
            )
    return names


def _modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, one in module.named_modules(remove_duplicate=False):
        yield (f"{name}." if name else ""), one


def _is_customized(module: nn.Module) -> bool:
    """Can its `state_dict` have other entries than its tensors and extra state?"""
    methods = ("state_dict", "_save_to_state_dict")
    overridden = any(getattr(type(module), method) is not getattr(nn.Module, method) for method in methods)
    return bool(overridden or module._state_dict_hooks)


@contextmanager
def _computing(tensors: dict[str, torch.Tensor]) -> Iterator[None]:
    """Where hooks may compute with these tensors."""
    if not any(map(torchax_tensors.is_torchax, tensors.values())):
        yield
        return
    env = torchax_tensors.torchax.default_env()
    enabled = env.enabled  # torchax's own exit turns this off even when an outer block had it on
    try:
        with env:
            yield
    finally:
        env.enabled = enabled


def _is_view(value: torch.Tensor, own: dict[str, torch.Tensor]) -> bool:
    """Does it share its memory with one of the own tensors?"""
    if torchax_tensors.is_torchax(value) or value.is_meta:
        return False
    memory = {one.untyped_storage().data_ptr() for one in own.values() if not torchax_tensors.is_torchax(one)}
    return value.untyped_storage().data_ptr() in memory - {0}
