"""What users see: the public names, where they seem to come from, and their signatures."""

from __future__ import annotations

import copy
import datetime
import inspect
import io
import pickle
import pydoc
import typing
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torchorbax
from torchorbax import errors, policies

from tests import public_signatures
from tests.helpers.programs import RunPython

PUBLIC = {name: getattr(torchorbax, name) for name in torchorbax.__all__}
OURS = {name: value for name, value in PUBLIC.items() if isinstance(value, type | FunctionType)}
RECORDS = [
    torchorbax.Problem("shape", "model", "weight", "(2,)", "(3,)"),
    torchorbax.SaveRecord(3, datetime.datetime.now(datetime.UTC), error=torchorbax.SaveError(3, "runs/a", "disk full")),
    torchorbax.RunOptions(keep=None, local="runs/fast"),
    torchorbax.params("runs/a", rename={"old": "new"}),
]
RAISED = [
    errors.ConfigError("no such axis"),
    errors.CheckpointNotFoundError("gs://bucket/run", 7, [1, 2]),
    errors.MismatchError("runs/a: step 3", [torchorbax.Problem("shape", "model", "weight", "(2,)", "(3,)")]),
    errors.StorageError("gs://bucket/run", "503"),
]


def test_signatures_are_those_committed() -> None:
    """A change here is a change of the public interface: `python -m tests.public_signatures write`, and a line in the
    changelog."""
    assert public_signatures.FILE.read_text() == public_signatures.text()


@pytest.mark.parametrize("module", [torchorbax, policies], ids=lambda module: module.__name__)
def test_dir_lists_the_public_names(module: ModuleType) -> None:
    assert {name for name in dir(module) if not name.startswith("__")} == set(module.__all__)
    assert "__doc__" in dir(module)
    assert len(set(module.__all__)) == len(module.__all__) <= 45


def test_dir_lists_no_internals_that_imports_leave_behind(run_python: RunPython) -> None:
    run_python("""
        import torchorbax, torchorbax.errors, torchorbax.__main__, torchorbax._src.run.tier
        assert {name for name in dir(torchorbax) if not name.startswith("__")} == set(torchorbax.__all__)
    """)


@pytest.mark.parametrize("name", [*OURS, "policies"])
def test_everything_public_is_documented(name: str) -> None:
    assert (PUBLIC[name].__doc__ or "").strip()


@pytest.mark.parametrize("name", OURS)
def test_public_names_come_from_torchorbax(name: str) -> None:
    assert OURS[name].__module__ == "torchorbax"
    assert OURS[name].__qualname__ == name
    assert "_src" not in pydoc.plain(pydoc.render_doc(OURS[name]))


@pytest.mark.parametrize("name", OURS)
def test_types_that_reach_users_can_be_imported(name: str) -> None:
    reached = {cls for annotation in _annotations(OURS[name]) for cls in _classes(annotation)}
    ours = {cls for cls in reached if cls.__module__.partition(".")[0] == "torchorbax"}
    assert ours <= {*OURS.values(), *(getattr(policies, name) for name in policies.__all__)}


def _annotations(value: Any) -> Iterator[Any]:
    """Of a function's parameters and result; of a class's fields, methods and properties."""
    yield from typing.get_type_hints(value).values()
    for name, member in vars(value).items() if isinstance(value, type) else ():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if isinstance(function, FunctionType) and (not name.startswith("_") or name in ("__init__", "__call__")):
            yield from typing.get_type_hints(function).values()


def _classes(annotation: Any) -> Iterator[type]:
    """The classes that an annotation consists of; of the keywords of a call, those of the values."""
    parts = typing.get_args(annotation)
    if typing.is_typeddict(annotation):
        parts = tuple(typing.get_type_hints(annotation).values())
    elif isinstance(annotation, type) and not parts:
        yield annotation
    for part in parts:
        yield from _classes(part)


def test_the_search_for_types_finds_them() -> None:
    """It would be of no use if it met no type of ours."""
    reached = {cls for annotation in _annotations(torchorbax.Checkpointer) for cls in _classes(annotation)}
    assert torchorbax.SaveRecord in reached
    assert torchorbax.SaveError in {
        cls for annotation in _annotations(torchorbax.SaveRecord) for cls in _classes(annotation)
    }


@pytest.mark.parametrize("value", RECORDS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_records_can_be_pickled_under_their_public_names(value: Any, protocol: int) -> None:
    pickled = pickle.dumps(value, protocol)
    found = pickle.loads(pickled)
    assert type(found) is type(value)
    assert str(found) == str(value)
    assert _modules_named(pickled) == {"torchorbax"}


@pytest.mark.parametrize("error", RAISED, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_errors_can_be_pickled_under_their_public_names(error: Exception, protocol: int) -> None:
    error.add_note("at step 3")
    pickled = pickle.dumps(error, protocol)
    for found in (pickle.loads(pickled), copy.copy(error)):
        assert type(found) is type(error)
        assert (str(found), found.args, vars(found)) == (str(error), error.args, vars(error))
    assert _modules_named(pickled) == {"torchorbax"}


def _modules_named(pickled: bytes) -> set[str]:
    """The modules of this package that a pickle imports from."""
    found: set[str] = set()

    class Noting(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            found.add(module)
            return super().find_class(module, name)

    Noting(io.BytesIO(pickled)).load()
    return {module for module in found if module.partition(".")[0] == "torchorbax"}


def test_errors_are_printed_under_their_public_names() -> None:
    with pytest.raises(torchorbax.ConfigError, match="must be 'first' or 'all'") as caught:
        torchorbax.RunOptions(replicas="some")  # type: ignore[arg-type]
    assert repr(type(caught.value)) == "<class 'torchorbax.ConfigError'>"


def test_annotations_still_resolve() -> None:
    """Though `__module__` names a module that lacks the names which the annotations use."""
    assert typing.get_type_hints(torchorbax.SaveRecord)["time"] is datetime.datetime
    assert inspect.signature(torchorbax.Problem).parameters["item"].default is inspect.Parameter.empty
