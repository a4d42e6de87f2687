"""The test server for gs:// keeps Cloud Storage's promises about uploads, batches and HTTP."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable

import pytest

from tests.helpers.gcs_requests import Client, content, object_path
from tests.helpers.gcs_server import HOST, Server
from tests.helpers.gcs_server_store import CHUNK


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
