"""The plan finds every difference between a checkpoint and the live objects, and no other."""

from __future__ import annotations

from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as st
from torchorbax._src.format.manifest import LeafMeta
from torchorbax._src.state.compare import (
    advice,
    castable,
    compare_leaves,
    compare_ties,
    same_integers,
    with_suggestions,
)
from torchorbax._src.state.request import Request
from torchorbax.errors import Problem

from tests.helpers.names import paths

names = st.sampled_from([f"layers.{index}.{kind}" for index in range(4) for kind in ("weight", "bias")])

shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)

metas = st.builds(
    LeafMeta,
    shape=shapes,
    dtype=st.sampled_from(["float32", "bfloat16", "int8"]),
    residence=st.sampled_from(["jax", "host"]),
    sharding=st.none() | st.just({"mesh": {"fsdp": 8}, "spec": ["fsdp"]}),
)


@given(saved=st.dictionaries(names, metas), data=st.data())
def test_exactly_the_injected_differences_are_found(saved: dict[str, LeafMeta], data: st.DataObject) -> None:
    """`live` is the saved tree with some leaves gone, some new, some reshaped, and some of another dtype."""
    live = {}
    expected: set[tuple[str, str, str, str]] = set()
    for name, meta in saved.items():
        shape, dtype = meta.shape, meta.dtype
        changes = data.draw(st.sets(st.sampled_from(["unexpected", "shape", "dtype"])))
        if "unexpected" in changes:
            expected.add(("unexpected", name, "", str(meta)))
            continue
        if "shape" in changes:
            shape = data.draw(shapes.filter(lambda other, shape=shape: other != shape))
            expected.add(("shape", name, str(shape), str(meta.shape)))
        if "dtype" in changes:
            dtype = "float16"
            expected.add(("dtype", name, "float16", meta.dtype))
        live[name] = LeafMeta(shape, dtype, data.draw(st.sampled_from(["jax", "host"])))  # places may differ
    for name in data.draw(st.sets(names)):
        if name not in saved:
            live[name] = data.draw(metas)
            expected.add(("missing", name, str(live[name]), ""))
    problems = compare_leaves("model", live, saved)
    assert {(problem.kind, problem.name, problem.expected, problem.found) for problem in problems} == expected
    assert len(problems) == len(expected)
    assert all(problem.item == "model" for problem in problems)


def test_only_what_jax_narrows_is_converted_without_asking() -> None:
    dtypes, places = ["int16", "int32", "int64", "uint32", "float32", "float64"], ["jax", "host"]
    converted = {
        (saved, saved_place, live, live_place)
        for saved in dtypes
        for live in dtypes
        for saved_place in places
        for live_place in places
        if same_integers(LeafMeta((), saved, saved_place), LeafMeta((), live, live_place))
    }
    assert converted == {("int32", "jax", "int64", "host"), ("int64", "host", "int32", "jax")}
    counter = {"norm.num_batches_tracked": LeafMeta((), "int64", "host")}
    assert not compare_leaves("model", counter, {"norm.num_batches_tracked": LeafMeta((), "int32", "jax")})
    problems = compare_leaves("model", counter, {"norm.num_batches_tracked": LeafMeta((1,), "int32", "jax")})
    assert [problem.kind for problem in problems] == ["shape"]


def test_ties_on_one_side_only_are_told() -> None:
    live = {"embed": "embed", "head": "embed", "bias": "bias", "gain": "gain", "new": "embed"}
    saved = {"embed": "embed", "head": "head", "bias": "bias", "gain": "bias", "old": "head"}
    assert compare_ties("model", live, saved) == [
        Problem("ties", "model", "embed", "tied with head", "not tied"),
        Problem("ties", "model", "head", "tied with embed", "not tied"),
        Problem("ties", "model", "bias", "not tied", "tied with gain"),
        Problem("ties", "model", "gain", "not tied", "tied with bias"),
    ]


groupings = st.dictionaries(names, st.integers(0, 3))
"""Which tensor each name belongs to."""


@given(live=groupings, saved=groupings, order=st.randoms(use_true_random=False))
def test_ties_are_compared_as_groups_whatever_name_comes_first(
    live: dict[str, int], saved: dict[str, int], order: object
) -> None:
    common = live.keys() & saved.keys()
    differing = {name for name in common if _group(name, live, common) != _group(name, saved, common)}
    problems = compare_ties("model", _first_names(live, sorted(live)), _first_names(saved, sorted(saved)[::-1]))
    assert {problem.name for problem in problems} == differing
    assert {problem.kind for problem in problems} <= {"ties"}


def _first_names(groups: Mapping[str, int], order: list[str]) -> dict[str, str]:
    firsts: dict[int, str] = {}
    return {name: firsts.setdefault(groups[name], name) for name in order}


def _group(name: str, groups: Mapping[str, int], among: set[str]) -> set[str]:
    return {other for other in among if groups[other] == groups[name]}


@given(missing=st.sets(paths), unexpected=st.sets(paths))
def test_every_suggestion_is_an_unexpected_name_of_the_same_shape_and_given_once(
    missing: set[str], unexpected: set[str]
) -> None:
    problems = [Problem("missing", "model", name, f"float32({len(name)},)") for name in sorted(missing)]
    problems += [
        Problem("unexpected", "model", name, "", f"float32({len(name)},)") for name in sorted(unexpected - missing)
    ]
    found = [problem for problem in with_suggestions(problems) if problem.nearest]
    assert all(problem.kind == "missing" and problem.nearest in unexpected for problem in found)
    assert all(len(problem.nearest) == len(problem.name) for problem in found)
    assert len({problem.nearest for problem in found}) == len(found)


def test_suggestions_for_thousands_of_names_are_quick() -> None:
    problems = [Problem("missing", "model", f"blocks.{i}.weight", "float32()") for i in range(5000)]
    problems += [Problem("unexpected", "model", f"layers.{i}.weight", "", "float32()") for i in range(5000)]
    found = with_suggestions(problems)
    assert [problem.nearest for problem in found[:20]] == [f"layers.{i}.weight" for i in range(20)]


def test_casts_stay_within_a_kind_of_numbers() -> None:
    assert castable("float32", "bfloat16")
    assert castable("float8_e4m3fn", "float64")
    assert castable("int64", "int32")
    assert castable("complex64", "complex128")
    for saved, live in (("float32", "int32"), ("complex64", "float32"), ("bool", "int32"), ("int8", "float32")):
        assert not castable(saved, live)


def test_advice_names_the_argument() -> None:
    assert "rename={'old': 'new'}" in advice([Problem("missing", "model", "new", "x", nearest="old")])
    assert "cast=True" in advice([Problem("dtype", "model", "x", "bfloat16", "float32")])
    assert "cast=True" not in advice([Problem("dtype", "model", "x", "int32", "float32")])
    assert "param_groups" in advice([Problem("groups", "optimizer", "x", "a", "b")])
    assert "strict=False" in advice([Problem("shape", "model", "x", "(1,)", "(2,)")])
    assert Request().strict
