"""The JSON API of Cloud Storage, from a request to an answer: no sockets, no faults.

It is strict: a parameter or a path that it does not know is an error, never ignored.
"""

from __future__ import annotations

import binascii
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.parser import BytesParser, Parser
from email.utils import format_datetime
from http.client import responses
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from tests.helpers.gcs_server_store import ApiError, Conditions, Object, Store, Upload

_HARMLESS = {"projection", "prettyPrint", "alt", "fields", "project", "userProject"}
_HARMLESS |= {"tensorstore"}  # a random number, against caches on the way
_CONDITIONS = {
    f"{prefix}{name}"
    for prefix in ("if", "ifSource")
    for name in ("GenerationMatch", "GenerationNotMatch", "MetagenerationMatch", "MetagenerationNotMatch")
}
_KNOWN = (
    _HARMLESS
    | _CONDITIONS
    | {"prefix", "delimiter", "maxResults", "pageToken", "startOffset", "endOffset", "includeTrailingDelimiter"}
    | {"name", "uploadType", "upload_id", "generation", "sourceGeneration", "rewriteToken", "maxBytesRewrittenPerCall"}
    | {"predefinedAcl", "predefinedDefaultObjectAcl", "destinationPredefinedAcl", "enableObjectRetention"}
)
_ATTRIBUTES = {
    *("contentType", "contentEncoding", "contentLanguage", "contentDisposition", "cacheControl"),
    *("customTime", "metadata", "storageClass"),
}
_REASONS = {401: "authError", 403: "forbidden", 404: "notFound", 412: "conditionNotMet", 429: "rateLimitExceeded"}


@dataclass
class Request:
    """One request. `target` is the path and the query as they were sent; names of headers are in lower case.

    `base` is what comes before the target in links to this server.
    """

    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes = field(default=b"", repr=False)
    base: str = ""

    def __post_init__(self) -> None:
        parts = urlsplit(self.target)
        # Split first: the slashes of an object's name are quoted.
        self.segments = [unquote(segment) for segment in parts.path.strip("/").split("/")]
        self.query = dict(parse_qsl(parts.query, keep_blank_values=True))

    def json(self) -> dict[str, Any]:
        try:
            found = json.loads(self.body or b"{}")
        except ValueError as error:
            raise ApiError(400, "parseError", f"Parse Error: {error}") from error
        if not isinstance(found, dict):
            raise ApiError(400, "parseError", "Parse Error: not an object")
        return found

    def number(self, parameter: str) -> int | None:
        try:
            return int(self.query[parameter]) if parameter in self.query else None
        except ValueError as error:
            raise ApiError(400, "invalidParameter", f"Invalid value for {parameter}: {error}") from error


@dataclass
class Response:
    """One answer; `written` bytes of an object came with the request."""

    status: int
    body: bytes = field(default=b"", repr=False)
    headers: dict[str, str] = field(default_factory=dict)
    written: int = 0


@dataclass
class Call:
    """What a request asks for: known before anything is done, so that a fault can come first."""

    kind: str
    bucket: str
    name: str
    act: Callable[[], Response]

    @property
    def path(self) -> str:
        return f"{self.bucket}/{self.name}" if self.name or self.kind != "bucket" else self.bucket

    def answer(self) -> Response:
        try:
            return self.act()
        except ApiError as error:
            return failure(error.status, error.message, error.reason)


class Api:
    """The requests that a store answers."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def call(self, request: Request) -> Call:
        """Which request is it? One that is unknown answers that."""
        call = self._call(request)
        if unknown := request.query.keys() - _KNOWN:
            message = f"This server does not know the parameters {', '.join(sorted(unknown))}"
            call.act = lambda: failure(400, message, "invalidParameter")
        return call

    def _call(self, request: Request) -> Call:
        match request.method, request.segments:
            case "GET", ["storage", "v1", "b"]:
                return Call("bucket", "", "", lambda: self._buckets())
            case "POST", ["storage", "v1", "b"]:
                return Call("bucket", "", "", lambda: self._create_bucket(request))
            case "GET", ["storage", "v1", "b", bucket]:
                return Call("bucket", bucket, "", lambda: self._bucket(bucket))
            case "DELETE", ["storage", "v1", "b", bucket]:
                return Call("bucket", bucket, "", lambda: self._delete_bucket(bucket))
            case "GET", ["storage", "v1", "b", bucket, "o"]:
                prefix = request.query.get("prefix", "")
                return Call("list", bucket, prefix, lambda: self._list(request, bucket))
            case "GET", ["storage", "v1", "b", bucket, "o", name] if request.query.get("alt") != "media":
                return Call("stat", bucket, name, lambda: self._stat(request, bucket, name))
            case "GET", ["storage", "v1", "b", bucket, "o", name] | ["download", _, "v1", "b", bucket, "o", name]:
                return Call("read", bucket, name, lambda: self._read(request, bucket, name))
            case "PATCH", ["storage", "v1", "b", bucket, "o", name]:
                return Call("patch", bucket, name, lambda: self._patch(request, bucket, name))
            case "DELETE", ["storage", "v1", "b", bucket, "o", name]:
                return Call("delete", bucket, name, lambda: self._delete(request, bucket, name))
            case "POST", ["storage", "v1", "b", bucket, "o", name, "compose"]:
                return Call("compose", bucket, name, lambda: self._compose(request, bucket, name))
            case "POST", ["storage", "v1", "b", bucket, "o", name, "rewriteTo" | "copyTo" as how, "b", to, "o", new]:
                return Call("copy", to, new, lambda: self._copy(request, (bucket, name), (to, new), how))
            case "POST", ["storage", "v1", "b", bucket, "o", name, "moveTo", "o", new]:
                return Call("move", bucket, new, lambda: self._copy(request, (bucket, name), (bucket, new), "moveTo"))
            case method, ["upload", "storage", "v1", "b", bucket, "o"]:
                return self._upload_call(method, request, bucket)
            case "POST", ["batch", "storage", "v1"]:
                return Call("batch", "", "", lambda: self._batch(request))
        message = f"This server does not know {request.method} {request.target}"
        return Call("other", "", "", lambda: failure(400, message, "badRequest"))

    # Buckets

    def _buckets(self) -> Response:
        return _json({"kind": "storage#buckets", "items": [_bucket(name) for name in self.store.buckets()]})

    def _create_bucket(self, request: Request) -> Response:
        name = str(request.json()["name"])
        self.store.create_bucket(name)
        return _json(_bucket(name))

    def _bucket(self, bucket: str) -> Response:
        self.store.objects(bucket)
        return _json(_bucket(bucket))

    def _delete_bucket(self, bucket: str) -> Response:
        self.store.delete_bucket(bucket)
        return Response(204)

    # Objects

    def _list(self, request: Request, bucket: str) -> Response:
        query = request.query
        limit = request.number("maxResults")
        if limit is not None and limit < 1:
            raise ApiError(400, "invalidParameter", "maxResults must be positive")
        try:
            page = self.store.page(
                bucket,
                query.get("prefix", ""),
                query.get("delimiter", ""),
                min(limit or 1000, 1000),
                query.get("pageToken"),
                query.get("startOffset", ""),
                query.get("endOffset"),
            )
        except (binascii.Error, UnicodeDecodeError) as error:
            raise ApiError(400, "invalidParameter", f"Invalid pageToken: {error}") from error
        found: dict[str, Any] = {"kind": "storage#objects"}
        if page.items:
            found["items"] = [_resource(item, request.base) for item in page.items]
        if page.prefixes:
            found["prefixes"] = page.prefixes
        if page.next_token:
            found["nextPageToken"] = page.next_token
        return _json(found)

    def _stat(self, request: Request, bucket: str, name: str) -> Response:
        found = self.store.get(bucket, name, Conditions.of(request.query), request.number("generation"))
        return _json(_resource(found, request.base), ETag=found.etag)

    def _read(self, request: Request, bucket: str, name: str) -> Response:
        try:
            found = self.store.get(bucket, name, Conditions.of(request.query), request.number("generation"))
        except ApiError as error:
            if error.status == 304:
                raise
            # Cloud Storage answers those who ask for contents in plain words.
            return Response(error.status, error.message.encode(), {"Content-Type": "text/html; charset=UTF-8"})
        hashes = f"crc32c={found.crc32c}" + (f",md5={found.md5}" if found.md5 else "")
        headers = {
            "Content-Type": found.attributes.get("contentType", "application/octet-stream"),
            "ETag": found.etag,
            "Last-Modified": format_datetime(datetime.fromtimestamp(found.updated / 1e6, UTC), usegmt=True),
            "X-Goog-Generation": str(found.generation),
            "X-Goog-Metageneration": str(found.metageneration),
            "X-Goog-Hash": hashes,  # of the whole object, whatever the range
            "X-Goog-Stored-Content-Length": str(len(found.data)),
            "X-Goog-Stored-Content-Encoding": found.attributes.get("contentEncoding", "identity"),
            "Accept-Ranges": "bytes",
        }
        if "range" not in request.headers:
            return Response(200, found.data, headers)
        size = len(found.data)
        wanted = _range(request.headers["range"], size)
        if wanted is None:
            body = b"The requested range cannot be satisfied."
            return Response(416, body, {"Content-Type": "text/html", "Content-Range": f"bytes */{size}"})
        start, stop = wanted
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return Response(206, found.data[start:stop], headers)

    def _patch(self, request: Request, bucket: str, name: str) -> Response:
        attributes = _attributes(request.json())
        changed = self.store.patch(bucket, name, attributes, Conditions.of(request.query))
        return _json(_resource(changed, request.base))

    def _delete(self, request: Request, bucket: str, name: str) -> Response:
        self.store.delete(bucket, name, Conditions.of(request.query), request.number("generation"))
        return Response(204)

    def _compose(self, request: Request, bucket: str, name: str) -> Response:
        asked = request.json()
        sources = asked.get("sourceObjects", [])
        if not 1 <= len(sources) <= 32:
            raise ApiError(400, "invalid", f"{len(sources)} source components; between 1 and 32 are allowed.")
        attributes = _attributes(asked.get("destination", {}))
        made = self.store.compose(bucket, name, sources, attributes, Conditions.of(request.query))
        return _json(_resource(made, request.base))

    def _copy(self, request: Request, source: tuple[str, str], to: tuple[str, str], how: str) -> Response:
        made = self.store.copy(
            source,
            to,
            Conditions.of(request.query),
            Conditions.of(request.query, "ifSource"),
            request.number("sourceGeneration"),
            move=how == "moveTo",
        )
        if how != "rewriteTo":
            return _json(_resource(made, request.base))
        size = str(len(made.data))
        answer = {"kind": "storage#rewriteResponse", "totalBytesRewritten": size, "objectSize": size, "done": True}
        return _json({**answer, "resource": _resource(made, request.base)})

    # Uploads

    def _upload_call(self, method: str, request: Request, bucket: str) -> Call:
        query = request.query
        if id := query.get("upload_id"):
            try:
                upload = self.store.upload(id)
            except ApiError as error:
                gone = error
                return Call("chunk", bucket, "", lambda: failure(gone.status, gone.message, gone.reason))
            if method == "DELETE":
                return Call("cancel", bucket, upload.name, lambda: self._cancel(upload))
            return Call("chunk", bucket, upload.name, lambda: self._chunk(request, upload))
        match method, query.get("uploadType"):
            case "POST", "media":
                return Call("media", bucket, query.get("name", ""), lambda: self._media(request, bucket))
            case "POST", "multipart":
                try:
                    attributes, data = _related(request)
                except ApiError as error:
                    wrong = error
                    return Call("multipart", bucket, "", lambda: failure(wrong.status, wrong.message, wrong.reason))
                name = query.get("name") or str(attributes.get("name", ""))
                return Call("multipart", bucket, name, lambda: self._multipart(request, bucket, name, attributes, data))
            case "POST", "resumable":
                attributes = request.json()
                name = query.get("name") or str(attributes.get("name", ""))
                return Call("resumable", bucket, name, lambda: self._start(request, bucket, name, attributes))
        message = f"This server does not know {method} {request.target}"
        return Call("other", bucket, "", lambda: failure(400, message, "badRequest"))

    def _media(self, request: Request, bucket: str) -> Response:
        attributes = {"contentType": request.headers.get("content-type", "application/octet-stream")}
        return self._write(request, bucket, request.query.get("name", ""), request.body, attributes, {})

    def _multipart(self, request: Request, bucket: str, name: str, attributes: dict[str, Any], data: bytes) -> Response:
        return self._write(request, bucket, name, data, _attributes(attributes), _expected(request, attributes))

    def _write(
        self,
        request: Request,
        bucket: str,
        name: str,
        data: bytes,
        attributes: dict[str, Any],
        hashes: dict[str, str],
    ) -> Response:
        conditions = Conditions.of(request.query)
        made = self.store.put(bucket, _valid(name), data, attributes, conditions, hashes or _expected(request, {}))
        return _json(_resource(made, request.base), written=len(data), ETag=made.etag)

    def _start(self, request: Request, bucket: str, name: str, asked: dict[str, Any]) -> Response:
        attributes = _attributes(asked)
        if "x-upload-content-type" in request.headers:
            attributes.setdefault("contentType", request.headers["x-upload-content-type"])
        conditions = Conditions.of(request.query)
        upload = self.store.start_upload(bucket, _valid(name), conditions, attributes, _expected(request, asked))
        kept = "".join(f"&{key}={value}" for key, value in request.query.items() if key in _CONDITIONS)
        where = f"{request.base}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&name={quote(name, safe='')}"
        return Response(200, b"", {"Location": f"{where}{kept}&upload_id={upload.id}"})

    def _chunk(self, request: Request, upload: Upload) -> Response:
        start, total = _content_range(request)
        upload = self.store.append(upload.id, request.body, start, total)
        if upload.result is not None:
            return _json(_resource(upload.result, request.base), written=len(request.body), ETag=upload.result.etag)
        have = len(upload.data)
        return Response(308, b"", {"Range": f"bytes=0-{have - 1}"} if have else {}, len(request.body))

    def _cancel(self, upload: Upload) -> Response:
        self.store.cancel_upload(upload.id)
        return Response(499)

    def _batch(self, request: Request) -> Response:
        boundary = "batch_of_answers"
        parts = []
        for part in _mixed(request):
            answer = self.call(part).answer()
            head = f"HTTP/1.1 {answer.status} {responses.get(answer.status, '')}\r\n".encode()
            fields = {**answer.headers, "Content-Length": str(len(answer.body))}
            head += "".join(f"{key}: {value}\r\n" for key, value in fields.items()).encode()
            id = part.headers["content-id"].replace("<", "<response-", 1)
            outer = f"--{boundary}\r\nContent-Type: application/http\r\nContent-ID: {id}\r\n\r\n".encode()
            parts.append(outer + head + b"\r\n" + answer.body + b"\r\n")
        body = b"".join(parts) + f"--{boundary}--\r\n".encode()
        return Response(200, body, {"Content-Type": f"multipart/mixed; boundary={boundary}"})


def failure(status: int, message: str, reason: str | None = None) -> Response:
    """An error as Cloud Storage tells it."""
    if status == 304:
        return Response(304)
    reason = reason or _REASONS.get(status, "backendError" if status >= 500 else "invalid")
    detail = {"message": message, "domain": "global", "reason": reason}
    return _json({"error": {"code": status, "message": message, "errors": [detail]}}, status)


def _resource(found: Object, base: str) -> dict[str, Any]:
    """What Cloud Storage tells about an object."""
    where = f"/storage/v1/b/{found.bucket}/o/{quote(found.name, safe='')}"
    told = {
        "kind": "storage#object",
        "id": f"{found.bucket}/{found.name}/{found.generation}",
        "selfLink": base + where,
        "mediaLink": f"{base}/download{where}?generation={found.generation}&alt=media",
        "name": found.name,
        "bucket": found.bucket,
        "generation": str(found.generation),
        "metageneration": str(found.metageneration),
        "size": str(found.size),
        "crc32c": found.crc32c,
        "etag": found.etag,
        "storageClass": "STANDARD",
        "timeCreated": _time(found.generation),
        "updated": _time(found.updated),
        **found.attributes,
    }
    return {**told, "md5Hash": found.md5} if found.md5 else told


def _json(found: dict[str, Any], status: int = 200, written: int = 0, **headers: str) -> Response:
    body = json.dumps(found).encode()
    return Response(status, body, {"Content-Type": "application/json; charset=UTF-8", **headers}, written)


def _bucket(name: str) -> dict[str, Any]:
    where = f"/storage/v1/b/{name}"
    told = {"kind": "storage#bucket", "id": name, "name": name, "selfLink": where, "location": "US"}
    return {**told, "storageClass": "STANDARD", "metageneration": "1", "projectNumber": "0"}


def _time(microseconds: int) -> str:
    return datetime.fromtimestamp(microseconds / 1e6, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _attributes(asked: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in asked.items() if key in _ATTRIBUTES}


def _valid(name: str) -> str:
    """Cloud Storage's rules for names of objects."""
    if not 1 <= len(name.encode()) <= 1024 or re.search(r"[\r\n]", name) or name in (".", ".."):
        raise ApiError(400, "invalid", f"{name!r} cannot be the name of an object")
    return name


def _expected(request: Request, asked: Mapping[str, Any]) -> dict[str, str]:
    """The hashes that the client says its data has, in the metadata or in a header."""
    told = {kind: str(asked[key]) for kind, key in (("crc32c", "crc32c"), ("md5", "md5Hash")) if asked.get(key)}
    for word in filter(None, request.headers.get("x-goog-hash", "").split(",")):
        kind, _, value = word.strip().partition("=")
        told[kind] = value
    return told


def _range(text: str, size: int) -> tuple[int, int] | None:
    """Start and stop of a Range header; None if it cannot be satisfied."""
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", text.strip())
    if not found or found[1] == found[2] == "":
        raise ApiError(400, "invalid", f"This server does not know the range {text!r}")
    if found[1] == "":
        start, stop = max(size - int(found[2]), 0), size
    else:
        start, stop = int(found[1]), min(int(found[2]) + 1 if found[2] else size, size)
    return (start, stop) if start < stop else None


def _content_range(request: Request) -> tuple[int | None, int | None]:
    """Where the bytes of a chunk begin, and how many there will be in all; None where that is not told."""
    text = request.headers.get("content-range")
    if text is None:
        return 0, len(request.body)
    found = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(?:(\d+)|\*)", text.strip())
    if not found:
        raise ApiError(400, "invalid", f"Invalid Content-Range: {text!r}")
    start, last, total = (None if number is None else int(number) for number in found.groups())
    promised = 0 if start is None or last is None else last - start + 1
    if promised != len(request.body):
        raise ApiError(400, "invalid", f"{len(request.body)} bytes came with Content-Range {text!r}")
    return start, total


def _boundary(request: Request) -> bytes:
    header = b"Content-Type: " + request.headers.get("content-type", "").encode()
    boundary = BytesParser().parsebytes(header + b"\n\n").get_boundary()
    if boundary is None:
        raise ApiError(400, "badRequest", "A multipart body needs a boundary")
    return boundary.encode()


def _related(request: Request) -> tuple[dict[str, Any], bytes]:
    """The metadata and the data of a multipart/related upload.

    The data may hold anything, so it ends at the last boundary; and gcsfs' lines end in LF, others' in CR LF, so
    what ends the data is what ended the first line.
    """
    boundary = b"--" + _boundary(request)
    end_of_line = b"\r\n" if request.body.split(b"\n", 1)[0].endswith(b"\r") else b"\n"
    try:
        _, metadata, rest = request.body.split(boundary + end_of_line, 2)
        data, _ = rest.rsplit(end_of_line + boundary + b"--", 1)
        content_type, data = _without_headers(data, end_of_line)
        asked = json.loads(_without_headers(metadata, end_of_line)[1])
    except ValueError as error:
        raise ApiError(400, "badRequest", f"Malformed multipart body: {error}") from error
    return {"contentType": content_type, **asked}, data


def _without_headers(part: bytes, end_of_line: bytes) -> tuple[str, bytes]:
    head, separator, body = part.partition(end_of_line * 2)
    if not separator:
        raise ValueError("a part has no empty line after its headers")
    return BytesParser().parsebytes(head + b"\n\n").get_content_type(), body


def _mixed(request: Request) -> list[Request]:
    """The requests in a batch."""
    head = f"Content-Type: {request.headers.get('content-type', '')}\r\n\r\n".encode()
    parts = list(BytesParser().parsebytes(head + request.body).walk())[1:]
    if not 1 <= len(parts) <= 100:
        raise ApiError(400, "badRequest", f"A batch of {len(parts)} requests; between 1 and 100 are allowed.")
    found = []
    for part in parts:
        first, _, rest = str(part.get_payload()).lstrip().partition("\n")
        method, target = first.split()[:2]
        inner = Parser().parsestr(rest)
        headers = {key.lower(): value for key, value in inner.items()}
        headers["content-id"] = part.get("Content-ID", "<>")
        body = str(inner.get_payload()).encode()
        found.append(Request(method, target.removeprefix(request.base), headers, body, request.base))
    return found
