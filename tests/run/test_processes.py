"""What only shows across processes: other device counts, signals, and programs that end without asking."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.programs import RunPython

ROOT = Path(__file__).parents[2]

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


LOOP = """
    import sys
    sys.path.insert(0, {root!r})
    import numpy as np, torch, torchorbax
    model = torch.nn.Linear(64, 64)
    with torchorbax.resume(model, None, sys.argv[1], save=None) as run:
        for step in run.steps(1_000_000):
            with torch.no_grad():
                model.weight.fill_(step)
            print(step, flush=True)
    print("ended", run.preempted, run.all_steps(), flush=True)
"""


def start(code: str, *args: object, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            "timeout",
            "-k",
            "5",
            "120",
            sys.executable,
            "-c",
            "\n".join(line[4:] for line in code.splitlines()),
            *map(str, args),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
    )


def child_of(process: subprocess.Popen[str]) -> int:
    """The pid of the Python below `timeout`."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(children[0])


def test_sigterm_saves_the_current_step_and_ends_the_loop(tmp_path: Path, run_python: RunPython) -> None:
    process = start(LOOP.format(root=str(ROOT)), tmp_path / "run", cwd=tmp_path)
    assert process.stdout is not None
    while process.stdout.readline().strip() != "20":
        assert process.poll() is None
    os.kill(child_of(process), signal.SIGTERM)
    lines = process.stdout.read().splitlines()  # not by `communicate`, which misses what `readline` has read ahead
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    last_step = int(lines[-2])
    assert lines[-1] == f"ended True [{last_step}]"
    assert "SIGTERM: saving the current step" in err
    check = "import sys, torchorbax; print(float(torchorbax.load(sys.argv[1])['weight'][0, 0]))"
    assert float(run_python(check, tmp_path / "run").stdout) == last_step


def test_sigterm_in_a_hand_written_loop(tmp_path: Path, run_python: RunPython) -> None:
    code = """
        import os, signal, sys, torch, torchorbax
        before = signal.getsignal(signal.SIGTERM)
        run = torchorbax.resume(torch.nn.Linear(2, 2), None, sys.argv[1], save=None)
        started = []
        for step in range(6):
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            started.append(run.save(step))
        run.close()
        print(started, run.preempted, run.all_steps(), signal.getsignal(signal.SIGTERM) == before)
    """
    out = run_python(code, tmp_path / "run").stdout
    assert out.strip() == "[False, False, False, True, False, False] True [3] True"


def test_a_second_sigterm_ends_the_process(tmp_path: Path, run_python: RunPython) -> None:
    code = """
        import os, signal, sys, torch, torchorbax
        with torchorbax.resume(torch.nn.Linear(2, 2), None, sys.argv[1]) as run:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            print("still here")
    """
    done = run_python(code, tmp_path / "run", check=False)
    assert done.returncode == -signal.SIGTERM
    assert "still here" not in done.stdout


def test_a_forked_worker_dies_when_told_to(tmp_path: Path, run_python: RunPython) -> None:
    """A DataLoader ends its workers with SIGTERM; they inherit the handler and the open run."""
    code = """
        import os, signal, sys, time, torch, torchorbax
        with torchorbax.resume(torch.nn.Linear(2, 2), None, sys.argv[1]) as run:
            told, tell = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.write(tell, b"x")
                while True:  # a signal that comes right before a wait without an end would not be seen
                    signal.sigtimedwait([], 0.05)
            os.read(told, 1)
            os.kill(pid, signal.SIGTERM)
            _, status = os.waitpid(pid, 0)
            print(os.WTERMSIG(status) == signal.SIGTERM, run.preempted)
    """
    assert run_python(code, tmp_path / "run", warnings="ignore").stdout.strip() == "True False"


@pytest.mark.parametrize("ending", ["pass", "sys.exit(3)", "raise RuntimeError('mine')"])
def test_a_program_that_ends_without_close_commits_the_save_in_flight(
    ending: str, tmp_path: Path, run_python: RunPython
) -> None:
    code = f"""
        import sys, numpy as np, torchorbax
        run = torchorbax.Checkpointer(sys.argv[1], {{"x": {{"a": np.ones(1 << 24, np.float32)}}}})
        run.save(0)
        print(run.all_steps())
        {ending}
    """
    done = run_python(code, tmp_path / "run", check=False)
    assert done.returncode == {"pass": 0, "sys.exit(3)": 3}.get(ending, 1), done.stderr
    check = "import sys, torchorbax; print(torchorbax.load(sys.argv[1], item='x')['a'].sum())"
    assert float(run_python(check, tmp_path / "run").stdout) == 1 << 24


def test_a_failed_save_is_told_at_exit(tmp_path: Path, run_python: RunPython) -> None:
    code = """
        import pathlib, shutil, sys, numpy as np, torchorbax
        run = torchorbax.Checkpointer(sys.argv[1], {"x": {"a": np.ones(8, np.float32)}})
        shutil.rmtree(sys.argv[1])
        pathlib.Path(sys.argv[1]).write_text("in the way")
        run.save(0)
    """
    done = run_python(code, tmp_path / "run", check=False)
    assert "step 0 was not saved" in done.stderr


def test_sigkill_in_mid_save_loses_nothing_that_was_committed(tmp_path: Path, run_python: RunPython) -> None:
    code = """
        import sys, numpy as np, torchorbax
        state = {"x": {"a": np.zeros(1 << 22, np.float32)}}
        with torchorbax.Checkpointer(sys.argv[1], state) as run:
            print(run.restore(), float(state["x"]["a"].max()), flush=True)
            for step in run.steps(100_000):
                state["x"]["a"][:] = step
                print(step, run.all_steps()[-1:], flush=True)
    """
    code = "\n".join(line[4:] for line in code.splitlines())
    newest = -1
    for _ in range(3):
        process = start(code, tmp_path / "run", cwd=tmp_path)
        assert process.stdout is not None
        restored, value = process.stdout.readline().split()
        assert restored == "None" if newest < 0 else (int(restored) >= newest and float(value) == int(restored))
        for line in process.stdout:
            step, listed = line.split(maxsplit=1)
            newest = max([newest, *json.loads(listed)])
            if newest > -1 and int(step) % 500 == 499:
                break
        os.kill(child_of(process), signal.SIGKILL)
        process.communicate(timeout=60)
    check = """
        import sys, torchorbax
        value = torchorbax.load(sys.argv[1], item="x")["a"]
        print(int(value.min()), int(value.max()), torchorbax.Checkpointer(sys.argv[1], {}, rng=False).all_steps()[-1])
    """
    low, high, step = map(int, run_python(check, tmp_path / "run").stdout.split())
    assert low == high == step >= newest >= 0


def test_sigterm_reaches_every_run_and_the_handler_of_before_comes_back(tmp_path: Path, run_python: RunPython) -> None:
    code = """
        import os, signal, sys, torch, torchorbax
        before = signal.getsignal(signal.SIGTERM)
        one, two = (torchorbax.resume(torch.nn.Linear(2, 2), None, sys.argv[1] + name, save=None) for name in "ab")
        os.kill(os.getpid(), signal.SIGTERM)
        print(one.preempted, two.preempted)
        one.close()
        print(signal.getsignal(signal.SIGTERM) == before)
        two.close()
        print(signal.getsignal(signal.SIGTERM) == before)
    """
    assert run_python(code, tmp_path / "run").stdout.split() == ["True", "True", "False", "True"]
