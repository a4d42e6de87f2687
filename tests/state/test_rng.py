"""Random number generators go on where they were."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import torchorbax
from torch import nn
from torchorbax._src.tensors import torchax_tensors as _torchax

from tests.helpers.runs import restored, saved
from tests.helpers.tensors import bits


def test_rng_can_be_left_out(tmp_path: Path) -> None:
    path = str(tmp_path / "run")
    model = nn.Linear(1, 1)
    with torchorbax.resume(model, None, path) as run:
        run.save(0)
    torch.manual_seed(5)
    expected = torch.get_rng_state()
    with torchorbax.resume(model, None, path, rng=False):
        assert torch.equal(torch.get_rng_state(), expected)
    with torchorbax.resume(model, None, path):
        assert not torch.equal(torch.get_rng_state(), expected)


@pytest.mark.parametrize("form", ["typed", "raw", "other"])
def test_random_numbers_go_on_in_either_form_of_the_key(form: str, tmp_path: Path) -> None:
    keys = {"typed": jax.random.key(7), "raw": jax.random.PRNGKey(7), "other": jax.random.key(7, impl="rbg")}

    def draw() -> list[Any]:
        key, sub = jax.random.split(_torchax.rng_key())
        _torchax.set_rng_key(key)
        numbers = jax.random.normal(sub, (2,)), torch.rand(2), np.random.rand(2), random.random()
        return [bits(np.asarray(number)) for number in numbers] + [bits(np.random.randn(1)), random.gauss(0, 1)]

    _torchax.set_rng_key(keys[form])
    draw()  # leaves half of a pair of normal numbers behind
    path = saved(tmp_path, x=1)
    expected = draw()
    _torchax.set_rng_key(jax.random.PRNGKey(1) if form == "typed" else jax.random.key(1))
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    restored(path, x=0)
    assert draw() == expected
    assert str(_torchax.rng_key().dtype) == str(keys[form].dtype)


@pytest.mark.parametrize("started", ["before", "after"])
def test_random_numbers_go_on_in_a_thread_that_did_not_restore(started: str, tmp_path: Path) -> None:
    """Torchax has a key for each thread. The training loop may run in another one than `resume`."""

    def draw() -> list[bytes]:
        key, sub = jax.random.split(_torchax.rng_key())
        _torchax.set_rng_key(key)
        return [bits(np.asarray(jax.random.normal(sub, (2,))))]

    def life(step: int) -> list[bytes]:
        with ThreadPoolExecutor(1) as loop:
            if started == "before":
                loop.submit(draw).result()
            with torchorbax.resume(nn.Linear(1, 1), None, tmp_path, save=None) as run:
                drawn: list[bytes] = loop.submit(draw).result()
                loop.submit(run.save, step, force=True).result()
            return drawn + loop.submit(draw).result()

    torch.manual_seed(3)
    first = life(0)
    torch.manual_seed(4)
    assert life(1)[0] == first[1]


def test_a_key_of_all_threads_that_is_undone_leaves_each_its_own() -> None:
    def key_data() -> bytes:
        return bits(jax.random.key_data(_torchax.rng_key()))

    with ThreadPoolExecutor(1) as other:
        other.submit(_torchax.set_rng_key, jax.random.key(11)).result()
        before = key_data(), other.submit(key_data).result()
        with ExitStack() as undo:
            _torchax.set_rng_key_of_all_threads(jax.random.key(12), undo)
            assert key_data() == other.submit(key_data).result() not in before
        assert (key_data(), other.submit(key_data).result()) == before
