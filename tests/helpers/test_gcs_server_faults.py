"""The test server for gs:// misbehaves as its rules say, and never otherwise."""

from __future__ import annotations

import http.client
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.gcs_requests import Client, content
from tests.helpers.gcs_server import Server, ServerProcess
from tests.helpers.gcs_server_faults import Faults, Rule


# Faults
def test_a_rule_is_for_some_requests() -> None:
    rule = Rule.parse("503 kind=data-write,list method=POST name='^bucket/a b' client=^rank0$ after=2 times=3")
    assert rule.is_for("media", "POST", "bucket/a b/c", "rank0")
    for other in (
        ("multipart", "POST", "bucket/a b/c", "rank0"),
        ("list", "GET", "bucket/a b/c", "rank0"),
        ("media", "POST", "bucket/ab", "rank0"),
        ("media", "POST", "bucket/a b/c", "rank00"),
    ):
        assert not rule.is_for(*other)
    assert [rule.acts_now() for _ in range(7)] == [False, False, True, True, True, False, False]


def test_rules_count_by_themselves() -> None:
    faults = Faults(["503 times=2", "429 kind=read times=2", "cut-after kind=read after=2"])
    effects = [faults.effect(kind, "GET", "bucket/a", "") for kind in ("list", "read", "read", "read", "list")]
    assert [effect and (effect.what, effect.amount) for effect in effects] == [
        ("status", 503),
        ("status", 503),  # the first rule that acts
        ("status", 429),
        ("cut", 0),
        None,
    ]
    assert faults.matches() == {"503 times=2": 5, "429 kind=read times=2": 3, "cut-after kind=read after=2": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("600", "'600' is no effect"),
        ("cut", "'cut' is no effect"),
        ("503 kind=writes", "writes in the rule"),
        ("503 kind", "no key=value"),
        ("503 nmae=a", "'nmae' in the rule"),
        ("503 times=x", "invalid literal"),
    ],
)
def test_rules_that_are_none(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rule.parse(text)


def test_error_answers_on_purpose(server: Server, client: Client) -> None:
    server.add_faults("503 kind=write name=commit times=2", "403 name=^bucket/secret/", "401 name=^bucket/closed/")
    assert [client.put("run/commit", b"").status for _ in range(3)] == [503, 503, 200]
    assert client.put("run/other", b"").status == 200
    for answer in (client.get("secret/a"), client.put("secret/a", b""), client.list(prefix="secret/")):
        assert (answer.status, answer.json["error"]["errors"][0]["reason"]) == (403, "forbidden")
    assert client.get("closed/a").status == 401
    server.clear_faults()
    assert client.get("secret/a").status == 404


@pytest.mark.parametrize("effect", ["cut", "hang"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_no_answer(server: Server, connect: Callable[..., Client], effect: str, when: str) -> None:
    server.add_faults(f"{effect}-{when} kind=media times=1")
    client, other = connect(server.port), connect(server.port)
    client.connection.request("POST", "/upload/storage/v1/b/bucket/o?uploadType=media&name=name", b"data")
    server.wait_for(1, "media")
    assert other.get("name").status == {"before": 404, "after": 200}[when]
    assert server.requests("media")[0].status == {"before": 0, "after": 200}[when]
    client.connection.sock.settimeout(0.2)
    with pytest.raises(TimeoutError if effect == "hang" else http.client.RemoteDisconnected):
        client.connection.getresponse()


def test_bodies_that_end_early(server: Server, client: Client) -> None:
    client.put("name", content(1))
    server.add_faults("truncate:100 kind=read times=1")
    with pytest.raises(http.client.IncompleteRead) as caught:
        client.get("name")
    assert caught.value.partial == content(1)[:100]
    assert client.get("name").body == content(1)
    assert server.bytes_read() == {"bucket/name": 1100}


@pytest.mark.parametrize("effect", ["delay:0.3", "drip:3000"])
def test_answers_that_take_time(server: Server, client: Client, effect: str) -> None:
    client.put("name", content(1))
    server.add_faults(f"{effect} kind=read")
    start = time.monotonic()
    assert client.get("name").body == content(1)
    assert 0.25 < time.monotonic() - start < 5


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_process_ends(tmp_path: Path, connect: Callable[..., Client], when: str) -> None:
    with ServerProcess(tmp_path, faults=[f"exit-{when} kind=media name=last"]) as server:
        client = connect(server.port)
        client.put("first", b"data")
        with pytest.raises(http.client.RemoteDisconnected):
            client.put("last", b"data")
        assert server.wait() == 1
        with pytest.raises(ConnectionRefusedError):
            client.get("first")
        server.start()
        assert client.get("first").body == b"data"
        assert client.get("last").status == {"before": 404, "after": 200}[when]
