"""What is added to torchax computes as torch does: detached tensors, grouped products, a mixture of experts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchorbax
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchorbax import to_jax
from torchorbax._src.tensors import torchax_tensors

grouped_mm = torch.nn.functional.grouped_mm
M, K, N = 3, 4, 5


def on_jax(a: np.ndarray, b: np.ndarray, ends: list[int] | None, **options: Any) -> jax.Array:
    """A grouped product under torchax."""
    with torchax_tensors.torchax.default_env():
        offs = None if ends is None else torchax_tensors.wrap(jnp.asarray(ends, jnp.int32))
        product = grouped_mm(
            torchax_tensors.wrap(jnp.asarray(a)), torchax_tensors.wrap(jnp.asarray(b)), offs=offs, **options
        )
    return torchax_tensors.array_of(product)


def by_groups(layout: str, a: torch.Tensor, b: torch.Tensor, ends: list[int]) -> torch.Tensor:
    """The same product, group after group."""
    spans = list(zip([0, *ends], ends, strict=False))
    if layout == "rows":
        return torch.cat([a[start:end] @ b[group] for group, (start, end) in enumerate(spans)])
    if layout == "columns":
        return torch.cat([a[group] @ b[:, start:end] for group, (start, end) in enumerate(spans)], dim=1)
    return torch.stack([a[:, start:end] @ b[start:end] for start, end in spans])


@settings(max_examples=6, deadline=None)
@given(sizes=st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(any), seed=st.integers(0, 1000))
@pytest.mark.parametrize("layout", ["rows", "columns", "inner"])
def test_grouped_products_are_those_of_the_groups(layout: str, sizes: list[int], seed: int) -> None:
    groups, length, ends = len(sizes), sum(sizes), np.cumsum(sizes).tolist()
    shapes = {
        "rows": ((length, K), (groups, K, N)),
        "columns": ((groups, M, K), (K, length)),
        "inner": ((M, length), (length, N)),
    }[layout]
    random = np.random.default_rng(seed)
    a, b = (random.normal(size=shape).astype(np.float32) for shape in shapes)
    torch_a, torch_b = torch.tensor(a, requires_grad=True), torch.tensor(b, requires_grad=True)
    expected = by_groups(layout, torch_a, torch_b, ends)
    expected.square().sum().backward()
    np.testing.assert_allclose(on_jax(a, b, ends), expected.detach().numpy(), rtol=1e-5, atol=1e-5)
    gradients = jax.grad(lambda a, b: jnp.square(on_jax(a, b, ends)).sum(), (0, 1))(a, b)
    for found, leaf in zip(gradients, (torch_a, torch_b), strict=True):
        np.testing.assert_allclose(found, leaf.grad.numpy(), rtol=1e-4, atol=1e-4)


def test_groups_of_matrices_need_no_ends() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32), np.ones((2, 4, 5), np.float32)
    np.testing.assert_allclose(on_jax(a, b, None), a @ b, rtol=1e-6)


def test_rows_behind_the_last_group_are_zero() -> None:
    product = on_jax(np.ones((4, K), np.float32), np.ones((2, K, N), np.float32), [1, 3])
    np.testing.assert_array_equal(product[:, 0], [K, K, K, 0])


def test_the_dtype_is_that_of_the_operands_or_the_one_asked_for() -> None:
    a, b = np.ones((4, K), jnp.bfloat16), np.ones((2, K, N), jnp.bfloat16)
    assert on_jax(a, b, [1, 4]).dtype == jnp.bfloat16
    assert on_jax(a, b, [1, 4], out_dtype=torch.float32).dtype == jnp.float32


def test_what_grouped_products_do_not_take_is_refused() -> None:
    a, b = np.ones((4, K), np.float32), np.ones((2, K, N), np.float32)
    with pytest.raises(NotImplementedError, match="takes no bias"):
        on_jax(a, b, [1, 4], bias=torchax_tensors.wrap(jnp.ones(N)))
    with pytest.raises(ValueError, match="takes offs= if an operand is 2-D"):
        on_jax(a, b, None)


@pytest.mark.parametrize("make", [nn.Parameter, lambda tensor: tensor.detach().requires_grad_()])
def test_a_leaf_has_values_of_its_own(make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensor = torchax_tensors.wrap(jnp.ones(2))
    leaf, shared = make(tensor), tensor.detach()
    assert type(leaf) is type(tensor)
    assert leaf.requires_grad
    assert leaf.is_leaf
    with torchax_tensors.torchax.default_env(), torch.no_grad():
        shared.mul_(3)
        leaf.mul_(2)
    np.testing.assert_array_equal(to_jax(tensor), [3, 3])
    np.testing.assert_array_equal(to_jax(leaf), [2, 2])


def test_a_mixture_of_experts_trains_as_in_torch() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        output_router_logits=True,
    )
    model = transformers.MixtralForCausalLM(config)
    reference = copy.deepcopy(model)

    def loss_fn(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        return loss

    step = torchorbax.train_step(model, torch.optim.AdamW(model.parameters(), lr=1e-2), loss_fn)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    for index in range(4):
        tokens = torch.randint(1, 32, (4, 8), generator=torch.Generator().manual_seed(index))
        expected = loss_fn(reference, tokens)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        assert float(step(tokens)) == pytest.approx(expected.item(), rel=1e-5)
    for name, tensor in reference.state_dict().items():
        np.testing.assert_allclose(to_jax(model)[name], tensor.numpy(), atol=2e-4, err_msg=name)
