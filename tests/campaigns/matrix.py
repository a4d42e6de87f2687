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
from collections.abc import Callable, Iterator, Mapping
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
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchax import interop
from torchax.train import ScannedModule
from torchorbax import OptaxOptimizer, place_, resume, to_jax, train_step
from torchorbax._src.state.values import encode
from torchorbax._src.tensors import torchax_tensors as _torchax

from tests.helpers.models import BATCH, TOKENS, WIDTH, TiedNet, batch_of, loss_fn
from tests.helpers.programs import ROOT, start_program

PAGE = ROOT / "docs" / "matrix.md"
STEPS, SAVED, SHARES = 6, 2, 2
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


# --------------------------------------------------------------------------------------------------------------- models


class Tokens(nn.Module):
    """`body` between an embedding and a head, with dropout."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(TOKENS, WIDTH), body
        self.dropout, self.head = nn.Dropout(0.5), nn.Linear(WIDTH, TOKENS)
        self.register_buffer("scale", torch.full((WIDTH,), 0.5), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.dropout(self.body(self.embed(tokens) * self.scale)))


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.listed = nn.ParameterList([torch.randn(WIDTH, WIDTH) / WIDTH for _ in range(2)])
        self.named = nn.ParameterDict({"shift": torch.zeros(WIDTH)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.listed[0] @ self.listed[1] + self.named["shift"]


def lazy() -> nn.Module:
    model = Tokens(nn.LazyLinear(WIDTH))
    model(torch.zeros(1, dtype=torch.long))
    return model


class Causal(nn.Module):
    """A transformers model as a function of `[tokens]`."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        import transformers

        if kind == "bert":
            sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
            config: Any = transformers.BertConfig(vocab_size=TOKENS, max_position_embeddings=BATCH, **sizes)
            self.inner = transformers.BertForMaskedLM(config)
        else:
            self.inner = transformers.LlamaForCausalLM(llama_config())
        if kind == "lora":
            import peft

            lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.5)
            self.inner = peft.get_peft_model(self.inner, lora)
            for name, param in self.named_parameters():
                param.requires_grad_("lora_" in name)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.inner(input_ids=tokens[None], use_cache=False).logits[0]


def llama_config() -> Any:
    import transformers

    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return transformers.LlamaConfig(vocab_size=TOKENS, attention_dropout=0.1, tie_word_embeddings=True, **sizes)


def frozen() -> nn.Module:
    model = TiedNet()
    model.hidden.requires_grad_(False)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "dropout, BatchNorm, tied": TiedNet,
    "dropout": lambda: Tokens(nn.Linear(WIDTH, WIDTH)),
    "the same in bf16": lambda: TiedNet().to(torch.bfloat16),
    "frozen layer": frozen,
    "ParameterList, ParameterDict": lambda: Tokens(Listed()),
    "weight_norm": lambda: Tokens(nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH))),
    "orthogonal": lambda: Tokens(nn.utils.parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH))),
    "spectral_norm": lambda: Tokens(nn.utils.parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH))),
    "LazyLinear after a dry run": lazy,
    "ScannedModule": lambda: Tokens(ScannedModule([nn.Linear(WIDTH, WIDTH) for _ in range(3)])),
    "weights only": lambda: nn.Sequential(nn.Embedding(TOKENS, WIDTH), nn.Linear(WIDTH, TOKENS, bias=False)),
    "HF Llama": lambda: Causal("llama"),
    "HF BERT": lambda: Causal("bert"),
    "HF Llama with LoRA": lambda: Causal("lora"),
}
USUAL = "dropout, BatchNorm, tied"


# ----------------------------------------------------------------------------------------------------------- optimizers


def two_groups(model: nn.Module) -> torch.optim.Optimizer:
    matrices = [param for param in model.parameters() if param.ndim > 1]
    others = [param for param in model.parameters() if param.ndim <= 1]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": others, "lr": 0.02}], lr=0.01)


def multi_transform(model: nn.Module) -> OptaxOptimizer:
    transforms = {"matrix": optax.adam(0.01), "other": optax.sgd(0.01, momentum=0.9)}
    return OptaxOptimizer(
        model,
        optax.multi_transform(
            transforms, lambda tree: jax.tree.map(lambda x: "matrix" if x.ndim > 1 else "other", tree)
        ),
    )


def masked(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.ndim > 1, tree)


def _torch(kind: str, **options: Any) -> Callable[[nn.Module], Any]:
    return lambda model: getattr(torch.optim, kind)(model.parameters(), **options)


def _optax(tx: Callable[[], Any]) -> Callable[[nn.Module], Any]:
    return lambda model: OptaxOptimizer(model, tx())


TORCH: dict[str, Callable[[nn.Module], Any]] = {
    "SGD": _torch("SGD", lr=0.1),
    "SGD momentum": _torch("SGD", lr=0.1, momentum=0.9, nesterov=True),
    "SGD dampening": _torch("SGD", lr=0.1, momentum=0.9, dampening=0.5),
    "Adam": _torch("Adam", lr=0.01),
    "Adam amsgrad": _torch("Adam", lr=0.01, amsgrad=True, weight_decay=0.1),
    "AdamW": _torch("AdamW", lr=0.01),
    "AdamW, two groups": two_groups,
    "Adamax": _torch("Adamax", lr=0.01),
    "NAdam": _torch("NAdam", lr=0.01),
    "RAdam": _torch("RAdam", lr=0.01),
    "Adagrad": _torch("Adagrad", lr=0.01),
    "Adadelta": _torch("Adadelta", lr=0.5),
    "ASGD": _torch("ASGD", lr=0.01),
    "RMSprop": _torch("RMSprop", lr=0.01, momentum=0.9, centered=True),
    "Rprop": _torch("Rprop", lr=0.01),
    "Adafactor": _torch("Adafactor", lr=0.01),
    "Muon": _torch("Muon", lr=0.01),
    "LBFGS": _torch("LBFGS", lr=0.01),
    "SparseAdam": _torch("SparseAdam", lr=0.01),
}
OPTAX: dict[str, Callable[[nn.Module], Any]] = {
    "optax adamw": _optax(lambda: optax.adamw(0.01)),
    "optax chain": _optax(lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9))),
    "optax multi_transform": multi_transform,
    "optax MultiSteps": _optax(lambda: optax.MultiSteps(optax.adam(0.01), 2)),
    "optax inject_hyperparams": _optax(
        lambda: optax.inject_hyperparams(optax.adam)(learning_rate=optax.cosine_decay_schedule(0.01, STEPS))
    ),
    "optax masked": _optax(lambda: optax.chain(optax.masked(optax.trace(0.9), masked), optax.scale(-0.1))),
    "optax bf16 moments": _optax(lambda: optax.adam(0.01, mu_dtype=jnp.bfloat16)),
    "optax lion": _optax(lambda: optax.lion(0.001)),
    "optax adafactor": _optax(lambda: optax.adafactor(0.01, min_dim_size_to_factor=8)),
}
OPTIMIZERS = {**TORCH, **OPTAX}
DOES_NOT_TRAIN = ("Adamax", "Adagrad", "ASGD", "Rprop", "Adafactor", "LBFGS", "SparseAdam")
"""In at least one loop, whether or not there is a checkpoint."""


# ---------------------------------------------------------------------------------------------------------------- state


def loader_of(workers: int) -> Any:
    from torchdata.stateful_dataloader import StatefulDataLoader

    data = torch.arange(12 * BATCH) % TOKENS
    return StatefulDataLoader(data, batch_size=2 * BATCH, shuffle=True, num_workers=workers)


def plateau(optimizer: Any) -> Any:
    return lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)


def sequential(optimizer: Any) -> Any:
    parts = [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3), lr_scheduler.ExponentialLR(optimizer, 0.9)]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "StepLR": lambda optimizer: lr_scheduler.StepLR(optimizer, 2, 0.5),
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, STEPS),
    "CosineAnnealingWarmRestarts": lambda optimizer: lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 2),
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=STEPS + 1),
    "CyclicLR": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, step_size_up=2, cycle_momentum=False),
    "SequentialLR": sequential,
    "ReduceLROnPlateau": plateau,
}
LOADERS = {"loader": 0, "loader with 2 workers": 2}


def state_of(names: tuple[str, ...], model: nn.Module, optimizer: Any) -> dict[str, Any]:
    import torchmetrics

    makers: dict[str, Callable[[], Any]] = {
        **{name: (lambda make=make: make(optimizer)) for name, make in SCHEDULERS.items()},
        **{name: (lambda workers=workers: loader_of(workers)) for name, workers in LOADERS.items()},
        "torchmetrics": lambda: torchmetrics.MetricCollection([torchmetrics.MeanMetric(), torchmetrics.MaxMetric()]),
        "EMA": lambda: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True),
        "plain values": lambda: {"epoch": 0, "seen": [0.0], "name": "x"},
    }
    return {name.replace(" ", "_"): makers[name]() for name in names}


def batches(extra: Mapping[str, Any], first: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Of the loader in mid-epoch and then of further epochs; without one, of the number of the step."""
    loaders = [value for name, value in extra.items() if name.startswith("loader")]
    if not loaders:
        yield from (batch_of(step) for step in range(first, STEPS))
    while loaders:
        for tokens in loaders[0]:
            yield tokens[:BATCH], tokens[BATCH:]


def after_step(extra: Mapping[str, Any], model: nn.Module, loss: float) -> None:
    """What a loop does with its other objects."""
    for value in extra.values():
        if isinstance(value, lr_scheduler.ReduceLROnPlateau):
            value.step(loss)
        elif isinstance(value, lr_scheduler.LRScheduler):
            value.step()
        elif isinstance(value, AveragedModel):
            average(value, model)
        elif isinstance(value, dict) and "epoch" in value:
            value["epoch"] += 1
            value["seen"][0] += loss
        elif hasattr(value, "compute"):
            value.update(loss)


def average(ema: AveragedModel, model: nn.Module) -> None:
    """Exponential average of torchax weights: `update_parameters` needs torchax's modes."""
    for kept, new in zip(ema.module.parameters(), model.parameters(), strict=True):
        _torchax.set_array(kept, _torchax.array_of(kept) * 0.5 + _torchax.array_of(new) * 0.5)


# ---------------------------------------------------------------------------------------------------------------- loops


def compiled(model: nn.Module, optimizer: Any) -> Callable[[Any], float]:
    """`torchorbax.train_step`."""
    step = train_step(model, optimizer, loss_fn)
    return lambda batch: float(step(batch))


def eager_update(model: nn.Module, optimizer: Any) -> Callable[[Any], float]:
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


def plain_torch(model: nn.Module, optimizer: Any) -> Callable[[Any], float]:
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


LOOPS: dict[str, Callable[[nn.Module, Any], Callable[[Any], float]]] = {
    "train_step": compiled,
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
    found += [Combination("train_step", model, "AdamW") for model in MODELS if model not in (USUAL, "weights only")]
    found += [Combination("train_step", USUAL, "AdamW", (name,)) for name in LOADERS]
    found += [Combination("train_step", USUAL, "AdamW", ("EMA", "StepLR", "loader", "torchmetrics", "plain values"))]
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
        if "EMA" in extra:
            place_(extra["EMA"])
        step = LOOPS[one.loop](model, optimizer)
        losses = []
        with resume(model, optimizer, path, state=extra, save=None) as run:
            source = batches(extra, run.next_step)
            for i in range(run.next_step, STEPS):
                losses.append(step(next(source)))
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
    others = [value.state_dict() for value in extra.values() if isinstance(value, lr_scheduler.LRScheduler | nn.Module)]
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
