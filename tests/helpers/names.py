"""Names of leaves, for hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

paths = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=3).map(".".join)
