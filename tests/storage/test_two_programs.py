"""Two programs on one path, on a local disk and under gs://: one writes, the other is told, and nothing is lost."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.gcs_client import Client
from tests.helpers.gcs_server import Server, environment

OPEN = """
    def opened():
        kept["run"] = torchorbax.Checkpointer(path, {"weights": live(0)}, save=None, rng=False, **options)
    result = attempt(opened)[:2]
"""
SAVE = """
    run = kept["run"]
    def save():
        run.state["weights"].update(live(step))
        run.save(step, force=True)
        run.wait()
    result = attempt(save)[:2]
"""
PAUSED_SAVE = """
    import threading
    from torchorbax._src.storage import array_writer

    reached, go, write = threading.Event(), threading.Event(), array_writer.write

    def paused(*arguments, **options):
        sums = write(*arguments, **options)
        reached.set()
        go.wait(100)
        array_writer.write = write
        return sums

    array_writer.write = paused
    run, kept["go"] = kept["run"], go
    run.state["weights"].update(live(step))
    run.save(step, force=True)
    reached.wait(100)
    result = None
"""
GO_ON = """
    kept["go"].set()
    result = attempt(kept["run"].wait)[:2]
"""
CLOSE = "kept['run'].close()"
LOOK = """
    first = next(iter(torchorbax.load(path, item="weights").values()))
    result = [torchorbax.verify(path), float(np.asarray(first).ravel()[0])]
"""
RESTORE = """
    with torchorbax.Checkpointer(path, {"weights": live(0)}, rng=False, read_only=True) as reader:
        result = [reader.restore(), attempt(lambda: reader.save(99, force=True))[1]]
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(buckets=["bucket"]) as server:
        yield server


@pytest.fixture(scope="module")
def one(server: Server) -> Iterator[Client]:
    with Client(environment(server.port, "one")) as client:
        yield client


@pytest.fixture(scope="module")
def other(server: Server) -> Iterator[Client]:
    with Client(environment(server.port, "other")) as client:
        yield client


@pytest.fixture(params=["local", "gs"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run") if request.param == "local" else f"gs://bucket/{tmp_path.name}/run"


def opened(client: Client, path: str, **options: Any) -> list[str]:
    found: list[str] = client.run(OPEN, path=path, options={"storage_timeout_s": 20, **options})
    return found


def saved(client: Client, path: str, step: int) -> list[str]:
    found: list[str] = client.run(SAVE, path=path, step=step)
    return found


def test_the_second_program_is_told_who_the_first_is(path: str, one: Client, other: Client) -> None:
    assert opened(one, path, keep=1) == ["", ""]
    kind, text = opened(other, path)
    assert kind == "OwnershipError"
    assert f"on {socket.gethostname()}, since 20" in text
    assert "takeover=True" in text
    assert saved(one, path, 0) == ["", ""]
    # A reader disturbs nobody, and is told that it cannot save.
    restored, refusal = other.run(RESTORE, path=path)
    assert restored == 0
    assert "was opened with read_only=True, so nothing can be saved there" in refusal
    assert saved(one, path, 1) == ["", ""]
    # Once the first has closed the run, the second comes in at once.
    one.run(CLOSE)
    assert opened(other, path) == ["", ""]
    assert saved(other, path, 2) == ["", ""]
    other.run(CLOSE)
    assert other.run("result = torchorbax.verify(path)", path=path) == [1, 2]


def test_whoever_is_taken_over_from_writes_and_deletes_nothing_more(path: str, one: Client, other: Client) -> None:
    opened(one, path, keep=1)
    saved(one, path, 0)
    assert opened(other, path, keep=3, takeover=True) == ["", ""]
    for step in (1, 2):
        assert saved(other, path, step) == ["", ""]
    kind, text = saved(one, path, 7)
    assert kind == "SaveError"
    assert "has taken this run over; this process writes, commits and deletes nothing more there" in text
    one.run(CLOSE)
    assert saved(other, path, 3) == ["", ""]
    other.run(CLOSE)
    assert other.run("result = torchorbax.verify(path)", path=path) == [1, 2, 3]


def test_a_program_that_was_asleep_in_its_save_commits_nothing(path: str, one: Client, other: Client) -> None:
    opened(one, path, keep=1)
    saved(one, path, 0)
    one.run(PAUSED_SAVE, path=path, step=1)
    assert opened(other, path, keep=3, takeover=True) == ["", ""]
    for step in (1, 2):
        assert saved(other, path, step) == ["", ""]
    kind, text = one.run(GO_ON)
    assert kind == "SaveError"
    assert "has taken this run over" in text
    one.run(CLOSE)
    other.run(CLOSE)
    verified, value = other.run(LOOK, path=path)
    assert verified == [0, 1, 2]
    assert value == other.run("result = float(np.asarray(next(iter(live(2).values()))).ravel()[0])")


def test_after_a_kill_the_next_program_need_not_wait(path: str, server: Server, other: Client) -> None:
    with Client(environment(server.port, "killed")) as killed:
        opened(killed, path)
        saved(killed, path, 0)
        pid = killed.run("import os; result = os.getpid()")
        os.kill(pid, signal.SIGKILL)
        killed._process.wait()
        assert opened(other, path) == ["", ""]
        assert saved(other, path, 1) == ["", ""]
    other.run(CLOSE)


def test_a_program_that_sleeps_for_long_loses_its_right(path: str, server: Server, other: Client) -> None:
    """A machine that was suspended shows no sign of life. The lease is shortened for the test."""
    with Client(environment(server.port, "suspended")) as suspended:
        opened(suspended, path)
        saved(suspended, path, 0)
        pid = suspended.run("import os; result = os.getpid()")
        os.kill(pid, signal.SIGSTOP)
        other.run("from torchorbax._src.storage import ownership; ownership.LEASE_S = 1.0")
        try:
            while (found := opened(other, path))[0] == "OwnershipError":
                pass
            assert found == ["", ""]
            assert saved(other, path, 1) == ["", ""]
        finally:
            other.run("from torchorbax._src.storage import ownership; ownership.LEASE_S = 30.0")
            os.kill(pid, signal.SIGCONT)
        kind, text = saved(suspended, path, 1)
        assert kind == "SaveError"
        assert "has taken this run over" in text
    other.run(CLOSE)
    assert other.run("result = torchorbax.verify(path)", path=path) == [0, 1]
