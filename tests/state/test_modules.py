"""Modules beyond their parameters and buffers, and modules that lie elsewhere now."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from torch import nn
from torchorbax import Checkpointer, MismatchError, place_
from torchorbax._src.tensors import torchax_tensors as _torchax

from tests.helpers.runs import restored, saved
from tests.helpers.tensors import bits


def test_extra_state_that_is_a_tensor_comes_back_through_its_setter(tmp_path: Path) -> None:
    class Counting(nn.Linear):
        count = torch.zeros(())

        def get_extra_state(self) -> torch.Tensor:
            return self.count.clone()

        def set_extra_state(self, state: torch.Tensor) -> None:
            self.count = state

    model = Counting(1, 1)
    model.count = torch.tensor(5.0)
    path = saved(tmp_path, model=model)
    again = Counting(1, 1)
    restored(path, model=again)
    assert again.count == 5
    with Checkpointer(path, {"model": nn.Linear(1, 1)}) as run:
        with pytest.raises(MismatchError, match=r"model: _extra_state: found a value, but there is no such live value"):
            run.restore()
        run.restore(strict=False)
        assert [problem.name for problem in run.left_out] == ["_extra_state"]


def test_a_model_placed_on_jax_and_one_on_the_cpu_read_each_other(tmp_path: Path, mesh: Mesh) -> None:
    source = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    placed = copy.deepcopy(source)
    place_(placed, None, (mesh, lambda name, shape: P("fsdp")))
    for one, name in ((source, "cpu"), (placed, "jax")):
        path = saved(tmp_path / name, model=one)
        for sharded in (False, True):
            target = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
            if sharded:
                place_(target, None, (mesh, lambda name, shape: P("fsdp")))
            restored(path, model=target)
            assert all(bits(a) == bits(b) for a, b in zip(target.parameters(), source.parameters(), strict=True))
            assert all(_torchax.is_torchax(param) == sharded for param in target.parameters())
