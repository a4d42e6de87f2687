"""Every dtype keeps its bits between torch, numpy and the name in the manifest."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import jax
import numpy as np
import pytest
import torch
from hypothesis import given
from torchorbax._src.arrays.dtypes import (
    BY_NAME,
    NUMPY_TO_TORCH,
    TORCH_TO_NUMPY,
    fits_on_device,
    host_to_torch,
    torch_to_host,
)

from tests.helpers.tensors import DTYPES, WIDE, bits, tensors

UNSUPPORTED = ("complex32", "bits", "qint", "quint", "float4", "int1", "int2", "int3", "int4", "int5", "int6", "int7")


def test_the_table_has_every_dtype_that_has_a_counterpart() -> None:
    assert set(DTYPES) <= set(TORCH_TO_NUMPY)
    everything = {value for name in dir(torch) if isinstance(value := getattr(torch, name), torch.dtype)}
    rest = {str(dtype).removeprefix("torch.") for dtype in everything - set(TORCH_TO_NUMPY)}
    unknown = {name for name in rest if not name.removeprefix("u").startswith(UNSUPPORTED)}
    assert not unknown, "a dtype that this torch has and nobody has thought of"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_name_for_all(dtype: torch.dtype) -> None:
    """A manifest's dtype is what torch, numpy and JAX call it, so that any JAX program can read it."""
    name = str(dtype).removeprefix("torch.")
    assert TORCH_TO_NUMPY[dtype].name == name
    assert NUMPY_TO_TORCH[BY_NAME[name]] is dtype
    assert str(jax.ShapeDtypeStruct((), BY_NAME[name]).dtype) == name
    assert BY_NAME[name].itemsize == torch.empty((), dtype=dtype).element_size()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("x64", [False, True])
def test_fits_on_device_is_what_jax_does(dtype: torch.dtype, x64: bool) -> None:
    jax.config.update("jax_enable_x64", x64)
    kept = TORCH_TO_NUMPY[dtype]
    assert fits_on_device(kept) == (x64 or dtype not in WIDE)
    with warnings.catch_warnings(action="ignore"):  # of JAX, that it narrows
        assert fits_on_device(kept) == (jax.numpy.zeros((), kept).dtype == kept)


@given(tensors())
def test_round_trip_through_numpy(tensor: torch.Tensor) -> None:
    array = torch_to_host(tensor)
    assert (array.shape, array.dtype) == (tuple(tensor.shape), TORCH_TO_NUMPY[tensor.dtype])
    assert array.tobytes() == bits(tensor)
    back = host_to_torch(array)
    assert (back.shape, back.dtype, back.device.type) == (tensor.shape, tensor.dtype, "cpu")
    assert bits(back) == bits(tensor)


@given(tensors([dtype for dtype in DTYPES if dtype is not torch.bool]))
def test_neither_way_shares_memory(tensor: torch.Tensor) -> None:
    before = bits(tensor)
    array = torch_to_host(tensor)
    back = host_to_torch(array)
    tensor.reshape(-1).view(torch.uint8).bitwise_not_()
    assert array.tobytes() == before
    array.reshape(-1).view(np.uint8)[...] ^= 255
    assert bits(back) == before


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda tensor: tensor.t(),
    "every other": lambda tensor: tensor[:, ::2],
    "repeated": lambda tensor: tensor[:1].expand(4, -1),
    "offset": lambda tensor: tensor[1:, 1:],
    "parameter": lambda tensor: torch.nn.Parameter(tensor),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2, torch.complex64], ids=str)
def test_values_in_any_layout(dtype: torch.dtype, layout: str) -> None:
    values = torch.arange(24).reshape(4, 6)
    expected = LAYOUTS[layout](values.float()).to(dtype).contiguous()
    tensor = LAYOUTS[layout](values.to(torch.float32).to(dtype))
    array = torch_to_host(tensor)
    assert array.shape == tuple(expected.shape)
    assert array.tobytes() == bits(expected)
    assert bits(host_to_torch(np.asfortranarray(array))) == bits(expected)


def test_conjugated_and_negated_views_are_resolved() -> None:
    """Torch keeps both as flags, with the memory as it was."""
    values = torch.tensor([1 + 2j, -3 - 4j], dtype=torch.complex64)
    assert torch_to_host(values.conj()).tolist() == [1 - 2j, -3 + 4j]
    assert torch_to_host(values.conj().imag).tolist() == [-2.0, 4.0]


@pytest.mark.parametrize("stride", [0, 2, 5])
def test_one_value_of_a_larger_tensor_keeps_its_bits(stride: int) -> None:
    one = torch.arange(6.0).as_strided((1,), (stride,))  # torch calls it contiguous, whatever its stride
    assert torch_to_host(one).tolist() == [0.0]
