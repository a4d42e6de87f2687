"""The exception tree, and what each error promises: attributes to act on, messages to read."""

from __future__ import annotations

import inspect
import pickle

import pytest
import torchorbax
from torchorbax import errors
from torchorbax.errors import Problem

TREE = {
    errors.ConfigError: ValueError,
    errors.CheckpointNotFoundError: FileNotFoundError,
    errors.CorruptCheckpointError: Exception,
    errors.MismatchError: Exception,
    errors.UnsupportedLeafError: TypeError,
    errors.DeletedArrayError: RuntimeError,
    errors.SaveError: Exception,
    errors.StorageError: OSError,
    errors.OwnershipError: Exception,
    errors.ProcessError: RuntimeError,
}

EXAMPLES = [
    errors.ConfigError("no such axis"),
    errors.CheckpointNotFoundError("gs://bucket/run", 7, [1, 2]),
    errors.CorruptCheckpointError("/run", {3: "truncated"}),
    errors.MismatchError("/run: step 3", [Problem("shape", "model", "weight", "(2,)", "(3,)")]),
    errors.UnsupportedLeafError("weight", "a set"),
    errors.DeletedArrayError(["weight"]),
    errors.SaveError(3, "/run", "disk full"),
    errors.StorageError("gs://bucket/run", "503"),
    errors.OwnershipError.of_owner("run", "process 1 on host, since noon"),
    errors.ProcessError([1], "write", "process 1 did not come"),
]


@pytest.mark.parametrize(("error", "builtin"), TREE.items())
def test_one_tree_that_also_answers_to_the_builtin_kind(error: type[Exception], builtin: type[Exception]) -> None:
    assert issubclass(error, errors.TorchorbaxError)
    assert issubclass(error, builtin)
    assert not any(issubclass(error, other) for other in TREE if other is not error), (
        "siblings must not catch each other"
    )


def test_the_tree_is_complete_and_public() -> None:
    defined = {cls for cls in vars(errors).values() if inspect.isclass(cls) and issubclass(cls, errors.TorchorbaxError)}
    assert defined == {*TREE, errors.TorchorbaxError}
    for cls in defined:
        assert getattr(torchorbax, cls.__name__) is cls
        assert cls.__name__ in torchorbax.__all__
        assert cls is errors.TorchorbaxError or cls.__name__ in (errors.__doc__ or "")


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_documented_attributes_exist(error: Exception) -> None:
    documented = (type(error).__doc__ or "").partition("Attributes:")[2].split("\n")
    names = [line.strip().partition(":")[0] for line in documented if line.startswith("        ") and ":" in line]
    for name in names:
        assert hasattr(error, name), name


def test_not_found_says_what_there_is() -> None:
    error = errors.CheckpointNotFoundError("gs://bucket/run", 7, [1, 2])
    assert (error.path, error.step) == ("gs://bucket/run", 7)
    assert str(error) == "gs://bucket/run: no step 7 found; steps there: 1, 2"
    anything = errors.CheckpointNotFoundError("/run")
    assert (anything.path, anything.step) == ("/run", None)
    assert str(anything) == "/run: no checkpoint found"


def test_corrupt_gives_a_reason_for_every_step_newest_first() -> None:
    reasons = {1: "no manifest", 12: "truncated", 3: "weight is missing"}
    error = errors.CorruptCheckpointError("/run", reasons)
    assert (error.path, error.reasons) == ("/run", reasons)
    assert "3 damaged steps" in str(error)
    lines = str(error).splitlines()
    assert [line.strip() for line in lines if line.startswith("  step")] == [
        "step 12: truncated",
        "step 3: weight is missing",
        "step 1: no manifest",
    ]
    assert "Nothing was changed" in lines[-1]
    reasons.clear()
    assert len(error.reasons) == 3
    assert "/run: a damaged step" in str(errors.CorruptCheckpointError("/run", {3: "truncated"}))


def test_mismatch_counts_every_kind_shows_the_first_of_each_and_keeps_all() -> None:
    problems = [
        *(Problem("missing", "model", f"layers.{index}.weight", "float32(2, 3)") for index in range(12)),
        *(Problem("unexpected", "model", f"old.{index}", "", "float32(9,)") for index in range(2)),
        Problem("shape", "model", "head", "(10, 4)", "(10, 5)"),
        Problem("dtype", "optimizer", "head.exp_avg", "float32", "bfloat16"),
    ]
    error = errors.MismatchError("/run: step 3", problems)
    assert error.problems == tuple(problems)
    first, *rest, last = str(error).splitlines()
    assert first == "/run: step 3 does not fit the live objects: 12 missing, 2 unexpected, 1 shape, 1 dtype"
    shown = [line for line in rest if "layers." in line]
    assert len(shown) == 5
    assert "model: layers.0.weight" in shown[0]
    assert "expected float32(2, 3)" in shown[0]
    assert [line for line in rest if "more of kind" in line] == ["  ... and 7 more of kind missing (see .problems)"]
    for parts in (
        ("model: old.1", "float32(9,)", "no such live value"),
        ("model: head", "shape", "expected (10, 4)", "found (10, 5)"),
        ("optimizer: head.exp_avg", "dtype", "expected float32", "found bfloat16"),
    ):
        assert [line for line in rest if all(part in line for part in parts)], parts
    assert "Nothing was changed" in last


def test_unsupported_leaf_names_the_leaf() -> None:
    error = errors.UnsupportedLeafError("head.weight", "torch.quint8 cannot be kept")
    assert error.name == "head.weight"
    assert str(error) == "head.weight: torch.quint8 cannot be kept"
    nameless = errors.UnsupportedLeafError("", "a set")
    assert nameless.name == ""
    assert str(nameless) == "the value: a set"


def test_deleted_array_names_all_and_says_what_to_do() -> None:
    names = [f"layers.{index}.weight" for index in range(7)]
    error = errors.DeletedArrayError(names)
    assert error.names == tuple(names)
    assert "7 array(s) have been deleted" in str(error)
    assert f"{', '.join(names[:5])}, ..." in str(error)
    assert "assign_" in str(error)
    assert "..." not in str(errors.DeletedArrayError(names[:5])).split(". Hand over")[0]


def test_save_error_says_which_step() -> None:
    error = errors.SaveError(40, "gs://bucket/run", "OSError: disk full")
    assert (error.step, error.path) == (40, "gs://bucket/run")
    assert str(error) == "gs://bucket/run: step 40 was not saved: OSError: disk full"


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_errors_cross_process_boundaries(error: Exception) -> None:
    """Launchers and worker pools hand exceptions over by pickle."""
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)
