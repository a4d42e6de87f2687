"""Which runs are the same run after a resume: every combination below, in one process and then in another.

One process runs combinations without interruption and saves in the middle; another builds each anew, from other random
numbers, resumes and runs the rest. `python -m tests.campaigns.matrix write` does both for all and writes
docs/matrix.md.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch.nn.functional as F
import torchorbax  # noqa: F401  # makes torchax importable
from torch import nn
from torch.optim import lr_scheduler
from torchax import interop
from torchorbax import OptaxOptimizer, place_, resume, to_jax, train_step
from torchorbax._src.state.values import encode
from torchorbax._src.tensors import torchax_tensors as _torchax

from tests.campaigns.matrix_parts import (
    AVERAGES,
    DOES_NOT_TRAIN,
    GENERATORS,
    LOADERS,
    MODELS,
    OPTIMIZERS,
    SCHEDULERS,
    STEPS,
    TORCH,
    USUAL,
    WeightDecaySchedule,
    after_step,
    batches,
    state_of,
)
from tests.helpers.models import BATCH, TOKENS, batch_of, loss_fn
from tests.helpers.programs import ROOT, start_program

PAGE = ROOT / "docs" / "matrix.md"
SAVED, SHARES = 2, 2
ENVIRONMENT = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_backend_optimization_level=0",  # compiles faster
}


@dataclass(frozen=True)
class Combination:
    """A training loop. `state` names what is in `state=` besides the model and the optimizer."""

    loop: str
    model: str
    optimizer: str
    state: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "-".join((self.loop, self.model, self.optimizer, *self.state)).replace(" ", "_")


# ---------------------------------------------------------------------------------------------------------------- loops


def compiled(model: nn.Module, optimizer: Any, extra: Mapping[str, Any]) -> Callable[[Any], float]:
    """`torchorbax.train_step`."""
    step = train_step(model, optimizer, loss_fn)
    return lambda batch: float(step(batch))


def gan(model: nn.Module, optimizer: Any, extra: Mapping[str, Any]) -> Callable[[Any], float]:
    """Two steps in turn: of a critic, with an optimizer of its own that has no state, and of the generator."""
    critic = extra["critic"]
    critic_step = train_step(
        critic,
        torch.optim.SGD(critic.parameters(), lr=0.1),
        lambda critic, noise: critic(model(noise).detach()).mean() - critic(noise**2).mean(),
    )
    step = train_step(model, optimizer, lambda model, noise: -critic(model(noise)).mean())

    def run(batch: Any) -> float:
        noise = batch[0][:, None] / TOKENS
        return float(critic_step(noise)) + float(step(noise))

    return run


def distillation(model: nn.Module, optimizer: Any, extra: Mapping[str, Any]) -> Callable[[Any], float]:
    """A teacher that the loss reads, in evaluation mode."""
    teacher = extra["teacher"].eval()

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        with torch.no_grad():
            expected = teacher(batch[0])
        return F.mse_loss(model(batch[0]), expected) + loss_fn(model, batch)

    step = train_step(model, optimizer, loss)
    return lambda batch: float(step(batch))


def contrastive(model: nn.Module, optimizer: Any, extra: Mapping[str, Any]) -> Callable[[Any], float]:
    """A queue and a momentum encoder, both updated within the loss."""
    queue = extra["queue"]

    def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            for kept, new in zip(queue.encoder.parameters(), model.parameters(), strict=True):
                kept.mul_(0.9).add_(new, alpha=0.1)
            keys = queue.encoder(x)
        found = (model(x) @ queue.keys.T).logsumexp(-1).mean() - (model(x) * keys).mean()
        with torch.no_grad():
            queue.keys.copy_(torch.cat([queue.keys[BATCH:], keys]))
        return found

    step = train_step(model, optimizer, loss)
    return lambda batch: float(step(batch[0][:, None] / TOKENS))


def eager_update(model: nn.Module, optimizer: Any, extra: Mapping[str, Any]) -> Callable[[Any], float]:
    """Gradients by `jax_value_and_grad`, then the optimizer's own step, not compiled."""
    env = _torchax.torchax.default_env()
    place_(model, optimizer)
    params = dict(model.named_parameters())

    def run(batch: Any) -> float:
        tokens, targets = (_torchax.wrap(jnp.asarray(part.numpy())) for part in batch)
        with env:
            loss_of = lambda weights: F.cross_entropy(torch.func.functional_call(model, weights, (tokens,)), targets)
            loss, grads = interop.jax_value_and_grad(loss_of)(params)
            for name, param in params.items():
                param.grad = grads[name]
            optimizer.step()
            return float(loss.item())

    return run


def plain_torch(model: nn.Module, optimizer: Any, extra: Mapping[str, Any]) -> Callable[[Any], float]:
    """Torch alone, on the CPU."""

    def run(batch: Any) -> float:
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        return float(loss)

    return run


def functional(model: nn.Module, path: str, tx: Any, thread_key: bool) -> tuple[list[float], Any]:
    """Torchax's tutorial: `make_train_step`-like, jitted and donating, its state in local variables, handed to `save`.

    The key is an argument and a result of the step, or else in torchax's environment, where jit makes it a constant.
    """
    place_(model)
    weights: Any = to_jax(dict(model.named_parameters()))
    env = _torchax.torchax.default_env()

    def step_of(key: Any, weights: Any, opt_state: Any, batch: Any) -> Any:
        def loss_of(weights: Any) -> Any:
            with env.override_property(prng=key if thread_key else env.param.prng), env:
                wrapped = jax.tree.map(_torchax.wrap, (weights, batch))
                logits = torch.func.functional_call(model, wrapped[0], (wrapped[1][0],))
                return _torchax.array_of(F.cross_entropy(logits, wrapped[1][1])), env.param.prng

        (loss, new_key), grads = jax.value_and_grad(loss_of, has_aux=True)(weights)
        updates, opt_state = tx.update(grads, opt_state, weights)
        return (new_key if thread_key else key), loss, optax.apply_updates(weights, updates), opt_state

    step = jax.jit(step_of, donate_argnums=(1, 2))
    losses = []
    with resume(model, None, path, state={"opt_state": tx.init(weights)}, save=None) as run:
        weights, opt_state = to_jax(dict(model.named_parameters())), run.state["opt_state"]
        for i in range(run.next_step, STEPS):
            batch = tuple(jnp.asarray(part.numpy()) for part in batch_of(i))
            key, loss, weights, opt_state = step(_torchax.rng_key(), weights, opt_state, batch)
            _torchax.set_rng_key(key)
            losses.append(float(loss))
            run.save(i, {"model": weights, "opt_state": opt_state}, force=i == SAVED)
        return losses, [weights, jax.tree.leaves(opt_state), jax.random.key_data(_torchax.rng_key())]


LOOPS: dict[str, Callable[[nn.Module, Any, Mapping[str, Any]], Callable[[Any], float]]] = {
    "train_step": compiled,
    "GAN": gan,
    "distillation": distillation,
    "contrastive queue": contrastive,
    "eager update": eager_update,
    "plain torch": plain_torch,
}
FUNCTIONAL = {"functional": True, "functional, key in the environment": False}


def combinations() -> list[Combination]:
    needs_matrices = ("Muon", "SparseAdam")
    schedulers = itertools.chain(SCHEDULERS, itertools.repeat(None))
    found = []
    for name in OPTIMIZERS:
        scheduler = None if name in DOES_NOT_TRAIN or name not in TORCH else next(schedulers)
        model = "weights only" if name in needs_matrices else USUAL
        found.append(Combination("train_step", model, name, (scheduler,) if scheduler else ()))
    found += [
        Combination("train_step", model, "AdamW")
        for model in MODELS
        if model not in (USUAL, "weights only", "perceptron")
    ]
    found += [Combination("train_step", USUAL, "AdamW", (name,)) for name in LOADERS]
    found += [Combination("train_step", USUAL, "AdamW", ("EMA", "StepLR", "loader", "torchmetrics", "plain values"))]
    found += [Combination("train_step", USUAL, "AdamW", ("EMA of timm",))]
    found += [
        Combination("GAN", "perceptron", "Adam", ("critic",)),
        Combination("distillation", "dropout", "AdamW", ("teacher",)),
        Combination("contrastive queue", "perceptron", "AdamW", ("queue",)),
        Combination("train_step", USUAL, "AdamW", ("weight decay schedule", *GENERATORS)),
    ]
    eager = ("SGD", "AdamW", "Adamax", "NAdam", "Adagrad", "ASGD", "Rprop", "Adafactor")
    found += [Combination("eager update", "dropout", name) for name in eager]
    found += [Combination("plain torch", USUAL, name, ("StepLR",)) for name in ("SGD momentum", "AdamW", "Adafactor")]
    found += [Combination("plain torch", "HF Llama with LoRA", "Adagrad")]
    found += [Combination(loop, "dropout", "optax adamw") for loop in FUNCTIONAL]
    return found


# ------------------------------------------------------------------------------------------------------------------ run


def run_one(one: Combination, path: str, seed: int) -> dict[str, Any]:
    """Run a combination from where `path` is to the end.

    Returns:
        The losses of its last steps and a digest of all that it has at the end, or the error that stopped it.
    """
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    _torchax.set_rng_key(jax.random.key(seed))
    try:
        model = MODELS[one.model]()
        if one.loop in FUNCTIONAL:
            tx = OPTIMIZERS[one.optimizer](model).tx
            losses, final = functional(model, path, tx, FUNCTIONAL[one.loop])
            return {"losses": losses[-(STEPS - SAVED - 1) :], "digest": digest(final)}
        optimizer = OPTIMIZERS[one.optimizer](model)
        extra = state_of(one.state, model, optimizer)
        for average in AVERAGES & extra.keys():
            place_(extra[average])
        step = LOOPS[one.loop](model, optimizer, extra)
        losses = []
        with resume(model, optimizer, path, state=extra, save=None) as run:
            source = batches(extra, run.next_step)
            for i in range(run.next_step, STEPS):
                drawn = [
                    draw(extra[name.replace(" ", "_")]) for name, (_, draw) in GENERATORS.items() if name in one.state
                ]
                losses.append(step(next(source)) + sum(drawn))
                after_step(extra, model, losses[-1])
                run.save(i, force=i == SAVED)
        seen = [next(source).__repr__() for _ in range(2)] if any(name.startswith("loader") for name in extra) else []
        return {"losses": losses[-(STEPS - SAVED - 1) :], "digest": digest([state(model, optimizer, extra), seen])}
    except Exception as error:  # a combination that fails is listed as such
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}


def state(model: nn.Module, optimizer: Any, extra: Mapping[str, Any]) -> Any:
    """Everything that can be different at the end of a run."""
    names = {id(param): name for name, param in model.named_parameters()}
    if isinstance(optimizer, OptaxOptimizer):
        moments: Any = [str(jax.tree.structure(optimizer.state)), *jax.tree.leaves(optimizer.state)]
    else:
        moments = [
            {names[id(param)]: dict(entries) for param, entries in optimizer.state.items()},
            [{**group, "params": [names[id(p)] for p in group["params"]]} for group in optimizer.param_groups],
        ]
    others = [
        value.state_dict()
        for value in extra.values()
        if isinstance(value, lr_scheduler.LRScheduler | nn.Module | WeightDecaySchedule)
    ]
    plain = [value for value in extra.values() if isinstance(value, dict)]
    computed = [value.compute() for value in extra.values() if hasattr(value, "compute")]
    generators = [jax.random.key_data(_torchax.rng_key()), torch.get_rng_state(), random.random(), np.random.random()]
    return [dict(model.state_dict()), moments, others, plain, computed, generators]


def digest(tree: Any) -> str:
    """SHA-256 of a tree of tensors, arrays and plain values, bit for bit."""
    leaves: dict[str, Any] = {}
    found = hashlib.sha256(json.dumps(encode(jax.tree.map(lambda x: x, tree), leaves)).encode())
    for name, leaf in leaves.items():
        found.update(name.encode())
        found.update(np.asarray(to_jax(leaf)).tobytes())
    return found.hexdigest()


def run_all(part: str, folder: Path, share: int) -> None:
    warnings.simplefilter("ignore")  # torch's, on combinations that do not work anyway
    chosen = combinations()[share::SHARES]
    seed = 1 if part == "first" else 2
    results = {str(one): run_one(one, str(folder / str(one).replace(",", "")), seed) for one in chosen}
    (folder / f"{part}-{share}.json").write_text(json.dumps(results))


def verdict(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """`bitwise`, or what is wrong."""
    if "error" in first:
        return f"does not train: {first['error']}"
    if "error" in second:
        return f"fails to resume: {second['error']}"
    if first["losses"] != second["losses"]:
        return "other losses"
    return "bitwise" if first["digest"] == second["digest"] else "equal losses, other state"


def both_parts(folder: Path) -> dict[Combination, str]:
    """The verdicts of all combinations, each after two processes; `SHARES` of them run at a time."""
    code = """
        import sys
        from pathlib import Path
        from tests.campaigns import matrix
        matrix.run_all(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
    """
    results: dict[str, dict[str, Any]] = {"first": {}, "second": {}}
    for part, found in results.items():
        with (folder / f"{part}.output").open("w+") as output:
            processes = [
                start_program(ROOT, code, part, folder, share, env=ENVIRONMENT, stdout=output, stderr=output)
                for share in range(SHARES)
            ]
            codes = [process.wait() for process in processes]
            if any(codes):
                output.seek(0)
                raise RuntimeError(f"the {part} part ended with exit codes {codes}\n{output.read()[-5000:]}")
        for share in range(SHARES):
            found.update(json.loads((folder / f"{part}-{share}.json").read_text()))
    return {one: verdict(results["first"][str(one)], results["second"][str(one)]) for one in combinations()}


def page(verdicts: Mapping[Combination, str]) -> str:
    """docs/matrix.md."""
    rows = [
        f"| {one.loop} | {one.model} | {one.optimizer} | {', '.join(one.state)} | {result.replace('|', '/')[:160]} |"
        for one, result in verdicts.items()
    ]
    works = sum(result == "bitwise" for result in verdicts.values())
    return "\n".join([HEADING.format(works=works, all=len(rows), steps=STEPS, saved=SAVED + 1), *rows, ""])


HEADING = """# What resumes bit for bit

Written by `python -m tests.campaigns.matrix write`; a test runs the matrix and fails if this page is stale.

Every row ran {steps} steps in one process, saving after {saved}; another process built the same objects from other
random numbers, resumed, and ran the rest. `bitwise`: losses, parameters, buffers, optimizer state, other state and
random numbers are the same to the last bit. {works} of {all} are; the others say why not.

| loop | model | optimizer | `state=` | after a resume |
|---|---|---|---|---|"""


if __name__ == "__main__":
    if sys.argv[1:] != ["write"]:
        sys.exit("usage: python -m tests.campaigns.matrix write")
    with tempfile.TemporaryDirectory() as folder:
        PAGE.write_text(page(both_parts(Path(folder))))
