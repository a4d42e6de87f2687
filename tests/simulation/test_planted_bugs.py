"""Each invariant is seen to fail: a mistake is put into the product, and the simulation finds it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
from torchorbax._src.distributed.channel import Channel
from torchorbax._src.save.writer import _StepWriting
from torchorbax._src.storage.gcs_files import GcsFiles
from torchorbax._src.storage.local_files import LocalFiles
from torchorbax._src.storage.orbax_storage import OrbaxStorage
from torchorbax._src.storage.ownership import Ownership

from tests.simulation.disk import SimulatedFiles
from tests.simulation.schedule import generated
from tests.simulation.world import simulate

MOST_SCHEDULES = 150


def commit_without_a_look_at_the_record() -> Any:
    real = OrbaxStorage._commit

    def commit(storage: OrbaxStorage, step: int, folder: str) -> None:
        storage.check_owned = lambda: None  # type: ignore[method-assign]
        try:
            real(storage, step, folder)
        finally:
            del storage.check_owned  # type: ignore[method-assign]

    return mock.patch.object(OrbaxStorage, "_commit", commit)


def never_look_at_the_record() -> Any:
    return mock.patch.object(Ownership, "check", lambda owner: None)


def announce_before_the_commit() -> Any:
    real = _StepWriting.commit

    def commit(writing: Any) -> Any:
        if writing._processes.is_first:
            writing._channel.publish("commit", {"failure": None, "value": {"metrics": {}, "nbytes": 0}})
            with mock.patch.object(writing._channel, "announcing", _announced(writing._channel)):
                return real(writing)
        return real(writing)

    return mock.patch.object(_StepWriting, "commit", commit)


def _announced(channel: Channel) -> Any:
    real = channel.announcing

    @contextmanager
    def announcing(phase: str) -> Iterator[Callable[[Any], None]]:
        if phase == "commit":
            yield lambda value: None
        else:
            with real(phase) as announce:
                yield announce

    return announcing


def delete_whatever_has_a_number() -> Any:
    return mock.patch.object(OrbaxStorage, "is_own", lambda storage, step: True)


def wait_for_ever() -> Any:
    def wait_for(channel: Any, key: str, process: int, phase: str, deadline: float) -> str:
        while (value := channel._get(key, phase, 60.0)) is None:
            pass
        return str(value)

    return mock.patch.object(Channel, "_wait_for", wait_for)


def delete_in_place() -> Any:
    return mock.patch.object(OrbaxStorage, "delete", lambda storage, step: storage.files.delete_folder(str(step)))


def delete_the_old_before_the_new_is_there() -> Any:
    real = OrbaxStorage.write

    def write(storage: OrbaxStorage, step: int, arrays: Any, fill: Any) -> Any:
        for older in storage.steps():
            if storage.is_own(older):
                storage.delete(older)
        return real(storage, step, arrays, fill)

    return mock.patch.object(OrbaxStorage, "write", write)


def write_the_marker_whether_or_not_the_manifest_is_there() -> Any:
    def copy(files: GcsFiles, folder: str, path: str, to: str) -> None:
        files.create(f"{folder}/{to}", b"committed")

    return mock.patch.object(GcsFiles, "copy", copy)


def take_any_file_for_the_manifest() -> Any:
    """A restore that does not compare: what has been read is another step's."""

    def digests(files: Any, folder: str, paths: Any) -> Any:
        return {path: (0, "00000000") for path in paths}

    return mock.patch.object(SimulatedFiles, "digests", digests)


PLANTED: dict[Callable[[], Any], str] = {
    commit_without_a_look_at_the_record: "although it could know that it has been ousted",
    never_look_at_the_record: "although it could know that it has been ousted",
    announce_before_the_commit: "two outcomes|was acknowledged",
    delete_whatever_has_a_number: "not the run's own",
    wait_for_ever: "wait for ever|waited",
    delete_in_place: "is listed, but",
    delete_the_old_before_the_new_is_there: "was acknowledged",
    write_the_marker_whether_or_not_the_manifest_is_there: "has no manifest",
    take_any_file_for_the_manifest: "is not what was written",
}
