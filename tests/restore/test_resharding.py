"""A run goes on on other numbers of devices, in every layout."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.programs import ROOT, RunPython

# Trains a little, and prints what the parameters and moments are and where they lie.
PROGRAM = """
    import json, sys
    sys.path.insert(0, {root!r})
    import jax, numpy as np, optax, torch, torchorbax
    from hashlib import sha256
    from jax.sharding import Mesh, PartitionSpec as P
    from tests.helpers.models import TiedNet, RULES, RULES_2D, batch_of, loss_fn
    from torchorbax import to_jax

    path, layout, start, stop, kind = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5]
    devices = np.array(jax.devices())
    if layout == "fsdp":
        shardings = (Mesh(devices, ("fsdp",)), RULES if len(devices) <= 32 else {{}})
    elif layout == "fsdp,tp":
        shardings = (Mesh(devices.reshape(-1, 2), ("fsdp", "tp")), RULES_2D)
    else:
        shardings = None
    torch.manual_seed(0)
    with torch.device("meta" if start == "meta" else "cpu"):
        model = TiedNet()
    if kind == "optax":
        optimizer = torchorbax.OptaxOptimizer(model, optax.adamw(0.01))
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    if start == "placed":
        torchorbax.place_(model, optimizer, shardings)
        shardings = None
    step = torchorbax.train_step(model, optimizer, loss_fn)
    with torchorbax.resume(model, optimizer, path, shardings=shardings, save=None) as run:
        restored = {{name: sha256(np.asarray(array)).hexdigest() for name, array in to_jax(model).items()}}
        losses = [float(step(batch_of(i))) for i in run.steps(stop)]
        if losses:
            run.save(stop - 1, force=True)
    if kind == "optax":
        moment = optimizer.state[0].mu["hidden.weight"]
    else:
        moment = optimizer.state[model.hidden.weight]["exp_avg"]
        moment = moment.jax() if hasattr(moment, "jax") else None
    weight = to_jax(model)["hidden.weight"]
    print(json.dumps(dict(
        step=run.step, losses=losses, restored=restored,
        final={{name: sha256(np.asarray(array)).hexdigest() for name, array in to_jax(model).items()}},
        devices=len(weight.sharding.device_set), shard=list(weight.addressable_shards[0].data.shape),
        moment=moment is not None and moment.sharding == weight.sharding, tied=model.head.weight is model.embed.weight,
    )))
"""


def train(
    run_python: RunPython, path: Path, devices: int, layout: str, start: str, stop: int, kind: str = "torch"
) -> dict[str, Any]:
    done = run_python(PROGRAM.format(root=str(ROOT)), path, layout, start, stop, kind, devices=devices)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("kind", ["torch", "optax"])
def test_resharding_from_every_layout_to_every_other(kind: str, tmp_path: Path, run_python: RunPython) -> None:
    """Each source trains two steps; each destination restores it without training, and then trains one step."""
    sources = {"8": (8, "fsdp"), "8 as 4x2": (8, "fsdp,tp")}
    destinations = {
        "16": (16, "fsdp", "cpu", 32 // 16),
        "16 as 8x2": (16, "fsdp,tp", "meta", 32 // 8),
        "4 as 2x2": (4, "fsdp,tp", "placed", 32 // 2),
        "4": (4, "fsdp", "meta", 32 // 4),
        "1": (1, "none", "meta", 32),
    }
    losses: list[float] = []
    for source, (devices, layout) in sources.items():
        path = tmp_path / source.replace(" ", "-")
        saved = train(run_python, path, devices, layout, "cpu", 2, kind)
        assert saved["step"] is None
        for destination, (count, other, start, width) in destinations.items():
            if (kind, source) == ("optax", "8 as 4x2") and destination != "16 as 8x2":
                continue  # the same code as with torch; one of them is enough
            copy = tmp_path / f"{path.name}-to-{destination.replace(' ', '-')}"
            subprocess.run(["cp", "-r", path, copy], check=True)
            result = train(run_python, copy, count, other, start, 3, kind)
            assert result["step"] == 1
            assert result["restored"] == saved["final"], f"{source} to {destination}"
            assert result["devices"] == count, f"{source} to {destination}: not on all devices"
            assert width in result["shard"], f"{source} to {destination}: {result['shard']}"
            assert result["moment"], f"{source} to {destination}: the moments are not where their parameter is"
            assert result["tied"]
            losses += result["losses"]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)
