"""What is different about gs://: credentials and access, time limits, and the meaning of errors.

Array data goes through TensorStore; everything else goes through gcsfs. Both retry a request when it
fails with 408, 429 or 5xx or when the connection breaks: TensorStore 32 times, for a quarter of an hour; gcsfs 6 times,
for half a minute. For a server that does not answer at all, gcsfs waits for ever. Time limits are set here.
"""

from __future__ import annotations

import asyncio
import importlib.util
import re
import uuid
from typing import Any

import tensorstore as ts

from torchorbax.errors import ConfigError

_LONGEST_DELAY_S = 32.0
"""The longest delay between two retries."""
_FORBIDDEN = "#?[]*"
"""Characters that gcsfs or TensorStore take for something else than a part of a name."""
_LONGEST_LINE = 400
"""The length at which an error is cut. TensorStore appends the server's whole answer to its messages."""


def is_uri(path: str) -> bool:
    """Is it a URI, and not a path on a local disk?"""
    return "://" in path


def check_supported(path: str) -> None:
    """Raise ConfigError if a URI is not a `gs://` URI, or if the packages that it needs are not installed."""
    if not path.startswith("gs://"):
        raise ConfigError(f"{path}: only local folders and gs:// are supported; mount other storage as a folder")
    if not path.removeprefix("gs://").split("/")[0]:
        raise ConfigError(f"{path}: there is no bucket in it; write gs://bucket/folder")
    if found := [character for character in _FORBIDDEN if character in path]:
        raise ConfigError(f"{path}: a name under gs:// cannot have the character {found[0]!r}; choose another")
    for module in ("gcsfs", "google.cloud.storage"):
        if not _installed(module):
            raise ConfigError(f"{path}: gs:// needs {module}: pip install 'torchorbax[gcs]'")


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


def prepare(path: str, timeout_s: float) -> Any:
    """Gcsfs's file system, with a time limit on its requests and without its cache of listings.

    The limit is for one request with all its retries. The cache never expires, so gcsfs would not see the steps that
    another process saves.

    Both apply to the instance of `GCSFileSystem` that etils uses, which the whole process shares. Of several limits the
    shortest holds, so that a `load` with a longer limit does not lengthen that of a run.

    Args:
        path: the URI, for the error.
        timeout_s: the limit, in seconds.

    Returns:
        The `GCSFileSystem`.

    Raises:
        ConfigError: there are no credentials.
    """
    import fsspec

    try:
        # With the arguments that etils uses, because fsspec returns the same instance for the same arguments.
        system: Any = fsspec.filesystem("gcs", finalize_on_close=True)
    except Exception as error:  # google-auth raises errors of its own types
        raise refused(path, error) from error
    system.dircache.use_listings_cache = False
    system.invalidate_cache()

    limit_s = system._torchorbax_limit_s = min(timeout_s, getattr(system, "_torchorbax_limit_s", timeout_s))

    async def request(*args: Any, **kwargs: Any) -> Any:
        return await asyncio.wait_for(type(system)._request(system, *args, **kwargs), limit_s)

    system._request = request
    return system


def context(spec: dict[str, Any], timeout_s: float) -> ts.Context:
    """A TensorStore context with a limit on the time that it spends on retries.

    Args:
        spec: the context's spec, without the limit.
        timeout_s: the approximate limit. TensorStore counts retries, with delays that double up to 32 s.
    """
    first = min(1.0, timeout_s / 8)
    retries, delay, total = 0, first, 0.0
    while total + delay <= timeout_s:
        total += delay
        retries += 1
        delay = min(2 * delay, _LONGEST_DELAY_S)
    limits = {"max_retries": retries, "initial_delay": f"{first:g}s", "max_delay": f"{_LONGEST_DELAY_S:g}s"}
    return ts.Context({**spec, "gcs_request_retries": limits})


def error_line(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, TimeoutError | asyncio.TimeoutError):
        return "no good answer in time (storage_timeout_s)"
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"[:_LONGEST_LINE]


def check_access(path: str, timeout_s: float) -> None:
    """Check that TensorStore can write below a URI.

    Raises:
        ConfigError: it cannot; the message says what to do.
    """
    bucket, _, folder = path.removeprefix("gs://").partition("/")
    spec = {"driver": "gcs", "bucket": bucket, "path": f"{folder}/".lstrip("/")}
    try:
        store = ts.KvStore.open(spec, context=context({}, timeout_s)).result(timeout=timeout_s)
        probe = f".torchorbax-probe-{uuid.uuid4().hex}"
        store.write(probe, b"").result(timeout=timeout_s)
        store.delete_range(ts.KvStore.KeyRange(probe, probe + "\0")).result(timeout=timeout_s)
    except Exception as error:  # TensorStore's errors have various types
        raise refused(path, error) from error


def refused(path: str, error: BaseException) -> ConfigError:
    """The error that says why a URI cannot be used, and what to do about it."""
    # Without URLs and the path, which may contain the numbers that are looked for.
    message = re.sub(r"\w+://\S*", "", str(error)).replace(path.removeprefix("gs://"), "")
    text = f"{type(error).__module__} {message}".lower()
    bucket = path.removeprefix("gs://").split("/")[0]
    advice = ""
    if any(word in text for word in ("credential", "google.auth", "401", "unauthenticated", "anonymous")):
        advice = "; for credentials, run: gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS"
    elif "403" in text or "forbidden" in text or "permission" in text:
        advice = f"; this account may not write there: grant it roles/storage.objectUser on gs://{bucket}"
    elif "404" in text or "not found" in text or "not_found" in text or isinstance(error, FileNotFoundError):
        advice = f"; is there a bucket {bucket}? To create it: gcloud storage buckets create gs://{bucket}"
    return ConfigError(f"{path} cannot be used for a run: {error_line(error)}{advice}")
