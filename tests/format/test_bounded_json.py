"""JSON that would take too much memory is refused before it is parsed, and what a run needs is not."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torchorbax._src.format.bounded_json import LEAF_BYTES, LEAST_BYTES, RATIO, loads, parsed_bytes

jsons = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=9), inner, max_size=5),
)


def size_of(value: Any) -> int:
    if isinstance(value, dict):
        inner = sum(size_of(key) + size_of(one) for key, one in value.items())
        return sys.getsizeof(value) + inner
    return sys.getsizeof(value) + (sum(map(size_of, value)) if isinstance(value, list) else 0)


@given(value=jsons)
def test_a_value_takes_no_more_than_was_counted(value: Any) -> None:
    text = json.dumps(value)
    assert loads(text) == value
    assert size_of(json.loads(text)) <= parsed_bytes(text) + 200  # a single value has no comma


@pytest.mark.parametrize("piece", ["[],", "{},", '{"":0},', "[[[[]]]],", "1e5,", '"",', "[0,0],"])
def test_small_pieces_are_counted_in_full(piece: str) -> None:
    text = f"[{piece * 1000}0]"
    assert size_of(json.loads(text)) <= parsed_bytes(text)


def test_a_bomb_is_refused_unparsed(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "[" + "[]," * 20_000_000 + "0]"
    assert parsed_bytes(text) > LEAST_BYTES
    monkeypatch.setattr(json, "loads", pytest.fail)
    with pytest.raises(ValueError, match=r"60000003 characters of JSON would take about \d+ bytes of memory"):
        loads(text, lambda: 100)


def test_a_large_run_may_have_a_large_manifest() -> None:
    """A million leaves: what their descriptions take is allowed by what Orbax's metadata has on disk."""
    leaf = {"shape": [300, 100], "dtype": "float32", "residence": "jax", "fingerprint": "0" * 32}
    leaf |= {"sharding": {"mesh": {"fsdp": 8}, "spec": ["fsdp", None]}}
    text = json.dumps({"layers.100.attention.weight": leaf, "and": {"$": "leaf", "name": "a", "as": "torch"}})
    assert 1_000_000 * parsed_bytes(text) < LEAST_BYTES + RATIO * 1_000_000 * LEAF_BYTES
