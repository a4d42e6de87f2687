"""Processes that run pieces of Python for tests of gs://, one after another: each starts JAX and compiles but once.

    with Client(environment(server.port)) as client:
        client.run("result = torchorbax.load(path, item='weights')['small0'].shape", path="gs://bucket/run")

Every piece has its own names, besides those imported below, `kept` (a dict that stays), and what it is given.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from tests.helpers.programs import ROOT, start_program


class Client:
    """A process, from `with` on; `environment` is added to this one's. A piece that takes too long ends it."""

    def __init__(self, environment: Mapping[str, str], devices: int = 2) -> None:
        self._environment = {
            **os.environ,
            **environment,
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        }

    def __enter__(self) -> Client:
        self._errors = tempfile.TemporaryFile("w+")
        self._process = start_program(
            ROOT,
            "from tests.helpers import gcs_client; gcs_client.main()",
            env=self._environment,
            warnings="default",
            stdin=subprocess.PIPE,
            stderr=self._errors,
        )
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        self._errors.close()

    def run(self, code: str, timeout: float = 150, **names: Any) -> Any:
        """Run code; returns what it calls `result`. Fails with its traceback if it raises."""
        self.start(code, **names)
        return self.finish(timeout)

    def start(self, code: str, **names: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"code": textwrap.dedent(code), "names": names}) + "\n")
        self._process.stdin.flush()

    def finish(self, timeout: float = 150) -> Any:
        """Wait for what was started."""
        assert self._process.stdout is not None
        patience = threading.Timer(timeout, self._process.kill)
        patience.start()
        line = self._process.stdout.readline()
        patience.cancel()
        if not line:
            self._errors.seek(0)
            raise AssertionError(f"the client ended, or took more than {timeout} s\n{self._errors.read()[-5000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise AssertionError(answer["error"])
        return answer["result"]


def attempt(action: Callable[[], object]) -> list[Any]:
    """The error of torchorbax that an action ends with: its kind, its text, and the seconds until then."""
    import torchorbax

    started_s = time.monotonic()
    try:
        action()
    except torchorbax.TorchorbaxError as error:
        return [type(error).__name__, str(error), time.monotonic() - started_s]
    return ["", "", time.monotonic() - started_s]


def train(path: str, stop: int, **options: Any) -> dict[str, Any]:
    """Train a small network; where it started, its losses, and a digest of its state at the end."""
    import jax
    import numpy as np
    import torch
    import torchorbax
    from jax.sharding import Mesh
    from torchorbax._src.tensors import torchax_tensors as _torchax

    from tests.helpers.models import RULES, batch_of, loss_fn, seeded

    _torchax.set_rng_key(jax.random.key(0))
    model = seeded()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    step = torchorbax.train_step(model, optimizer, loss_fn)
    losses = []
    mesh = Mesh(np.array(jax.devices()), ("fsdp",))
    with torchorbax.resume(model, optimizer, path, shardings=(mesh, RULES), **options) as run:
        start = run.next_step
        for i in run.steps(stop):
            loss = step(batch_of(i))
            run.log(loss=loss)
            losses.append(float(loss).hex())
    digest = hashlib.sha256()
    for name, array in torchorbax.to_jax(model).items():
        digest.update(name.encode() + np.asarray(array).tobytes())
    for name, param in model.named_parameters():
        for key, value in sorted(optimizer.state[param].items()):
            digest.update(f"{name}.{key}".encode() + np.asarray(torchorbax.to_jax(value)).tobytes())
    return {"start": start, "losses": losses, "digest": digest.hexdigest(), "steps": run.all_steps()}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else is printed
    import jax
    import numpy as np
    import torch
    import torchorbax

    from tests.campaigns import fault_matrix

    jax.config.update("jax_platforms", "cpu")
    shared = dict(jax=jax, np=np, os=os, sys=sys, time=time, torch=torch, torchorbax=torchorbax)  # noqa: C408
    shared |= {"attempt": attempt, "train": train, "live": fault_matrix.live, "same": fault_matrix.same, "kept": {}}
    for line in sys.stdin:
        asked = json.loads(line)
        space = {**shared, **asked["names"]}
        try:
            exec(asked["code"], space)
            answer = {"result": space.get("result")}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)
