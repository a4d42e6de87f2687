"""`resume`: a checkpointer around an existing loop."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from torchorbax.checkpointer import Checkpointer
from torchorbax.errors import ConfigError
from torchorbax.optimizers import Optimizer
from torchorbax.placement import meta_tensors, place_
from torchorbax.sharding import Shardings
from torchorbax.snapshot import Staging


def resume(
    model: torch.nn.Module,
    optimizer: Optimizer | None,
    path: str | os.PathLike[str],
    *,
    state: Mapping[str, Any] | None = None,
    save: Any = "continuous",
    keep: Any = 3,
    shardings: Shardings | None = None,
    staging: Staging = "auto",
    rng: bool = True,
    verify: bool = True,
    save_on_exception: bool = False,
) -> Checkpointer:
    """Restore the newest good step under `path` into live objects if there is one, and keep saving them there.

    With `shardings` the model and the optimizer's state are on jax devices afterwards, laid out by the rules, whether
    there was a checkpoint or not (see `place_`). Until `close`, SIGTERM saves the current step and ends `steps()`.

    Args:
        model: the module; on CPU, on meta (if there is a checkpoint) or on jax.
        optimizer: a `torch.optim` optimizer of its parameters, an `OptaxOptimizer`, or None.
        state: further objects to save and restore by name.
        path: see `Checkpointer`.
        save: see `Checkpointer`.
        keep: see `Checkpointer`.
        shardings: see `Checkpointer`.
        staging: see `Checkpointer`.
        rng: see `Checkpointer`.
        verify: see `Checkpointer`.
        save_on_exception: see `Checkpointer`.

    Returns:
        The run. `run.step` is the step restored, None if it starts fresh.

    Raises:
        ConfigError: as `Checkpointer`; also a model on meta without a checkpoint to give it values.
        MismatchError, CorruptCheckpointError: as `Checkpointer.restore`. The live objects are as they were.
    """
    further = dict(state or {})
    if taken := {"model", "optimizer"} & further.keys():
        raise ConfigError(f"state must not name {' or '.join(sorted(taken))}: resume takes them as arguments")
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
        save_on_exception=save_on_exception,
    )
    try:
        restored = run.restore()
        on_meta = meta_tensors(model)
        if on_meta and restored is None:
            raise ConfigError(
                f"{len(on_meta)} tensors of the model are on meta ({on_meta[0]}, ...) and {run.path} has no checkpoint "
                "to give them values; build the model on the CPU for the first start"
            )
        if on_meta:
            warnings.warn(
                f"still on meta after the restore, because buffers that are not persistent are in no checkpoint: "
                f"{', '.join(on_meta)}. Build them again before training.",
                stacklevel=2,
            )
        if shardings is not None:
            place_(model, optimizer, shardings, skip=on_meta)
        run.listen_for_preemption()
    except BaseException:
        run.close()
        raise
    return run
