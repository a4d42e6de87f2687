"""Whether the machine is about to go away, asked every few seconds; and the server that knows it on Google Cloud."""

from __future__ import annotations

import logging
import os
import threading
import urllib.request
import weakref
from collections.abc import Callable

_logger = logging.getLogger(__name__)

_EVERY_S = 2.0
"""Seconds from an answer to the next question. Clouds give notice half a minute to a minute ahead, at the least."""
_LONGEST_JOIN_S = 5.0
"""Seconds to wait for an answer when the run is closed."""


class Poll:
    """Asks a callable on a thread of its own, which may take its time, until it says yes.

    Args:
        ask: is the machine about to go away? An error of it counts as no; the first one is logged.
        tell: called when it says yes. Its owner is not kept alive; when it is gone, nobody is asked any more.
    """

    def __init__(self, ask: Callable[[], bool], tell: weakref.WeakMethod[Callable[[], None]]) -> None:
        self._ended = threading.Event()
        self._thread = threading.Thread(
            target=_poll, args=(ask, tell, self._ended), name="torchorbax-maintenance", daemon=True
        )

    def start(self) -> None:
        """Ask for the first time now."""
        self._thread.start()

    def stop(self) -> None:
        """Ask no more. An answer that does not come is left alone."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(_LONGEST_JOIN_S)


def _poll(ask: Callable[[], bool], tell: weakref.WeakMethod[Callable[[], None]], ended: threading.Event) -> None:
    failed = False
    while tell() is not None and not ended.is_set():
        try:
            if ask():
                if (received := tell()) is not None:
                    received()
                return
        except Exception as error:  # whatever the user's code raises; training goes on without a notice
            if not failed:
                _logger.warning("preemption_notice raised %s: %s; it is asked again", type(error).__name__, error)
            failed = True
        ended.wait(_EVERY_S)


class GceMaintenanceNotice:
    """For `preemption_notice=` on a VM of Google Cloud, a TPU VM included: is it about to be preempted or terminated?

    It asks the VM's metadata server for `instance/preempted` and `instance/maintenance-event`. A live migration, during
    which the VM goes on running, does not count.

    Args:
        timeout_s: how long to wait for an answer.

    Raises:
        OSError: (when called) the server cannot be reached or refuses to answer.
    """

    def __init__(self, timeout_s: float = 1.0) -> None:
        host = os.environ.get("GCE_METADATA_HOST") or "metadata.google.internal"
        self._instance = f"http://{host}/computeMetadata/v1/instance"
        self._timeout_s = timeout_s
        # Without a proxy: one would ask the server of its own machine, if any.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def __call__(self) -> bool:
        """Is the VM about to go away?"""
        return (
            self._value("preempted").upper() == "TRUE"
            or self._value("maintenance-event").upper() == "TERMINATE_ON_HOST_MAINTENANCE"
        )

    def _value(self, name: str) -> str:
        request = urllib.request.Request(f"{self._instance}/{name}", headers={"Metadata-Flavor": "Google"})
        with self._opener.open(request, timeout=self._timeout_s) as answer:
            text: str = answer.read(1000).decode("utf-8", "replace")
        return text.strip()
