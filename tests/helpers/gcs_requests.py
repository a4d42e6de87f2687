"""Requests to the server of gs://, made by hand."""

from __future__ import annotations

import hashlib
import http.client
import json
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

from tests.helpers.gcs_server import HOST


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
