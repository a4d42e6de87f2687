"""The protocol of a storage: the place where the steps of a run are kept.

A storage holds steps; a step is a manifest and its arrays. It knows nothing of policies, live objects or the agreement
of processes. The frozen parameters of a run are kept apart, in its `bases`: a storage of the same kind, whose steps,
called bases, have numbers of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, MutableMapping
from typing import Any, Protocol

from jax.sharding import Sharding

from torchorbax._src.arrays.fingerprint import Sums
from torchorbax._src.arrays.leaves import Array
from torchorbax._src.format.manifest import FileDigest, Key, LeafMeta, Manifest
from torchorbax._src.format.per_process import HostItem

Folders = Mapping[str, str]
"""The folders of a step that is being written, by item, and that of its manifest. They are sent to other processes as
JSON, which write there too."""


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
        """The manifest of a step.

        Raises:
            CheckpointNotFoundError: there is no such step.
            CorruptCheckpointError: the step exists, but its manifest is missing or unreadable.
        """

    def as_seen_by(self, manifest: Manifest, process: int) -> tuple[Manifest, Mapping[str, HostItem]]:
        """A step from the point of view of one process: the manifest with that process's own state, and that state.

        Raises:
            CorruptCheckpointError: the file with the process's own state is damaged.
        """

    def read(
        self,
        step: int,
        leaves: Mapping[Key, LeafMeta],
        targets: Mapping[Key, Sharding | None],
        when_read: Callable[[Key, Any], object] | None = None,
    ) -> dict[Key, Any]:
        """Read leaves of a step. Leaves that a base holds are read from `bases`.

        Args:
            step: the number of the step.
            leaves: the descriptions in the manifest of at least the leaves that are read.
            targets: the leaves to read, each with the sharding to read it into, or None for a numpy array.
            when_read: called with each leaf that has elements as soon as it has been read, while others are still being
                read.

        Returns:
            A `jax.Array` or numpy array for each leaf; or a `FirstReplica`, which `arrays.broadcast` sends to the other
            replicas.

        Raises:
            CorruptCheckpointError: a leaf is missing, unreadable, or not what the manifest describes.
        """


class Storage(Source, Protocol):
    """Where the steps of a run are read and written."""

    @property
    def bases(self) -> Storage:
        """Where the run keeps its frozen parameters."""

    @property
    def epoch(self) -> int:
        """How many owners the run has had, this process included; 0 before `create`."""

    def create(self, *, takeover: bool = False) -> None:
        """Create the folder of the run, check that it can be written to, and become its owner.

        Args:
            takeover: also if another program is the owner, which then writes and deletes nothing more.

        Raises:
            ConfigError: it cannot be written to, or it holds other things than a run.
            OwnershipError: another program is the owner, and alive.
        """

    def release(self) -> None:
        """Let the run go, so that the next program need not wait. Nothing can be written afterwards."""

    def check_owned(self) -> None:
        """Raise OwnershipError if another program has taken the run over."""

    def is_own(self, step: int) -> bool:
        """Was the step saved by this run? False for what somebody else has put there, under whatever name."""

    def is_other_run(self, identity: str) -> bool:
        """Is an identity in a manifest that of another run? Nothing is written to find out."""

    def check_visible(self) -> None:
        """Raise ConfigError if this process cannot see what another process has made with `create`."""

    def identity(self) -> str:
        """A unique name of this run, the same whatever its path. It is made the first time that it is asked for."""

    def existing_steps(self) -> list[int]:
        """The committed steps in ascending order, at least one.

        Raises:
            CheckpointNotFoundError: there is no step.
        """

    def check_files(self, manifest: Manifest, *, digests: Collection[str]) -> None:
        """Compare the files of a step with its manifest. A step without a list of its files passes.

        Args:
            manifest: the manifest of the step.
            digests: the paths of those of its files of which not only the size is compared, but what is in them, too.
                On a local disk they are read.

        Raises:
            CorruptCheckpointError: a file is missing, or is not what was written.
        """

    def write(self, step: int, arrays: Mapping[Key, Array], fill: Callable[[Folders], Manifest]) -> Manifest:
        """Write a step and commit it. When it returns, the step is listed and survives a loss of power.

        Args:
            step: the number of the step.
            arrays: the arrays that `fill` will write. Only their descriptions are used, and no reference is kept.
            fill: writes the arrays into the folders with `write_arrays`, in this process and in others, and returns the
                manifest. When it returns, nothing but the manifest and the commit is missing.

        Returns:
            The manifest that `fill` has returned, with the digests of all files. Those that it has already are taken as
            they are.

        Raises:
            SaveError: the step could not be written; the reason is its `__cause__`. The step is not listed, and what
                was written of it is removed if possible.
        """

    def write_arrays(
        self, folders: Folders, arrays: MutableMapping[Key, Array], process: int, *, alone: bool
    ) -> dict[Key, Sums]:
        """Write one process's shards of the arrays of a step.

        Args:
            folders: the folders of the step.
            arrays: the arrays. Each is removed and its memory freed as soon as it is written.
            process: the number of the process. Process 0 writes small arrays and metadata.
            alone: is it the only process? Otherwise `write` has to merge what they have written.

        Returns:
            The sums, for the fingerprints, of the shards that were written.
        """

    def written_files(self, folders: Folders, process: int) -> dict[str, FileDigest]:
        """What another process than process 0 has written into the folders of a step, by path below the step.

        Empty where the storage tells process 0 the digests of all files.
        """

    def write_process_items(self, folders: Folders, items: Mapping[str, HostItem], process: int) -> str:
        """Write the file with one process's own state; returns its SHA-256, for the manifest."""

    def set_aside(self, step: int) -> None:
        """Rename a damaged step, so that its number is free again and it can still be repaired."""

    def has_set_aside(self) -> bool:
        """Is there a damaged step that `set_aside` has renamed?"""

    def delete(self, step: int) -> None:
        """Delete a step. It is never listed half deleted."""

    def unfinished(self) -> list[int]:
        """Steps that a save has begun and not finished, and whose writes may still arrive."""

    def remove_leftovers(self) -> None:
        """Delete what interrupted saves and deletions have left behind. Call it before the first save."""
