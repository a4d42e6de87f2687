"""Buckets, objects and unfinished uploads of the test server for gs://, in memory and, if asked, on disk.

Every change is made under one lock: preconditions are checked and the change is made as one, as Cloud Storage promises.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import google_crc32c

CHUNK = 256 * 1024
"""Every part of a resumable upload but the last is a multiple of this many bytes."""


class ApiError(Exception):
    """An answer that is no success, in Cloud Storage's words."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status, self.reason, self.message = status, reason, message


@dataclass(frozen=True)
class Object:
    """One generation of an object. A composed one has no MD5, as in Cloud Storage."""

    bucket: str
    name: str
    data: bytes = field(repr=False)
    size: int
    generation: int  # microseconds since 1970, as in Cloud Storage, and thus the time of creation, too
    metageneration: int
    updated: int
    crc32c: str
    md5: str | None
    attributes: Mapping[str, Any]  # contentType, metadata, ...: what the client chose

    @property
    def etag(self) -> str:
        """Changes with the contents and with the metadata."""
        return base64.b64encode(f"{self.generation}/{self.metageneration}".encode()).decode()


@dataclass(frozen=True)
class Conditions:
    """Preconditions of one request about one object; generation 0 is an object that does not exist."""

    match: int | None = None
    not_match: int | None = None
    meta_match: int | None = None
    meta_not_match: int | None = None

    @classmethod
    def of(cls, query: Mapping[str, str], prefix: str = "if") -> Conditions:
        """Those that a request's parameters name."""
        names = ("GenerationMatch", "GenerationNotMatch", "MetagenerationMatch", "MetagenerationNotMatch")
        try:
            return cls(*(int(query[prefix + name]) if prefix + name in query else None for name in names))
        except ValueError as error:
            raise ApiError(400, "invalidParameter", f"Invalid precondition: {error}") from error

    def check(self, current: Object | None, *, reading: bool = False) -> None:
        """Raise 412 if one does not hold; 304 if a reader has this generation already."""
        generation, metageneration = (current.generation, current.metageneration) if current else (0, 0)
        if self.match not in (None, generation) or self.meta_match not in (None, metageneration):
            raise _not_met(412)
        if self.not_match == generation or (current and self.meta_not_match == metageneration):
            raise _not_met(304 if reading else 412)


ALWAYS = Conditions()


@dataclass
class Upload:
    """A resumable upload; once finished, it says so for ever."""

    id: str
    bucket: str
    name: str
    conditions: Conditions
    attributes: dict[str, Any]
    hashes: dict[str, str]
    data: bytearray = field(default_factory=bytearray, repr=False)
    result: Object | None = None


@dataclass(frozen=True)
class Page:
    """One page of a listing."""

    items: list[Object]
    prefixes: list[str]
    next_token: str | None


class Store:
    """All state of a server. With `root`, what has been acknowledged outlives a killed process."""

    def __init__(self, root: Path | None = None) -> None:
        self._lock = threading.RLock()
        self._root = root
        self._buckets: dict[str, dict[str, Object]] = {}
        self._uploads: dict[str, Upload] = {}
        self._last_generation = 0
        if root is not None:
            self._load(root)

    # Buckets

    def create_bucket(self, bucket: str, *, exist_ok: bool = False) -> None:
        with self._lock:
            if bucket in self._buckets:
                if exist_ok:
                    return
                raise ApiError(409, "conflict", "Your previous request to create the named bucket succeeded.")
            if self._root is not None:
                (self._root / bucket).mkdir()
            self._buckets[bucket] = {}

    def delete_bucket(self, bucket: str) -> None:
        with self._lock:
            if self.objects(bucket):
                raise ApiError(409, "conflict", "The bucket you tried to delete is not empty.")
            if self._root is not None:
                (self._root / bucket).rmdir()
            del self._buckets[bucket]

    def buckets(self) -> list[str]:
        with self._lock:
            return sorted(self._buckets)

    def objects(self, bucket: str) -> dict[str, Object]:
        """Name to object; 404 if there is no such bucket."""
        if bucket not in self._buckets:
            raise ApiError(404, "notFound", "The specified bucket does not exist.")
        return self._buckets[bucket]

    # Objects

    def get(self, bucket: str, name: str, conditions: Conditions = ALWAYS, generation: int | None = None) -> Object:
        with self._lock:
            found = self._current(bucket, name, generation)
            conditions.check(found, reading=True)
            return found

    def put(
        self,
        bucket: str,
        name: str,
        data: bytes,
        attributes: Mapping[str, Any],
        conditions: Conditions = ALWAYS,
        hashes: Mapping[str, str] | None = None,
        *,
        composed: bool = False,
    ) -> Object:
        """A new generation. `hashes` are what the client says that the data has."""
        crc32c = base64.b64encode(google_crc32c.value(data).to_bytes(4, "big")).decode()
        md5 = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        for kind, expected in (hashes or {}).items():
            if expected != (found := {"crc32c": crc32c, "md5": md5}[kind]):
                message = f"Provided {kind} hash '{expected}' doesn't match calculated hash '{found}'."
                raise ApiError(400, "invalid", message)
        with self._lock:
            conditions.check(self.objects(bucket).get(name))
            new = self._next_generation()
            made = Object(
                bucket, name, data, len(data), new, 1, new, crc32c, None if composed else md5, dict(attributes)
            )
            self._keep(made)
            return made

    def patch(self, bucket: str, name: str, attributes: Mapping[str, Any], conditions: Conditions) -> Object:
        """The same contents with other metadata: None removes an entry."""
        with self._lock:
            old = self._current(bucket, name)
            conditions.check(old)
            merged = {**old.attributes, **attributes}
            if isinstance(attributes.get("metadata"), dict):
                merged["metadata"] = _merged(old.attributes.get("metadata") or {}, attributes["metadata"])
            changed = replace(
                old,
                metageneration=old.metageneration + 1,
                updated=self._next_generation(),
                attributes={key: value for key, value in merged.items() if value is not None},
            )
            self._keep(changed)
            return changed

    def delete(self, bucket: str, name: str, conditions: Conditions = ALWAYS, generation: int | None = None) -> None:
        with self._lock:
            conditions.check(self._current(bucket, name, generation))
            if self._root is not None:
                self._file(bucket, name).unlink()
            del self._buckets[bucket][name]

    def copy(
        self,
        source: tuple[str, str],
        to: tuple[str, str],
        conditions: Conditions,
        source_conditions: Conditions,
        generation: int | None,
        *,
        move: bool = False,
    ) -> Object:
        with self._lock:
            found = self._current(*source, generation)
            source_conditions.check(found)
            made = self.put(*to, found.data, found.attributes, conditions, composed=found.md5 is None)
            if move and source != to:
                self.delete(*source)
            return made

    def compose(
        self, bucket: str, name: str, sources: list[dict[str, Any]], attributes: dict[str, Any], conditions: Conditions
    ) -> Object:
        with self._lock:
            parts = []
            for source in sources:
                part = self._current(bucket, source["name"], _number(source.get("generation")))
                Conditions.of(source.get("objectPreconditions", {})).check(part)
                parts.append(part.data)
            return self.put(bucket, name, b"".join(parts), attributes, conditions, composed=True)

    def page(
        self, bucket: str, prefix: str, delimiter: str, limit: int, token: str | None, start: str, end: str | None
    ) -> Page:
        """One page in the order of names. Objects and prefixes count alike, and no prefix comes twice."""
        items: list[Object] = []
        prefixes: list[str] = []
        last = base64.urlsafe_b64decode(token).decode() if token else None
        with self._lock:
            objects = self.objects(bucket)
            names = sorted(name for name in objects if name.startswith(prefix) and start <= name)
            for name in names:
                if end is not None and name >= end:
                    break
                cut = name.find(delimiter, len(prefix)) if delimiter else -1
                shown = name if cut < 0 else name[: cut + len(delimiter)]
                if (last is not None and shown <= last) or (prefixes and shown == prefixes[-1]):
                    continue  # a prefix sorts before all that it stands for, so this leaves those out, too
                if len(items) + len(prefixes) == limit:
                    shown_last = max([item.name for item in items[-1:]] + prefixes[-1:])
                    return Page(items, prefixes, base64.urlsafe_b64encode(shown_last.encode()).decode())
                if cut < 0:
                    items.append(objects[name])
                else:
                    prefixes.append(shown)
        return Page(items, prefixes, None)

    # Resumable uploads

    def start_upload(
        self,
        bucket: str,
        name: str,
        conditions: Conditions,
        attributes: dict[str, Any],
        hashes: dict[str, str],
    ) -> Upload:
        with self._lock:
            conditions.check(self.objects(bucket).get(name))
            upload = Upload(uuid.uuid4().hex, bucket, name, conditions, attributes, hashes)
            self._keep_upload(upload)
            return upload

    def upload(self, id: str) -> Upload:
        with self._lock:
            if id not in self._uploads:
                raise ApiError(404, "notFound", "No such upload session.")
            return self._uploads[id]

    def append(self, id: str, data: bytes, start: int | None, total: int | None) -> Upload:
        """Add what is new in `data`, which begins at `start`; at `total` bytes, the object is there. None: unknown."""
        with self._lock:
            upload = self.upload(id)
            if upload.result is not None:
                return upload
            have = len(upload.data)
            if start is not None:
                if start > have:
                    raise ApiError(400, "invalid", f"Bytes {have}-{start - 1} were never sent.")
                if total != start + len(data) and len(data) % CHUNK:
                    raise ApiError(400, "invalid", f"A part of {len(data)} bytes is no multiple of {CHUNK}.")
                upload.data += data[have - start :]  # the rest was sent before, and the acknowledgement was lost
            if total is not None and len(upload.data) > total:
                del upload.data[have:]
                raise ApiError(400, "invalid", f"More than {total} bytes were sent.")
            if total == len(upload.data):
                upload.result = self.put(
                    upload.bucket, upload.name, bytes(upload.data), upload.attributes, upload.conditions, upload.hashes
                )
                upload.data.clear()
            self._keep_upload(upload)
            return upload

    def cancel_upload(self, id: str) -> None:
        with self._lock:
            self.upload(id)
            del self._uploads[id]
            if self._root is not None:
                (self._root / _UPLOADS / id).unlink()

    # Both places

    def _current(self, bucket: str, name: str, generation: int | None = None) -> Object:
        found = self.objects(bucket).get(name)
        if found is None or generation not in (None, found.generation):  # older generations are not kept
            raise ApiError(404, "notFound", f"No such object: {bucket}/{name}")
        return found

    def _next_generation(self) -> int:
        self._last_generation = max(self._last_generation + 1, time.time_ns() // 1000)
        return self._last_generation

    def _keep(self, made: Object) -> None:
        if self._root is not None:
            header = {key: value for key, value in vars(made).items() if key != "data"}
            _write(self._file(made.bucket, made.name), header, made.data)
        self._buckets[made.bucket][made.name] = made

    def _keep_upload(self, upload: Upload) -> None:
        if self._root is not None:
            result = upload.result
            header = {**vars(upload), "conditions": asdict(upload.conditions)}
            header["result"] = result and {key: value for key, value in vars(result).items() if key != "data"}
            del header["data"]
            _write(self._root / _UPLOADS / upload.id, header, bytes(upload.data))
        self._uploads[upload.id] = upload

    def _file(self, bucket: str, name: str) -> Path:
        assert self._root is not None
        return self._root / bucket / hashlib.sha256(name.encode()).hexdigest()  # a name may be longer than a file's

    def _load(self, root: Path) -> None:
        (root / _UPLOADS).mkdir(parents=True, exist_ok=True)
        for header, data in _records(root / _UPLOADS):
            result = header.pop("result")
            upload = Upload(**{**header, "conditions": Conditions(**header["conditions"]), "data": bytearray(data)})
            upload.result = result and Object(**result, data=b"")
            self._uploads[upload.id] = upload
        for folder in root.iterdir():
            if folder.name == _UPLOADS:
                continue
            found = (Object(**header, data=data) for header, data in _records(folder))
            self._buckets[folder.name] = {one.name: one for one in found}
            newest = (max(one.generation, one.updated) for one in self._buckets[folder.name].values())
            self._last_generation = max(self._last_generation, *newest, 0)


_UPLOADS = ".uploads"  # no bucket's name begins with a dot
_TEMPORARY = ".tmp"


def _write(path: Path, header: Mapping[str, Any], data: bytes) -> None:
    """A line of JSON and the contents, all or nothing. No fsync: processes are killed here, not machines."""
    temporary = path.with_name(path.name + _TEMPORARY)
    with temporary.open("wb") as file:
        file.write(json.dumps(header).encode() + b"\n")
        file.write(data)
    os.replace(temporary, path)


def _records(folder: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    for path in folder.iterdir():
        if path.name.endswith(_TEMPORARY):
            path.unlink()  # the process was killed while it wrote; nobody was told that it is there
        else:
            header, _, data = path.read_bytes().partition(b"\n")
            yield json.loads(header), data


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in {**old, **new}.items() if value is not None}


def _number(text: str | int | None) -> int | None:
    return None if text is None else int(text)


def _not_met(status: int) -> ApiError:
    return ApiError(status, "conditionNotMet", "At least one of the pre-conditions you specified did not hold.")
