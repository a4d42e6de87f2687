"""A process with everything imported, which forks to run programs: importing anew would take each of them seconds.

It is started as a script. Whoever connects to its socket sends one request, with the descriptors that are to be the
program's standard streams, and is told the program's pid and, when it has ended, its exit code. A program runs as in a
new interpreter: `__main__`, arguments, environment, folder, warnings and signals are its own, and it ends as a script
does, with exit handlers, tracebacks and exit codes. When it is forked, no JAX backend has started and no thread of
Python runs. The server ends when its standard input does.
"""

from __future__ import annotations

import builtins
import contextlib
import gc
import json
import os
import random
import runpy
import selectors
import signal
import socket
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

STREAMS = 3


def serve(path: str) -> dict[str, Any]:
    """Fork a program for each request. Returns in each of the programs, with what was asked for."""
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as selector:
        listener.bind(path)
        listener.listen(64)
        selector.register(listener, selectors.EVENT_READ)
        selector.register(0, selectors.EVENT_READ)
        clients: dict[int, tuple[int, socket.socket]] = {}
        os.write(1, b"ready\n")
        while True:
            for key, _ in selector.select():
                if key.fileobj is listener:
                    client, _ = listener.accept()
                    request, streams = receive(client)
                    if (pid := os.fork()) == 0:
                        os.setsid()  # a group of its own, with whatever it starts
                        for stream in range(STREAMS):
                            os.dup2(streams[stream], stream)
                        for descriptor in streams:
                            os.close(descriptor)
                        client.close()
                        for _, other in clients.values():
                            other.close()
                        for descriptor in clients:
                            os.close(descriptor)
                        return request
                    for descriptor in streams:
                        os.close(descriptor)
                    client.sendall(f"{pid}\n".encode())
                    ended = os.pidfd_open(pid)
                    clients[ended] = pid, client
                    selector.register(ended, selectors.EVENT_READ)
                elif key.fileobj == 0:
                    os._exit(0)
                else:
                    selector.unregister(key.fileobj)
                    os.close(key.fd)
                    pid, client = clients.pop(key.fd)
                    _, status = os.waitpid(pid, 0)
                    with client, contextlib.suppress(BrokenPipeError):  # if nobody wants to know any more
                        client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def receive(client: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """A request, and the descriptors that came with it."""
    data, descriptors, _, _ = socket.recv_fds(client, 1 << 16, STREAMS)
    while not data.endswith(b"\n"):
        data += client.recv(1 << 16)
    request: dict[str, Any] = json.loads(data)
    return request, descriptors


def program_of(request: dict[str, Any]) -> Callable[[], object]:
    """Make this process what a new interpreter would be, up to the program itself."""
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    act_on_warnings(request["warnings"])
    seed()
    code, script, arguments = request["code"], request["script"], request["arguments"]
    folders = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:] = ["" if script is None else os.path.dirname(script), *folders, *sys.path[1:]]
    if script is not None:
        sys.argv[:] = [script, *arguments]
        return lambda: runpy.run_path(script, run_name="__main__")
    sys.argv[:] = ["-c", *arguments]
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main
    return lambda: exec(compile(code, "<string>", "exec"), main.__dict__)


def act_on_warnings(action: str) -> None:
    """As `python -W action` does; the server itself runs with `-W error`, so that filters of libraries come first."""
    sys.warnoptions[:] = [action]
    if action != "error":
        warnings.filters[:] = [one for one in warnings.filters if one != ("error", None, Warning, None, 0)]  # type: ignore[index]
        warnings.simplefilter(action, append=True)  # type: ignore[arg-type]


def seed() -> None:
    """From the system, as in every new interpreter. Torch's generator starts from a constant there, too."""
    random.seed()
    sys.modules["numpy"].random.seed()


def import_all() -> None:
    """What programs of tests import, and what that imports when it is first used."""
    import optax  # noqa: F401
    import orbax.checkpoint  # noqa: F401
    import tensorstore  # noqa: F401
    import torch._dynamo  # noqa: F401  # by the first optimizer
    import torchorbax  # noqa: F401


if __name__ == "__main__":
    import_all()
    gc.freeze()  # or every program would copy all of this memory when it collects garbage, at its end at the latest
    program_of(serve(sys.argv[1]))()
