"""What the matrix combines: models, optimizers, and what else a run has in its state."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping
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
from torchax.train import ScannedModule
from torchorbax import OptaxOptimizer

from tests.helpers.models import BATCH, TOKENS, WIDTH, TiedNet, batch_of
from tests.helpers.timm_averages import ModelEmaV3

STEPS = 6
"""Of each run."""


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


class Fused(nn.Module):
    """Three projections in one weight, as its `state_dict` shows three: torchtitan's way to fuse them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3 * WIDTH, WIDTH) / WIDTH)
        self.register_state_dict_post_hook(self._split)
        self.register_load_state_dict_pre_hook(self._join)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = F.linear(x, self.weight).chunk(3, dim=-1)
        return query * key.sigmoid() + value

    @staticmethod
    def _split(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for name, part in zip("qkv", state.pop(f"{prefix}weight").chunk(3), strict=True):
            state[f"{prefix}{name}"] = part

    @staticmethod
    def _join(module: nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
        state[f"{prefix}weight"] = torch.cat([state.pop(f"{prefix}{name}") for name in "qkv"])


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(1, WIDTH), nn.BatchNorm1d(WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1))


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
    "fused projections with hooks": lambda: Tokens(Fused()),
    "perceptron": perceptron,
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


class WeightDecaySchedule:
    """Halves the weight decay after each step."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._steps = 0

    def step(self) -> None:
        self._steps += 1
        for group in self._optimizer.param_groups:
            group["weight_decay"] = 0.1 * 0.5**self._steps

    def state_dict(self) -> dict[str, int]:
        return {"steps": self._steps}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self._steps = state["steps"]


class Queue(nn.Module):
    """Keys of the last batches, for a contrastive loss, and the encoder that makes them: an average of the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(model).requires_grad_(False)
        self.register_buffer("keys", torch.randn(3 * BATCH, 1))


AVERAGES = {"EMA", "EMA_of_timm"}
"""The names in `state=` of averages of the model, which go to the devices with it."""

GENERATORS: dict[str, tuple[Callable[[], Any], Callable[[Any], float]]] = {
    "torch_generator": (torch.Generator, lambda one: float(torch.rand((), generator=one))),
    "numpy_generator": (np.random.default_rng, lambda one: float(one.random())),
    "python_generator": (random.Random, lambda one: one.random()),
}


def state_of(names: tuple[str, ...], model: nn.Module, optimizer: Any) -> dict[str, Any]:
    import torchmetrics

    makers: dict[str, Callable[[], Any]] = {
        **{name: (lambda make=make: make(optimizer)) for name, make in SCHEDULERS.items()},
        **{name: (lambda workers=workers: loader_of(workers)) for name, workers in LOADERS.items()},
        "torchmetrics": lambda: torchmetrics.MetricCollection([torchmetrics.MeanMetric(), torchmetrics.MaxMetric()]),
        "EMA": lambda: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True),
        "EMA of timm": lambda: ModelEmaV3(model, decay=0.5),
        "weight decay schedule": lambda: WeightDecaySchedule(optimizer),
        "critic": perceptron,
        "teacher": lambda: copy.deepcopy(model),
        "queue": lambda: Queue(model),
        **{name: make for name, (make, _) in GENERATORS.items()},
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
            value.update_parameters(model)
        elif isinstance(value, ModelEmaV3):
            value.update(model)
        elif isinstance(value, WeightDecaySchedule):
            value.step()
        elif isinstance(value, dict) and "epoch" in value:
            value["epoch"] += 1
            value["seen"][0] += loss
        elif hasattr(value, "compute"):
            value.update(loss)
