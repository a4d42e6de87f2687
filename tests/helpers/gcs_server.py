"""A strict Cloud Storage for tests, on this machine: the JSON API, preconditions, faults on purpose, and a log.

In process:

    with gcs_server.Server(buckets=["bucket"], faults=["503 kind=list times=2"]) as server:
        subprocess.run(..., env={**os.environ, **gcs_server.environment(server.port)})
        server.requests(kind="list")

In a process of its own, which can be killed and started again on the same data:

    with gcs_server.ServerProcess(folder, buckets=["bucket"]) as server:
        ...
        server.kill()
        server.start()

Both have the same methods (`Control`). From a shell: `python -m tests.helpers.gcs_server --root DIR --bucket NAME`; the
first line that it prints is its port. `gcs_server_faults` explains the rules, `gcs_server_store` what is kept.

The admin endpoint: GET /admin/faults tells how many requests each rule was for, POST adds rules, one a line, DELETE
removes all; GET /admin/log is the list of requests, DELETE empties it.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import TCPServer
from typing import Any

from tests.helpers.gcs_server_api import Api, Call, Request, Response, failure
from tests.helpers.gcs_server_faults import GROUPS, Effect, Faults
from tests.helpers.gcs_server_store import Store

HOST = "127.0.0.1"
_REPOSITORY = Path(__file__).parents[2]


def environment(port: int, client: str | None = None) -> dict[str, str]:
    """What gcsfs, google-cloud-storage and TensorStore need to know, before they are imported.

    `client` names the process in the log of requests: the URLs then begin with /as/CLIENT, as TensorStore cannot be
    made to send a header. Without it, a client is what it says as its User-Agent.
    """
    url = f"http://{HOST}:{port}" + (f"/as/{client}" if client else "")
    return {
        "STORAGE_EMULATOR_HOST": url,  # gcsfs, google-cloud-storage
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "test",  # TensorStore
        "FSSPEC_GCS_TOKEN": "anon",
        "FSSPEC_GS_TOKEN": "anon",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # else it asks over gRPC what kind of bucket it is
        "GOOGLE_CLOUD_PROJECT": "test",  # else it is looked for
        "EPATH_USE_TF": "false",
        "NO_PROXY": HOST,
    }


@dataclass(frozen=True)
class Entry:
    """One request that was received, logged before it is answered."""

    kind: str
    method: str
    target: str
    name: str  # 'bucket/object', 'bucket/prefix' or 'bucket'
    client: str
    port: int  # the client's
    time: float
    status: int  # 0: it was not acted on, and not answered
    read: int  # bytes of an object that are sent
    written: int  # bytes of an object that were received and taken
    effect: str  # of a fault; empty: none


def in_a_row(entries: Iterable[Entry], answer_s: float) -> int:
    """The most requests of which each was made when the one before had been answered.

    Args:
        entries: the requests.
        answer_s: how long each answer took, by a fault `delay`.
    """
    count, answered = 0, 0.0
    for entry in sorted(entries, key=lambda entry: entry.time):
        if entry.time >= answered:
            count, answered = count + 1, entry.time + answer_s
    return count


class Control:
    """What tests do with a server, wherever it runs."""

    port: int

    def add_faults(self, *rules: str) -> None:
        """Add rules, which come after those in force."""
        raise NotImplementedError

    def clear_faults(self) -> None:
        raise NotImplementedError

    def fault_matches(self) -> dict[str, int]:
        """Rules in force, and how many requests each was for."""
        raise NotImplementedError

    def log(self) -> list[Entry]:
        """All requests since the start or the last `clear_log`, oldest first."""
        raise NotImplementedError

    def clear_log(self) -> None:
        raise NotImplementedError

    def requests(self, kind: str | None = None, name: str = "", client: str = "") -> list[Entry]:
        """The requests of a kind or group of kinds, and whose name and client these expressions are found in."""
        kinds = None if kind is None else GROUPS.get(kind, {kind})
        return [
            entry
            for entry in self.log()
            if (kinds is None or entry.kind in kinds)
            and re.search(name, entry.name)
            and re.search(client, entry.client)
        ]

    def counts(self) -> Counter[str]:
        """Requests by kind."""
        return Counter(entry.kind for entry in self.log())

    def bytes_read(self, name: str = "", client: str = "") -> Counter[str]:
        """Bytes of contents sent, by 'bucket/object'."""
        return _sum((entry.name, entry.read) for entry in self.requests("read", name, client))

    def bytes_written(self, name: str = "", client: str = "") -> Counter[str]:
        """Bytes of contents taken, by 'bucket/object'."""
        return _sum((entry.name, entry.written) for entry in self.requests("write", name, client))


def _sum(parts: Iterable[tuple[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for name, number in parts:
        total[name] += number
    return total


class Server(Control):
    """A server in threads of this process, from `with` on. `token`: what callers must bear; None lets in all."""

    def __init__(
        self,
        root: Path | None = None,
        *,
        port: int = 0,
        buckets: Sequence[str] = ("bucket",),
        faults: Sequence[str] = (),
        token: str | None = None,
    ) -> None:
        self.store = Store(root)
        for bucket in buckets:
            self.store.create_bucket(bucket, exist_ok=True)
        self.faults = Faults(faults)
        self.token = token
        self.stopping = threading.Event()
        self._entries: list[Entry] = []
        self._logged = threading.Condition()
        self.errors: list[BaseException] = []  # of this code: they end the `with` block
        self._http = _HTTPServer(self, port)
        self.port = self._http.server_address[1]
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), name="gcs_server")

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopping.set()
        self._http.shutdown()
        self._http.close_connections()
        self._http.server_close()  # waits for the threads of the connections
        self._thread.join()
        if self.errors:
            raise self.errors[0]

    def add_faults(self, *rules: str) -> None:
        self.faults.add(*rules)

    def clear_faults(self) -> None:
        self.faults.clear()

    def fault_matches(self) -> dict[str, int]:
        return self.faults.matches()

    def log(self) -> list[Entry]:
        with self._logged:
            return list(self._entries)

    def clear_log(self) -> None:
        with self._logged:
            self._entries.clear()

    def append(self, entry: Entry) -> None:
        """Log a request."""
        with self._logged:
            self._entries.append(entry)
            self._logged.notify_all()

    def wait_for(self, count: int = 1, kind: str | None = None, name: str = "", timeout: float = 60) -> None:
        """Wait until the log has so many such requests."""
        with self._logged:
            if not self._logged.wait_for(lambda: len(self.requests(kind, name)) >= count, timeout):
                raise TimeoutError(f"there were not {count} requests of kind {kind} and name {name!r} in {timeout} s")


class ServerProcess(Control):
    """A server in a process of its own, from `with` on; it ends with this process, whatever ends this one."""

    def __init__(
        self,
        root: Path | None = None,
        *,
        buckets: Sequence[str] = ("bucket",),
        faults: Sequence[str] = (),
        token: str | None = None,
    ) -> None:
        self.port = 0
        self._options = ["--root", str(root)] if root is not None else []
        self._options += [word for bucket in buckets for word in ("--bucket", bucket)]
        self._options += ["--token", token] if token is not None else []
        self._faults = faults
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> ServerProcess:
        self.start(*self._faults)
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def start(self, *faults: str) -> None:
        """Start it, or start it again on the same port and data, with these faults and an empty log."""
        self.kill()
        command = [sys.executable, "-m", __name__, "--port", str(self.port), "--until-eof", *self._options]
        command += [word for rule in faults for word in ("--fault", rule)]
        self.process = subprocess.Popen(
            command, cwd=_REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.kill()
            raise RuntimeError("the server did not start")
        self.port = int(line)

    def kill(self) -> None:
        """As the kernel would: nothing is said, nothing is finished."""
        if self.process is not None:
            self.process.kill()
            self.wait()

    def wait(self, timeout: float = 30) -> int:
        """Wait until it has ended, because of a fault for example, and tell its exit status."""
        assert self.process is not None
        code = self.process.wait(timeout)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        self.process = None
        return code

    def add_faults(self, *rules: str) -> None:
        self._admin("POST", "faults", "\n".join(rules))

    def clear_faults(self) -> None:
        self._admin("DELETE", "faults")

    def fault_matches(self) -> dict[str, int]:
        found: dict[str, int] = self._admin("GET", "faults")
        return found

    def log(self) -> list[Entry]:
        return [Entry(**entry) for entry in self._admin("GET", "log")]

    def clear_log(self) -> None:
        self._admin("DELETE", "log")

    def _admin(self, method: str, what: str, body: str = "") -> Any:
        with contextlib.closing(http.client.HTTPConnection(HOST, self.port, timeout=30)) as connection:
            connection.request(method, f"/admin/{what}", body.encode())
            answer = connection.getresponse()
            text = answer.read().decode()
            if answer.status != 200:
                raise ValueError(text)
            return json.loads(text)


class _HTTPServer(ThreadingHTTPServer):
    daemon_threads = False  # so that closing waits for them
    request_queue_size = 128

    def __init__(self, owner: Server, port: int) -> None:
        self.owner = owner
        self.api = Api(owner.store)
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        super().__init__((HOST, port), _Handler)

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's asks the resolver for the machine's name
        self.server_name, self.server_port = HOST, self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._connections.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        """Wake the threads that wait for a client's next request."""
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):  # the client was faster
                    connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if error is not None and not isinstance(error, ConnectionError):  # clients come and go
            self.owner.errors.append(error)
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits for the client's delayed acknowledgement
    server: _HTTPServer

    def _serve(self) -> None:
        body = self._body()
        if self.path.startswith("/admin/"):
            self._admin(self.path.removeprefix("/admin/"), body.decode())
            return
        headers = {key.lower(): value for key, value in self.headers.items()}
        base, target, client = f"http://{headers.get('host', '')}", self.path, headers.get("user-agent", "")
        if found := re.match(r"/as/([^/]+)(?=/)", target):
            base, target, client = base + found[0], target[found.end() :], found[1]
        request = Request(self.command, target, headers, body, base)
        call = self.server.api.call(request)
        effect = self.server.owner.faults.effect(call.kind, self.command, call.path, client)
        answer = self._answer(request, call, effect)
        sent = answer.body if answer else b""
        if effect and effect.what == "truncate":
            sent = sent[: int(effect.amount)]
        entry = Entry(
            call.kind,
            self.command,
            target,
            call.path,
            client,
            self.client_address[1],
            time.time(),
            answer.status if answer else 0,
            len(sent) if answer and call.kind == "read" and answer.status in (200, 206) else 0,
            answer.written if answer else 0,
            effect.what if effect else "",
        )
        self.server.owner.append(entry)
        self._finish(answer, sent, effect)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve  # the names that http.server looks for

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self._read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self._line().split(b";")[0], 16):
            parts.append(self._read(size))
            self._line()
        while self._line().strip():
            pass  # trailers
        return b"".join(parts)

    def _read(self, size: int) -> bytes:
        """That many bytes; what a killed client sent the half of is not acted on."""
        found = self.rfile.read(size)
        if len(found) < size:
            raise ConnectionError("the client went away")
        return found

    def _line(self) -> bytes:
        found = self.rfile.readline()
        if not found.endswith(b"\n"):
            raise ConnectionError("the client went away")
        return found

    def _answer(self, request: Request, call: Call, effect: Effect | None) -> Response | None:
        """The answer, acted on or not; None where there will be none."""
        if effect and effect.before:
            if effect.what != "status":
                return None
            status = int(effect.amount)
            if status == 401:
                return _refused(request, call)
            return failure(status, f"{http.client.responses[status]}, on purpose")
        token = self.server.owner.token
        if token is not None and request.headers.get("authorization") != f"Bearer {token}":
            return _refused(request, call)
        return call.answer()

    def _finish(self, answer: Response | None, sent: bytes, effect: Effect | None) -> None:
        match effect:
            case Effect("exit"):
                os._exit(1)
            case Effect("hang"):
                self.server.owner.stopping.wait()
                self.close_connection = True
                return
            case Effect("cut"):
                self.close_connection = True
                return
            case Effect("delay", amount=seconds):
                self.server.owner.stopping.wait(seconds)
        assert answer is not None
        self._head(answer)
        if effect and effect.what == "drip":
            self._drip(sent, effect.amount)
        else:
            self.wfile.write(sent)
        if len(sent) < len(answer.body):
            self.close_connection = True

    def _head(self, answer: Response) -> None:
        self.send_response(answer.status)
        for key, value in answer.headers.items():
            self.send_header(key, value)
        if answer.status not in (204, 304):
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()

    def _drip(self, body: bytes, bytes_per_s: float) -> None:
        size = max(int(bytes_per_s / 20), 1)
        for start in range(0, len(body), size):
            if self.server.owner.stopping.wait(size / bytes_per_s):
                self.close_connection = True
                return
            self.wfile.write(body[start : start + size])

    def _admin(self, what: str, text: str) -> None:
        owner, status = self.server.owner, 200
        found: object = None
        match self.command, what:
            case "GET", "faults":
                found = owner.fault_matches()
            case "POST", "faults":
                try:
                    owner.add_faults(*text.splitlines())
                except ValueError as error:
                    found, status = str(error), 400
            case "DELETE", "faults":
                owner.clear_faults()
            case "GET", "log":
                found = [asdict(entry) for entry in owner.log()]
            case "DELETE", "log":
                owner.clear_log()
            case _:
                found, status = f"no {self.command} of {what}", 404
        answer = Response(status, json.dumps(found).encode())
        self._head(answer)
        self.wfile.write(answer.body)

    def log_message(self, format: str, *args: object) -> None:
        """There is a log already."""


def _refused(request: Request, call: Call) -> Response:
    if "authorization" in request.headers:
        return failure(401, "Invalid Credentials")
    message = f"Anonymous caller does not have storage access to {call.path} (or it may not exist)."
    return failure(401, message, "required")


def main() -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=0, help="0: any that is free; it is printed on the first line")
    parser.add_argument("--root", type=Path, help="keep objects in this folder, else in memory")
    parser.add_argument("--bucket", action="append", default=[], help="make this bucket unless it is there")
    parser.add_argument("--fault", action="append", default=[], help="a rule: see gcs_server_faults.py")
    parser.add_argument("--token", help="what callers must bear; without it, all are let in")
    parser.add_argument("--until-eof", action="store_true", help="end when the standard input does")
    given = parser.parse_args()
    with Server(given.root, port=given.port, buckets=given.bucket, faults=given.fault, token=given.token) as server:
        print(server.port, flush=True)
        if given.until_eof:
            sys.stdin.buffer.read()
        else:
            threading.Event().wait()


if __name__ == "__main__":
    main()
