"""The test server for gs:// keeps Cloud Storage's promises: asked by hand, and by the clients that Orbax uses."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

import google_crc32c
import pytest

from tests.helpers.gcs_server import HOST, Server, ServerProcess, environment
from tests.helpers.gcs_server_faults import Faults, Rule
from tests.helpers.gcs_server_store import CHUNK
from tests.helpers.programs import RunPython

REPOSITORY = Path(__file__).parents[2]


class Answer(NamedTuple):
    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def generation(self) -> int:
        return int(self.json["generation"])


class Client:
    """Requests by hand, over one connection."""

    def __init__(self, port: int, timeout: float = 30) -> None:
        self.connection = http.client.HTTPConnection(HOST, port, timeout=timeout)

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        **query: Any,
    ) -> Answer:
        asked = urlencode({key.rstrip("_"): value for key, value in query.items()})
        try:
            self.connection.request(method, path + ("?" + asked if asked else ""), body, headers or {})
            answer = self.connection.getresponse()
            return Answer(answer.status, answer.headers, answer.read())
        except BaseException:
            self.connection.close()
            raise

    def put(self, name: str, data: bytes, **query: Any) -> Answer:
        return self.ask("POST", "/upload/storage/v1/b/bucket/o", data, uploadType="media", name=name, **query)

    def get(self, name: str, range_: str | None = None, **query: Any) -> Answer:
        headers = {"Range": range_} if range_ else {}
        return self.ask("GET", object_path(name), None, headers, alt="media", **query)

    def stat(self, name: str, **query: Any) -> Answer:
        return self.ask("GET", object_path(name), **query)

    def delete(self, name: str, **query: Any) -> Answer:
        return self.ask("DELETE", object_path(name), **query)

    def list(self, **query: Any) -> Answer:
        return self.ask("GET", "/storage/v1/b/bucket/o", **query)

    def start_upload(self, name: str, **query: Any) -> str:
        path = "/upload/storage/v1/b/bucket/o"
        location = self.ask("POST", path, b"{}", uploadType="resumable", name=name, **query).headers["Location"]
        return location.removeprefix(f"http://{HOST}:{self.connection.port}")

    def chunk(self, upload: str, data: bytes, content_range: str) -> Answer:
        return self.ask("PUT", upload, data, {"Content-Range": content_range})


def object_path(name: str) -> str:
    return f"/storage/v1/b/bucket/o/{quote(name, safe='')}"


def content(number: int, size: int = 1000) -> bytes:
    """Bytes that no other number has."""
    return hashlib.sha256(str(number).encode()).digest() * (size // 32) + b"." * (size % 32)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    made = Client(server.port)
    yield made
    made.connection.close()


@pytest.fixture
def connect() -> Iterator[Callable[..., Client]]:
    """More connections: `connect(port, timeout=30)`."""
    made: list[Client] = []

    def one(port: int, timeout: float = 30) -> Client:
        made.append(Client(port, timeout))
        return made[-1]

    yield one
    for client in made:
        client.connection.close()


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


# Uploads


@pytest.mark.parametrize("end_of_line", [b"\n", b"\r\n"])
@pytest.mark.parametrize("data", [b"data", b"", b"\r", b"\n", b"a\r\n\r\nb\r\n", b"\n--==0==\ninside", b"\n--==0==--"])
def test_multipart_uploads(client: Client, data: bytes, end_of_line: bytes) -> None:
    lines = [b"--==0==", b"Content-Type: application/json", b"", b'{"name": "a/b", "metadata": {"key": "value"}}']
    lines += [b"--==0==", b"Content-Type: text/x-test", b"", data, b"--==0==--"]
    headers = {"Content-Type": 'multipart/related; boundary="==0=="'}
    body = end_of_line.join(lines)
    made = client.ask("POST", "/upload/storage/v1/b/bucket/o", body, headers, uploadType="multipart")
    assert (made.status, made.json["metadata"], made.json["contentType"]) == (200, {"key": "value"}, "text/x-test")
    assert client.get("a/b").body == data


def test_wrong_hashes_are_refused(client: Client) -> None:
    path = "/upload/storage/v1/b/bucket/o?uploadType=media&name=name"
    assert client.ask("POST", path, b"data", {"X-Goog-Hash": "crc32c=AAAAAA=="}).status == 400
    right = client.put("right", b"data").json
    asked = {"name": "name", "md5Hash": right["md5Hash"]}
    for data, expected in ((b"Data", 400), (b"data", 200)):
        assert client.get("name").status == 404
        answer = client.ask("POST", "/upload/storage/v1/b/bucket/o?uploadType=resumable", json.dumps(asked).encode())
        upload = answer.headers["Location"].partition(f":{client.connection.port}")[2]
        assert client.ask("PUT", upload, data).status == expected


@pytest.mark.parametrize("name", ["", "a\nb", ".", "é" * 600])
def test_names_that_no_object_can_have(client: Client, name: str) -> None:
    assert client.put(name, b"").status == 400
    answer = client.ask("POST", "/upload/storage/v1/b/bucket/o", b"{}", uploadType="resumable", name=name)
    assert answer.status == 400


def test_resumable_uploads(client: Client) -> None:
    data = content(1, CHUNK + 1000)
    upload = client.start_upload("a/b", ifGenerationMatch=0)
    assert "Range" not in client.chunk(upload, b"", "bytes */*").headers
    part = client.chunk(upload, data[:CHUNK], f"bytes 0-{CHUNK - 1}/*")
    assert (part.status, part.headers["Range"]) == (308, f"bytes=0-{CHUNK - 1}")
    status = client.chunk(upload, b"", f"bytes */{len(data)}")
    assert (status.status, status.headers["Range"]) == (308, f"bytes=0-{CHUNK - 1}")
    assert client.stat("a/b").status == 404
    # The acknowledgement was lost, so the client sends from the start.
    done = client.chunk(upload, data, f"bytes 0-{len(data) - 1}/{len(data)}")
    assert (done.status, done.json["size"]) == (200, str(len(data)))
    assert client.get("a/b").body == data
    client.put("a/b", b"later")
    for again, content_range in ((b"", "*"), (data, f"0-{len(data) - 1}")):  # finished ones stay answerable
        assert client.chunk(upload, again, f"bytes {content_range}/{len(data)}").generation == done.generation
    assert client.get("a/b").body == b"later"


def test_resumable_uploads_that_end_with_an_empty_chunk(client: Client) -> None:
    upload = client.start_upload("name")
    client.chunk(upload, content(1, CHUNK), f"bytes 0-{CHUNK - 1}/*")
    assert client.chunk(upload, b"", f"bytes */{CHUNK}").status == 200
    assert client.get("name").body == content(1, CHUNK)
    assert client.chunk(client.start_upload("empty"), b"", "bytes */0").status == 200
    assert client.get("empty").body == b""


@pytest.mark.parametrize(
    ("size", "content_range"),
    [
        (CHUNK - 1, f"bytes 0-{CHUNK - 2}/*"),  # only the last may be of any size
        (CHUNK - 1, f"bytes 0-{CHUNK - 2}/{CHUNK}"),
        (CHUNK, f"bytes {CHUNK}-{2 * CHUNK - 1}/*"),  # what comes before was never sent
        (CHUNK, f"bytes 0-{CHUNK}/*"),  # one byte less than it says
        (CHUNK, f"bytes 0-{CHUNK - 1}/1000"),
        (10, "bytes 0-9"),
    ],
)
def test_chunks_that_are_refused(client: Client, size: int, content_range: str) -> None:
    upload = client.start_upload("name")
    assert client.chunk(upload, content(1, size), content_range).status == 400
    assert client.chunk(upload, b"", "bytes */*").headers.get("Range") is None


def test_conditions_of_resumable_uploads(client: Client) -> None:
    upload = client.start_upload("name", ifGenerationMatch=0)
    client.put("name", b"first")
    assert client.ask("PUT", upload, b"second").status == 412
    assert client.get("name").body == b"first"
    path = "/upload/storage/v1/b/bucket/o"
    assert client.ask("POST", path, b"{}", uploadType="resumable", name="name", ifGenerationMatch=0).status == 412


def test_resumable_uploads_that_are_given_up(client: Client) -> None:
    upload = client.start_upload("name")
    assert client.ask("DELETE", upload).status == 499
    assert client.ask("PUT", upload, b"data").status == 404
    assert client.stat("name").status == 404


def test_batches(client: Client) -> None:
    client.put("a/1", b"")
    part = "--sep\r\nContent-Type: application/http\r\nContent-ID: <id+{0}>\r\n\r\nDELETE {1} HTTP/1.1\r\n\r\n\r\n"
    body = "".join(part.format(n, object_path(name)) for n, name in enumerate(["a/1", "missing"])) + "--sep--"
    answer = client.ask("POST", "/batch/storage/v1", body.encode(), {"Content-Type": 'multipart/mixed; boundary="sep"'})
    assert answer.status == 200
    first, second = answer.body.decode().split("--" + answer.headers["Content-Type"].split("=", 1)[1])[1:-1]
    assert "<response-id+0>" in first
    assert "HTTP/1.1 204" in first
    assert "HTTP/1.1 404" in second
    assert client.stat("a/1").status == 404


# HTTP


def test_errors_are_told_like_cloud_storage_does(client: Client) -> None:
    error = client.stat("missing").json["error"]
    assert (error["code"], error["message"]) == (404, "No such object: bucket/missing")
    assert error["errors"] == [{"message": error["message"], "domain": "global", "reason": "notFound"}]
    assert client.get("missing").body == b"No such object: bucket/missing"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/storage/v1/b/bucket/o?versions=true"),
        ("GET", "/storage/v1/b/bucket/o?maxResults=0"),
        ("GET", "/storage/v1/b/bucket/o?maxResults=many"),
        ("GET", "/storage/v1/b/bucket/o?pageToken=x"),
        ("GET", "/storage/v1/b/bucket/o/a/b"),  # the slashes of a name are quoted
        ("GET", "/storage/v1/b/bucket/o/a?ifGenerationMatch=x"),
        ("POST", "/upload/storage/v1/b/bucket/o?name=a"),
        ("POST", "/upload/storage/v1/b/bucket/o?uploadType=multipart"),
        ("PUT", "/storage/v1/b/bucket/o/a"),
    ],
)
def test_what_is_unknown_is_an_error(server: Server, client: Client, method: str, path: str) -> None:
    client.put("a", b"")
    assert client.ask(method, path, b"").status == 400


def test_continue_comes_before_the_body(server: Server) -> None:
    with socket.create_connection((HOST, server.port), timeout=10) as connection:
        head = "POST /upload/storage/v1/b/bucket/o?uploadType=media&name=a HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n"
        connection.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"data")
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")


def test_bodies_in_chunks(client: Client) -> None:
    path = "/upload/storage/v1/b/bucket/o?uploadType=media&name=a"
    client.connection.request("POST", path, iter([b"da", b"ta"]), encode_chunked=True)
    assert client.connection.getresponse().read()
    assert client.get("a").body == b"data"


@pytest.mark.parametrize(
    ("header", "body"),
    [
        ("Content-Length: 5", b"data"),
        ("Transfer-Encoding: chunked", b"5\r\nda"),
        ("Transfer-Encoding: chunked", b"4\r\ndata\r\n"),
    ],
)
def test_half_a_request_does_nothing(connect: Callable[..., Client], header: str, body: bytes) -> None:
    with Server() as server:  # its end waits for all connections, and would raise an error of the server
        with socket.create_connection((HOST, server.port), timeout=10) as connection:
            head = f"POST /upload/storage/v1/b/bucket/o?uploadType=media&name=a HTTP/1.1\r\nHost: x\r\n{header}\r\n\r\n"
            connection.sendall(head.encode() + body)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(100) == b""
        assert connect(server.port).get("a").status == 404


def test_many_requests_share_a_connection(server: Server, client: Client) -> None:
    client.put("name", b"data")
    start = time.monotonic()
    for _ in range(100):
        client.get("name")
        client.get("missing")
        client.get("name", ifGenerationNotMatch=0)
        client.delete("missing")
    assert len({entry.port for entry in server.log()}) == 1
    assert time.monotonic() - start < 8  # 400 answers, each 40 ms late if it waits for an acknowledgement


def test_callers_without_the_token(connect: Callable[..., Client]) -> None:
    with Server(token="right") as server:
        client = connect(server.port)
        for header, message in (({}, "Anonymous caller"), ({"Authorization": "Bearer wrong"}, "Invalid Credentials")):
            answer = client.ask("GET", "/storage/v1/b/bucket", None, header)
            assert answer.status == 401
            assert answer.json["error"]["message"].startswith(message)
        assert client.ask("GET", "/storage/v1/b/bucket", None, {"Authorization": "Bearer right"}).status == 200


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


# Clients


GCSFS = """
    import fsspec

    files = fsspec.filesystem("gcs")
    big = bytes(range(256)) * 24 * 1024  # 6 MiB
    with files.open("bucket/a/small", "wb") as file:
        file.write(b"data")
    with files.open("bucket/a/big", "wb", block_size=2**20) as file:
        for start in range(0, len(big), 1_000_000):
            file.write(big[start : start + 1_000_000])
    with files.open("bucket/a/empty", "wb"):
        pass
    files.pipe("bucket/a/piped", b"\\r\\n--==0==\\n")
    assert files.cat("bucket/a/big") == big
    assert files.cat("bucket/a/piped") == b"\\r\\n--==0==\\n"
    assert files.cat("bucket/a/empty") == b""
    assert files.cat_file("bucket/a/big", 1000, 2000) == big[1000:2000]
    with files.open("bucket/a/big", "rb") as file:
        file.seek(5_000_000)
        assert file.read(100) == big[5_000_000:5_000_100]
    try:
        files.pipe("bucket/a/small", b"again", mode="create")
        raise AssertionError("overwritten")
    except FileExistsError:
        pass
    assert files.ls("bucket/a", detail=False) == [f"bucket/a/{name}" for name in ("big", "empty", "piped", "small")]
    assert files.isdir("bucket/a") and not files.isdir("bucket/a/small") and not files.exists("bucket/b")
    files.mv("bucket/a", "bucket/b", recursive=True)
    assert files.find("bucket") == [f"bucket/b/{name}" for name in ("big", "empty", "piped", "small")]
    files.cp("bucket/b/big", "bucket/c/big")
    files.merge("bucket/c/merged", ["bucket/b/small", "bucket/b/small"])
    assert files.cat("bucket/c/merged") == b"datadata"
    files.rm("bucket/b", recursive=True)
    assert files.find("bucket") == ["bucket/c/big", "bucket/c/merged"]
    assert files.info("bucket/c/big")["size"] == len(big)
    files.mkdir("new")
    assert sorted(files.ls("")) == ["bucket/", "new/"]
"""

STORAGE = """
    import io
    from google.cloud import storage

    client = storage.Client()
    bucket = client.get_bucket("bucket")
    big = bytes(range(256)) * 4 * 1024  # 1 MiB
    blob = bucket.blob("a/big", chunk_size=256 * 1024)
    blob.upload_from_file(io.BytesIO(big[:-10]), if_generation_match=0)
    assert blob.download_as_bytes(checksum="crc32c") == big[:-10]
    for name in ("a/1", "a/2", "a/b/3"):
        bucket.blob(name).upload_from_string(b"data", checksum="md5")
    assert [one.name for one in client.list_blobs("bucket", page_size=2)] == ["a/1", "a/2", "a/b/3", "a/big"]
    found = client.list_blobs("bucket", prefix="a/", delimiter="/", page_size=1)
    assert ([one.name for one in found], found.prefixes) == (["a/1", "a/2", "a/big"], {"a/b/"})
    blob.metadata = {"key": "value"}
    blob.patch(if_metageneration_match=1)
    assert bucket.get_blob("a/big").metadata == {"key": "value"}
    bucket.copy_blob(bucket.blob("a/1"), bucket, "copy")
    bucket.rename_blob(bucket.blob("a/2"), "renamed")
    bucket.blob("rewritten").rewrite(bucket.blob("copy"))
    bucket.blob("composed").compose([bucket.blob("copy"), bucket.blob("renamed")])
    assert bucket.blob("composed").download_as_bytes() == b"datadata"
    with client.batch():
        bucket.delete_blobs([bucket.blob(name) for name in ("copy", "renamed", "rewritten")])
    assert [one.name for one in client.list_blobs("bucket")] == ["a/1", "a/b/3", "a/big", "composed"]
    assert client.lookup_bucket("missing") is None
"""

TENSORSTORE = """
    import threading
    import tensorstore as ts

    def kvstore():
        return ts.KvStore.open({"driver": "gcs", "bucket": "bucket", "path": "ts/"}, context=ts.Context()).result()

    store = kvstore()
    data = bytes(range(256)) * 8 * 1024  # 2 MiB
    first = store.write("a/key", data).result()
    assert store.read("a/key").result().value == data
    assert store.read("a/key", byte_range=slice(1000, 2000)).result().value == data[1000:2000]
    assert store.read("a/key", if_not_equal=first.generation).result().state == "unspecified"
    assert store.read("missing").result().state == "missing"
    second = store.write("a/key", b"new", if_equal=first.generation).result()
    assert second.generation and not store.write("a/key", b"late", if_equal=first.generation).result().generation
    store.write("b", b"").result()
    assert store.list().result() == [b"a/key", b"b"]
    store.delete_range(ts.KvStore.KeyRange("a/", "a0")).result()
    assert store.list().result() == [b"b"]

    not_there = store.read("missing").result().stamp.generation
    winners, stores = [], [kvstore() for _ in range(8)]
    def write(number, key):
        if stores[number].write(key, str(number), if_equal=not_there).result().generation:
            winners.append((key, number))
    for key in ("x", "y", "z"):
        threads = [threading.Thread(target=write, args=(number, key)) for number in range(8)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert [key for key, _ in winners] == ["x", "y", "z"], winners
    assert all(store.read(key).result().value == str(number).encode() for key, number in winners)
"""

OCDBT = """
    import sys
    import threading
    import tensorstore as ts

    def open_database():
        spec = {"driver": "ocdbt", "base": "gs://bucket/db/"}
        return ts.KvStore.open(spec, context=ts.Context()).result()

    def write(writer, database):
        for number in range(5):
            database.write(f"{writer}/{number}", bytes([writer]) * 1000 * number).result()

    threads = [threading.Thread(target=write, args=(writer, open_database())) for writer in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    database = open_database()
    assert len(database.list().result()) == 30
    for writer in range(6):
        for number in range(5):
            assert database.read(f"{writer}/{number}").result().value == bytes([writer]) * 1000 * number
"""

ORBAX = """
    import sys
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    key = jax.random.key(0)  # random numbers, as others are compressed
    tree = {"a": jax.random.normal(key, 500_000), "b": {"c": jax.random.normal(key, (300, 1000))}}
    with ocp.CheckpointManager("gs://bucket/run", options=ocp.CheckpointManagerOptions(max_to_keep=2)) as manager:
        if sys.argv[1] == "save":
            for step in range(3):
                manager.save(step, args=ocp.args.StandardSave(jax.tree.map(lambda array: array + step, tree)))
            manager.wait_until_finished()
        assert manager.all_steps() == [1, 2]
        if sys.argv[1] == "restore":
            restored = manager.restore(2, args=ocp.args.StandardRestore(tree))
            jax.tree.map(lambda array, found: np.testing.assert_array_equal(array + 2, found), tree, restored)
"""


def test_gcsfs(server: Server, run_python: RunPython) -> None:
    run_python(GCSFS, env=environment(server.port), warnings="default")
    kinds = server.counts()
    assert kinds["chunk"] > 6  # the big file came in several
    assert kinds.keys() >= {"resumable", "multipart", "read", "list", "stat", "move", "copy", "compose", "delete"}
    assert kinds["other"] == 0
    assert server.bytes_written("a/big$") == {"bucket/a/big": 6 * 2**20}


def test_google_cloud_storage(server: Server, run_python: RunPython) -> None:
    run_python(STORAGE, env=environment(server.port))
    assert [entry.written for entry in server.requests("chunk")] == [CHUNK, CHUNK, CHUNK, CHUNK - 10]
    assert server.counts()["batch"] == 1
    assert server.counts()["other"] == 0


def test_tensorstore(server: Server, run_python: RunPython) -> None:
    run_python(TENSORSTORE, env=environment(server.port))
    assert server.counts()["other"] == 0
    assert server.bytes_read("key$") == {"bucket/ts/a/key": 2 * 2**20 + 1000}


def test_concurrent_writers_of_one_database(server: Server, run_python: RunPython) -> None:
    run_python(OCDBT, env=environment(server.port))
    assert any(entry.status == 412 for entry in server.requests("media", "manifest"))  # they did meet


@pytest.mark.parametrize(
    "faults",
    [
        ["503 kind=write after=3 times=1", "429 kind=read after=3 times=1"],
        [
            "cut-before kind=write after=2 times=1",
            "cut-after kind=write name=(ts/b|a/piped)$ times=1",
            "cut-after kind=read times=1",
        ],
        ["truncate:500 kind=read times=1", "drip:9000000 kind=read after=1 times=1"],
    ],
    ids=["errors", "cuts", "truncated"],
)
@pytest.mark.parametrize("program", [TENSORSTORE, GCSFS], ids=["tensorstore", "gcsfs"])
def test_clients_survive_faults(server: Server, run_python: RunPython, program: str, faults: list[str]) -> None:
    server.add_faults(*faults)
    run_python(program, env=environment(server.port), warnings="default")
    assert sum(entry.effect != "" for entry in server.log()) == sum(Rule.parse(rule).times or 0 for rule in faults)


def test_checkpoints_of_orbax(tmp_path: Path, run_python: RunPython) -> None:
    with ServerProcess(tmp_path / "data") as server:
        run_python(ORBAX, "save", env=environment(server.port, "saver"), warnings="default")
        server.kill()
        server.start()
        run_python(ORBAX, "restore", env=environment(server.port, "restorer"), warnings="default")
        assert {entry.client for entry in server.log()} == {"restorer"}
        size = 4 * (500_000 + 300 * 1000)
        assert 0.8 * size < sum(server.bytes_read(r"/ocdbt.*/d/").values()) < 1.5 * size
        assert server.counts()["other"] == 0
