"""Under gs://, what arrives late changes nothing; and what several threads read is what one would."""

from __future__ import annotations

import _thread
import threading
from collections.abc import Iterator

import pytest
from torchorbax._src.format.manifest import LeafMeta
from torchorbax._src.storage.at_once import at_once
from torchorbax._src.storage.step_reader import _waves

from tests.helpers.gcs_client import Client
from tests.helpers.gcs_server import Server, environment


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(buckets=["bucket"]) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Client]:
    with Client(environment(server.port)) as client:
        yield client


LATE = """
    from torchorbax._src.format.manifest import LeafMeta
    from torchorbax._src.storage import array_reader, array_writer
    from torchorbax._src.storage.traffic import Traffic

    folders = {"w": path}

    def write(value):
        for process in range(count):
            arrays = {("w", f"of {process}"): np.full(30_000, value, np.float32)}
            array_writer.write(folders, arrays, Traffic(), process if count > 1 else 0, alone=count == 1)
        if count > 1:
            array_writer.merge(folders, {"w": [f"ocdbt.process_{process}" for process in range(count)]}, Traffic())

    def value():
        meta = LeafMeta((30_000,), "float32", "host")
        found = array_reader.read(path, {"of 0": (meta, None)}, Traffic())
        return float(found["of 0"][0])

    write(1.0)
    try:
        write(2.0)
    except FileExistsError as error:
        result = [type(error).__name__, value()]
"""


@pytest.mark.parametrize("count", [1, 2])
def test_the_arrays_of_a_save_that_was_given_up_change_nothing_in_a_later_one(count: int, client: Client) -> None:
    """Its last requests may arrive at any time, and its program may have been taken over meanwhile."""
    assert client.run(LATE, path=f"gs://bucket/late{count}/0/w", count=count) == ["FileExistsError", 1.0]


def test_64_bits_stay_64_bits_in_every_item(client: Client) -> None:
    """JAX keeps that setting for each thread, and items are read by several."""
    program = """
        with jax.enable_x64(True):
            items = {name: {"a": jax.numpy.full(3, 0.1, jax.numpy.float64)} for name in "pqr"}
            with torchorbax.Checkpointer("gs://bucket/x64", items, save=None, rng=False) as run:
                run.save(0, force=True)
            items = {name: {"a": jax.numpy.full(3, 9.0, jax.numpy.float64)} for name in "pqr"}
            with torchorbax.Checkpointer("gs://bucket/x64", items, save=None, rng=False, verify=False) as run:
                run.restore()
            result = [[str(item["a"].dtype), float(item["a"][0])] for item in items.values()]
    """
    assert client.run(program) == [["float64", 0.1]] * 3


def test_a_base_whose_marker_is_gone_is_written_again(client: Client, server: Server) -> None:
    program = """
        model = torch.nn.Linear(200, 200)
        model.weight.requires_grad_(False)
        torchorbax.place_(model)
        run = kept["run"] = torchorbax.resume(model, None, "gs://bucket/frozen", save=None, keep=2)
        for step in range(2):
            run.save(step, force=True)
            run.wait()
    """
    client.run(program)
    server.store.delete("bucket", "frozen/base/0/commit_success.txt")
    client.run("kept['run'].save(2, force=True); kept['run'].close()")
    assert client.run("result = torchorbax.verify('gs://bucket/frozen', 2)") == [2]


def test_a_step_whose_marker_is_gone_no_longer_counts(client: Client, server: Server) -> None:
    program = """
        run = kept["run"] = torchorbax.Checkpointer("gs://bucket/marker", {"x": {"a": np.ones(3)}}, save=None, keep=2)
        for step in range(2):
            run.save(step, force=True)
            run.wait()
    """
    client.run(program)
    server.store.delete("bucket", "marker/1/commit_success.txt")
    found = "kept['run'].save(2, force=True); kept['run'].close(); result = torchorbax.verify('gs://bucket/marker')"
    assert client.run(found) == [0, 2]


def test_ctrl_c_does_not_wait_for_the_other_actions() -> None:
    go, waiting = threading.Event(), threading.Event()

    def wait() -> None:
        waiting.set()
        go.wait(60)

    def interrupt() -> None:
        waiting.wait(60)
        _thread.interrupt_main()
        threading.Event().wait(60)

    try:
        with pytest.raises(KeyboardInterrupt):
            at_once([wait, interrupt])
    finally:
        go.set()


def test_items_that_are_read_at_once_have_room_together() -> None:
    leaves = {
        (item, "w"): LeafMeta((nbytes,), "int8", "host") for item, nbytes in zip("abcd", (50, 60, 10, 300), strict=True)
    }
    by_item = {item: ["w"] for item, _ in leaves}
    assert _waves(by_item, leaves, 240) == [["a", "b", "c"], ["d"]]
    assert _waves(by_item, leaves, 2000) == [["a", "b", "c", "d"]]
    assert _waves(by_item, leaves, 1) == [["a"], ["b"], ["c"], ["d"]]
