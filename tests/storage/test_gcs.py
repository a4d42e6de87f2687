"""Runs on gs://, in processes of their own, against a strict server on this machine.

What faults on the way do is in tests/campaigns/test_fault_matrix.py."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torchorbax import Checkpointer, ConfigError, load

from tests.helpers.fake_runs import weights
from tests.helpers.gcs_client import Client
from tests.helpers.gcs_server import Server, environment
from tests.helpers.programs import RunPython

SCRIPTS = Path(__file__).parents[2] / "scripts"

TOKEN = {"FSSPEC_GCS_TOKEN", "FSSPEC_GS_TOKEN", "GOOGLE_AUTH_TOKEN_FOR_TESTING"}

IMPATIENT_S = 3.0

SLACK_S = 30.0
"""How much later than `storage_timeout_s` an error may come, on a machine that has other things to do."""


@pytest.fixture(scope="module")
def whole_server() -> Iterator[Server]:
    with Server(buckets=["bucket", "whole"]) as server:
        yield server


@pytest.fixture
def server(whole_server: Server) -> Iterator[Server]:
    whole_server.clear_log()
    yield whole_server
    whole_server.clear_faults()


@pytest.fixture(scope="module")
def clients(whole_server: Server) -> Iterator[tuple[Client, Client]]:
    port = whole_server.port
    with Client(environment(port, "one")) as one, Client(environment(port, "other")) as other:
        yield one, other


@pytest.fixture
def one(clients: tuple[Client, Client]) -> Client:
    return clients[0]


@pytest.fixture
def other(clients: tuple[Client, Client]) -> Client:
    """Another process than `one`."""
    return clients[1]


@pytest.fixture(scope="module")
def impatient(whole_server: Server) -> Iterator[Client]:
    """A process whose runs do not wait long. The shortest limit counts for a whole process."""
    with Client(environment(whole_server.port, "impatient")) as client:
        yield client


@pytest.fixture
def path(request: pytest.FixtureRequest) -> str:
    """A URI that no other test uses."""
    return f"gs://bucket/{re.sub('[^a-z0-9]+', '_', request.node.name)}/run"


def objects(server: Server, path: str) -> set[str]:
    """The names below a URI."""
    bucket, _, folder = path.removeprefix("gs://").partition("/")
    below = f"{folder}/" if folder else ""
    return {name.removeprefix(below) for name in server.store.objects(bucket) if name.startswith(below)}


def folders(server: Server, path: str) -> set[str]:
    """What a user sees below a URI; hidden names are left out."""
    return {name.split("/")[0] for name in objects(server, path) if not name.startswith(".")}


SAVE = """
    with torchorbax.Checkpointer(path, {"weights": live(0)}, save=None, **options) as run:
        for step in steps:
            run.state["weights"].update(live(step))
            run.save(step, metrics={"loss": losses[step]} if losses else None, force=True)
            run.wait()
        result = run.all_steps()
"""


def save(client: Client, path: str, *steps: int, losses: list[float] | None = None, **options: Any) -> list[int]:
    """Save steps one after the other; returns those that are listed afterwards."""
    found: list[int] = client.run(SAVE, path=path, steps=steps, losses=losses, options=options)
    return found


def test_a_training_run_goes_on_in_another_process(path: str, one: Client, other: Client, tmp_path: Path) -> None:
    first = one.run("result = train(path, 5)", path=path)
    second = other.run("result = train(path, 9, keep=2)", path=path)
    whole = one.run("result = train(path, 9)", path=str(tmp_path / "run"))
    assert (first["start"], second["start"]) == (0, 5)
    assert first["losses"] + second["losses"] == whole["losses"]
    assert second["digest"] == whole["digest"]
    assert len(second["steps"]) == 2
    assert second["steps"][-1] == 8


def test_a_save_goes_on_in_the_background(path: str, server: Server, one: Client, other: Client) -> None:
    server.add_faults("delay:1 name=/1/commit_success times=1")
    found = one.run(
        """
        run = kept["run"] = torchorbax.Checkpointer(path, {"weights": live(0)}, save=None)
        run.save(0, force=True)
        run.wait()
        result = [run.all_steps()]
        run.state["weights"].update(live(1))
        run.save(1, force=True)
        result += [run.all_steps(), run.history[-1].commit_s is None]
        run.state["weights"].update(live(2))  # while it is being written
        run.wait()
        result += [run.all_steps(), run.history[-1].commit_s is None]
        run.close()
        """,
        path=path,
    )
    assert found == [[0], [0], True, [0, 1], False]
    assert other.run(
        "result = [same(torchorbax.load(path, step, 'weights'), step) for step in torchorbax.verify(path)]", path=path
    ) == [True, True]


def test_continuous_saves_follow_each_other(path: str, server: Server, one: Client, other: Client) -> None:
    started, listed = one.run(
        """
        with torchorbax.Checkpointer(path, {"weights": live(0)}, keep=3) as run:
            for step in run.steps(400):
                run.state["weights"].update(live(step))
                time.sleep(0.005)
        result = [record.step for record in run.history], run.all_steps()
        """,
        path=path,
    )
    assert len(started) > 3
    assert started[-1] == 399
    assert listed == started[-3:]
    assert folders(server, path) == set(map(str, listed))
    assert other.run("result = torchorbax.verify(path)", path=path) == listed
    assert other.run("result = same(torchorbax.load(path, item='weights'), 399)", path=path)


def test_the_best_steps_stay(path: str, server: Server, one: Client, other: Client) -> None:
    found = one.run(
        """
        keep = torchorbax.policies.BestN(get_metric_fn=lambda metrics: -metrics["loss"], n=2)
        with torchorbax.Checkpointer(path, {"weights": live(0)}, save=None, keep=keep) as run:
            for step, loss in enumerate([3.0, 1.0, 2.0, 5.0, 4.0]):
                run.save(step, metrics={"loss": loss}, force=True)
            run.wait()
            result = run.all_steps(), run.best_step("loss")
        """,
        path=path,
    )
    assert found == [[1, 2, 4], 1]
    assert folders(server, path) == {"1", "2", "4"}
    best = "result = torchorbax.Checkpointer(path, {'weights': live(0)}, save=None).best_step('loss')"
    assert other.run(best, path=path) == 1


def test_others_read_the_steps(path: str, one: Client, other: Client) -> None:
    save(one, path, 0, 7, losses=[2.0] * 8)
    assert other.run("result = torchorbax.verify(path)", path=f"{path}/") == [0, 7]
    ls, inspected, verified = other.run(
        """
        import contextlib, io, runpy
        os.environ["COLUMNS"] = "160"
        result = []
        for arguments in (["ls"], ["inspect", "--step", "7"], ["verify"]):
            sys.argv = ["torchorbax", arguments[0], path, *arguments[1:]]
            with contextlib.redirect_stdout(io.StringIO()) as output:
                try:
                    runpy.run_module("torchorbax", run_name="__main__")
                except SystemExit as end:
                    assert not end.code, end.code
            result.append(output.getvalue())
        """,
        path=path,
    )
    assert "loss=2" in ls
    assert "weights (pytree, 2 MiB)" in inspected
    assert verified.splitlines() == ["step 0: every byte is as it was saved", "step 7: every byte is as it was saved"]
    assert other.run(
        """
        import orbax.checkpoint as ocp
        with ocp.CheckpointManager(path, item_names=("weights",)) as manager:
            target = ocp.args.StandardRestore(live(0))
            restored = manager.restore(7, args=ocp.args.Composite(weights=target))["weights"]
            result = manager.all_steps(), same(restored, 7)
        """,
        path=path,
    ) == [[0, 7], True]


def test_a_run_starts_from_another(path: str, one: Client, other: Client) -> None:
    made = """
        model = torch.nn.Linear(3, 2)
        with torchorbax.resume(model, None, path, save=None, **({"init_from": origin} if origin else {})) as run:
            result = run.next_step, model.weight.tolist()
            run.save(run.next_step + 4, force=True)
    """
    _, weight = one.run(made, path=path, origin=None)
    assert other.run(made, path=f"{path}2", origin=path) == [5, weight]
    assert other.run(made, path=f"{path}2", origin=None) == [10, weight]  # a step above it
    assert other.run(made, path=f"{path}3", origin=f"{path}2/9") == [10, weight]
    params = made.replace("origin}", "torchorbax.params(origin)}")
    assert one.run(params, path=f"{path}4", origin=f"{path}3/") == [0, weight]


def test_frozen_parameters_are_written_once(path: str, server: Server, one: Client, other: Client) -> None:
    program = """
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.Linear(256, 2))
        model[0].requires_grad_(False)
        torchorbax.place_(model)
        with torchorbax.resume(model, None, path, save=None, keep=1) as run:
            result = run.step, np.asarray(torchorbax.to_jax(model)["0.weight"])[0, :3].tolist()
            for _ in range(2):
                torchorbax.assign_(model[1].weight, np.full((2, 256), run.next_step, np.float32))
                run.save(run.next_step, force=True)
                run.wait()
    """
    _, weight = one.run(program, path=path, seed=0)
    written = sum(server.bytes_written("/base/").values())
    assert 256 * 256 * 4 < written < 300_000
    assert other.run(program, path=path, seed=1) == [1, weight]
    assert sum(server.bytes_written("/base/").values()) == written
    assert folders(server, path) == {"3", "base"}
    assert one.run("result = torchorbax.verify(path)", path=path) == [3]


def test_uris_stay_as_they_are(path: str, server: Server, one: Client) -> None:
    for given in (path, f"{path}/", f"{path}//"):
        code = "result = torchorbax.Checkpointer(given, {'weights': live(0)}, save=None).path"
        assert one.run(code, given=given) == path
    assert save(one, "gs://whole", 3, 4, 5, keep=2) == [4, 5]  # all of a bucket
    assert folders(server, "gs://whole") == {"4", "5"}


def test_steps_of_other_processes_show_up(path: str, one: Client, other: Client) -> None:
    look = "result = kept[path].all_steps()"
    opened = "kept[path] = torchorbax.Checkpointer(path, {'weights': live(0)}, read_only=True)"
    other.run(opened, path=path)
    assert other.run(look, path=path) == []
    save(one, path, 0)
    assert other.run(look, path=path) == [0]
    save(one, path, 1, 2, keep=2)
    assert other.run(look, path=path) == [1, 2]
    assert other.run("result = kept[path].restore(), same(kept[path].state['weights'], 2)", path=path) == [2, True]


def test_what_is_half_there_is_not_listed_and_removed_by_the_next_save(
    path: str, server: Server, one: Client, other: Client
) -> None:
    save(one, path, 0, 1, 2, 10, keep=None)
    folder = path.removeprefix("gs://bucket/")
    server.store.delete("bucket", f"{folder}/10/commit_success.txt")  # half written
    for name in sorted(objects(server, path)):
        if name.startswith("1/") and not name.startswith("1/manifest/"):  # half deleted
            server.store.delete("bucket", f"{folder}/{name}")
    assert folders(server, path) == {"0", "1", "2", "10"}
    listed = """
        run = torchorbax.Checkpointer(path, {"weights": live(0)}, save=None)
        result = [run.all_steps(), torchorbax.verify(path), run.restore(), same(run.state["weights"], 2)]
        result.append(attempt(lambda: torchorbax.load(path, 10, "weights"))[0])
        run.close()
    """
    for client in (one, other):
        assert client.run(listed, path=path) == [[0, 2], [0, 2], 2, True, "CheckpointNotFoundError"]
    assert folders(server, path) == {"0", "1", "2", "10"}  # who only reads removes nothing
    assert save(other, path, 3, keep=None) == [0, 2, 3]
    assert folders(server, path) == {"0", "2", "3"}
    assert save(one, path, 10, keep=None) == [0, 2, 3, 10]


def test_a_write_that_was_given_up_and_arrives_late_is_in_nobodys_way(
    path: str, server: Server, impatient: Client, other: Client
) -> None:
    """Whatever object it is: in this life, and if this life has ended before it arrives."""
    folder = path.removeprefix("gs://bucket/")
    program = f"""
        state = {{"weights": live(0)}}
        run = kept["late"] = torchorbax.Checkpointer(path, state, save=None, storage_timeout_s={IMPATIENT_S})
        run.save(7, force=True)
        result = attempt(run.wait)
    """
    server.add_faults("503 kind=data-write name=/7/")
    assert impatient.run(program, path=path)[0] == "SaveError"
    server.clear_faults()
    goes_on = "run = kept['late']; run.save(step, force=True); run.wait(); result = run.all_steps()"
    assert impatient.run(goes_on, step=8) == [8]
    server.store.put("bucket", f"{folder}/7/odd", b"late", {})
    assert impatient.run(goes_on, step=9) == [8, 9]
    assert folders(server, path) == {"8", "9"}
    impatient.run("kept['late'].close()")
    server.store.put("bucket", f"{folder}/7/odd", b"later", {})
    assert save(other, path, 10) == [8, 9, 10]
    assert folders(server, path) == {"8", "9", "10"}
    server.store.put("bucket", f"{folder}/11/odd", b"of somebody else", {})
    assert "other things under names of steps (11)" in other.run(OPENED, path=path)[1]


OPENED = "result = attempt(lambda: torchorbax.Checkpointer(path, {'weights': live(0)}, save=None))"


def test_runs_leave_each_other_alone(path: str, server: Server, one: Client, other: Client) -> None:
    """Their names begin alike, and so do those of steps."""
    save(one, path, 1, 10, 11, keep=None)
    before = {name: found.generation for name, found in server.store.objects("bucket").items()}
    server.clear_log()
    beside = f"{path}2"
    assert save(other, beside, 2, 20, 21, keep=1) == [21]
    assert one.run("result = train(path, 2, keep=1)['start']", path=path.replace("/run", "/ru")) == 0
    found = {name: found.generation for name, found in server.store.objects("bucket").items()}
    assert {name: found.get(name) for name in before} == before
    mine = "^(one|other)$"  # others may still be trying what they have given up
    changed = server.requests("write", client=mine) + server.requests("delete", client=mine)
    touched = {entry.name.split("/run")[0].split("/ru/")[0] for entry in changed if entry.name}
    assert touched == {path.removeprefix("gs://").removesuffix("/run")}
    assert not [entry for entry in changed if f"{path.removeprefix('gs://')}/" in entry.name]
    assert save(one, path, 12, keep=1) == [12]
    assert folders(server, path) == {"12"}
    assert folders(server, beside) == {"21"}


def test_no_request_asks_for_more_than_objects(path: str, server: Server, one: Client, other: Client) -> None:
    """To ask for the bucket takes a permission that roles/storage.objectUser does not have."""
    server.add_faults("403 kind=bucket")
    save(one, path, 0, 1, 2, keep=1)
    assert other.run("result = torchorbax.verify(path)", path=path) == [2]
    assert server.counts()["bucket"] == 0
    assert server.counts()["other"] == 0


OPEN = f"""
    result = attempt(lambda: torchorbax.resume(torch.nn.Linear(2, 2), None, path, storage_timeout_s={IMPATIENT_S}))
"""


@pytest.mark.parametrize(
    ("faults", "says"),
    [
        (["401"], "for credentials, run: gcloud auth application-default login"),
        (["403"], "grant it roles/storage.objectUser on gs://bucket"),
        (["403 kind=write"], "grant it roles/storage.objectUser on gs://bucket"),
        (["403 kind=data-write"], "grant it roles/storage.objectUser on gs://bucket"),
        (["403 kind=delete"], "grant it roles/storage.objectUser on gs://bucket"),
        (["503"], "no good answer in time"),
        (["429"], "no good answer in time"),
        (["503 kind=data-write"], "Service Unavailable|no good answer in time"),
        (["hang-before"], "no good answer in time"),
        (["hang-before kind=data-write"], "no good answer in time"),
        (["cut-before"], "no good answer in time"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_storage_that_cannot_be_used(
    faults: list[str], says: str, path: str, server: Server, impatient: Client
) -> None:
    server.add_faults(*faults)
    kind, text, seconds = impatient.run(OPEN, path=path)
    assert kind == "ConfigError"
    assert text.startswith(f"{path} cannot be used for a run: ")
    assert re.search(says, text)
    assert len(text.splitlines()) == 1
    assert seconds < 2 * IMPATIENT_S + SLACK_S
    server.clear_faults()
    assert impatient.run(OPEN, path=path)[:2] == ["", ""]


@pytest.mark.parametrize("bucket", ["missing", "403", "401-credentials-forbidden"])
def test_there_is_no_bucket(bucket: str, impatient: Client) -> None:
    kind, text, _ = impatient.run(OPEN, path=f"gs://{bucket}/run")
    assert kind == "ConfigError"
    assert f"is there a bucket {bucket}? To create it: gcloud storage buckets create gs://{bucket}" in text


def test_nobody_listens(run_python: RunPython) -> None:
    with Server() as server:
        port = server.port
    program = "import torch, torchorbax\nfrom tests.helpers.gcs_client import attempt\n"
    program += OPEN.strip().replace("path,", "'gs://bucket/run',") + "\nprint(result)"
    root = str(Path(__file__).parents[2])
    done = run_python(program, env={**environment(port), "PYTHONPATH": root}, warnings="default")
    assert "'ConfigError', 'gs://bucket/run cannot be used for a run: " in done.stdout
    assert float(done.stdout.split()[-1].rstrip("]")) < IMPATIENT_S + SLACK_S


def test_nobody_has_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (*TOKEN, "GOOGLE_APPLICATION_CREDENTIALS"):
        monkeypatch.delenv(name, raising=False)
    without = {"NO_GCE_CHECK": "true", "HOME": str(tmp_path), "CLOUDSDK_CONFIG": str(tmp_path)}
    with Server(token="secret") as server:
        env = {key: value for key, value in environment(server.port).items() if key not in TOKEN}
        with Client({**env, **without}) as client:
            kind, text, seconds = client.run(OPEN, path="gs://bucket/run")
    assert kind == "ConfigError"
    assert "for credentials, run: gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS" in text
    assert seconds < IMPATIENT_S + SLACK_S


@pytest.mark.parametrize("module", ["gcsfs", "google.cloud.storage"])
def test_the_missing_extra_is_named(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ConfigError, match=rf"gs://bucket/run: gs:// needs {module}: pip install 'torchorbax\[gcs\]'"):
        load("gs://bucket/run")


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("s3://bucket/run", "only local folders and gs:// are supported; mount other storage as a folder"),
        ("az://bucket/run", "only local folders and gs:// are supported"),
        ("gs:/bucket/run", "a URI has two slashes: gs://bucket/run"),
        ("gs://", "there is no bucket in it; write gs://bucket/folder"),
        ("gs:///run", "there is no bucket in it"),
    ],
)
def test_uris_that_are_none(path: str, says: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(path)}: {re.escape(says)}"):
        load(path)


@pytest.mark.parametrize("fault", ["hang-before kind=write", "503 kind=read,write", "403 kind=data-write"])
def test_training_goes_on_while_a_save_is_stuck(fault: str, path: str, server: Server, impatient: Client) -> None:
    impatient.run(
        f"""
        run = kept["run"] = torchorbax.Checkpointer(path, {{"weights": live(0)}}, storage_timeout_s={IMPATIENT_S})
        run.save(0)
        run.wait()
        """,
        path=path,
    )
    server.add_faults(fault)
    made, seconds, error, listed = impatient.run(
        """
        run, made, started_s, error = kept["run"], 0, time.monotonic(), ""
        while not error:
            made += 1
            run.state["weights"].update(live(made))
            try:
                run.save(made)
            except torchorbax.SaveError as failure:
                error = str(failure)
            time.sleep(0.002)
        result = made, time.monotonic() - started_s, error, run.all_steps()
        """,
        path=path,
    )
    assert error.startswith(f"{path}: step 1 was not saved: ")
    assert made >= (3 if seconds > IMPATIENT_S / 2 else 1)  # a save that is refused at once is no hindrance
    assert seconds < IMPATIENT_S + SLACK_S
    assert listed == [0]
    server.clear_faults()
    last = impatient.run(
        """
        run, step = kept["run"], made
        while run.history[-1].commit_s is None:
            step += 1
            run.state["weights"].update(live(step))
            attempt(lambda: run.save(step))
            time.sleep(0.002)
        run.close()
        result = run.all_steps()[-1]
        result = same(torchorbax.load(path, item="weights"), result) and torchorbax.verify(path)[-1] == result
        """,
        path=path,
        made=made,
    )
    assert last is True
    if fault.startswith("403"):  # of the others a write may still arrive; the next run removes it
        assert folders(server, path) == set(map(str, impatient.run("result = kept['run'].all_steps()")))


def test_a_base_that_could_not_be_written_is_written_again(path: str, server: Server, impatient: Client) -> None:
    server.add_faults("503 kind=data-write name=/base/0/")
    program = f"""
        model = torch.nn.Linear(256, 256)
        model.requires_grad_(False)
        torchorbax.place_(model)
        run = kept["run"] = torchorbax.resume(model, None, path, save=None, storage_timeout_s={IMPATIENT_S})
        run.save(0, force=True)
        result = attempt(run.wait)
    """
    kind, text, _ = impatient.run(program, path=path)
    assert kind == "SaveError"
    assert text.startswith(f"{path}: step 0 was not saved: base 0: ")
    server.clear_faults()
    found = impatient.run("run = kept['run']; run.save(1, force=True); run.close(); result = run.all_steps()")
    assert found == [1]
    assert impatient.run("result = torchorbax.verify(path)", path=path) == [1]
    assert folders(server, path) == {"1", "base"}
    assert folders(server, f"{path}/base") <= {"0", "1"}  # writes of the first that were given up may still arrive


def test_the_end_of_a_run_reports_a_save_that_failed(path: str, server: Server, impatient: Client) -> None:
    server.add_faults("hang-before kind=write name=/0/")
    kind, text, seconds = impatient.run(
        f"""
        def work():
            with torchorbax.Checkpointer(path, {{"weights": live(0)}}, storage_timeout_s={IMPATIENT_S}) as run:
                run.save(0)
        result = attempt(work)
        """,
        path=path,
    )
    assert kind == "SaveError"
    assert text == f"{path}: step 0 was not saved: no good answer in time (storage_timeout_s)"
    assert seconds < IMPATIENT_S + SLACK_S


@pytest.mark.parametrize("kind", ["metadata-write", "data-write"])
def test_a_program_ends_although_the_storage_is_silent(
    kind: str, path: str, server: Server, run_python: RunPython
) -> None:
    server.add_faults(f"hang-before kind={kind} name=/0/")
    program = f"""
        import numpy as np, torchorbax
        run = torchorbax.Checkpointer({path!r}, {{"x": np.ones(5)}}, storage_timeout_s={IMPATIENT_S})
        run.save(0)
    """
    done = run_python(program, env=environment(server.port), warnings="default", timeout=100)
    assert "step 0 was not saved: no good answer in time (storage_timeout_s)" in done.stderr


def test_damage_is_still_damage(path: str, server: Server, one: Client) -> None:
    """A storage that answers is believed."""
    save(one, path, 0, 1, 2)
    folder = path.removeprefix("gs://bucket/")
    data = [name for name in sorted(objects(server, path)) if re.match(r"1/weights/d/", name)]
    for name in data:  # one of them may hold only what nobody reads
        server.store.delete("bucket", f"{folder}/{name}")
    server.store.delete("bucket", f"{folder}/2/manifest/metadata")
    found = one.run(
        """
        import warnings
        result = [attempt(lambda: torchorbax.verify(path))]
        with torchorbax.Checkpointer(path, {"weights": live(9)}, save=None) as run:
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                result += [run.restore(), same(run.state["weights"], 0), [str(one.message) for one in seen]]
            result.append(run.all_steps())
            run.save(3, force=True)
            run.wait()
            result.append(run.all_steps())
        """,
        path=path,
    )
    kind, text, _ = found[0]
    assert kind == "CorruptCheckpointError"
    assert "step 1: item weights: " in text
    assert "step 2: " in text
    assert found[1:3] == [0, True]
    assert [text.split(": ")[1] for text in found[3] if "skipped" in text] == [
        "skipped damaged step 2",
        "skipped damaged step 1",
    ]
    assert found[4:] == [[0], [0, 3]]
    assert folders(server, path) == {"0", "1.torchorbax-damaged", "2.torchorbax-damaged", "3"}


def test_client_and_server_are_killed_together(run_python: RunPython) -> None:
    done = run_python(SCRIPTS / "gcskills.py", "--trials", 22, devices=None, timeout=280, warnings="ignore")
    assert done.stdout.splitlines()[-1] == "22 trials, 0 failures"
    counts = {how: int(count) for count, how in re.findall(r"^ *(\d+)  (.*)$", done.stdout, re.MULTILINE)}
    assert sum(counts.values()) == 22
    assert sum(count for how, count in counts.items() if how.startswith("committed")) >= 1
    assert counts["not committed, no old step gone"] >= 10


def test_missing_gcs_extra_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'torchorbax\[gcs\]'"):
        Checkpointer("gs://bucket/run", {"w": weights()})
