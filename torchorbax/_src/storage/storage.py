"""What the rest of torchorbax asks of the place where a run is kept.

A storage knows nothing of processes, policies or live objects. It holds steps; a step is a manifest and its arrays.
The frozen parameters of a run are kept apart, in `bases`: a storage of the same kind, whose steps have numbers of their
own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, Protocol

from jax.sharding import Sharding

from torchorbax._src.arrays.fingerprint import Sums
from torchorbax._src.arrays.leaves import Array
from torchorbax._src.format.manifest import Key, LeafMeta, Manifest
from torchorbax._src.format.per_process import HostItem

Folders = Mapping[str, str]
"""Where the items of a step that is being written lie, and its manifest. JSON: other processes write there, too."""


class Source(Protocol):
    """Where steps are read from."""

    @property
    def path(self) -> str:
        """The absolute path or URI, for messages."""

    @property
    def bases(self) -> Source:
        """Where the run's frozen parameters are read from."""

    def steps(self) -> list[int]:
        """The committed steps in ascending order."""

    def manifest(self, step: int) -> Manifest:
        """What a step says about itself.

        Raises:
            CheckpointNotFoundError: there is no such step.
            CorruptCheckpointError: there is, but its manifest is missing or unreadable.
        """

    def as_seen_by(self, manifest: Manifest, process: int) -> tuple[Manifest, Mapping[str, HostItem]]:
        """A step as a process finds it, and what that process has of it for itself.

        Raises:
            CorruptCheckpointError: the process's own file is damaged.
        """

    def read(
        self,
        step: int,
        leaves: Mapping[Key, LeafMeta],
        targets: Mapping[Key, Sharding | None],
        when_read: Callable[[Key, Any], object] | None = None,
    ) -> dict[Key, Any]:
        """Read leaves of a step. Those of a base are read from `bases`.

        Args:
            step: which.
            leaves: what the manifest says of at least those that are read.
            targets: the sharding to read each of them into, or None for a numpy array.
            when_read: called with each leaf that has data as soon as it is there, while others are still being read.

        Returns:
            `jax.Array`s, numpy arrays, and `FirstReplica`s of what is to be sent on to other devices.

        Raises:
            CorruptCheckpointError: something is missing, unreadable, or not what the manifest says.
        """


class Storage(Source, Protocol):
    """Where a run is kept."""

    @property
    def bases(self) -> Storage:
        """Where the run keeps its frozen parameters."""

    def create(self) -> None:
        """Make the place and see that it can be written to.

        Raises:
            ConfigError: it cannot, or it holds something that is no run.
        """

    def check_visible(self) -> None:
        """Raise ConfigError if what another process has made with `create` cannot be seen in this one."""

    def identity(self) -> str:
        """What tells this run from any other, whatever its path. It is made when it is first asked for."""

    def existing_steps(self) -> list[int]:
        """The committed steps, of which there must be some.

        Raises:
            CheckpointNotFoundError: there is none.
        """

    def write(self, step: int, arrays: Mapping[Key, Array], fill: Callable[[Folders], Manifest]) -> Manifest:
        """Write a step and commit it. When it returns, the step is listed and survives a loss of power.

        Args:
            step: its number.
            arrays: what is going to be in it. They are described here, and not kept.
            fill: writes the arrays into the folders, with `write_arrays`, in this process and others. It returns what
                the step says about itself. When it returns, the step is complete but for its commit.

        Returns:
            What `fill` has returned.

        Raises:
            SaveError: anything that went wrong, as `__cause__`. The step is not listed, and what was written of it is
                removed if it can be.
        """

    def write_arrays(self, folders: Folders, arrays: MutableMapping[Key, Array], process: int) -> dict[Key, Sums]:
        """Write what one process has of the arrays of a step.

        Args:
            folders: where to.
            arrays: each is taken out, and let go as soon as it is written.
            process: the number of the process. Process 0 writes small arrays and what describes the arrays.

        Returns:
            The sums that make up the fingerprints, of the parts that were written.
        """

    def write_process_items(self, folders: Folders, items: Mapping[str, HostItem], process: int) -> str:
        """Write what one process has for itself; returns the SHA-256 that the manifest has of it."""

    def set_aside(self, step: int) -> None:
        """Rename a damaged step, so that another can take its place and nothing is lost that might be repaired."""

    def has_set_aside(self) -> bool:
        """Is there a damaged step that was renamed?"""

    def delete(self, step: int) -> None:
        """Delete a step, so that it is never listed half deleted."""

    def remove_leftovers(self) -> None:
        """Delete what interrupted saves and deletions have left behind. Call it before the first save."""
