"""A simulated bucket of Cloud Storage, below the real `GcsFiles`: requests, and the retries of a client like gcsfs.

It is strongly consistent, as Cloud Storage is: what has been written is read and listed from then on. A request may get
lost, and so may its answer; the client makes it again, with the same precondition. One that the client has given up may
still arrive.
"""

from __future__ import annotations

import base64
import errno
import json
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import google_crc32c

from tests.simulation.scheduler import NoAnswerError, Scheduler

T = TypeVar("T")
_RETRY_S = 2.0
_OWNER = ".torchorbax-owner"


class Bucket:
    """The objects of a bucket.

    Attributes:
        objects: content and generation by name.
        changed: called with the name of what has been changed.
    """

    def __init__(self, scheduler: Scheduler, objects: dict[str, tuple[bytes, int]]) -> None:
        self.scheduler = scheduler
        self.objects = objects
        self.changed: Callable[[str], None] = lambda name: None
        self._generation = max((generation for _, generation in objects.values()), default=0)

    def put(self, name: str, content: bytes, generation: int | None = None) -> int:
        """Write an object if it has this generation, 0 if there is to be none; returns the new one."""
        if generation is not None and self.objects.get(name, (b"", 0))[1] != generation:
            raise FileExistsError(errno.EEXIST, "conditionNotMet", name)
        self._generation += 1
        self.objects[name] = content, self._generation
        self.changed(name)
        return self._generation

    def get(self, name: str) -> tuple[bytes, int]:
        """An object and its generation."""
        if name not in self.objects:
            raise FileNotFoundError(errno.ENOENT, "notFound", name)
        return self.objects[name]

    def delete(self, name: str) -> None:
        """Delete an object."""
        self.get(name)
        del self.objects[name]
        self.changed(name)

    def below(self, prefix: str) -> list[str]:
        """The names that begin so."""
        return sorted(name for name in self.objects if name.startswith(prefix))


class SimulatedGcs:
    """What is used of gcsfs's `GCSFileSystem`."""

    _location = ""
    loop = None

    def __init__(self, bucket: Bucket, timeout_s: float) -> None:
        self._bucket = bucket
        self._timeout_s = timeout_s

    def call(self, method: str, path: str, *args: Any, **query: Any) -> Any:
        if "copyTo" in path:
            return self._copied(args[1], args[3])
        if method == "POST":
            return self._uploaded(query)
        if path == "b/{}/o":
            return self._asked(f"list {query['prefix']}", lambda: ({}, self._listed(**query)))
        name = args[1]
        if method == "DELETE":
            return self._asked(f"unlink {name}", lambda: self._bucket.delete(name))
        if query.get("alt") != "media":
            return self._asked(f"exists {name}", lambda: ({}, json.dumps({"name": self._bucket.get(name) and name})))

        def media() -> tuple[dict[str, str], bytes]:
            content, generation = self._bucket.get(name)
            return {"x-goog-generation": str(generation)}, content

        return self._asked(f"{'look' if name.endswith(_OWNER) else 'read'} {name}", media)

    def pipe_file(self, path: str, content: bytes, mode: str = "overwrite") -> None:
        name = path.partition("/")[2]
        if mode == "create":
            self._asked(f"create {name}", lambda: self._bucket.put(name, content, 0))
        else:
            self._asked(f"put {name}", lambda: self._bucket.put(name, content))

    async def _rm_files(self, paths: list[str]) -> list[Exception | None]:
        outcomes: list[Exception | None] = []
        for path in paths:
            name = path.partition("/")[2]
            try:
                self._asked(f"unlink {name}", lambda name=name: self._bucket.delete(name))  # type: ignore[misc]  # mypy cannot infer a lambda with a default
            except FileNotFoundError:
                outcomes.append(OSError("No such object"))
            else:
                outcomes.append(None)
        return outcomes

    async def _call(self, method: str, path: str, bucket: str, name: str, to: str, headers: Any) -> None:
        def act() -> None:
            content, _ = self._bucket.get(name)
            self._bucket.put(to, content)
            self._bucket.delete(name)

        self._asked(f"move {name} {to}", act)

    def _copied(self, name: str, to: str) -> Any:
        return self._asked(f"copy {name} {to}", lambda: self._bucket.put(to, self._bucket.get(name)[0], 0))

    def _uploaded(self, query: dict[str, Any]) -> dict[str, int]:
        name, generation = query["name"], int(query["ifGenerationMatch"])
        return {"generation": self._asked(f"swap {name}", lambda: self._bucket.put(name, query["data"], generation))}

    def _listed(self, prefix: str, fields: str, delimiter: str = "") -> str:
        names, items = set(), []
        for name in self._bucket.below(prefix):
            rest = name.removeprefix(prefix)
            if delimiter and delimiter in rest:
                names.add(f"{prefix}{rest.partition(delimiter)[0]}/")
                continue
            content, _ = self._bucket.objects[name]
            crc = base64.b64encode(google_crc32c.value(content).to_bytes(4, "big")).decode()
            items.append({"name": name, "size": str(len(content)), "crc32c": crc})
        return json.dumps({"items": items, "prefixes": sorted(names)})

    def _asked(self, label: str, act: Callable[[], T]) -> T:
        scheduler = self._bucket.scheduler
        deadline = scheduler.now + self._timeout_s
        while True:
            try:
                left = max(0.0, deadline - scheduler.now)
                return scheduler.request("objects", label, act, wait_s=left)
            except NoAnswerError:
                if scheduler.now >= deadline:
                    raise TimeoutError from None
                scheduler.sleep(_RETRY_S)


def finished(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that waits for nothing but simulated requests."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]  # what the coroutine has returned
    raise RuntimeError("it waits for something else")


class Sequential:
    """What is used of `asyncio` and `fsspec` where requests are made at the same time: here, one after the other."""

    TimeoutError = TimeoutError

    class asyn:
        @staticmethod
        def sync(loop: object, function: Callable[[], Coroutine[Any, Any, T]]) -> T:
            return finished(function())

    @staticmethod
    async def gather(*requests: Coroutine[Any, Any, T]) -> list[T]:
        return [await request for request in requests]
