"""Checkpoints that somebody made to do harm: a clear error, nothing written elsewhere, nothing executed."""

from __future__ import annotations

import ast
import contextlib
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchorbax
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchorbax import Checkpointer, CorruptCheckpointError, MismatchError, UnsupportedLeafError
from torchorbax._src.format import manifest

from tests.helpers.programs import RunPython
from tests.helpers.tensors import bits

ROOT = Path(__file__).parents[2]


def live() -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "data": {"seen": np.zeros(3), "epoch": 1, "order": (1, "two", None)},
    }


def signed(content: dict[str, Any]) -> dict[str, Any]:
    """With a digest that is right, as whoever means harm would make it."""
    plain = {key: value for key, value in content.items() if key != "sha256"}
    return {**plain, "sha256": manifest.digest(plain)}


@pytest.fixture
def run_path(tmp_path: Path) -> Path:
    with Checkpointer(tmp_path / "run", live(), save=None) as run:
        run.save(0, force=True)
    return tmp_path / "run"


def manifest_file(run: Path) -> Path:
    return run / "0" / "manifest" / "metadata"


# ------------------------------------------------------------------------------------------------- manifests by hand


def item(content: Any, name: str = "model") -> Any:
    return content["items"][name]


def rename_item(content: Any, name: str) -> None:
    content["items"][name] = content["items"].pop("model")


def set_leaf(content: Any, **fields: Any) -> None:
    item(content)["leaves"]["0.weight"].update(fields)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


HOSTILE: dict[str, Callable[[Any], object]] = {
    "an item above the run": lambda content: rename_item(content, "../../x"),
    "an absolute item": lambda content: rename_item(content, "/etc"),
    "an item with NUL": lambda content: rename_item(content, "a\0b"),
    "an item called ..": lambda content: rename_item(content, ".."),
    "an item of 10 MB": lambda content: rename_item(content, "x" * 10_000_000),
    "a shape beyond all memory": lambda content: set_leaf(content, shape=[2**40, 2**40]),
    "a negative shape": lambda content: set_leaf(content, shape=[-3, 3]),
    "a shape of text": lambda content: set_leaf(content, shape="33"),
    "a fractional shape": lambda content: set_leaf(content, shape=[1.5]),
    "a thousand dimensions": lambda content: set_leaf(content, shape=[1] * 1000),
    "an unknown dtype": lambda content: set_leaf(content, dtype="object"),
    "a residence elsewhere": lambda content: set_leaf(content, residence="gpu"),
    "no fingerprint": lambda content: set_leaf(content, fingerprint=""),
    "a tie to nothing": lambda content: item(content)["ties"].update({"a": "nothing"}),
    "a step that is none": lambda content: content.update(step="0"),
    "values of an unknown kind": lambda content: item(content, "data")["values"].update(value={"$": "os.system"}),
    "a class by name": lambda content: item(content, "data")["values"].update(
        value={"$": "torch.dtype", "value": "nn"}
    ),
    "a note without what it notes": lambda content: item(content, "data")["values"].update(
        value={"$": "built", "value": 1}
    ),
    "text as the values of a module": lambda content: item(content).update(values="2020-01-01"),
    "values that are not there": lambda content: item(content, "optimizer").update(values=None),
    "an optimizer without groups": lambda content: item(content, "optimizer").update(
        values={"$": "dict", "keys": ["state"], "values": [{"$": "dict", "keys": [], "values": []}]}
    ),
    "items that are a list": lambda content: content.update(items=[]),
    "a time that is none": lambda content: content.update(time="soon"),
}


@pytest.mark.parametrize("harm", HOSTILE)
def test_hostile_manifests_are_damage(harm: str, run_path: Path) -> None:
    content = json.loads(manifest_file(run_path).read_text())
    HOSTILE[harm](content)
    manifest_file(run_path).write_text(json.dumps(signed(content)))
    state = live()
    before = bits(state["model"][0].weight)
    with Checkpointer(run_path, state) as run, pytest.raises(CorruptCheckpointError, match=r"step 0: ") as caught:
        run.restore()
    assert len(str(caught.value)) < 2000
    assert bits(state["model"][0].weight) == before


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "JSONDecodeError"),
        ("{", "JSONDecodeError"),
        ("[" * 100_000, "RecursionError"),
        ('{"format": 2}', r"manifest format 2 is newer than this torchorbax reads \(1\)"),
        ('{"format": 1, "sha256": ""}', "SHA-256 differs"),
        ("null", "not a torchorbax manifest"),
        ("\0" * 100, "JSONDecodeError"),
    ],
    ids=["empty", "truncated", "nested", "newer", "unsigned", "null", "zeros"],
)
def test_texts_that_are_no_manifest(text: str, reason: str, run_path: Path) -> None:
    manifest_file(run_path).write_text(text)
    with Checkpointer(run_path, live()) as run, pytest.raises(CorruptCheckpointError, match=reason):
        run.restore()


def test_values_nested_beyond_python_s_stack(run_path: Path) -> None:
    content = json.loads(manifest_file(run_path).read_text())
    item(content, "data")["values"]["value"] = nested(900)
    manifest_file(run_path).write_text(json.dumps(signed(content)))
    with Checkpointer(run_path, live()) as run, pytest.raises(CorruptCheckpointError, match="RecursionError"):
        run.restore()


@pytest.mark.parametrize("name", ["manifest/metadata", "model/_METADATA"])
def test_metadata_beyond_all_measure_is_not_read(name: str, run_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (run_path / "0" / name).open("ab") as file:
        file.truncate(2**31)  # a sparse file
    with pytest.raises(CorruptCheckpointError, match="2147483648 bytes"):
        torchorbax.verify(run_path)
    if name == "manifest/metadata":  # Orbax's own metadata is not needed for a restore
        with Checkpointer(run_path, live()) as run, pytest.raises(CorruptCheckpointError, match="2147483648 bytes"):
            run.restore()


def test_a_key_of_10_mb_does_not_flood_the_terminal(run_path: Path) -> None:
    content = json.loads(manifest_file(run_path).read_text())
    leaves = item(content)["leaves"]
    leaves["x" * 10_000_000] = leaves.pop("0.bias")
    leaves["\x1b[2J\0"] = leaves.pop("1.bias")
    manifest_file(run_path).write_text(json.dumps(signed(content)))
    with Checkpointer(run_path, live()) as run, pytest.raises(MismatchError, match="unexpected") as caught:
        run.restore()
    assert len(str(caught.value)) < 5000
    assert "\x1b" not in str(caught.value)


# -------------------------------------------------------------------------------------------- manifests by hypothesis


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all nodes of a JSON value."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, child in children for place in places(child, (*path, key)))]


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from(["", "../../x", "/etc/passwd", "a\0b", "$", "leaf", "dict", "nn", "float32", "x" * 5000]),
    st.just([]),
    st.just({}),
    st.just({"$": "leaf", "name": "0.weight", "as": "torch"}),
    st.just({"$": "dict", "keys": [], "values": []}),
    st.just({"$": "tuple", "values": [1]}),
    st.lists(st.integers(0, 3), max_size=3),
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    path = tmp_path_factory.mktemp("hostile") / "run"
    with Checkpointer(path, live(), save=None) as run:
        run.save(0, force=True)
    return path, json.loads(manifest_file(path).read_text())


@given(data=st.data())
def test_any_manifest_gives_a_known_error_or_the_saved_state(
    data: st.DataObject, written: tuple[Path, dict[str, Any]]
) -> None:
    path, original = written
    content = copy.deepcopy(original)
    for _ in range(data.draw(st.integers(1, 2))):
        where = data.draw(st.sampled_from([place for place in places(content) if place and place != ("sha256",)]))
        parent = content
        for key in where[:-1]:
            parent = parent[key]
        if isinstance(parent, dict) and data.draw(st.booleans()):
            value = parent.pop(where[-1])
            if data.draw(st.booleans()):
                parent[data.draw(st.sampled_from(["../../x", "a\0b", "", "$", "0.weight", "values"]))] = value
        else:
            parent[where[-1]] = copy.deepcopy(data.draw(JUNK))
    manifest_file(path).write_text(json.dumps(signed(content)))
    state = live()
    weight = bits(state["model"][0].weight)
    with Checkpointer(path, state) as run:
        with contextlib.suppress(CorruptCheckpointError, MismatchError, UnsupportedLeafError):
            run.restore(0)
        assert bits(state["model"][0].weight) == weight  # either way: what was saved is what is live


# ----------------------------------------------------------------------------------------------------- what is executed


def test_nothing_is_executed_and_nothing_is_written_by_a_restore(run_path: Path, run_python: RunPython) -> None:
    """Python reports what matters to its audit hooks: unpickling, code, processes, files opened to be written."""
    program = """
        import sys, torch, numpy as np
        sys.path.insert(0, sys.argv[2])
        import torchorbax
        from tests.campaigns.test_hostile import live
        run = torchorbax.Checkpointer(sys.argv[1], live(), save=None)
        run.restore(0)                      # imports and compiles
        seen = []

        def hook(event, args):
            if event == "open":
                name, mode, flags = args
                if isinstance(mode, str) and set(mode) & set("wax+"):
                    seen.append((event, name, mode))
            elif event in ("pickle.find_class", "exec", "compile", "marshal.loads", "subprocess.Popen", "os.system",
                           "os.exec", "os.posix_spawn", "os.rename", "os.remove", "os.rmdir", "socket.connect",
                           "shutil.rmtree", "ctypes.dlopen"):
                seen.append((event, *map(str, args))[:2])

        sys.addaudithook(hook)
        run.restore(0)
        torchorbax.verify(sys.argv[1])
        torchorbax.load(sys.argv[1])
        print(seen)
    """
    assert run_python(program, run_path, ROOT).stdout.strip() == "[]"


def test_the_package_has_no_way_to_execute_what_it_reads() -> None:
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    for file in (ROOT / "torchorbax").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [node.id] if isinstance(node, ast.Name) and node.id in ("eval", "exec") else []
            assert not forbidden & {name.partition(".")[0] for name in names}, file
            assert not {"eval", "exec"} & set(names), file
            calls_load = isinstance(node, ast.Attribute) and node.attr == "load" and ast.unparse(node.value) == "torch"
            assert not calls_load, file
