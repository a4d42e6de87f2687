"""Optax states as items."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import optax
import torchorbax
from torch import nn

from tests.helpers.models import batch_of, loss_fn, seeded
from tests.helpers.tensors import bits


def test_typed_keys_in_optax_states_and_in_objects(tmp_path: Path) -> None:
    class Sampler:
        def __init__(self, seed: int) -> None:
            self.key = jax.random.key(seed)

        def state_dict(self) -> dict[str, Any]:
            return {"key": self.key}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.key = state["key"]

    def build(seed: int) -> tuple[nn.Module, torchorbax.OptaxOptimizer, Sampler]:
        model = seeded()
        tx = optax.chain(optax.add_noise(0.1, 0.5, key=jax.random.key(seed)), optax.sgd(0.1))
        return model, torchorbax.OptaxOptimizer(model, tx), Sampler(seed)

    model, optimizer, sampler = build(1)
    step = torchorbax.train_step(model, optimizer, loss_fn)
    with torchorbax.resume(model, optimizer, tmp_path, state={"sampler": sampler}) as run:
        step(batch_of(0))
        run.save(0, force=True)
    expected = float(step(batch_of(1))), float(step(batch_of(2)))
    model, optimizer, sampler = build(2)
    with torchorbax.resume(model, optimizer, tmp_path, state={"sampler": sampler}):
        step = torchorbax.train_step(model, optimizer, loss_fn)
        assert (float(step(batch_of(1))), float(step(batch_of(2)))) == expected
    assert bits(jax.random.key_data(sampler.key)) == bits(jax.random.key_data(jax.random.key(1)))
