"""Refuses several processes of torch.distributed that JAX does not know of."""

from __future__ import annotations

import jax
import torch.distributed

from torchorbax.errors import ConfigError


def refuse_torch_processes() -> None:
    """Raise a `ConfigError` if torch.distributed runs several processes while each is a JAX program of its own.

    They would train apart and write their steps over each other's.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    processes = torch.distributed.get_world_size()
    if processes > 1 and jax.process_count() == 1:
        raise ConfigError(
            f"torch.distributed has {processes} processes, and JAX takes each of them for a program of its own. Start "
            "them with jax.distributed.initialize() and let a mesh over all devices do what DDP or FSDP did, or run "
            "one process"
        )
