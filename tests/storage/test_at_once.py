"""What does not depend on each other is asked at once: how many requests a save and a restore wait for in a row."""

from __future__ import annotations

import itertools
import threading

import pytest
from torchorbax._src.storage.at_once import at_once

from tests.helpers.gcs_client import Client
from tests.helpers.gcs_server import Entry, Server, environment, in_a_row

DELAY_S = 0.15
"""How long each answer takes: so long that a client on a loaded machine sends all that belongs together before it."""


def test_actions_wait_for_each_other() -> None:
    both = threading.Barrier(3)
    assert at_once([lambda: both.wait(60) >= 0] * 3) == [True] * 3
    assert at_once([lambda: 1]) == [1]


def test_the_first_failure_in_the_order_is_raised_when_all_have_ended() -> None:
    ended = []

    def fail(number: int) -> None:
        try:
            raise OSError(f"number {number}")
        finally:
            ended.append(number)

    for order in itertools.permutations(range(3)):
        with pytest.raises(OSError, match=f"number {order[0]}"):
            at_once([lambda number=number: fail(number) for number in order])
        assert sorted(ended) == [0, 1, 2]
        ended.clear()


@pytest.fixture(scope="module")
def requests() -> dict[str, list[Entry]]:
    """By what was done, the requests to a storage that takes its time."""
    program = """
        kept["model"] = {"a": jax.numpy.ones((256, 256)), "b": jax.numpy.ones(4)}
        kept["optimizer"] = {"m": jax.numpy.ones((256, 256)), "v": jax.numpy.ones((256, 256))}
        items = {"model": kept["model"], "optimizer": kept["optimizer"]}
        run = kept["run"] = torchorbax.Checkpointer("gs://bucket/rows", items, save=None, keep=2)
        for step in range(3):
            run.save(step, force=True)
            run.wait()
    """
    again = """
        items = {"model": kept["model"], "optimizer": kept["optimizer"]}
        kept["run"].close()
        kept["run"] = torchorbax.Checkpointer("gs://bucket/rows", items, save=None, keep=2)
    """
    found = {}
    with Server(buckets=["bucket"]) as server, Client(environment(server.port)) as client:
        client.run(program)
        server.add_faults(f"delay:{DELAY_S}")
        for what, code in {
            "save": "kept['run'].save(3, force=True); kept['run'].wait()",
            "open": again,
            "restore": "kept['run'].restore()",
        }.items():
            server.clear_log()
            client.run(code)
            found[what] = server.log()
    return found


def test_a_save_waits_for_few_requests_in_a_row(requests: dict[str, list[Entry]]) -> None:
    entries = requests["save"]
    committed = next(entry.time for entry in entries if entry.name == "bucket/rows/3/commit_success.txt")
    assert in_a_row([entry for entry in entries if entry.time <= committed], DELAY_S) <= 12
    assert in_a_row(entries, DELAY_S) <= 20  # and then it deletes a step


def test_a_restore_waits_for_few_requests_in_a_row(requests: dict[str, list[Entry]]) -> None:
    assert in_a_row(requests["restore"], DELAY_S) <= 6


def test_to_open_a_run_is_to_wait_for_few_requests_in_a_row(requests: dict[str, list[Entry]]) -> None:
    assert in_a_row(requests["open"], DELAY_S) <= 14
