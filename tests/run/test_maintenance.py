"""Notices of maintenance: a callable that is asked, and the metadata server of Google Cloud."""

from __future__ import annotations

import contextlib
import gc
import http.server
import logging
import signal
import threading
import urllib.error
import weakref
from collections.abc import Iterator

import pytest
from torchorbax import GceMaintenanceNotice
from torchorbax._src.run import maintenance
from torchorbax._src.run.maintenance import Poll
from torchorbax._src.run.preemption import PreemptionNotice

from tests.helpers.fake_runs import fake_run
from tests.helpers.memory_storage import MemoryStorage


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maintenance, "_EVERY_S", 0.001)


class Listener:
    def __init__(self) -> None:
        self.told = threading.Event()

    def tell(self) -> None:
        self.told.set()


def poll(answers: list[bool | Exception], listener: Listener, asked: threading.Semaphore) -> Poll:
    """A poll that gets these answers, the last of them for ever."""

    def ask() -> bool:
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        asked.release()
        if isinstance(answer, Exception):
            raise answer
        return answer

    return Poll(ask, weakref.WeakMethod(listener.tell))


def test_it_is_asked_until_it_says_yes_and_its_errors_cost_one_line(caplog: pytest.LogCaptureFixture) -> None:
    listener = Listener()
    answers: list[bool | Exception] = [False, OSError("no route"), ValueError("odd"), OSError("no route"), False, True]
    with caplog.at_level(logging.WARNING):
        polling = poll(answers, listener, threading.Semaphore(0))
        polling.start()
        assert listener.told.wait(30)
        polling.stop()
    assert [record.getMessage() for record in caplog.records] == [
        "preemption_notice raised OSError: no route; it is asked again"
    ]
    assert answers == [True]


def test_nobody_is_asked_for_a_run_that_is_closed_or_gone() -> None:
    asked = threading.Semaphore(0)
    closed = Listener()
    polling = poll([False], closed, asked)
    polling.start()
    assert asked.acquire(timeout=30)
    polling.stop()
    assert not polling._thread.is_alive()
    gone = Listener()
    polling = poll([False], gone, asked)
    polling.start()
    del gone
    gc.collect()
    polling._thread.join(30)
    assert not polling._thread.is_alive()


def test_a_run_ends_with_its_step_saved_when_the_notice_comes(storage: MemoryStorage) -> None:
    going = threading.Event()
    with fake_run(storage, save=None, preemption_notice=going.is_set) as run:
        for step in run.steps(100):
            if step == 3:
                going.set()
                run._preemption._poll._thread.join(30)  # type: ignore[union-attr]  # it ends when it has its answer
        assert run.preempted
    assert storage.steps() == [3]


def test_sigterm_after_a_notice_is_the_first() -> None:
    notice = PreemptionNotice()
    notice.install()
    try:
        notice._announce()
        signal.raise_signal(signal.SIGTERM)
        assert notice.signalled  # and this process goes on
    finally:
        notice.remove()


# ------------------------------------------------------------------------------------------------------ Google Cloud


class Metadata(http.server.BaseHTTPRequestHandler):
    """As the metadata server of a VM: it answers nobody who does not ask for metadata of Google's."""

    values: dict[str, str]

    def do_GET(self) -> None:
        value = self.values.get(self.path.removeprefix("/computeMetadata/v1/instance/"))
        known = value is not None and self.headers["Metadata-Flavor"] == "Google"
        self.send_response(200 if known else 403)
        self.end_headers()
        if known and value is not None:
            self.wfile.write(value.encode())

    def log_message(self, format: str, *args: object) -> None: ...


@contextlib.contextmanager
def metadata_server(values: dict[str, str]) -> Iterator[str]:
    handler = type("Handler", (Metadata,), {"values": values})
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("preempted", "event", "going"),
    [
        ("FALSE", "NONE", False),
        ("FALSE", "MIGRATE_ON_HOST_MAINTENANCE", False),  # the VM moves while it runs
        ("FALSE", "TERMINATE_ON_HOST_MAINTENANCE", True),
        ("TRUE", "NONE", True),
        ("TRUE\n", "NONE\n", True),
    ],
)
def test_the_metadata_server_says_whether_the_vm_goes(
    preempted: str, event: str, going: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with metadata_server({"preempted": preempted, "maintenance-event": event}) as host:
        monkeypatch.setenv("GCE_METADATA_HOST", host)
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # not for this server
        assert GceMaintenanceNotice()() is going


def test_a_server_that_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with metadata_server({}) as host:
        monkeypatch.setenv("GCE_METADATA_HOST", host)
        with pytest.raises(urllib.error.HTTPError, match="403"):
            GceMaintenanceNotice()()
    with pytest.raises(OSError, match="refused"):
        GceMaintenanceNotice()()


def test_a_vm_that_is_about_to_go_ends_the_run(storage: MemoryStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"preempted": "FALSE", "maintenance-event": "NONE"}
    with metadata_server(values) as host:
        monkeypatch.setenv("GCE_METADATA_HOST", host)
        with fake_run(storage, save=None, preemption_notice=GceMaintenanceNotice()) as run:
            for step in run.steps(100):
                if step == 5:
                    values["maintenance-event"] = "TERMINATE_ON_HOST_MAINTENANCE"
                    run._preemption._poll._thread.join(30)  # type: ignore[union-attr]
    assert storage.steps() == [5]
