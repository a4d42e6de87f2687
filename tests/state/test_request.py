"""What is asked for: patterns and renamings of names."""

from __future__ import annotations

from hypothesis import given
from torchorbax._src.state.request import request

from tests.helpers.names import paths


@given(name=paths, old=paths, new=paths)
def test_a_renaming_moves_what_lies_below_and_can_be_repeated(name: str, old: str, new: str) -> None:
    wanted = request(rename={old: new})
    renamed = wanted.live_name("model", name)
    below = name == old or name.startswith(f"{old}.")
    if not below:
        assert renamed == name
    elif not (new == old or new.startswith(f"{old}.")):
        assert renamed == new + name.removeprefix(old)
        assert old.startswith(f"{new}.") or wanted.live_name("model", renamed) == renamed


@given(name=paths, pattern=paths)
def test_a_pattern_stands_for_what_lies_below(name: str, pattern: str) -> None:
    wanted = request(only=f"model.{pattern}")
    below = f"{name}.".startswith(f"{pattern}.")
    assert wanted.selects("model", name) == below
    assert not wanted.selects("other", name)
    assert wanted.concerns("model")
    assert not wanted.concerns("other")
    assert wanted.selects("model", f"{name}.more") == f"{name}.more.".startswith(f"{pattern}.")
    assert request().selects("model", name)
