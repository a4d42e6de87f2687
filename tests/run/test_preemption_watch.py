"""The thread that sees when a loop does not come back after SIGTERM."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torchorbax._src.run import preemption_watch

from tests.helpers.programs import RunPython


class Notice:
    def __init__(self, patience_s: float = 0.0) -> None:
        self.received = False
        self.patience_s = patience_s
        self.called_s: list[float] = []
        self.called = threading.Event()

    def call_overdue(self) -> None:
        self.called_s.append(time.monotonic())
        self.called.set()


@pytest.fixture(autouse=True)
def _nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(preemption_watch, "_LOOK_EVERY_S", 0.005)
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "torchorbax-preemption"]


def test_it_is_called_once_after_its_patience_and_not_before_it_is_received() -> None:
    patient, hasty, other = Notice(patience_s=0.2), Notice(), Notice()
    for notice in (patient, hasty, other):
        preemption_watch.watch(notice)
    received_s = time.monotonic()
    patient.received = hasty.received = True
    assert hasty.called.wait(30)
    assert patient.called.wait(30)
    assert patient.called_s[0] >= received_s + 0.2
    for notice in (patient, hasty, other):
        preemption_watch.unwatch(notice)  # the last one ends the thread, which then has looked at all
    assert [len(notice.called_s) for notice in (patient, hasty, other)] == [1, 1, 0]


def test_what_is_not_watched_any_more_or_gone_is_not_called() -> None:
    left, gone, forgotten = Notice(), Notice(), Notice()
    for notice in (left, gone, forgotten):
        preemption_watch.watch(notice)
    assert preemption_watch.is_watched(gone)
    preemption_watch.unwatch(forgotten)
    assert not preemption_watch.is_watched(forgotten)
    called = gone.called
    del gone, notice
    gc.collect()
    forgotten.received = left.received = True
    assert left.called.wait(30)
    preemption_watch.unwatch(left)
    assert not called.is_set()
    assert not forgotten.called.is_set()


def test_the_thread_ends_when_the_last_run_has_been_dropped() -> None:
    notice = Notice()
    preemption_watch.watch(notice)
    thread = preemption_watch._thread
    assert thread is not None
    del notice
    gc.collect()
    thread.join(30)
    assert not thread.is_alive()


IN_C = """
    import hashlib, os, signal, sys, threading, time
    from torchorbax._src.run.preemption import PreemptionNotice

    class Owner:
        def overdue(self):
            print("overdue", notice.received, flush=True)
            os._exit(0)

    owner = Owner()
    notice = PreemptionNotice(patience_s=0.0, overdue=owner.overdue)
    if "taken" in sys.argv:
        mine = os.pipe()
        os.set_blocking(mine[1], False)
        signal.set_wakeup_fd(mine[1])
    notice.install()
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    {wait}
    print("too late", signal.set_wakeup_fd(-1) == mine[1])
"""


def test_sigterm_is_noticed_while_the_main_thread_runs_no_python(tmp_path: Path, run_python: RunPython) -> None:
    hour = "hashlib.pbkdf2_hmac('sha256', b'', b'', (1 << 31) - 1)"  # in C, without the interpreter's lock
    assert run_python(IN_C.format(wait=hour)).stdout == "overdue False\n"


def test_a_program_that_uses_the_wakeup_descriptor_keeps_it(tmp_path: Path, run_python: RunPython) -> None:
    wait = """
    owner.overdue = None
    while not notice.received:
        time.sleep(0.01)  # a loop of Python code, in which the handler runs
    notice.remove()
    """
    done = run_python(IN_C.format(wait=wait).replace("os._exit(0)", "pass"), "taken")
    assert done.stdout.splitlines()[-1] == "too late True"


def test_a_signal_to_a_forked_process_is_none_of_its_parent(tmp_path: Path, run_python: RunPython) -> None:
    code = """
        import os, signal
        from torchorbax._src.run.preemption import PreemptionNotice
        notice = PreemptionNotice(patience_s=1000.0)
        notice.install()
        told, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            assert signal.set_wakeup_fd(-1) == -1
            assert not notice.watched
            again = PreemptionNotice(patience_s=1000.0)
            again.install()
            assert again.watched
            os.write(tell, b"x")
            while True:
                signal.sigtimedwait([], 0.05)
        os.read(told, 1)
        os.kill(pid, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), notice.watched)
        notice.remove()
        print(notice.watched, signal.set_wakeup_fd(-1))
    """
    assert run_python(code, warnings="ignore").stdout.split() == ["-9", "True", "False", "-1"]
