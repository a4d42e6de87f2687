"""Steps that were written before steps said how their program began are restored as they were then."""

from __future__ import annotations

import datetime
from contextlib import ExitStack
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from torch import nn
from torchmetrics import MeanMetric
from torchorbax import OptaxOptimizer
from torchorbax._src.format.manifest import ItemMeta, LeafMeta, Manifest
from torchorbax._src.restore.plan import planned
from torchorbax._src.state.registry import items_of
from torchorbax._src.state.request import Request
from torchorbax._src.state.sharing import Restoring
from torchorbax._src.state.values import encode


def leaf(name: str, kind: str = "torch") -> dict[str, str]:
    return {"$": "leaf", "name": name, "as": kind}


def restore(state: dict[str, Any], name: str, values: Any, arrays: dict[str, Any], kind: str) -> None:
    """Restore one item of a step with these values and arrays."""
    metas = {
        key: LeafMeta(array.shape, str(array.dtype), "jax" if isinstance(array, jax.Array) else "host")
        for key, array in arrays.items()
    }
    manifest = Manifest(0, datetime.datetime.now(datetime.UTC), {}, {name: ItemMeta(kind, metas, {}, values)})
    items = items_of(state, rng=False)
    plan = planned("a run", manifest, items, None, Request(only=(name,))).items[name]
    loaded = {key: array if plan.targets[key] is None else jnp.asarray(array) for key, array in arrays.items()}
    with ExitStack() as undo:
        items[name].apply(manifest.items[name], plan, loaded, undo, Restoring())
        undo.pop_all()


def test_a_tree_by_the_names_of_its_leaves() -> None:
    state = {"x": {"a": {"b": torch.zeros(2)}, "n": 0, "log": [1], "none": None}}
    values = {"a.b": leaf("a.b"), "n": 3, "log": [1, 2], "none": None}
    restore(state, "x", values, {"a.b": np.ones(2, np.float32)}, "pytree")
    assert state["x"]["a"]["b"].tolist() == [1, 1]  # type: ignore[index]
    assert (state["x"]["n"], state["x"]["log"]) == (3, [1, 2])


def test_the_bare_state_of_an_object_and_a_mapping_without_its_factory() -> None:
    class Holder:
        state: Any = None

        def state_dict(self) -> Any:
            return self.state

        def load_state_dict(self, state: Any) -> None:
            self.state = state

    holder = Holder()
    mapping = {"$": "defaultdict", "keys": ["at"], "values": [[5]]}
    restore({"x": holder}, "x", mapping, {}, "object")
    assert holder.state == {"at": [5]}
    assert type(holder.state) is dict


def test_a_torch_optimizer_that_does_not_say_where_parameters_were() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    tree = {
        "class": "SGD",
        "state": {"weight": {"momentum_buffer": torch.ones(1, 2)}},
        "param_groups": [{**optimizer.param_groups[0], "lr": 0.5, "params": ["weight"]}],
        "params": {"weight": [[1, 2], "float32"]},
    }
    leaves: dict[str, Any] = {}
    values = encode(tree, leaves, lambda path: ".".join(path[1:]))
    arrays = {name: tensor.numpy() for name, tensor in leaves.items()}
    restore({"model": model, "optimizer": optimizer}, "optimizer", values, arrays, "torch.optim")
    assert optimizer.state[model.weight]["momentum_buffer"].tolist() == [[1, 1]]
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_an_optax_state_by_the_owners_of_its_leaves() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = OptaxOptimizer(model, optax.sgd(0.1, momentum=0.9))
    arrays = {"weight.0.trace": jnp.ones((1, 2))}
    restore({"model": model, "optimizer": optimizer}, "optimizer", {"weight.0.trace": "weight"}, arrays, "optax")
    assert [one.tolist() for one in jax.tree.leaves(optimizer.state)] == [[[1, 1]]]


def test_a_metric_with_its_states_only() -> None:
    metric = MeanMetric()
    leaves: dict[str, Any] = {}
    state = {"mean_value": torch.tensor(6.0), "weight": torch.tensor(2.0)}
    values = encode({"metric": {"updates": 2, "state": state}}, leaves)
    restore({"m": metric}, "m", values, {name: tensor.numpy() for name, tensor in leaves.items()}, "object")
    assert float(metric.compute()) == 3
    assert metric._update_count == 2


def test_a_buffer_that_was_taken_for_extra_state() -> None:
    model = nn.Linear(1, 1, bias=False)
    model.register_buffer("rnn_extra_state", torch.zeros(2))
    arrays = {"weight": np.ones((1, 1), np.float32), "rnn_extra_state": np.ones(2, np.float32)}
    restore({"model": model}, "model", {"rnn_extra_state": leaf("rnn_extra_state")}, arrays, "module")
    assert model.rnn_extra_state.tolist() == [1, 1]
