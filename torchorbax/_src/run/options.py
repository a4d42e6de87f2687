"""The options that `resume` and `Checkpointer` share: their names, types, defaults, checks and documentation."""

from __future__ import annotations

import datetime
import difflib
import inspect
import math
import operator
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, TypeVar

from torchorbax import policies
from torchorbax._src.arrays.sharding_rules import ShardingRules, Shardings
from torchorbax._src.distributed.processes import Processes
from torchorbax._src.run.compile_cache import check_compile_cache
from torchorbax._src.save.read_back import VerifyAfterSave
from torchorbax._src.save.staging import Staging, check_staging
from torchorbax._src.storage.traffic import Traffic, traffic
from torchorbax.errors import ConfigError

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The keyword arguments that `resume` and `Checkpointer` have in common.

    Attributes:
        save: when `save` saves: `"continuous"` (as soon as the save before is committed), a number of steps, a
            `timedelta`, None (only when forced), or any policy from `torchorbax.policies`.
        keep: which steps stay: the number of newest ones, None (all), or any preservation policy. The newest step
            always stays.
        shardings: `(mesh, rules)`: a `jax.sharding.Mesh`, and the layout of every parameter and buffer on it. The rules
            are a mapping from name patterns (`*` and `?` as in file names; the first match counts; a name that matches
            none is replicated) to `PartitionSpec`, or a function `(name, shape) -> PartitionSpec`. None restores every
            tensor to where it is.
        staging: how a snapshot is taken. `"device"` copies on the devices without waiting. `"reference"` copies
            nothing, which is only right where nothing is donated. `"host"` copies to host memory before `save` returns.
            `"auto"` is `"device"`, except that it takes views of the memory of CPU devices.
        rng: save and restore the random number generators as well, as the item `rng`.
        verify: compare what is restored with the fingerprints made when it was saved, before anything live changes.
        verify_after_save: read a step again after its commit, on the background thread, and compare it with what was
            saved, before older steps go: `"first"` (the first step of a life, every tenth, and whenever older steps
            would go and none that has been read again would be left), True (every step), or False (none). A step that
            differs no longer counts, and is a SaveError.
        compression: `"zstd"`, or None. Trained weights hardly become smaller, and saving takes several times as long.
        max_host_bytes: bytes of host memory for arrays on their way to storage or back; at least 64 MiB.
        save_on_exception: save the last complete step when an exception leaves the `with` block. This takes a snapshot
            at every call of `save`, which costs the loop what a save costs it, and the memory of one snapshot.
        replicas: which devices write a shard that several of them hold. `"first"`: the first of them (over a mesh with
            an axis of slices, the one in the first slice). `"all"`: each of them writes an equal share.
        single_replica_restore: read what several processes hold only once, by the processes of the first replica, and
            send it to the others over the network between the devices.
        read_only: only restore. Nothing is written, locked or deleted; another program may be writing to the run.
        takeover: write to the run even if another program, which is alive, does. That program then writes and
            deletes nothing more there. It is not needed if the other program has ended, or has shown no sign of life
            for half a minute.
        storage_timeout_s: seconds for which requests to `gs://` are tried again before a save or a restore fails.
        barrier_timeout_s: seconds to wait for the other processes in one phase, before an error that names them.
        local: a fast folder on each host, such as `/dev/shm/run`, for saves that are more frequent than those under
            the path. Every process uses a folder of its own below it. A restore takes the newest step that is complete
            under the path, on all hosts, or on all hosts of one slice, which then send it to the other slices.
        local_save: as `save`, for `local`. Forced saves and those on SIGTERM go to the path.
        local_keep: as `keep`, for `local`.
        preemption_notice: asked every two seconds, on a thread of its own, if the machine is about to go away; True
            acts as SIGTERM does. `GceMaintenanceNotice()` asks the metadata server of Google Cloud. None for SIGTERM
            alone, for which `resume` listens.
        preemption_patience_s: seconds after SIGTERM, or after the notice, for which the loop may go on with its body.
            After them, the last complete step is saved from another thread if no step has begun to change the state.
        compile_cache: where JAX keeps what this process compiles, for its next life: a folder, True for `torchorbax` in
            the user's cache folder, or False. Whoever can write there can run code in this process. A compilation cache
            that is set up for JAX itself is left alone.

    Raises:
        ConfigError: a value that cannot work.
    """

    save: Literal["continuous"] | int | datetime.timedelta | policies.SaveDecisionPolicy | None = "continuous"
    keep: int | policies.PreservationPolicy | None = 3
    shardings: Shardings | None = None
    staging: Staging = "auto"
    rng: bool = True
    verify: bool = True
    verify_after_save: VerifyAfterSave = "first"
    compression: Literal["zstd"] | None = None
    max_host_bytes: int = 1 << 30
    save_on_exception: bool = False
    replicas: Literal["first", "all"] = "first"
    single_replica_restore: bool = False
    read_only: bool = False
    takeover: bool = False
    storage_timeout_s: float = 300.0
    barrier_timeout_s: float = 600.0
    local: str | os.PathLike[str] | None = None
    local_save: Literal["continuous"] | int | datetime.timedelta | policies.SaveDecisionPolicy | None = "continuous"
    local_keep: int | policies.PreservationPolicy | None = 2
    preemption_notice: Callable[[], bool] | None = None
    preemption_patience_s: float = 2.0
    compile_cache: bool | str | os.PathLike[str] = True

    def __post_init__(self) -> None:
        Processes(self.barrier_timeout_s, index=0, count=1)  # raises if the limit cannot work
        save_policy(self.save)
        preservation_policy(self.keep)
        save_policy(self.local_save)
        preservation_policy(self.local_keep)
        check_staging(self.staging)
        if self.verify_after_save not in ("first", True, False):
            raise ConfigError(f"verify_after_save must be 'first', True or False, not {self.verify_after_save!r}")
        rules_of(self)
        traffic_of(self)
        for name in ("read_only", "takeover"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if self.read_only and (self.takeover or self.local is not None):
            raise ConfigError("read_only=True writes nothing, so it has no use for takeover= or local=")
        if self.local is not None and "://" in os.fspath(self.local):
            raise ConfigError(f"local must be a folder on each host, not {os.fspath(self.local)}")
        if isinstance(self.preemption_notice, type) or not callable(self.preemption_notice or bool):
            raise ConfigError(
                f"preemption_notice must be a callable () -> bool or None, not {self.preemption_notice!r}"
            )
        patience_s = self.preemption_patience_s
        if isinstance(patience_s, bool) or not isinstance(patience_s, int | float) or not 0 <= patience_s < math.inf:
            raise ConfigError(f"preemption_patience_s must be a number of seconds, not {patience_s!r}")
        check_compile_cache(self.compile_cache)


class RunKeywords(TypedDict, total=False):
    """The same names and types for type checkers and editors, which cannot read them off a dataclass."""

    save: Literal["continuous"] | int | datetime.timedelta | policies.SaveDecisionPolicy | None
    keep: int | policies.PreservationPolicy | None
    shardings: Shardings | None
    staging: Staging
    rng: bool
    verify: bool
    verify_after_save: VerifyAfterSave
    compression: Literal["zstd"] | None
    max_host_bytes: int
    save_on_exception: bool
    replicas: Literal["first", "all"]
    single_replica_restore: bool
    read_only: bool
    takeover: bool
    storage_timeout_s: float
    barrier_timeout_s: float
    local: str | os.PathLike[str] | None
    local_save: Literal["continuous"] | int | datetime.timedelta | policies.SaveDecisionPolicy | None
    local_keep: int | policies.PreservationPolicy | None
    preemption_notice: Callable[[], bool] | None
    preemption_patience_s: float
    compile_cache: bool | str | os.PathLike[str]


def takes_run_options(function: F) -> F:
    """Show each option, with its type and default, in the signature of a function that takes `**options`."""
    signature = inspect.signature(function)
    own = [parameter for parameter in signature.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    shared = inspect.signature(RunOptions).parameters.values()
    function.__signature__ = signature.replace(parameters=[*own, *shared])  # type: ignore[attr-defined]
    return function


def run_options(function: Callable[..., object], keywords: RunKeywords) -> RunOptions:
    """The options that a function decorated with `takes_run_options` was called with.

    Raises:
        TypeError: the function has no such keyword. Names the most similar one.
        ConfigError: a value that cannot work.
    """
    known = inspect.signature(function).parameters
    for name in keywords:
        if name not in known:
            similar = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {similar[0]!r}?" if similar else f"it takes {', '.join(known)}"
            raise TypeError(f"{function.__name__}() got an unexpected keyword argument {name!r}; {hint}")
    return RunOptions(**keywords)


def rules_of(options: RunOptions) -> ShardingRules | None:
    """Where restored values go; None leaves them where the live tensors are."""
    return None if options.shardings is None else ShardingRules(options.shardings)


def traffic_of(options: RunOptions) -> Traffic:
    """How arrays travel between host memory and storage."""
    return traffic(
        options.compression,
        options.max_host_bytes,
        options.replicas,
        options.single_replica_restore,
        options.storage_timeout_s,
    )


def step_number(step: Any) -> int:
    """`step` as an int. Whatever can be an index is accepted, such as numpy's integers.

    Raises:
        ConfigError: it is not a step.
    """
    try:
        number = operator.index(step)
    except TypeError:
        raise ConfigError(f"a step is a whole number, not {step!r}") from None
    if number < 0:
        raise ConfigError(f"a step cannot be negative: {number}")
    return number


def check_save_arguments(state: object, metrics: object) -> None:
    """Raise ConfigError unless both are mappings, or None."""
    if not isinstance(state, Mapping | None) or not isinstance(metrics, Mapping | None):
        raise ConfigError("save takes state= and metrics= as mappings by name")


def save_policy(save: Any) -> policies.SaveDecisionPolicy:
    """The policy that `save=` stands for: `"continuous"`, a number of steps, a timedelta, None (never), or a policy
    itself.

    Raises:
        ConfigError: none of these.
    """
    if save == "continuous":
        return policies.ContinuousPolicy()
    if save is None:
        return policies.NeverPolicy()
    if isinstance(save, int) and not isinstance(save, bool) and save > 0:
        return policies.FixedIntervalPolicy(save)
    if isinstance(save, datetime.timedelta) and save > datetime.timedelta(0):
        return policies.TimeIntervalPolicy(save)
    if callable(getattr(save, "should_save", None)) and not isinstance(save, type):
        return save
    raise ConfigError(
        "save must be 'continuous', a positive number of steps, a positive timedelta, None or a save policy, "
        f"not {save!r}"
    )


def preservation_policy(keep: Any) -> policies.PreservationPolicy:
    """The policy that `keep=` stands for: the number of newest steps, None (all), or a policy itself.

    Raises:
        ConfigError: none of these.
    """
    if keep is None:
        return policies.PreserveAll()
    if isinstance(keep, int) and not isinstance(keep, bool) and keep > 0:
        return policies.LatestN(keep)
    if callable(getattr(keep, "should_preserve", None)) and not isinstance(keep, type):
        return keep
    raise ConfigError(f"keep must be a positive number of steps, None (all) or a preservation policy, not {keep!r}")
