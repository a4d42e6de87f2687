"""`resume`: a checkpointer around an existing loop."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from torchorbax._src.arrays.sharding_rules import Shardings
from torchorbax._src.run.checkpointer import Checkpointer
from torchorbax._src.run.init_from import Params, Path, check_init_from, origin
from torchorbax._src.save.staging import Staging
from torchorbax._src.state.registry import objects_in
from torchorbax._src.state.request import Rename, request
from torchorbax._src.tensors.optimizers import Optimizer
from torchorbax._src.tensors.placement import check_placeable, meta_tensors, place_, place_optimizer_
from torchorbax.errors import ConfigError

Model = torch.nn.Module | Sequence[torch.nn.Module] | Mapping[str, torch.nn.Module]
Optimizers = Optimizer | Sequence[Optimizer] | Mapping[str, Optimizer]


def resume(
    model: Model,
    optimizer: Optimizers | None,
    path: str | os.PathLike[str],
    *,
    state: Mapping[str, Any] | None = None,
    save: Any = "continuous",
    keep: Any = 3,
    shardings: Shardings | None = None,
    init_from: Path | Params | None = None,
    strict: bool = True,
    rename: Rename | None = None,
    cast: bool = False,
    staging: Staging = "auto",
    rng: bool = True,
    verify: bool = True,
    compression: Literal["zstd"] | None = None,
    max_host_bytes: int = 1 << 30,
    save_on_exception: bool = False,
    replicas: Literal["first", "all"] = "first",
    single_replica_restore: bool = False,
    storage_timeout_s: float = 300.0,
    barrier_timeout_s: float = 600.0,
    local: str | os.PathLike[str] | None = None,
    local_save: Any = "continuous",
    local_keep: Any = 2,
) -> Checkpointer:
    """Restore the newest good step under `path` into live objects if there is one, and keep saving them there.

    Where the run starts: a step under `path` wins; else `init_from`; else it starts fresh.

    With `shardings` the model and the optimizer's state are on jax devices afterwards, laid out by the rules, whether
    there was a checkpoint or not (see `place_`). Until `close`, SIGTERM saves the current step and ends `steps()`.

    Args:
        model: the module; on CPU, on meta (if there is a checkpoint) or on jax. Or a list or dict of modules.
        optimizer: a `torch.optim` optimizer of its parameters, an `OptaxOptimizer`, a list or dict of them, or None.
        state: further objects to save and restore by name.
        path: see `Checkpointer`.
        save: see `Checkpointer`.
        keep: see `Checkpointer`.
        shardings: see `Checkpointer`.
        init_from: the path of another run or of a step of it, whose full state is taken, the number of its step
            included; or `torchorbax.params(path)` for its parameters and buffers only, from step 0.
        strict: see `Checkpointer.restore`.
        rename: see `Checkpointer.restore`; may stay when later steps have the new names (a function must then leave
            those as they are).
        cast: see `Checkpointer.restore`.
        staging: see `Checkpointer`.
        rng: see `Checkpointer`.
        verify: see `Checkpointer`.
        compression: see `Checkpointer`.
        max_host_bytes: see `Checkpointer`.
        save_on_exception: see `Checkpointer`.
        replicas: see `Checkpointer`.
        single_replica_restore: see `Checkpointer`.
        storage_timeout_s: see `Checkpointer`.
        barrier_timeout_s: see `Checkpointer`.
        local: see `Checkpointer`.
        local_save: see `Checkpointer`.
        local_keep: see `Checkpointer`.

    Returns:
        The run. `run.step` is the step restored, None if it starts fresh or from parameters only; `run.left_out` is
        what did not fit, if `strict=False`.

    Raises:
        ConfigError: as `Checkpointer`; also `init_from` without a checkpoint, or a model on meta and nothing to give it
            values.
        MismatchError, CorruptCheckpointError: as `Checkpointer.restore`. The live objects are as they were.
    """
    check_init_from(init_from)
    if isinstance(rename, Mapping) and (both := set(rename) & set(rename.values())):
        raise ConfigError(
            f"rename takes and gives {', '.join(map(repr, sorted(both)))}, so resume would do it again at every start; "
            "do it once, with Checkpointer(...).restore(rename=...) and a save"
        )
    if isinstance(init_from, Params) and (rename is not None or cast):
        raise ConfigError("with init_from=params(...), rename and cast are arguments of params")
    if not isinstance(state, Mapping | None):
        raise ConfigError(f"state must be a mapping from names to objects, not a {type(state).__name__}")
    further = dict(state or {})
    if taken := {"model", "optimizer"} & further.keys():
        raise ConfigError(f"state must not name {' or '.join(sorted(taken))}: resume takes them as arguments")
    modules = [one for one in objects_in(model) if isinstance(one, torch.nn.Module)]
    if not modules:
        raise ConfigError(f"model must be a torch.nn.Module, or a list or dict of them, not a {type(model).__name__}")
    for one in () if optimizer is None else objects_in(optimizer):
        if not isinstance(one, Optimizer):
            raise ConfigError(f"optimizer must be a torch.optim or optax optimizer, or some of them, not {one!r}")
    objects = {"model": model} if optimizer is None else {"model": model, "optimizer": optimizer}
    run = Checkpointer(
        path,
        {**objects, **further},
        save=save,
        keep=keep,
        shardings=shardings,
        staging=staging,
        rng=rng,
        verify=verify,
        compression=compression,
        max_host_bytes=max_host_bytes,
        save_on_exception=save_on_exception,
        replicas=replicas,
        single_replica_restore=single_replica_restore,
        storage_timeout_s=storage_timeout_s,
        barrier_timeout_s=barrier_timeout_s,
        local=local,
        local_save=local_save,
        local_keep=local_keep,
    )
    try:
        if shardings is not None:
            for module in modules:
                check_placeable(module, shardings)
        restored = run.restore(strict=strict, rename=rename, cast=cast)
        if restored is None and init_from is not None:
            restored = run.start_from(*origin(init_from, model, request(None, strict, rename, cast)))
        _check_meta(modules, run, restored)
        if shardings is not None:
            for module in modules:
                place_(module, None, shardings, skip=meta_tensors(module))
            for one in () if optimizer is None else objects_in(optimizer):
                place_optimizer_(one)
        run.prepare()
        run.listen_for_preemption()
    except BaseException:
        run.close()
        raise
    return run


def _check_meta(modules: Sequence[torch.nn.Module], run: Checkpointer, restored: int | None) -> None:
    """What no checkpoint has given a value: an error before the first step, reported after a restore.

    Raises:
        ConfigError: nothing has been restored.
    """
    on_meta = [name for module in modules for name in meta_tensors(module)]
    if on_meta and restored is None:
        raise ConfigError(
            f"{len(on_meta)} tensors of the model are on meta ({on_meta[0]}, ...) and {run.path} has no checkpoint "
            "to give them values; build the model on the CPU for the first start"
        )
    if on_meta:
        warnings.warn(
            "still on meta after the restore, because buffers that are not persistent are in no checkpoint, nor is "
            f"what it left out: {', '.join(on_meta)}. Build them again before training.",
            stacklevel=3,
        )
