"""A manifest survives its way through JSON text, and anything else is told from one."""

from __future__ import annotations

import copy
import datetime
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchorbax._src.arrays.dtypes import BY_NAME
from torchorbax._src.format.manifest import FORMAT, ITEM_NAME, ItemMeta, LeafMeta, Manifest, Shared
from torchorbax._src.state.values import encode

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
jsons = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
names = st.text(min_size=1, max_size=8)
axes = st.none() | st.sampled_from(["fsdp", "tp"]) | st.lists(st.sampled_from(["fsdp", "tp"]), max_size=2)
shardings = st.fixed_dictionaries(
    {"mesh": st.dictionaries(names, st.integers(1, 8), max_size=2), "spec": st.lists(axes, max_size=3)}
)
leaf_metas = st.builds(
    LeafMeta,
    shape=st.lists(st.integers(0, 9), max_size=4).map(tuple),
    dtype=st.sampled_from(sorted(BY_NAME)),
    residence=st.sampled_from(["jax", "host"]),
    sharding=st.none() | shardings,
    fingerprint=st.integers(0, 2**128 - 1).map(lambda number: f"{number:032x}"),
    base=st.none() | st.integers(0, 9),
)
item_names = st.from_regex(ITEM_NAME, fullmatch=True)


@st.composite
def item_metas(draw: st.DrawFn) -> ItemMeta:
    kind = draw(st.sampled_from(["module", "torch.optim", "optax", "object", "pytree", "rng"]))
    leaves = draw(st.dictionaries(names, leaf_metas, max_size=3))
    aliases = draw(st.sets(names.filter(lambda name: name not in leaves), max_size=2)) if leaves else ()
    ties = {alias: draw(st.sampled_from(sorted(leaves))) for alias in aliases}
    keys = names | st.integers(0, 9)
    shared = draw(st.none() | st.lists(st.builds(Shared, keys, item_names, keys, st.booleans()), max_size=2).map(tuple))
    return ItemMeta(kind, leaves, ties, encode(draw(jsons), {}), shared)


manifests = st.builds(
    Manifest,
    step=st.integers(0, 2**40),
    time=st.datetimes(timezones=st.just(datetime.UTC)),
    metrics=st.dictionaries(names, st.floats(allow_nan=False), max_size=3),
    items=st.dictionaries(item_names, item_metas(), max_size=3),
    versions=st.dictionaries(names, names, max_size=3),
)


@given(manifests)
def test_round_trip_through_json_text(manifest: Manifest) -> None:
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest


def test_a_metric_that_is_not_a_number_survives() -> None:
    """The loss of a run that has gone wrong."""
    manifest = Manifest(3, datetime.datetime.now(datetime.UTC), {"loss": float("nan"), "top": float("inf")}, {})
    back = Manifest.from_json(json.loads(json.dumps(manifest.to_json())))
    assert repr(back.metrics) == repr(manifest.metrics)


LEAF = LeafMeta((2, 3), "bfloat16", "jax", {"mesh": {"fsdp": 2}, "spec": ["fsdp", None]}, "00ff" * 8)
MANIFEST = Manifest(
    step=3,
    time=datetime.datetime(2030, 1, 2, 3, 4, 5, 678, datetime.UTC),
    metrics={"loss": 0.5},
    items={"model": ItemMeta("module", {"weight": LEAF}, {"head": "weight"}, {"$": "tuple", "values": [1]})},
    versions={"torch": "2.13"},
)


def test_the_text_is_made_to_be_read_by_others() -> None:
    text = MANIFEST.to_json()
    assert text == text | {
        "format": FORMAT,
        "step": 3,
        "time": "2030-01-02T03:04:05.000678+00:00",
        "metrics": {"loss": 0.5},
        "items": {
            "model": {
                "kind": "module",
                "leaves": {
                    "weight": {
                        "shape": [2, 3],
                        "dtype": "bfloat16",
                        "residence": "jax",
                        "sharding": {"mesh": {"fsdp": 2}, "spec": ["fsdp", None]},
                        "fingerprint": "00ff" * 8,
                    }
                },
                "ties": {"head": "weight"},
                "values": {"$": "tuple", "values": [1]},
            }
        },
        "versions": {"torch": "2.13"},
    }


def test_the_json_shares_nothing_with_the_manifest() -> None:
    before = copy.deepcopy(MANIFEST)
    text = MANIFEST.to_json()
    text["items"]["model"]["leaves"].clear()
    text["items"]["model"]["values"]["values"].append(2)
    text["metrics"].clear()
    assert before == MANIFEST


def test_a_newer_format_says_so() -> None:
    with pytest.raises(
        ValueError, match=rf"manifest format {FORMAT + 1} is newer than this torchorbax reads \({FORMAT}\)"
    ):
        Manifest.from_json({**MANIFEST.to_json(), "format": FORMAT + 1, "items": "laid out in another way"})


@pytest.mark.parametrize(
    "garbage",
    [None, 3, "manifest", [], {}, {"format": FORMAT}, {"format": "one"}, {"format": None}, {"step": 3}],
    ids=str,
)
def test_garbage_is_no_manifest(garbage: Any) -> None:
    with pytest.raises(ValueError, match="not a torchorbax manifest"):
        Manifest.from_json(garbage)


DAMAGES: dict[str, Any] = {
    "format": 0,
    "step": "3",
    "time": "yesterday",
    "metrics": [1],
    "metrics.loss": "low",
    "items": ["model"],
    "items.model": None,
    "items.model.kind": "modvle",
    "items.model.leaves": [],
    "items.model.leaves.weight.shape": "23",
    "items.model.leaves.weight.shape.0": -2,
    "items.model.leaves.weight.dtype": "float33",
    "items.model.leaves.weight.residence": "hose",
    "items.model.ties.head": "wejght",
    "items.model.values.values.0": 9,
}


@pytest.mark.parametrize("where", DAMAGES)
def test_a_damaged_manifest_is_a_value_error(where: str) -> None:
    """A damaged step is skipped with a warning; a mismatch, which it would look like, never is."""
    damaged = json.loads(json.dumps(MANIFEST.to_json()))
    *path, last = where.split(".")
    owner = damaged
    for key in path:
        owner = owner[key]
    owner[int(last) if isinstance(owner, list) else last] = DAMAGES[where]
    with pytest.raises(ValueError, match=r"\S"):
        Manifest.from_json(damaged)


@given(data=st.data(), replacement=jsons)
def test_no_change_goes_unnoticed(data: st.DataObject, replacement: Any) -> None:
    """Orbax keeps no checksum of it, and a learning rate with a flipped bit is a learning rate, too."""
    text = json.dumps(MANIFEST.to_json())
    damaged = json.loads(text)
    owner, key = data.draw(st.sampled_from(list(_places(damaged))))
    owner[key] = replacement
    if json.dumps(damaged) != text:
        with pytest.raises(ValueError, match=r"\S"):
            Manifest.from_json(damaged)


def _places(json: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in `json` with each of its keys."""
    keys = list(json) if isinstance(json, dict) else range(len(json)) if isinstance(json, list) else ()
    for key in keys:
        yield json, key
        yield from _places(json[key])


def test_a_leaf_describes_itself() -> None:
    assert str(LEAF) == "bfloat16(2, 3)"
    assert [LeafMeta(shape, "int8", "jax").is_empty for shape in [(), (2,), (0,), (2, 0)]] == [False, False, True, True]
