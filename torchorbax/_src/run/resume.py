"""`resume`: opens a run and restores its newest step into live objects."""

from __future__ import annotations

import os
import warnings
from collections import ChainMap
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, Unpack

import torch

from torchorbax._src.run.checkpointer import Checkpointer, get_ready, listen_for_preemption, restore_from
from torchorbax._src.run.init_from import Params, check_init_from, starting_point
from torchorbax._src.run.options import RunKeywords, run_options, takes_run_options
from torchorbax._src.state.capture import check_movable
from torchorbax._src.state.registry import objects_in
from torchorbax._src.state.request import Rename, request
from torchorbax._src.tensors.optimizers import Optimizer
from torchorbax._src.tensors.placement import check_placeable, meta_tensors, place_, place_optimizer_
from torchorbax.errors import ConfigError


@takes_run_options
def resume(
    model: torch.nn.Module | Sequence[torch.nn.Module] | Mapping[str, torch.nn.Module],
    optimizer: Optimizer | Sequence[Optimizer] | Mapping[str, Optimizer] | None,
    path: str | os.PathLike[str],
    *,
    state: Mapping[str, Any] | None = None,
    init_from: str | os.PathLike[str] | Params | None = None,
    strict: bool = True,
    rename: Rename | None = None,
    cast: bool = False,
    **options: Unpack[RunKeywords],
) -> Checkpointer:
    """Restore the newest good step under `path` into live objects if there is one, and keep saving them there.

    Where the run starts: from a step under `path`; if there is none, from `init_from`; if that is None, fresh.

    With `shardings` the model and the optimizer's state are on jax devices afterwards, laid out by the rules, whether
    there was a checkpoint or not (see `place_`). Until `close`, SIGTERM saves the current step and ends `steps()`.

    Args:
        model: the module; on CPU, on meta (if there is a checkpoint) or on jax. Or a list or dict of modules.
        optimizer: a `torch.optim` optimizer of its parameters, an `OptaxOptimizer`, a list or dict of them, or None.
        path: the run's folder or `gs://` URI, see `Checkpointer`.
        state: further objects to save and restore, by name. Each save reads this very mapping, and a restore writes
            into it, unless it cannot be written to; then `run.state` alone has what is restored.
        init_from: the path of another run or of one of its steps, whose full state is taken, including the number of
            the step; or `torchorbax.params(path)` for its parameters and buffers only, from step 0.
        strict: see `Checkpointer.restore`.
        rename: see `Checkpointer.restore`. It may stay when later steps have the new names; a function must then leave
            those as they are.
        cast: see `Checkpointer.restore`.
        **options: the attributes of `RunOptions`, each as a keyword.

    Returns:
        The run. `run.step` is the step restored, None if it starts fresh or from parameters only; `run.left_out` is
        what did not fit, if `strict=False`.

    Raises:
        ConfigError: as `Checkpointer`; also `init_from` without a checkpoint, or a model on meta and nothing to give it
            values.
        MismatchError, CorruptCheckpointError: as `Checkpointer.restore`. The live objects are as they were.
        TypeError: an option that does not exist.
    """
    shardings = run_options(resume, options).shardings
    check_init_from(init_from)
    _check_rename(rename, cast, init_from)
    modules, optimizers = _modules(model), _optimizers(optimizer)
    objects = {"model": model} if optimizer is None else {"model": model, "optimizer": optimizer}
    # The user's own mapping comes first, so that what is written goes there.
    run = Checkpointer(path, ChainMap(_further(state), objects), **options)
    try:
        # Rules that cannot work must be found before a restore changes anything.
        if shardings is not None:
            check_movable(run._items)
            for module in modules:
                check_placeable(module, shardings)
        # Restore from this run, or else from another one.
        restored = run.restore(strict=strict, rename=rename, cast=cast)
        if restored is None and init_from is not None:
            restored = restore_from(run, *starting_point(init_from, model, request(None, strict, rename, cast)))
        _check_meta(modules, run, restored)
        # Place what has not been restored.
        if shardings is not None:
            with run._stopwatch.part("place_s"):
                for module in modules:
                    place_(module, None, shardings, skip=meta_tensors(module))
                for each in optimizers:
                    place_optimizer_(each)
        get_ready(run)
        listen_for_preemption(run)
    except BaseException:
        run.close()
        raise
    return run


def _check_rename(rename: Rename | None, cast: bool, init_from: object) -> None:
    """Raise ConfigError for a renaming that would be ignored, or applied again at the next start."""
    if isinstance(rename, Mapping) and (both := set(rename) & set(rename.values())):
        raise ConfigError(
            f"rename has {', '.join(map(repr, sorted(both)))} both as an old and as a new name, so resume would rename "
            "again at every start; do it once, with Checkpointer(...).restore(rename=...) and a save"
        )
    if isinstance(init_from, Params) and (rename is not None or cast):
        raise ConfigError("with init_from=params(...), rename and cast are arguments of params")


def _further(state: object) -> MutableMapping[str, Any]:
    """What was given as `state=`: that mapping itself, if it can be written to.

    Raises:
        ConfigError: it is not a mapping, or has a name that `resume` gives itself.
    """
    if not isinstance(state, Mapping | None):
        raise ConfigError(f"state must be a mapping from names to objects, not a {type(state).__name__}")
    further = state if isinstance(state, MutableMapping) else dict(state or {})
    if taken := {"model", "optimizer"} & further.keys():
        raise ConfigError(f"state must not name {' or '.join(sorted(taken))}: resume takes them as arguments")
    return further


def _modules(model: object) -> list[torch.nn.Module]:
    """The modules that `model=` consists of.

    Raises:
        ConfigError: there is none.
    """
    modules = [module for module in objects_in(model) if isinstance(module, torch.nn.Module)]
    if not modules:
        raise ConfigError(f"model must be a torch.nn.Module, or a list or dict of them, not a {type(model).__name__}")
    return modules


def _optimizers(optimizer: object) -> list[Optimizer]:
    """The optimizers that `optimizer=` consists of.

    Raises:
        ConfigError: something else is among them.
    """
    optimizers = [] if optimizer is None else list(objects_in(optimizer))
    for each in optimizers:
        if not isinstance(each, Optimizer):
            raise ConfigError(f"optimizer must be a torch.optim or optax optimizer, or some of them, not {each!r}")
    return optimizers


def _check_meta(modules: Sequence[torch.nn.Module], run: Checkpointer, restored: int | None) -> None:
    """Look for tensors that no checkpoint has given a value: an error in a fresh run, a warning after a restore.

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
