"""Checkpointing for PyTorch models that run on TPU through torchax, on top of Orbax."""

from importlib.metadata import version as _version

from torchorbax import policies
from torchorbax.adapter import assign_, to_jax
from torchorbax.checkpointer import Checkpointer
from torchorbax.errors import (
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    DeletedArrayError,
    MismatchError,
    ProcessError,
    SaveError,
    StorageError,
    TorchorbaxError,
    UnsupportedLeafError,
)
from torchorbax.integrity import verify
from torchorbax.loading import load
from torchorbax.optimizers import OptaxOptimizer
from torchorbax.placement import place_
from torchorbax.resuming import resume
from torchorbax.starting import params
from torchorbax.training import train_step

__version__ = _version("torchorbax")

__all__ = [
    "CheckpointNotFoundError",
    "Checkpointer",
    "ConfigError",
    "CorruptCheckpointError",
    "DeletedArrayError",
    "MismatchError",
    "OptaxOptimizer",
    "ProcessError",
    "SaveError",
    "StorageError",
    "TorchorbaxError",
    "UnsupportedLeafError",
    "assign_",
    "load",
    "params",
    "place_",
    "policies",
    "resume",
    "to_jax",
    "train_step",
    "verify",
]
