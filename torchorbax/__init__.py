"""Checkpointing for PyTorch models that run on TPU through torchax, on top of Orbax."""

from importlib.metadata import version as _version

from torchorbax import policies
from torchorbax._src.restore.load import load
from torchorbax._src.restore.verify import verify
from torchorbax._src.run.checkpointer import Checkpointer
from torchorbax._src.run.init_from import params
from torchorbax._src.run.resume import resume
from torchorbax._src.tensors.assign import assign_
from torchorbax._src.tensors.convert import to_jax
from torchorbax._src.tensors.optimizers import OptaxOptimizer
from torchorbax._src.tensors.placement import place_
from torchorbax._src.training.eval_step import EvalStep, eval_step
from torchorbax._src.training.train_step import TrainStep, train_step
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

__version__ = _version("torchorbax")

__all__ = [
    "CheckpointNotFoundError",
    "Checkpointer",
    "ConfigError",
    "CorruptCheckpointError",
    "DeletedArrayError",
    "EvalStep",
    "MismatchError",
    "OptaxOptimizer",
    "ProcessError",
    "SaveError",
    "StorageError",
    "TorchorbaxError",
    "TrainStep",
    "UnsupportedLeafError",
    "assign_",
    "eval_step",
    "load",
    "params",
    "place_",
    "policies",
    "resume",
    "to_jax",
    "train_step",
    "verify",
]
