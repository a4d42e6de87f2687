"""What does not fit is found before anything is changed, and all of it is said at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optax
import pytest
import torch
import torchorbax
from torch import nn
from torchorbax import Checkpointer, ConfigError, MismatchError

from tests.helpers.fake_runs import weights
from tests.helpers.models import TiedNet, objects
from tests.helpers.restores import Net, everything, optimizer_of, save
from tests.helpers.tensors import bits


def test_everything_that_is_wrong_is_said_at_once_and_nothing_is_changed(saved: str) -> None:
    model = Net("backbone", tied=True)
    model.head = nn.Linear(4, 4, bias=True, dtype=torch.bfloat16)
    model.out = nn.Linear(8, 4, bias=False)
    optimizer = torch.optim.Adam(
        [{"params": model.backbone.parameters()}, {"params": [*model.head.parameters(), *model.out.parameters()]}]
    )
    before = everything(model, optimizer)
    with Checkpointer(saved, {"model": model, "optimizer": optimizer, "extra": {"x": 1}}) as run:
        with pytest.raises(MismatchError) as caught:
            run.restore()
        assert run.step is None
    assert everything(model, optimizer) == before
    lines = str(caught.value).splitlines()
    assert lines[0].endswith(
        "step 5 does not fit the live objects: 11 missing, 8 unexpected, 2 dtype, 2 shape, 3 groups"
    )
    assert "  extra: the whole item: expected pytree, but it is missing" in lines
    assert "  model: backbone.0.weight: expected float32(4, 4), but it is missing (was it encoder.0.weight?)" in lines
    assert "  model: encoder.0.bias: found float32(4,), but there is no such live value" in lines
    assert "  model: out.weight: shape: expected (4, 8), found (4, 4)" in lines
    assert "  model: head.weight: dtype: expected bfloat16, found float32" in lines
    assert "  optimizer: head.weight: groups: expected in param_groups[1], found in param_groups[0]" in lines
    assert "  ... and 6 more of kind missing (see .problems)" in lines
    assert lines[-1].startswith("Nothing was changed. To try: if these were renamed, rename={")
    assert "cast=True" in lines[-1]
    assert "sizes" in lines[-1]
    assert len(caught.value.problems) == 26


def test_ties_that_differ(tmp_path: Path) -> None:
    save(tmp_path / "tied", Net(tied=True))
    save(tmp_path / "untied", Net())
    untied, tied = Net(), Net(tied=True)
    with pytest.raises(
        MismatchError, match=r"model: head\.weight: ties: expected not tied, found tied with out\.weight"
    ):
        Checkpointer(str(tmp_path / "tied"), {"model": untied, "optimizer": optimizer_of(untied, "torch", 0)}).restore()
    with pytest.raises(
        MismatchError, match=r"out\.weight: ties: expected tied with head\.weight, found not tied\n(.*\n)*.*To try: tie"
    ):
        Checkpointer(str(tmp_path / "untied"), {"model": tied, "optimizer": optimizer_of(tied, "torch", 0)}).restore()


def test_param_groups_that_differ_are_named(saved: str) -> None:
    model = Net()
    names = [name for name, _ in model.named_parameters()]

    def restore(groups: list[list[str]]) -> None:
        params = dict(model.named_parameters())
        optimizer = torch.optim.Adam([{"params": [params[name] for name in group]} for group in groups])
        with Checkpointer(saved, {"model": model, "optimizer": optimizer}) as run:
            run.restore()

    restore([names[::-1]])  # the order within a group does not matter: state goes by name
    with pytest.raises(
        MismatchError, match=r"optimizer: head\.weight: expected .*missing|optimizer: head\.weight: found in"
    ):
        restore([[name for name in names if name != "head.weight"]])
    with pytest.raises(
        MismatchError, match=r"1 groups\n  optimizer: param_groups: groups: expected 2 of them, found 1"
    ):
        restore([names, []])
    with pytest.raises(
        MismatchError, match=r"7 groups|out\.weight: groups: expected in param_groups\[1\], found in param"
    ):
        restore([names[:-1], names[-1:]])


def test_only_leaves_the_rest_unchecked(saved: str) -> None:
    model = Net(width=8)
    head = bits(torchorbax.load(saved)["head.weight"])
    with Checkpointer(saved, {"model": model, "other": [1]}) as run:
        run.restore(only=["model.head.*"])
    assert bits(model.head.weight) == head


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": "modle"}, r"only=\['modle'\] matches nothing; a pattern is 'item' or 'item\.name'"),
        ({"only": ["model", "model.decoder.*"]}, r"only=\['model\.decoder\.\*'\] matches nothing"),
        ({"only": []}, "only must be a pattern or several"),
        ({"only": [3]}, "only must be a pattern or several"),
        ({"rename": {"nothing": "elsewhere"}}, "rename: the checkpoint has nothing called 'nothing'"),
        ({"rename": "head"}, r"rename must be a mapping \{old name: new name\} or a function"),
        ({"rename": lambda name: "head.weight"}, r"rename gives two leaves of model the name 'head\.weight'"),
    ],
)
def test_slips_of_the_pen(saved: str, options: dict[str, Any], message: str) -> None:
    model = Net()
    optimizer = optimizer_of(model, "torch", 0)
    before = everything(model, optimizer)
    with (
        Checkpointer(saved, {"model": model, "optimizer": optimizer}) as run,
        pytest.raises(ConfigError, match=message),
    ):
        run.restore(**options)
    assert everything(model, optimizer) == before


def test_a_mismatch_lists_everything_and_changes_nothing(trained_run: str) -> None:
    class Other(TiedNet):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = nn.Linear(32, 16)
            self.norm = nn.LayerNorm(32)
            self.extra = nn.Parameter(torch.zeros(2, dtype=torch.float16))
            self.head.weight = nn.Parameter(torch.zeros(64, 32))

    model = Other()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    before = {name: bits(value.detach().numpy()) for name, value in model.state_dict().items()}
    with pytest.raises(torchorbax.MismatchError, match="step 1 does not fit the live objects") as caught:
        torchorbax.resume(model, optimizer, trained_run)
    found = {(problem.kind, problem.item, problem.name) for problem in caught.value.problems}
    assert {
        ("missing", "model", "extra"),
        ("unexpected", "model", "norm.running_mean"),
        ("shape", "model", "hidden.weight"),
        ("shape", "model", "hidden.bias"),
        ("ties", "model", "head.weight"),
        ("missing", "optimizer", "extra"),
        ("missing", "optimizer", "head.weight"),
    } <= found
    assert {name: bits(value.detach().numpy()) for name, value in model.state_dict().items()} == before
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert not optimizer.state


def test_items_and_kinds_must_agree(trained_run: str) -> None:
    model, _, _ = objects("adamw")
    with pytest.raises(torchorbax.MismatchError, match=r"whole item: found a torch\.optim item, but there is no such"):
        torchorbax.resume(model, None, trained_run)
    with pytest.raises(
        torchorbax.MismatchError,
        match=r"optimizer: the whole item: placement: expected optax, found a torch\.optim item",
    ):
        torchorbax.resume(model, torchorbax.OptaxOptimizer(model, optax.sgd(0.1)), trained_run)
    with pytest.raises(torchorbax.MismatchError, match="ema: the whole item: expected pytree, but it is missing"):
        torchorbax.resume(model, torch.optim.AdamW(model.parameters()), trained_run, state={"ema": weights()})


def test_dtypes_are_never_cast(trained_run: str) -> None:
    model = TiedNet().bfloat16()
    with pytest.raises(torchorbax.MismatchError, match=r"embed\.weight: dtype: expected bfloat16, found float32"):
        torchorbax.resume(model, torch.optim.AdamW(model.parameters()), trained_run)
