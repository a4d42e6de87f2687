"""A compiled evaluation sees the module as it is, and changes nothing."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import torch
import torchorbax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from torch import nn
from torchorbax import ConfigError, to_jax
from torchorbax._src.tensors import torchax_tensors as _torchax

from tests.helpers.models import RULES, batch_of, loss_fn, seeded
from tests.helpers.tensors import bits


def scores(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> dict[str, Any]:
    logits = model(batch[0])
    right = (logits.argmax(dim=-1) == batch[1]).float()
    return {"accuracy": right.mean(), "logits": logits, "samples": len(right), "nothing": None}


def test_it_follows_training_and_agrees_with_torch(mesh: Mesh) -> None:
    model = seeded()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    torchorbax.place_(model, optimizer, (mesh, RULES))
    step = torchorbax.train_step(model, optimizer, loss_fn, batch_sharding=P("fsdp"))
    evaluate = torchorbax.eval_step(model, scores, batch_sharding=P("fsdp"))
    reference = seeded().eval()
    seen = []
    for i in range(3):
        step(batch_of(i))
        model.eval()
        found = evaluate(batch_of(9))
        model.train()
        reference.load_state_dict(
            {name: torch.from_numpy(np.array(to_jax(one))) for name, one in model.state_dict().items()}
        )
        expected = scores(reference, batch_of(9))
        np.testing.assert_allclose(to_jax(found["logits"]), expected["logits"].detach().numpy(), rtol=1e-3, atol=1e-4)
        assert float(found["accuracy"]) == float(expected["accuracy"])
        assert int(found["samples"]) == 16
        assert found["nothing"] is None
        seen.append(float(to_jax(found["logits"]).sum()))
    assert len(set(seen)) == 3


def test_nothing_changes_in_training_mode_either(compilations: list[str]) -> None:
    model = seeded()
    evaluate = torchorbax.eval_step(model, loss_fn)
    evaluate(batch_of(0))
    before = {name: bits(array) for name, array in to_jax(model).items()}
    key = bits(jax.random.key_data(_torchax.rng_key()))
    losses = {float(evaluate(batch_of(0))) for _ in range(3)}
    assert len(losses) == 3, "dropout draws other numbers at each call"
    assert {name: bits(array) for name, array in to_jax(model).items()} == before
    assert bits(jax.random.key_data(_torchax.rng_key())) == key
    model.eval()
    assert len({float(evaluate(batch_of(0))) for _ in range(3)}) == 1
    assert compilations.count("evaluate") == 2


def test_it_reads_other_networks_anew_and_refuses_to_write_them() -> None:
    model, teacher = nn.Linear(2, 2), nn.Linear(2, 2)
    evaluate = torchorbax.eval_step(model, lambda m, x: (m(x) * 0 + teacher(x)).sum())
    x = torch.ones(1, 2)
    first = float(evaluate(x))
    _torchax.set_array(teacher.bias, to_jax(teacher.bias) + 1)
    assert float(evaluate(x)) == pytest.approx(first + 2, rel=1e-5)

    total = _torchax.wrap(jax.numpy.zeros(()))

    def counting(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        total.add_(1)
        return model(x)

    with pytest.raises(ConfigError, match=r"fn writes into total; an evaluation changes nothing"):
        torchorbax.eval_step(model, counting)(x)
    assert float(total.jax()) == 0


def test_outputs_and_arguments_of_other_types() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="fn returns a str among its outputs"):
        torchorbax.eval_step(model, lambda m, x: {"name": "x", "y": m(x)})(torch.ones(1, 2))
    with pytest.raises(ConfigError, match="fn must be a function"):
        torchorbax.eval_step(model, None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"model must be a torch\.nn\.Module, not a int"):
        torchorbax.eval_step(3, lambda m, x: x)  # type: ignore[arg-type]


def test_a_training_step_returns_further_outputs() -> None:
    model = nn.Linear(2, 2)
    step = torchorbax.train_step(
        model, torch.optim.SGD(model.parameters(), lr=0.1), lambda m, x: ((y := m(x)).sum(), {"y": y, "n": [len(x)]})
    )
    loss, rest = step(torch.ones(3, 2))
    assert float(loss) == pytest.approx(float(to_jax(rest["y"]).sum()), rel=1e-6)
    assert [int(n) for n in rest["n"]] == [3]
