"""Compiled programs, kept on disk for the next life of a run.

JAX can keep what XLA has compiled and find it again in another process, by a key of the program, the options, the
devices and the versions. What is here is the place where it keeps them: JAX's own neither notices damage nor writes
whole files, and a warning of it would end a program that takes warnings for errors. An entry that was cut off, damaged
or made on another machine is no entry here, and a disk that is full costs a compilation.

Entries are machine code that this process will run. So they are in the user's own cache folder, and not beside the
steps: a run that a stranger has made may do no more than be refused.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import platform
import tempfile
from pathlib import Path

import jax
from jax._src import (
    compilation_cache,
)  # private: JAX has no public way to say where programs are kept, but for a folder
from jax._src.compilation_cache_interface import CacheInterface

from torchorbax.errors import ConfigError

_logger = logging.getLogger(__name__)

MOST_BYTES = 2 << 30
"""Above this, the programs go that were used longest ago."""

SHORTEST_S = 0.02
"""Programs that compile faster are not kept: to find one takes some milliseconds. JAX's default is a second, which is
longer than the steps of small models take."""

_JAX_DEFAULT_S = 1.0
_DIGEST_BYTES = hashlib.sha256().digest_size


def check_compile_cache(where: object) -> None:
    """Raise ConfigError unless `where` is a value of the option `compile_cache`."""
    if not isinstance(where, bool | str | os.PathLike) or where == "":
        raise ConfigError(f"compile_cache must be True, False or a folder, not {where!r}")
    if not isinstance(where, bool) and "://" in str(where):
        raise ConfigError(
            f"compile_cache must be a folder, not {where}; JAX itself can keep programs under a URI: set "
            "jax_compilation_cache_dir"
        )


def use_compile_cache(where: bool | str | os.PathLike[str]) -> None:
    """Have JAX keep this process's programs in a folder, and look for them there.

    It is a setting of the whole process. A cache that the program has set up for JAX itself is left alone.

    Args:
        where: a folder; True for the user's cache folder; False for none of ours.

    Raises:
        ConfigError: a folder is given, and JAX has one already or is told to keep no programs; or it cannot be used.
    """
    current = compilation_cache._cache
    ours = isinstance(current, ProgramCache)
    if where is False:
        if ours:
            compilation_cache.reset_cache()
        return
    configured = jax.config.values
    off = not configured["jax_enable_compilation_cache"]
    if off or configured["jax_compilation_cache_dir"] is not None or not (ours or current is None):
        if where is not True:
            why = "is turned off" if off else "has a folder already"
            raise ConfigError(f"compile_cache={where!r}: JAX's compilation cache {why}; leave one of the two out")
        return
    folder = _default_folder() if where is True else _given_folder(where)
    if folder is None:
        return
    if configured["jax_persistent_cache_min_compile_time_secs"] == _JAX_DEFAULT_S:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST_S)
    if not isinstance(current, ProgramCache) or current.folder != folder:
        compilation_cache._cache = ProgramCache(folder)


class ProgramCache(CacheInterface):
    """Compiled programs by their keys, in one folder. Never raises for what is wrong with the folder or an entry.

    Args:
        folder: where they are. Several processes may use it at once.
        most_bytes: how much it may hold.
    """

    def __init__(self, folder: Path, most_bytes: int = MOST_BYTES) -> None:
        self.folder = self._path = folder
        self._most_bytes = most_bytes
        self._room = 0  # bytes that may be written before the folder is looked through again
        self._has_warned = False

    def get(self, key: str) -> bytes | None:
        """A program, as `put` got it on a machine like this one; None if there is none, or none that is whole."""
        path = self._path_of(key)
        try:
            content = path.read_bytes()
            if content[:_DIGEST_BYTES] != hashlib.sha256(content[_DIGEST_BYTES:]).digest():
                _logger.info("%s is damaged, and compiled again", path)
                path.unlink()
                return None
            os.utime(path)  # says when it was used
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn(error)
            return None
        return content[_DIGEST_BYTES:]

    def size(self, key: str) -> int:
        """The bytes of an entry; 0 if there is none."""
        try:
            return self._path_of(key).stat().st_size
        except OSError:
            return 0

    def put(self, key: str, value: bytes) -> None:
        """Keep a program."""
        size = _DIGEST_BYTES + len(value)
        if size > self._most_bytes:
            return
        try:
            if size > self._room:
                self._make_room(size)
            self._room -= size
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".", delete=False) as partial:
                try:
                    partial.write(hashlib.sha256(value).digest() + value)
                    partial.flush()
                    os.replace(partial.name, self._path_of(key))
                except BaseException:
                    os.unlink(partial.name)
                    raise
        except OSError as error:
            self._warn(error)

    def _path_of(self, key: str) -> Path:
        # XLA compiles for the very processor, and machines of several kinds may share the folder.
        return self.folder / hashlib.sha256(_machine() + key.encode()).hexdigest()

    def _make_room(self, needed: int) -> None:
        """Delete what was used longest ago, leftovers of killed processes among it, until there is room."""
        room = max(needed, self._most_bytes // 16)
        entries = []
        with os.scandir(self.folder) as found:
            for entry in found:
                with contextlib.suppress(FileNotFoundError):  # another process has deleted it
                    about = entry.stat(follow_symlinks=False)
                    entries.append((about.st_mtime, about.st_size, entry.path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total + room <= self._most_bytes:
                break
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            total -= size
        self._room = room

    def _warn(self, error: OSError) -> None:
        if not self._has_warned:
            self._has_warned = True
            _logger.warning("%s: compiled programs are not kept: %s", self.folder, error)


@functools.cache
def _machine() -> bytes:
    """The kind of processor, with what it can do."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as about:
        flags = next((line for line in about if line.startswith(("flags", "Features"))), "")
        return f"{platform.machine()} {flags}".encode()
    return f"{platform.machine()} {platform.processor()}".encode()


def _default_folder() -> Path | None:
    """A folder of the user's own; None if there is none, or if others can write there."""
    try:
        above = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        folder = above / "torchorbax" / "programs"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.stat()
    except (OSError, RuntimeError) as error:
        _logger.warning("compiled programs are not kept: %s. compile_cache= takes another folder", error)
        return None
    if about.st_uid != os.geteuid() or about.st_mode & 0o022:
        _logger.warning("%s can be written to by others, so no compiled program is taken from there", folder)
        return None
    return folder


def _given_folder(where: str | os.PathLike[str]) -> Path:
    try:
        folder = Path(where).expanduser().absolute()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        raise ConfigError(f"compile_cache={os.fspath(where)!r} cannot be used: {error}") from error
    return folder
