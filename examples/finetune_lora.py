"""A small Llama learns to write Python's licence, and then, with LoRA adapters only, its last part; kill it whenever.

python examples/finetune_lora.py --stage base           # all parameters, on the first three quarters of the text
python examples/finetune_lora.py --stage lora           # adapters on top of the base, on the rest
python examples/finetune_lora.py --stage lora --steps 200    # goes on from step 100
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import peft
import torch
import torch.nn.functional as F
import torchorbax
import transformers
from torch import nn

TEXT = Path(__file__).parent / "data" / "python_license.txt"  # from the Python distribution, under the PSF licence
WINDOW, BATCH_SIZE, BYTES = 64, 16, 256

Batch = tuple[torch.Tensor, torch.Tensor]


def train(stage: str, path: Path, steps: int, log_losses: Path | None) -> None:
    torch.manual_seed(0)
    model = llama() if stage == "base" else with_adapters(llama())
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=3e-3)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10)
    train_step = torchorbax.train_step(model, optimizer, next_byte_loss)
    text = part_of_text(stage)

    with torchorbax.resume(
        model,
        optimizer,
        str(path / stage),
        state={"scheduler": scheduler},
        # Where the adapters start that have no step of their own; the base's names are those of the model they wrap.
        init_from=torchorbax.params(path / "base") if stage == "lora" else None,
    ) as run:
        print(f"{stage}: {'starts' if run.step is None else f'goes on from step {run.step}'}")
        for step in run.steps(steps):
            loss = train_step(batch_of(text, step))
            scheduler.step()
            run.log(loss=loss)
            if log_losses is not None:
                with log_losses.open("a") as lines:
                    lines.write(json.dumps({"step": step, "loss": float(loss)}) + "\n")
    if run.next_step == steps and run.history:
        print(f"loss {float(loss):.3f} after {steps} steps")
        print(f"a save wrote {min(record.nbytes for record in run.history) / 1e3:.0f} kB")
        print(f"the model has {sum(param.nbytes for param in model.parameters()) / 1e3:.0f} kB")


def llama() -> nn.Module:
    """Small, from a configuration, with random weights: nothing is downloaded."""
    config = transformers.LlamaConfig(
        vocab_size=BYTES,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config)


def with_adapters(model: nn.Module) -> nn.Module:
    """The model with adapters at its attention; they alone require gradients."""
    config = peft.LoraConfig(r=4, lora_alpha=16, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])
    adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted


def next_byte_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    inputs, targets = batch
    logits = model(input_ids=inputs, use_cache=False).logits
    return F.cross_entropy(logits.reshape(-1, BYTES), targets.reshape(-1))


def part_of_text(stage: str) -> np.ndarray:
    text = np.frombuffer(TEXT.read_bytes(), np.uint8).astype(np.int32)
    cut = len(text) * 3 // 4
    return text[:cut] if stage == "base" else text[cut:]


def batch_of(text: np.ndarray, step: int) -> Batch:
    """Windows of the text, chosen by the number of the step alone, so that a resumed run sees what it would have."""
    starts = np.random.default_rng(step).integers(0, len(text) - WINDOW, BATCH_SIZE)
    windows = torch.from_numpy(np.stack([text[start : start + WINDOW + 1] for start in starts]))
    return windows[:, :-1], windows[:, 1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=["base", "lora"], required=True)
    parser.add_argument("--path", type=Path, default=Path("runs/lora"), help="the folder of both runs")
    parser.add_argument("--steps", type=int, default=100, help="of the whole stage")
    parser.add_argument("--log-losses", type=Path, metavar="FILE", help="append the loss of each step, as JSON lines")
    options = parser.parse_args()
    train(options.stage, options.path, options.steps, options.log_losses)


if __name__ == "__main__":
    main()
