"""What is different about gs://: who is asked, for how long, and what their errors mean.

Array data goes through TensorStore, all else through gcsfs (by way of etils). Both try again when a request fails with
408, 429 or 5xx or the connection breaks: TensorStore 32 times, for a quarter of an hour; gcsfs 6 times, for half a
minute, but for a server that is silent it waits for ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import re
from collections.abc import Iterator
from typing import Any

import tensorstore as ts

from torchorbax.errors import ConfigError, StorageError, TorchorbaxError

_LONGEST_DELAY_S = 32.0
PROBE = ".torchorbax-write-probe"
"""Written and deleted to see that one may."""
_LONGEST_LINE = 400  # TensorStore appends whole answers

_SAID_BY_TENSORSTORE = (
    "ABORTED",
    "CANCELLED",
    "DEADLINE_EXCEEDED",
    "INTERNAL",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "UNAUTHENTICATED",
    "UNAVAILABLE",
)
"""How errors of TensorStore begin that say nothing about the data. https://abseil.io/docs/cpp/guides/status-codes"""


def is_uri(path: str) -> bool:
    """Is it a URI, not a path on a local disk?"""
    return "://" in path


def check_supported(path: str) -> None:
    """Raise ConfigError if a URI is of another kind than gs://, or what it needs is not installed."""
    if not path.startswith("gs://"):
        raise ConfigError(f"{path}: only local folders and gs:// are supported; mount other storage as a folder")
    if not path.removeprefix("gs://").split("/")[0]:
        raise ConfigError(f"{path}: there is no bucket in it; write gs://bucket/folder")
    for module in ("gcsfs", "google.cloud.storage"):
        if not _installed(module):
            raise ConfigError(f"{path}: gs:// needs {module}: pip install 'torchorbax[gcs]'")


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a parent package
        return False


def prepare(path: str, timeout_s: float) -> None:
    """Let no request of gcsfs last longer, its repetitions included, and let it remember no listing.

    It would never learn of a step that another process has saved, for what it remembers never expires. All this is
    about the instance of `GCSFileSystem` that etils uses, for the whole process: of several limits the shortest counts,
    so that a `load` with its long one does not make a run patient.

    Raises:
        ConfigError: there are no credentials.
    """
    import fsspec

    try:
        system: Any = fsspec.filesystem("gcs", finalize_on_close=True)  # as etils asks for it: fsspec keeps instances
    except Exception as error:  # google-auth has errors of its own
        raise refused(path, error) from error
    system.dircache.use_listings_cache = False
    system.invalidate_cache()

    limit_s = system._torchorbax_limit_s = min(timeout_s, getattr(system, "_torchorbax_limit_s", timeout_s))

    async def request(*args: Any, **kwargs: Any) -> Any:
        return await asyncio.wait_for(type(system)._request(system, *args, **kwargs), limit_s)

    system._request = request


def context(spec: dict[str, Any], timeout_s: float) -> ts.Context:
    """TensorStore's resources, with a limit on how long it tries again.

    Args:
        spec: of the context otherwise.
        timeout_s: about; delays double from the first to 32 s.
    """
    first = min(1.0, timeout_s / 8)
    retries, delay, total = 0, first, 0.0
    while total + delay <= timeout_s:
        total += delay
        retries += 1
        delay = min(2 * delay, _LONGEST_DELAY_S)
    limits = {"max_retries": retries, "initial_delay": f"{first:g}s", "max_delay": f"{_LONGEST_DELAY_S:g}s"}
    return ts.Context({**spec, "gcs_request_retries": limits})


def is_unanswered(error: BaseException) -> bool:
    """Does an error say that the storage cannot be reached or refuses, and nothing about what is there?"""
    if isinstance(error, StorageError | TimeoutError | ConnectionError | asyncio.TimeoutError):
        return True
    package = type(error).__module__.partition(".")[0]
    if package in ("aiohttp", "gcsfs", "google", "requests", "urllib3"):
        return True
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError | FileExistsError):
        return error.errno is None  # of gcsfs: forbidden
    return isinstance(error, ValueError | NotImplementedError) and str(error).startswith(_SAID_BY_TENSORSTORE)


@contextlib.contextmanager
def answering(path: str) -> Iterator[None]:
    """Errors of a storage that does not answer as StorageError; all others as they are.

    Raises:
        StorageError: it does not.
    """
    try:
        yield
    except TorchorbaxError:
        raise
    except Exception as error:
        if is_uri(path) and is_unanswered(error):
            raise StorageError(path, told(error)) from error
        raise


def told(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, TimeoutError | asyncio.TimeoutError):
        return "no good answer in time (storage_timeout_s)"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"[:_LONGEST_LINE]


def check_access(path: str, timeout_s: float) -> None:
    """See that array data can be written below a URI.

    Raises:
        ConfigError: it cannot; says what to do.
    """
    bucket, _, folder = path.removeprefix("gs://").partition("/")
    spec = {"driver": "gcs", "bucket": bucket, "path": f"{folder}/".lstrip("/")}
    try:
        store = ts.KvStore.open(spec, context=context({}, timeout_s)).result(timeout=timeout_s)
        store.write(PROBE, b"").result(timeout=timeout_s)
        store.delete_range(ts.KvStore.KeyRange(PROBE, PROBE + "\0")).result(timeout=timeout_s)
    except Exception as error:  # TensorStore has its own words for everything
        raise refused(path, error) from error


def refused(path: str, error: BaseException) -> ConfigError:
    """What to say when a URI cannot be used."""
    said = re.sub(r"\w+://\S*", "", str(error)).replace(path.removeprefix("gs://"), "")  # a port may hold 403
    text = f"{type(error).__module__} {said}".lower()
    bucket = path.removeprefix("gs://").split("/")[0]
    advice = ""
    if any(word in text for word in ("credential", "google.auth", "401", "unauthenticated", "anonymous")):
        advice = "; for credentials, run: gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS"
    elif "403" in text or "forbidden" in text or "permission" in text:
        advice = f"; this account may not write there: grant it roles/storage.objectUser on gs://{bucket}"
    elif "404" in text or "not found" in text or "not_found" in text or isinstance(error, FileNotFoundError):
        advice = f"; is there a bucket {bucket}? To create it: gcloud storage buckets create gs://{bucket}"
    return ConfigError(f"{path} cannot be used for a run: {told(error)}{advice}")
