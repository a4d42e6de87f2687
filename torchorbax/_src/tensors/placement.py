"""Moves live tensors to jax devices, without losing ties, identity or optimizer references."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.sharding import Sharding, SingleDeviceSharding

from torchorbax._src.arrays.leaves import put
from torchorbax._src.arrays.sharding_rules import ShardingRules, Shardings, state_sharding
from torchorbax._src.tensors import torchax_tensors
from torchorbax._src.tensors.live import device_dtype, host_copy, live_array, live_dtype, raise_if_deleted, settle
from torchorbax._src.tensors.optimizers import OptaxOptimizer, Optimizer, state_tensors
from torchorbax.errors import ConfigError, UnsupportedLeafError


def place_(
    module: torch.nn.Module,
    optimizer: Optimizer | None = None,
    shardings: Shardings | None = None,
    *,
    skip: Collection[str] = (),
) -> None:
    """Move a module, and its optimizer's state, to jax devices in place.

    Every Parameter and buffer stays the object that it is, so tied weights stay tied and optimizers built before keep
    their references. CPU tensors are copied shard by shard; tensors on meta become zeros made on the devices, so no
    unsharded copy of them ever exists (as `to_empty`: restore or initialise them next); torchax tensors are resharded.
    Optimizer state with its parameter's shape takes the parameter's sharding, other state on jax is replicated.
    Gradients are dropped. If anything cannot be placed, nothing is moved.

    int64 becomes int32 while `jax_enable_x64` is off, as in torchax, if no value is lost (BatchNorm's counter is
    int64).

    Args:
        module: the module; on CPU, meta, jax or a mixture.
        optimizer: a `torch.optim` optimizer of its parameters, or an `OptaxOptimizer`.
        shardings: `(mesh, rules)`, see `ShardingRules`. None: what is on jax stays where it is, the
            rest goes to the default device.
        skip: names of tensors to leave alone.

    Raises:
        ConfigError: the rules do not fit, or torch cannot move a tensor in place.
        UnsupportedLeafError: a dtype that the devices cannot hold, such as float64 while `jax_enable_x64` is off.
        DeletedArrayError: tensors whose buffers were donated.
    """
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise ConfigError(
            f"optimizer must be a torch.optim or optax optimizer or None, not a {type(optimizer).__name__}"
        )
    rules = None if shardings is None else ShardingRules(shardings)
    tensors = {name: tensor for name, tensor in all_tensors(module) if name not in skip}
    raise_if_deleted({**tensors, **_optimizer_leaves(module, optimizer)})
    if rules is not None:
        rules.warn_of_unused([name for name, _ in all_tensors(module)])
    targets = target_shardings(tensors, rules)
    arrays = {name: _moved(name, tensor, targets[name]) for name, tensor in tensors.items()}
    with ExitStack() as undo:
        for name, tensor in tensors.items():
            undo.callback(setattr, tensor, "grad", tensor.grad if tensor.is_leaf else None)
            settle(tensor, arrays[name], undo)
            tensor.grad = None
        _place_optimizer(optimizer, undo)
        undo.pop_all()


def place_optimizer_(optimizer: Optimizer) -> None:
    """Move an optimizer's state to where its parameters are, which are on jax devices."""
    with ExitStack() as undo:
        _place_optimizer(optimizer, undo)
        undo.pop_all()


def check_placeable(module: torch.nn.Module, shardings: Shardings) -> None:
    """Check that the rules can place the buffers that no checkpoint has, because they are not persistent.

    Raises:
        ConfigError, UnsupportedLeafError: as `place_`.
    """
    persistent = {id(tensor) for tensor in module.state_dict(keep_vars=True).values()}
    rest = {name: one for name, one in all_tensors(module) if id(one) not in persistent and not one.is_meta}
    target_shardings(rest, ShardingRules(shardings))
    for name, tensor in rest.items():
        placed_dtype(name, tensor)


def all_tensors(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and buffer of a module once, by its first name; also buffers that are not persistent."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def meta_tensors(module: torch.nn.Module) -> list[str]:
    """The names of parameters and buffers that have no values."""
    return [name for name, tensor in all_tensors(module) if tensor.is_meta and not torchax_tensors.is_torchax(tensor)]


def target_shardings(
    tensors: Mapping[str, torch.Tensor], rules: ShardingRules | None, *, host: bool = False
) -> dict[str, Sharding | None]:
    """Where each tensor belongs; None for host memory.

    By the rules if there are some. Without: a torchax tensor where it is; a tensor on meta on the default device; a CPU
    tensor there as well, or, with `host`, in its own memory.

    Raises:
        ConfigError: the rules do not fit.
    """
    if rules is not None:
        return dict(rules.for_leaves({name: tuple(tensor.shape) for name, tensor in tensors.items()}))
    return {name: _current_sharding(tensor, host) for name, tensor in tensors.items()}


def _current_sharding(tensor: torch.Tensor, host: bool) -> Sharding | None:
    if torchax_tensors.is_torchax(tensor):
        return torchax_tensors.array_of(tensor).sharding
    return None if host and not tensor.is_meta else SingleDeviceSharding(jax.local_devices()[0])


def placed_dtype(name: str, tensor: torch.Tensor) -> np.dtype:
    """The dtype that a tensor has on jax devices.

    Raises:
        UnsupportedLeafError: it cannot be there without loss.
    """
    dtype = live_dtype(tensor)
    if dtype is None:
        raise UnsupportedLeafError(name, f"torch {tensor.dtype} cannot be kept bit for bit")
    return device_dtype(name, dtype, tensor if tensor.device.type == "cpu" else None)


def _moved(name: str, tensor: torch.Tensor, sharding: Sharding | None) -> jax.Array:
    dtype = placed_dtype(name, tensor)
    if tensor.is_meta and not torchax_tensors.is_torchax(tensor):
        return jnp.zeros(tuple(tensor.shape), dtype, device=sharding)
    held = live_array(name, tensor)
    if isinstance(held, jax.Array):
        return held if held.sharding == sharding else put(held, sharding)
    if isinstance(sharding, SingleDeviceSharding):
        sharding = None  # uncommitted, as `.to('jax')` leaves it: free to meet arrays on a mesh
    return put(host_copy(held).astype(dtype, copy=False), sharding)


def _optimizer_leaves(module: torch.nn.Module, optimizer: Optimizer | None) -> dict[str, Any]:
    if optimizer is None:
        return {}
    if isinstance(optimizer, OptaxOptimizer):
        names = [name for name, _ in optimizer.leaf_names(optimizer.state)]
        return dict(zip(names, jax.tree.leaves(optimizer.state), strict=True))
    owners = {id(param): name for name, param in module.named_parameters()}
    return {f"{owners.get(id(param), '?')}.{key}": tensor for key, param, tensor in state_tensors(optimizer)}


def _place_optimizer(optimizer: Optimizer | None, undo: ExitStack) -> None:
    if isinstance(optimizer, OptaxOptimizer):
        before = optimizer.state
        undo.callback(lambda: setattr(optimizer, "state", before))
        optimizer.place_state()
    elif optimizer is not None:
        for name, param, tensor in state_tensors(optimizer):
            if tensor.shape == param.shape or torchax_tensors.is_torchax(tensor):
                beside = torchax_tensors.array_of(param).sharding
                sharding = state_sharding(tuple(tensor.shape), beside, tuple(param.shape))
                settle(tensor, _moved(name, tensor, sharding), undo)
