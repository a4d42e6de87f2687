"""Rules by name become shardings: first match wins, every slip is reported at once, and JAX agrees with the check."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from torchorbax import ConfigError
from torchorbax._src.arrays.sharding_rules import ShardingRules, describe, replicated_like, state_sharding


def test_the_first_pattern_that_matches_counts(mesh_2d: Mesh) -> None:
    rules = ShardingRules(
        (
            mesh_2d,
            {
                "layers.0.*": P("tp"),
                "layers.*.weight": P("fsdp", None),
                "layers.?.bias": P("fsdp"),
                "*.weight": P(None, "tp"),
            },
        )
    )
    expected = {
        "layers.0.weight": P("tp"),
        "layers.1.weight": P("fsdp", None),
        "layers.1.bias": P("fsdp"),
        "layers.10.bias": P(),  # `?` is one character
        "head.weight": P(None, "tp"),
        "head.bias": P(),
        "LAYERS.1.weight": P(None, "tp"),  # case counts
    }
    shardings = rules.for_leaves(dict.fromkeys(expected, (8, 8)))
    assert {name: sharding.spec for name, sharding in shardings.items()} == expected
    assert all(sharding.mesh == mesh_2d for sharding in shardings.values())
    assert rules("layers.0.weight", (8, 8)) == shardings["layers.0.weight"]


def test_scalars_are_replicated_whatever_the_rule(mesh: Mesh) -> None:
    assert ShardingRules((mesh, {"*": P("fsdp")}))("count", ()).spec == P()
    assert ShardingRules((mesh, lambda name, shape: P("fsdp")))("count", ()).spec == P()


def test_a_callable_gets_name_and_shape(mesh: Mesh) -> None:
    asked = []

    def rule(name: str, shape: tuple[int, ...]) -> P:
        asked.append((name, shape))
        return P(*(None for _ in shape[1:]), "fsdp")

    shardings = ShardingRules((mesh, rule)).for_leaves({"a": (8,), "b": (3, 16)})
    assert asked == [("a", (8,)), ("b", (3, 16))]
    assert {name: sharding.spec for name, sharding in shardings.items()} == {"a": P("fsdp"), "b": P(None, "fsdp")}


def test_every_problem_is_listed_at_once(mesh_2d: Mesh) -> None:
    specs: dict[str, Any] = {
        "too_long": P("fsdp", None, None),
        "unknown": P("data"),
        "uneven": P(None, "fsdp"),
        "together": P(("fsdp", "tp")),
        "twice": P("tp", "tp"),
        "tuple": ("fsdp", None),
        "nothing": None,
        "good": P("fsdp", "tp"),
    }
    shapes = dict.fromkeys(specs, (8, 8)) | {"uneven": (8, 6), "together": (4, 8)}
    with pytest.raises(ConfigError, match="the sharding rules do not fit") as caught:
        ShardingRules((mesh_2d, lambda name, shape: specs[name])).for_leaves(shapes)
    _, *lines = str(caught.value).splitlines()
    said = dict(line.strip().split(": ", 1) for line in lines)
    assert said.keys() == specs.keys() - {"good"}
    for name, expected in {
        "too_long": "has 3 entries, but the shape is (8, 8)",
        "unknown": "names axis 'data'; the mesh has 'fsdp', 'tp'",
        "uneven": "dimension 1 of (8, 6) is not divisible by 4",
        "together": "dimension 0 of (4, 8) is not divisible by 8",
        "twice": "uses a mesh axis twice",
        "tuple": "expected a PartitionSpec, got ('fsdp', None)",
        "nothing": "expected a PartitionSpec, got None",
    }.items():
        assert expected in said[name]


@pytest.mark.parametrize(
    "shardings",
    [
        None,
        "fsdp",
        {"*": P("fsdp")},
        (None, {"*": P()}),
        ("mesh only",),
        lambda mesh: mesh,
        lambda mesh: (mesh,),
        lambda mesh: (mesh, None),
        lambda mesh: (mesh, P("fsdp")),
        lambda mesh: (mesh, [("*", P("fsdp"))]),
        lambda mesh: (mesh, {"*": P("fsdp")}, "more"),
        lambda mesh: ({"*": P("fsdp")}, mesh),
    ],
    ids=range(12),
)
def test_what_is_no_pair_of_mesh_and_rules_is_refused(shardings: Any, mesh: Mesh) -> None:
    with pytest.raises(ConfigError, match=r"shardings must be \(jax\.sharding\.Mesh, rules by name\)"):
        ShardingRules(shardings(mesh) if callable(shardings) else shardings)


def test_explicit_axes_are_accepted_and_made_usable(mesh_2d: Mesh) -> None:
    """`jax.make_mesh` gives Explicit axes, over which torchax's lowerings cannot be traced."""
    explicit = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    rules = ShardingRules((explicit, {"*": P("fsdp", "tp")}))
    table = jax.device_put(jnp.arange(64.0).reshape(8, 8), rules("embed", (8, 8)))
    assert table.sharding.device_set == set(explicit.devices.flat)
    rows = jax.jit(lambda table, tokens: table[tokens])(table, jnp.array([1, 5]))  # what an embedding does
    assert rows.tolist() == [list(range(8, 16)), list(range(40, 48))]
    assert dict(rules.mesh.shape) == {"fsdp": 4, "tp": 2}


def test_patterns_that_match_nothing_are_logged(mesh: Mesh, caplog: pytest.LogCaptureFixture) -> None:
    rules = ShardingRules((mesh, {"layers.*.weight": P("fsdp"), "heads.*": P("fsdp"), "*.bias": P()}))
    with caplog.at_level(logging.WARNING, "torchorbax"):
        rules.warn_of_unused({"layers.0.weight": (8, 8), "head.bias": (8,)})
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "'heads.*' matches no parameter or buffer" in caplog.records[0].getMessage()
    caplog.clear()
    ShardingRules((mesh, lambda name, shape: P())).warn_of_unused({"weight": ()})
    assert not caplog.records


entries = st.sampled_from([None, "fsdp", "tp", ("fsdp", "tp"), ("tp", "fsdp"), ("tp",), (), "data"])


@given(
    shape=st.lists(st.sampled_from([0, 1, 2, 3, 4, 6, 8, 16]), min_size=1, max_size=3).map(tuple),
    spec=st.lists(entries, max_size=4),
)
def test_the_check_agrees_with_jax(mesh_2d: Mesh, shape: tuple[int, ...], spec: list[Any]) -> None:
    """What is accepted works, evenly; what is refused, JAX refuses as well."""
    values = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    try:
        sharding = ShardingRules((mesh_2d, lambda name, shape: P(*spec)))("leaf", shape)
    except ConfigError:
        assert not _jax_takes(values, mesh_2d, P(*spec))
        return
    array = jax.device_put(values, sharding)
    assert np.array_equal(array, values)
    assert {shard.data.shape for shard in array.addressable_shards} == {sharding.shard_shape(shape)}


def _jax_takes(values: np.ndarray, mesh: Mesh, spec: P) -> bool:
    try:
        jax.device_put(values, NamedSharding(mesh, spec))
    except Exception:  # of several kinds
        return False
    return True


def test_state_has_its_parameters_sharding_only_with_its_shape(mesh: Mesh) -> None:
    param = NamedSharding(mesh, P("fsdp"))
    assert state_sharding((8, 4), param, (8, 4)) is param
    for shape in ((), (8,), (4, 8)):
        beside = state_sharding(shape, param, (8, 4))
        assert beside.is_fully_replicated
        assert beside.device_set == param.device_set
    single = SingleDeviceSharding(jax.devices()[3])
    assert replicated_like(single) == state_sharding((), single, (8,)) == single


def test_the_description_is_json_that_says_mesh_and_spec(mesh_2d: Mesh) -> None:
    described = describe(NamedSharding(mesh_2d, P(("fsdp", "tp"), None)))
    assert json.loads(json.dumps(described)) == described
    assert described == {"mesh": {"fsdp": 4, "tp": 2}, "spec": [["fsdp", "tp"], None]}
    assert describe(NamedSharding(mesh_2d, P())) == {"mesh": {"fsdp": 4, "tp": 2}, "spec": []}
    assert describe(SingleDeviceSharding(jax.devices()[0])) is None
