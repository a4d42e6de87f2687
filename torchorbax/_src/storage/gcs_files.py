"""The objects below a run's path under gs://, by requests of Cloud Storage's JSON API that gcsfs makes.

Object storage has no folders: a folder is what is common to the names of objects.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import fsspec.asyn

from torchorbax._src.format.manifest import FileDigest
from torchorbax._src.storage import gcs
from torchorbax._src.storage.at_once import at_once
from torchorbax._src.storage.files import Entry
from torchorbax.errors import StorageError, TorchorbaxError

_BATCH = 100  # the most deletions in one request
_NO_SUCH_RANGE = 416


class GcsFiles:
    """The objects below a `gs://` URI.

    Args:
        root: the URI.
        timeout_s: how long to wait for an answer, retries included.
    """

    def __init__(self, root: str, timeout_s: float) -> None:
        self.root = root
        self._bucket, _, self._prefix = root.removeprefix("gs://").partition("/")
        self._system = gcs.prepare(root, timeout_s)

    def entries(self, folder: str = "") -> list[Entry]:
        """See `Files.entries`."""
        prefix = self._name(folder) + "/" if self._name(folder) else ""
        found: list[Entry] = []
        for page in self._pages(prefix=prefix, delimiter="/", fields="items(name),prefixes,nextPageToken"):
            found += [Entry(name.removeprefix(prefix).rstrip("/"), "folder") for name in page.get("prefixes", ())]
            names = (item["name"].removeprefix(prefix) for item in page.get("items", ()))
            found += [Entry(name, "file") for name in names if name]
        return found

    def exists(self, path: str) -> bool:
        """See `Files.exists`."""
        return any(at_once([lambda: self.is_file(path), lambda: bool(self.entries(path))]))

    def is_file(self, path: str) -> bool:
        """See `Files.is_file`."""
        with self._translated():
            try:
                self._call("GET", "b/{}/o/{}", self._bucket, self._name(path), fields="name")
            except FileNotFoundError:
                return False
            return True

    def sizes(self, folder: str) -> dict[str, int]:
        """See `Files.sizes`."""
        return {path: nbytes for path, (nbytes, _) in self._listed(folder).items()}

    def digests(self, folder: str, paths: Collection[str] | None = None) -> dict[str, FileDigest]:
        """See `Files.digests`. Cloud Storage knows them; nothing is read."""
        listed = self._listed(folder)
        if paths is None:
            return listed
        if missing := [path for path in paths if path not in listed]:
            raise FileNotFoundError(f"{self.root}/{folder}/{missing[0]}")
        return {path: listed[path] for path in paths}

    def _listed(self, folder: str) -> dict[str, FileDigest]:
        """All objects below a folder."""
        prefix = f"{self._name(folder)}/"
        return {
            item["name"].removeprefix(prefix): (int(item["size"]), base64.b64decode(item["crc32c"]).hex())
            for page in self._pages(prefix=prefix, fields="items(name,size,crc32c),nextPageToken")
            for item in page.get("items", ())
            if not item["name"].endswith("/")
        }

    def read(self, path: str, most_bytes: int) -> bytes:
        """See `Files.read`."""
        with self._translated():
            # One byte more than is allowed says that there are more.
            headers = {"Range": f"bytes=0-{most_bytes}"}
            try:
                _, content = self._call(
                    "GET", "b/{}/o/{}", self._bucket, self._name(path), alt="media", headers=headers
                )
            except Exception as error:
                if getattr(error, "code", None) != _NO_SUCH_RANGE:
                    raise
                content = b""  # an empty object has no first byte
        if len(content) > most_bytes:
            raise ValueError(f"{path} has more than {most_bytes} bytes")
        return bytes(content)

    def write(self, path: str, content: bytes) -> None:
        """See `Files.write`."""
        with self._translated():
            self._system.pipe_file(f"{self._bucket}/{self._name(path)}", content)

    def create(self, path: str, content: bytes) -> None:
        """See `Files.create`."""
        try:
            with self._translated():
                self._system.pipe_file(f"{self._bucket}/{self._name(path)}", content, mode="create")
        except FileExistsError:
            # It may be our own: the answer was lost, and the request was made again.
            if self.read(path, len(content) + 1) != content:
                raise

    def copy(self, folder: str, path: str, to: str) -> None:
        """Copy an object below a folder to a name that is free, in one request, whatever its size.

        Raises:
            FileNotFoundError: there is no such object.
            FileExistsError: there is another object of the new name.
        """
        names = [self._name(f"{folder}/{name}") for name in (path, to)]
        try:
            with self._translated():
                self._call(
                    "POST",
                    "b/{}/o/{}/copyTo/b/{}/o/{}",
                    self._bucket,
                    names[0],
                    self._bucket,
                    names[1],
                    ifGenerationMatch="0",
                    headers={"Content-Type": "application/json"},
                )
        except FileExistsError:
            # It may be our own: the answer was lost, and the request was made again.
            if len(set(self.digests(folder, (path, to)).values())) > 1:
                raise

    def move(self, folder: str, to: str) -> None:
        """See `Files.move`. Objects are renamed one by one."""
        names = sorted(self.sizes(folder))
        if not names:
            raise FileNotFoundError(f"{self.root}/{folder}")
        if self.exists(to):
            raise FileExistsError(f"{self.root}/{to}")
        with self._translated():
            self._gather(self._moved(f"{folder}/{name}", f"{to}/{name}") for name in names)

    async def _moved(self, name: str, to: str) -> None:
        await self._system._call(
            "POST",
            "b/{}/o/{}/moveTo/o/{}",
            self._bucket,
            self._name(name),
            self._name(to),
            headers={"Content-Type": "application/json"},
        )

    def read_generation(self, path: str) -> tuple[bytes, str]:
        """An object and its generation.

        Raises:
            FileNotFoundError: there is no such object.
        """
        with self._translated():
            headers, content = self._call("GET", "b/{}/o/{}", self._bucket, self._name(path), alt="media")
        return bytes(content), headers["x-goog-generation"]

    def write_generation(self, path: str, content: bytes, generation: str) -> str:
        """Replace an object of a generation, "0" if there is none; returns the new generation.

        Raises:
            FileExistsError: the object has another generation.
        """
        try:
            with self._translated():
                answer = self._call(
                    "POST",
                    f"{self._system._location}/upload/storage/v1/b/{self._bucket}/o",
                    uploadType="media",
                    name=self._name(path),
                    ifGenerationMatch=generation,
                    headers={"Content-Type": "application/json"},
                    data=content,
                    json_out=True,
                )
            return str(answer["generation"])
        except FileExistsError:
            # It may be our own: the answer was lost, and the request was made again.
            found, generation = self.read_generation(path)
            if found != content:
                raise
            return generation

    def delete_file(self, path: str) -> None:
        """See `Files.delete_file`."""
        with self._translated(), contextlib.suppress(FileNotFoundError):
            self._call("DELETE", "b/{}/o/{}", self._bucket, self._name(path))

    def delete_folder(self, folder: str) -> None:
        """See `Files.delete_folder`."""
        self._delete_objects([f"{folder}/{name}" for name in self.sizes(folder)])

    def flush(self, folder: str) -> None:
        """See `Files.flush`. An object is durable as soon as it has been written."""

    def flush_names(self) -> None:
        """See `flush`."""

    def _name(self, path: str) -> str:
        """The name of an object in the bucket."""
        return "/".join(part for part in (self._prefix, path) if part)

    def _pages(self, **query: str) -> Iterator[dict[str, Any]]:
        token: str | None = None
        while True:
            more = {"pageToken": token} if token else {}
            try:
                with self._translated():
                    _, content = self._call("GET", "b/{}/o", self._bucket, **query, **more)
            except FileNotFoundError:  # there is no such bucket
                return
            page: dict[str, Any] = json.loads(content)
            yield page
            token = page.get("nextPageToken")
            if token is None:
                return

    def _delete_objects(self, names: Sequence[str]) -> None:
        full = [f"{self._bucket}/{self._name(name)}" for name in names]
        with self._translated():
            batches = [full[start : start + _BATCH] for start in range(0, len(full), _BATCH)]
            for outcomes in self._gather(self._system._rm_files(batch) for batch in batches):
                for outcome in outcomes:
                    if isinstance(outcome, Exception) and "No such object" not in str(outcome):
                        raise outcome

    def _call(self, *args: Any, **query: Any) -> Any:
        return self._system.call(*args, **query)

    def _gather(self, requests: Iterable[Any]) -> list[Any]:
        """The answers to requests that are made at the same time."""

        async def gathered() -> list[Any]:
            return await asyncio.gather(*requests)

        answers: list[Any] = fsspec.asyn.sync(self._system.loop, gathered)
        return answers

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Translate all errors but those that say that something is, or is not, there."""
        try:
            yield
        except (FileNotFoundError, FileExistsError, TorchorbaxError):
            raise
        except Exception as error:  # gcsfs, aiohttp and google-auth raise errors of their own types
            raise StorageError(self.root, gcs.error_line(error)) from error
