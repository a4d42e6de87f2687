"""Live tensors, modules and trees become arrays; what no array can hold is refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn
from torchorbax import DeletedArrayError, UnsupportedLeafError, to_jax
from torchorbax._src.tensors import torchax_tensors as _torchax

from tests.helpers.models import Tied
from tests.helpers.tensors import aligned, donated, torchax_tensor


def test_torchax_tensors_give_the_very_array() -> None:
    array = jnp.arange(6.0)
    tensor = _torchax.wrap(array)
    out = to_jax({"tensor": tensor, "parameter": nn.Parameter(tensor), "raw": array})
    assert out["tensor"] is out["parameter"] is out["raw"] is array


def test_views_give_what_they_show() -> None:
    tensor = torchax_tensor(np.arange(24).reshape(4, 6))
    with _torchax.torchax.default_env():
        view = tensor[1:3]
        narrower = view[:, 2:4]
    assert isinstance(view, _torchax.View)
    assert isinstance(narrower, _torchax.View)
    assert to_jax(view).tolist() == [[6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17]]
    assert to_jax(narrower).tolist() == [[8, 9], [14, 15]]


@pytest.mark.parametrize("kind", [torch.from_numpy, lambda array: array, lambda array: torch.from_numpy(array).t()])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_host_memory_is_copied(kind: Callable[[np.ndarray], Any], dtype: Any) -> None:
    memory = aligned(np.ones((64, 64), dtype))
    array = to_jax(kind(memory))
    memory[...] = 7
    assert np.all(np.asarray(array) == 1)
    assert not isinstance(array, np.ndarray) or array.flags.owndata or array.base is not memory


def test_modules_by_state_dict_names() -> None:
    model = Tied()
    arrays = to_jax(model)
    assert set(arrays) == set(model.state_dict())
    assert arrays["head.weight"].tolist() == arrays["embed.weight"].tolist() == model.embed.weight.tolist()
    assert arrays["norm.num_batches_tracked"].dtype == np.int64


def test_python_values_stay() -> None:
    tree = {"lr": 0.1, "name": "adam", "nesterov": False, "none": None, "z": 1j}
    assert to_jax(tree) == tree


def _quiet(make: Callable[[], Any]) -> Any:
    with warnings.catch_warnings(action="ignore"):  # torch says of some of these that they are experimental
        return make()


NOT_LEAVES: dict[str, Callable[[], Any]] = {
    "complex32": lambda: torch.zeros(2, dtype=torch.complex32),
    "float4_e2m1fn_x2": lambda: torch.empty(2, dtype=torch.float4_e2m1fn_x2),
    "uint4": lambda: torch.empty(2, dtype=torch.uint4),
    "bits8": lambda: torch.empty(2, dtype=torch.bits8),
    "quint8": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8),
    "sparse_coo": lambda: torch.eye(2).to_sparse(),
    "sparse_csr": lambda: torch.eye(2).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "meta": lambda: torch.empty(2, device="meta"),
    "object": lambda: np.array([object()]),
    "<U1": lambda: np.array(["a"]),
    "datetime64": lambda: np.zeros(2, "datetime64[s]"),
    "set": lambda: {1, 2},
    "bytes": lambda: b"ab",
}


@pytest.mark.parametrize("kind", NOT_LEAVES)
def test_what_no_array_can_hold_is_refused_by_name(kind: str) -> None:
    tree = {"layers": [{"weight": np.ones(2)}, {"weight": _quiet(NOT_LEAVES[kind])}]}
    with pytest.raises(UnsupportedLeafError, match=r"layers\.1\.weight: ") as caught:
        to_jax(tree)
    assert caught.value.name == "layers.1.weight"
    assert kind.split("_")[0] in str(caught.value) or kind == "nested"


def test_deleted_arrays_are_all_named() -> None:
    with _torchax.torchax.default_env():
        parent = torchax_tensor(np.zeros((4, 2)))
        view = parent[1:3]
    _torchax.array_of(parent).delete()
    tree = {"raw": donated(), "good": jnp.ones(2), "list": [_torchax.wrap(donated()), view], "parent": parent}
    with pytest.raises(DeletedArrayError, match="4 array") as caught:
        to_jax(tree)
    assert set(caught.value.names) == {"raw", "list.0", "list.1", "parent"}
