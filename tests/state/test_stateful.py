"""Objects with `state_dict`: data loaders, and what a failed restore does to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torchdata.stateful_dataloader import StatefulDataLoader
from torchorbax import Checkpointer, MismatchError

from tests.helpers.runs import restored, saved


@pytest.mark.parametrize("workers", [0, 2])
def test_no_sample_is_seen_twice_or_skipped(workers: int, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    def loader() -> StatefulDataLoader:
        return StatefulDataLoader(list(range(24)), batch_size=2, shuffle=True, num_workers=workers)

    torch.manual_seed(3)
    live = loader()
    batches = iter(live)
    before = [next(batches).tolist() for _ in range(5)]
    path = saved(tmp_path, loader=live)
    rest = [batch.tolist() for batch in batches]
    next_epoch = [batch.tolist() for batch in live]
    torch.manual_seed(4)
    again = loader()
    restored(path, loader=again)
    assert [batch.tolist() for batch in again] == rest
    assert sorted(sample for batch in before + rest for sample in batch) == list(range(24))
    assert [batch.tolist() for batch in again] == next_epoch
    recwarn.clear()  # torchdata's, of torch, and JAX's, of the fork of workers


def test_a_failed_restore_puts_a_loader_and_an_object_back(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    class Average:
        """An average of weights that loads in place."""

        def __init__(self) -> None:
            self.shadow = {"w": torch.zeros(2)}

        def state_dict(self) -> dict[str, torch.Tensor]:
            return self.shadow

        def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
            self.shadow["w"].copy_(state["w"])

    class Refusing(Average):
        def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
            raise RuntimeError("no")

    def objects(value: float) -> dict[str, Any]:
        average = Average()
        average.shadow["w"].fill_(value)
        return {"average": average, "loader": StatefulDataLoader(range(8)), "last": Refusing()}

    state = objects(1.0)
    taken = iter(state["loader"])
    next(taken)
    path = saved(tmp_path, **state)
    state = objects(2.0)
    with pytest.raises(MismatchError, match=r"last: placement: .*RuntimeError: no"):
        restored(path, **state)
    assert state["average"].shadow["w"].tolist() == [2, 2]
    assert len(list(state["loader"])) == 8
    recwarn.clear()  # torchdata's, of torch


def test_arrays_of_an_object_stay_on_their_side(tmp_path: Path) -> None:
    """Also where an array on the other side had their place when the run was opened."""

    class Holder:
        def __init__(self) -> None:
            self.state: list[Any] = [jnp.zeros(2), np.zeros(2, np.float32)]

        def state_dict(self) -> list[Any]:
            return self.state

        def load_state_dict(self, state: list[Any]) -> None:
            self.state = state

    holder, again = Holder(), Holder()
    with Checkpointer(tmp_path, {"x": holder}, save=None) as run:
        holder.state = [np.ones(2, np.float32), jnp.ones(2)]
        run.save(0, force=True)
    with Checkpointer(tmp_path, {"x": again}) as run:
        run.restore()
    assert [type(array) for array in again.state] == [type(array) for array in holder.state]
