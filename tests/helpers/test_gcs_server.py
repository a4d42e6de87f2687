"""The test server for gs:// in a process of its own, and what is left when it is killed."""

from __future__ import annotations

import http.client
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.gcs_requests import Client, content, object_path
from tests.helpers.gcs_server import Server, ServerProcess
from tests.helpers.gcs_server_store import CHUNK

REPOSITORY = Path(__file__).parents[2]


# Processes, and what is kept
def test_a_process_is_told_and_tells(connect: Callable[..., Client]) -> None:
    with ServerProcess(faults=["503 kind=list"], buckets=["bucket", "other"]) as server:
        client = connect(server.port)
        client.put("name", b"data")
        client.get("name")
        assert client.list().status == 503
        assert client.ask("GET", "/storage/v1/b/other").status == 200
        server.add_faults("403 kind=read name=a", "403 kind=read name=b")
        assert server.fault_matches() == {"503 kind=list": 1, "403 kind=read name=a": 0, "403 kind=read name=b": 0}
        with pytest.raises(ValueError, match="'wrong' is no effect"):
            server.add_faults("wrong")
        assert client.get("a").status == 403
        server.clear_faults()
        assert client.list().status == 200
        assert server.counts() == {"list": 2, "read": 2, "media": 1, "bucket": 1}
        assert server.bytes_read() == server.bytes_written() == {"bucket/name": 4}
        server.clear_log()
        assert server.log() == []


def test_a_process_ends_with_its_parent() -> None:
    command = [sys.executable, "-m", "tests.helpers.gcs_server", "--until-eof"]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            assert int(process.stdout.readline())
            process.stdin.close()
            assert process.wait(10) == 0
        finally:
            process.kill()


def test_what_a_killed_server_keeps(tmp_path: Path, connect: Callable[..., Client]) -> None:
    with ServerProcess(tmp_path) as server:
        client = connect(server.port)
        client.put("a/" + "long" * 200, b"long")
        client.put("gone", b"data")
        client.delete("gone")
        told = client.put("a/b", content(1)).json
        client.ask("PATCH", object_path("a/b"), b'{"metadata": {"key": "value"}}')
        upload = client.start_upload("big", ifGenerationMatch=0)
        client.chunk(upload, content(2, CHUNK), f"bytes 0-{CHUNK - 1}/*")
        finished = client.start_upload("small")
        result = client.ask("PUT", finished, b"data")
        before = client.list().json
        client.connection.close()

        server.kill()
        (tmp_path / "bucket" / "half.tmp").write_bytes(b"half of an obj")
        server.start()
        assert server.log() == []
        assert client.list().json == before
        assert client.get("a/b").body == content(1)
        assert client.stat("a/b").json == {**told, **client.stat("a/b").json, "metadata": {"key": "value"}}
        assert client.chunk(finished, b"", "bytes */4").json == result.json
        assert client.chunk(upload, b"", "bytes */*").headers["Range"] == f"bytes=0-{CHUNK - 1}"
        client.put("big", b"another")
        assert client.chunk(upload, b"", f"bytes */{CHUNK}").status == 412
        assert client.put("a/b", b"new").generation > int(told["generation"])


def test_nothing_acknowledged_is_lost(tmp_path: Path, connect: Callable[..., Client]) -> None:
    acknowledged: list[tuple[str, int]] = []
    enough = threading.Event()

    def write(client: Client, writer: int) -> None:
        for number in range(100_000):
            name = f"{writer}/{number % 10}"
            try:
                client.put(name, content(number, 100_000))
            except (OSError, http.client.HTTPException):
                return
            acknowledged.append((name, number))
            if len(acknowledged) >= 100:
                enough.set()

    with ServerProcess(tmp_path) as server:
        threads = [threading.Thread(target=write, args=(connect(server.port), writer)) for writer in range(4)]
        for thread in threads:
            thread.start()
        assert enough.wait(30)
        server.kill()
        for thread in threads:
            thread.join()
        server.start()
        client = connect(server.port)
        for name, number in dict(acknowledged).items():
            # A write that was not acknowledged may be there, too.
            assert client.get(name).body in (content(number, 100_000), content(number + 10, 100_000))


def test_a_generation_is_never_used_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Server(tmp_path) as server:
        first = server.store.put("bucket", "name", b"", {}).generation
    monkeypatch.setattr(time, "time_ns", lambda: 0)  # the clock was set back
    with Server(tmp_path) as server:
        assert server.store.put("bucket", "name", b"", {}).generation == first + 1


def test_a_failure_of_the_server_ends_the_test(
    connect: Callable[..., Client], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyError, match="name"), Server() as server, pytest.raises(http.client.RemoteDisconnected):
        connect(server.port).ask("POST", "/storage/v1/b", b"{}")
    assert "KeyError" in capfd.readouterr().err
