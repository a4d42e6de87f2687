"""The test server for gs:// keeps Cloud Storage's promises about objects and listings."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import google_crc32c
import pytest

from tests.helpers.gcs_requests import Client, content, object_path
from tests.helpers.gcs_server import HOST, Server


# Objects
def test_what_is_told_about_an_object(client: Client) -> None:
    data = content(1)
    written = client.put("a/b c.txt", data)
    assert written.status == 200
    told = client.stat("a/b c.txt").json
    assert told == written.json
    assert (told["name"], told["bucket"], told["size"]) == ("a/b c.txt", "bucket", "1000")
    assert told["md5Hash"] == base64.b64encode(hashlib.md5(data).digest()).decode()
    assert told["crc32c"] == base64.b64encode(google_crc32c.value(data).to_bytes(4, "big")).decode()
    assert abs(int(told["generation"]) / 1e6 - time.time()) < 60
    assert told["updated"].endswith("Z")

    read = client.get("a/b c.txt")
    assert (read.status, read.body, read.headers["Content-Length"]) == (200, data, "1000")
    assert (read.headers["X-Goog-Generation"], read.headers["X-Goog-Metageneration"]) == (told["generation"], "1")
    assert read.headers["X-Goog-Hash"] == f"crc32c={told['crc32c']},md5={told['md5Hash']}"
    assert read.headers["ETag"] == told["etag"]


def test_links_lead_to_the_object(server: Server, client: Client) -> None:
    told = client.put("a/b", b"data").json
    for link, body in ((told["mediaLink"], b"data"), (told["selfLink"], client.stat("a/b").body)):
        host, path = link.split(f":{server.port}")
        assert host == f"http://{HOST}"
        assert client.ask("GET", path).body == body


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("0-0", 0, 1),
        ("10-19", 10, 20),
        ("990-", 990, 1000),
        ("990-5000", 990, 1000),
        ("-7", 993, 1000),
        ("-5000", 0, 1000),
    ],
)
def test_ranges(client: Client, asked: str, start: int, stop: int) -> None:
    client.put("name", content(1))
    read = client.get("name", f"bytes={asked}")
    assert (read.status, read.body) == (206, content(1)[start:stop])
    assert read.headers["Content-Range"] == f"bytes {start}-{stop - 1}/1000"
    assert read.headers["X-Goog-Hash"] == client.get("name").headers["X-Goog-Hash"]


@pytest.mark.parametrize(("asked", "size"), [("1000-", 1000), ("1000-1001", 1000), ("0-", 0), ("-0", 1000)])
def test_ranges_beyond_the_end(client: Client, asked: str, size: int) -> None:
    client.put("name", content(1, size))
    read = client.get("name", f"bytes={asked}")
    assert (read.status, read.headers["Content-Range"]) == (416, f"bytes */{size}")


def test_generations_only_grow(client: Client) -> None:
    seen = [client.put("name", b"").generation for _ in range(20)]
    client.delete("name")
    seen.append(client.put("name", b"").generation)
    assert seen == sorted(set(seen))


def test_older_generations_are_gone(client: Client) -> None:
    old, new = client.put("name", b"old").generation, client.put("name", b"new").generation
    for ask in (client.get, client.stat, client.delete):
        assert ask("name", generation=old).status == 404
    assert client.get("name", generation=new).body == b"new"


@pytest.mark.parametrize(
    ("condition", "offset", "there", "missing"),
    [  # offset: from the object's generation; None: 0, which is an object that is not there
        ("ifGenerationMatch", 0, 200, 412),
        ("ifGenerationMatch", -1, 412, 412),
        ("ifGenerationMatch", None, 412, 200),
        ("ifGenerationNotMatch", 0, 412, 200),
        ("ifGenerationNotMatch", -1, 200, 200),
        ("ifGenerationNotMatch", None, 200, 412),
    ],
)
def test_conditions_of_writes(client: Client, condition: str, offset: int | None, there: int, missing: int) -> None:
    generation = client.put("there", b"old").generation
    value = 0 if offset is None else generation + offset
    for name, expected in (("there", there), ("missing", missing)):
        assert client.put(name, b"new", **{condition: value}).status == expected
        assert (client.get(name).body == b"new") == (expected == 200)


@pytest.mark.parametrize(
    ("condition", "offset", "expected"),
    [
        ("ifGenerationMatch", 0, 200),
        ("ifGenerationMatch", 1, 412),
        ("ifGenerationNotMatch", 0, 304),
        ("ifGenerationNotMatch", 1, 200),
    ],
)
def test_conditions_of_reads(client: Client, condition: str, offset: int, expected: int) -> None:
    asked: dict[str, Any] = {condition: client.put("name", b"data").generation + offset}
    for ask in (client.get, client.stat):
        answer = ask("name", **asked)
        assert answer.status == expected
        assert bool(answer.body) == (expected != 304)
        assert ask("missing", **asked).status == 404
    assert client.delete("name", **asked).status == (204 if expected == 200 else 412)


def test_metadata_changes(client: Client) -> None:
    before = client.put("name", b"data").json
    asked = json.dumps({"metadata": {"a": "1", "b": None}, "contentType": "text/plain"}).encode()
    after = client.ask("PATCH", object_path("name"), asked, ifMetagenerationMatch=1).json
    assert (after["metadata"], after["contentType"]) == ({"a": "1"}, "text/plain")
    assert (after["generation"], after["metageneration"]) == (before["generation"], "2")
    assert after["etag"] != before["etag"]
    assert client.ask("PATCH", object_path("name"), asked, ifMetagenerationMatch=1).status == 412
    assert client.get("name", ifMetagenerationNotMatch=2).status == 304
    assert client.get("name").headers["Content-Type"] == "text/plain"


def test_one_of_many_writers_wins(server: Server, connect: Callable[..., Client]) -> None:
    clients = [connect(server.port) for _ in range(8)]
    for name in "abcdefgh":
        with ThreadPoolExecutor(8) as threads:
            asked = [
                threads.submit(client.put, name, content(number), ifGenerationMatch=0)
                for number, client in enumerate(clients)
            ]
        statuses = [one.result().status for one in asked]
        assert sorted(statuses) == [200, *[412] * 7]
        assert clients[0].get(name).body == content(statuses.index(200))


def test_copies_moves_and_compositions(client: Client) -> None:
    first, second = client.put("a/1", b"one"), client.put("2", b"two")
    copied = client.ask("POST", f"{object_path('a/1')}/rewriteTo/b/bucket/o/x%2Fy").json
    assert (copied["done"], copied["resource"]["size"], client.get("x/y").body) == (True, "3", b"one")
    assert int(copied["resource"]["generation"]) > second.generation
    again = f"{object_path('2')}/copyTo/b/bucket/o/x%2Fy"
    assert client.ask("POST", again, ifGenerationMatch=0).status == 412
    assert client.ask("POST", again, ifSourceGenerationMatch=1).status == 412

    assert client.ask("POST", f"{object_path('a/1')}/moveTo/o/3", sourceGeneration=first.generation).status == 200
    assert (client.get("a/1").status, client.get("3").body) == (404, b"one")
    assert client.ask("POST", f"{object_path('a/1')}/moveTo/o/4").status == 404

    sources: list[dict[str, Any]] = [{"name": "3"}, {"name": "2", "generation": str(second.generation)}]
    asked = {"sourceObjects": sources, "destination": {"contentType": "text/plain"}}
    made = client.ask("POST", f"{object_path('all')}/compose", json.dumps(asked).encode())
    assert "md5Hash" not in made.json
    assert (client.get("all").body, client.get("all").headers["Content-Type"]) == (b"onetwo", "text/plain")
    client.put("2", b"changed")
    assert client.ask("POST", f"{object_path('all')}/compose", json.dumps(asked).encode()).status == 404
    sources[1] = {"name": "2", "objectPreconditions": {"ifGenerationMatch": second.generation}}
    assert client.ask("POST", f"{object_path('all')}/compose", json.dumps(asked).encode()).status == 412


def test_buckets(client: Client) -> None:
    assert client.ask("GET", "/storage/v1/b/bucket").json["name"] == "bucket"
    assert client.ask("GET", "/storage/v1/b/other").status == 404
    for method, path in (
        ("GET", "/storage/v1/b/other/o"),
        ("POST", "/upload/storage/v1/b/other/o?uploadType=media&name=a"),
    ):
        answer = client.ask(method, path)
        assert (answer.status, answer.json["error"]["message"]) == (404, "The specified bucket does not exist.")
    assert client.ask("POST", "/storage/v1/b", b'{"name": "other"}', project="test").status == 200
    assert client.ask("POST", "/storage/v1/b", b'{"name": "other"}').status == 409
    assert [one["name"] for one in client.ask("GET", "/storage/v1/b").json["items"]] == ["bucket", "other"]
    client.put("name", b"")
    assert client.ask("DELETE", "/storage/v1/b/bucket").status == 409
    assert client.ask("DELETE", "/storage/v1/b/other").status == 204
    assert client.ask("GET", "/storage/v1/b/other").status == 404


# Listings
NAMES = ["a", "a.b", "a/1", "a/2/x", "a/2/y", "a/b", "a0", "b/1", "c/", "c/d/e", "z/", "é"]


def expected_listing(
    prefix: str, delimiter: str, start: str = "", end: str = "\U0010ffff"
) -> tuple[list[str], list[str]]:
    items, prefixes = [], []
    for name in NAMES:
        if not name.startswith(prefix) or not start <= name < end:
            continue
        inside = name[len(prefix) :]
        if delimiter and delimiter in inside:
            prefixes.append(prefix + inside[: inside.index(delimiter) + 1])
        else:
            items.append(name)
    return items, sorted(set(prefixes))


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 1000])
@pytest.mark.parametrize("delimiter", ["", "/"])
@pytest.mark.parametrize("prefix", ["", "a", "a/", "a/2", "a/2/", "c/", "nothing"])
def test_listings_by_page(client: Client, prefix: str, delimiter: str, limit: int) -> None:
    for name in reversed(NAMES):
        client.put(name, b"data")
    items: list[str] = []
    prefixes: list[str] = []
    token: dict[str, Any] = {}
    while True:
        page = client.list(prefix=prefix, delimiter=delimiter, maxResults=limit, **token).json
        found = [item["name"] for item in page.get("items", [])]
        assert len(found) + len(page.get("prefixes", [])) <= limit
        items += found
        prefixes += page.get("prefixes", [])
        if "nextPageToken" not in page:
            break
        token = {"pageToken": page["nextPageToken"]}
    assert (items, prefixes) == expected_listing(prefix, delimiter)


def test_listings_between_names(client: Client) -> None:
    for name in NAMES:
        client.put(name, b"data")
    page = client.list(startOffset="a/2/x", endOffset="b/1").json
    assert [item["name"] for item in page["items"]] == expected_listing("", "", "a/2/x", "b/1")[0]


def test_a_thousand_are_a_page(client: Client) -> None:
    for number in range(1001):
        client.put(f"{number:04}", b"")
    page = client.list(maxResults=5000).json
    assert len(page["items"]) == 1000
    assert [item["name"] for item in client.list(pageToken=page["nextPageToken"]).json["items"]] == ["1000"]
