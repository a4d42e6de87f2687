"""The programs that the last life of a run needed, loaded while the next one restores its state and traces its step.

Loading is left to XLA's threads, and takes as long as tracing a small model. JAX asks for a program by its key, when it
has been traced and lowered; one that has been loaded for the same key, options and devices by then is the answer.
"""

from __future__ import annotations

import base64
import json
import logging
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
from jax._src import compilation_cache  # private: JAX loads a program only when it has been traced
from jax._src.lib import xla_client  # type: ignore[attr-defined]

from torchorbax._src.run.compile_cache import ProgramCache

_logger = logging.getLogger(__name__)

SMALLEST_BYTES = 16 << 10
"""Smaller programs are loaded in no time."""

_MOST = 16
"""Programs loaded ahead: those of a training step, and of what is around it."""


class Use(NamedTuple):
    """What a program is loaded for.

    Attributes:
        key: JAX's key of the program.
        options: XLA's options, serialized.
        devices: the ids of the devices.
    """

    key: str
    options: bytes
    devices: tuple[int, ...]


class ProgramsAhead:
    """The programs of one run.

    Args:
        cache: where they are.
        path: the run's path.
    """

    def __init__(self, cache: ProgramCache, path: str) -> None:
        self._cache = cache
        self._name = f"used by {path}"
        self._lock = threading.Lock()
        self._used: dict[Use, None] = {}
        self._loading: dict[Use, Future[Any]] = {}

    def start(self) -> None:
        """Begin to load what the last life has used, on a thread of its own."""
        uses = self._last_used()
        if not uses:
            return
        pool = ThreadPoolExecutor(1, thread_name_prefix="torchorbax-programs")
        self._loading = {use: pool.submit(self._load, use) for use in uses}
        pool.shutdown(wait=False)

    def take(self, use: Use) -> Any:
        """What JAX gets for a program that is being loaded; None if it is not. Takes note that the run needs it."""
        with self._lock:
            self._used[use] = None
            loading = self._loading.pop(use, None)
        if loading is None:
            return None
        if (error := loading.exception()) is not None:
            _logger.info("a program of the last start could not be loaded ahead: %r", error)
            return None
        return loading.result()

    def finish(self) -> None:
        """The first step is complete: let go what it did not need, and write down for the next life what it did."""
        with self._lock:
            self._loading.clear()
            used = [use for use in self._used if self._cache.size(use.key) >= SMALLEST_BYTES][:_MOST]
        entries = [[use.key, base64.b64encode(use.options).decode(), use.devices] for use in used]
        self._cache.put(self._name, json.dumps(entries).encode())

    def _last_used(self) -> list[Use]:
        content = self._cache.get(self._name)
        if content is None:
            return []
        return [Use(key, base64.b64decode(text), tuple(ids)) for key, text, ids in json.loads(content)]

    def _load(self, use: Use) -> Any:
        there = {device.id: device for device in jax.local_devices()}
        devices = xla_client.DeviceList(tuple(there[index] for index in use.devices))
        options = xla_client.CompileOptions.ParseFromString(use.options)
        return _load_from_cache(use.key, options, jax.local_devices()[0].client, devices)


_load_from_cache = compilation_cache.get_executable_and_time
_current: ProgramsAhead | None = None
"""The run that was opened last: JAX's programs are those of the process."""


def load_ahead(path: str) -> ProgramsAhead | None:
    """Begin to load the programs that the last life of the run at `path` has used.

    Returns:
        To be told of the end of the first step; None if no programs are kept, or there are several processes, which may
        not have the same programs.
    """
    global _current
    cache = compilation_cache._cache
    if not isinstance(cache, ProgramCache) or jax.process_count() > 1:
        return None
    setattr(compilation_cache, "get_executable_and_time", _loaded_ahead_or_now)  # noqa: B010  # to mypy, it is for ever
    _current = ProgramsAhead(cache, path)
    _current.start()
    return _current


def _loaded_ahead_or_now(key: str, options: Any, backend: Any, devices: Any) -> Any:
    """What JAX calls to look a program up."""
    use = Use(key, options.SerializeAsString(), tuple(device.id for device in devices))
    loaded = None if _current is None else _current.take(use)
    return loaded if loaded is not None else _load_from_cache(key, options, backend, devices)
