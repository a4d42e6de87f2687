"""Checkpointing for PyTorch models that run on TPU through torchax, on top of Orbax."""

from importlib.metadata import version as _version
from inspect import get_annotations as _get_annotations
from types import FunctionType as _FunctionType

from torchorbax import policies
from torchorbax._src.arrays.sharding_rules import Shardings
from torchorbax._src.restore.load import load
from torchorbax._src.restore.verify import verify
from torchorbax._src.run.checkpointer import Checkpointer
from torchorbax._src.run.init_from import Params, params
from torchorbax._src.run.maintenance import GceMaintenanceNotice
from torchorbax._src.run.options import RunOptions
from torchorbax._src.run.resume import resume
from torchorbax._src.run.timings import Timings
from torchorbax._src.save.save import SaveRecord
from torchorbax._src.save.staging import Staging
from torchorbax._src.state.request import Rename
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
    OwnershipError,
    Problem,
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
    "GceMaintenanceNotice",
    "MismatchError",
    "OptaxOptimizer",
    "OwnershipError",
    "Params",
    "Problem",
    "ProcessError",
    "Rename",
    "RunOptions",
    "SaveError",
    "SaveRecord",
    "Shardings",
    "Staging",
    "StorageError",
    "Timings",
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


def __dir__() -> list[str]:
    """The public names. Submodules, which imports leave here, are not listed."""
    return [*__all__, *(name for name in globals() if name.startswith("__"))]


def _show_as_ours() -> None:
    """Give classes and functions the module that users import them from: in help, errors and pickles.

    The room that a class is defined in may change; a pickle must not depend on it.
    """
    for name in __all__:
        value = globals()[name]
        if isinstance(value, type):
            # Annotations are looked up in the module that a class names, so they are evaluated before it changes.
            value.__annotations__ = _get_annotations(value, eval_str=True)
        if isinstance(value, type | _FunctionType):
            value.__module__ = __name__


_show_as_ours()
