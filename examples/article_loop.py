"""The loop of torchax's tutorial, its weights in local variables, with checkpoints that really bring them back.

python examples/article_loop.py --steps 200
python examples/article_loop.py --steps 400    # goes on from step 200
"""

from __future__ import annotations

import argparse

import numpy as np
import optax
import torch
import torch.nn.functional as F
import torchorbax  # before torchax, which it makes importable
from sklearn.datasets import load_digits
from torch import nn
from torchax import enable_globally, interop
from torchax.train import make_train_step

BATCH_SIZE = 64

Weights = dict[str, torch.Tensor]


class MyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(28 * 28, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        x = self.fc3(x)
        return x


def train(path: str, steps: int) -> None:
    torch.manual_seed(0)
    enable_globally()
    (train_images, train_labels), (test_images, test_labels) = train_and_test_digits()

    model = MyModel().to("jax")
    weights: Weights = dict(model.named_parameters())
    optimizer = optax.adam(1e-3)
    opt_state = interop.call_jax(optimizer.init, weights)

    def forward(weights: Weights, buffers: Weights, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = torch.func.functional_call(model, (weights, buffers), (images,))
        return logits

    train_step = make_train_step(forward, F.cross_entropy, optimizer)
    train_step = interop.jax_jit(train_step, kwargs_for_jax_jit={"donate_argnums": (0, 2)})

    with torchorbax.resume(model, None, path, state={"opt_state": opt_state}) as run:
        # The published loop restores by `param._jax_array = ...`, an attribute that nothing reads: nothing is restored.
        weights, opt_state = dict(model.named_parameters()), run.state["opt_state"]
        for step in range(run.next_step, steps):
            images, labels = batch(train_images, train_labels, step)
            loss, weights, opt_state = train_step(weights, {}, opt_state, images, labels)
            last = step == steps - 1
            run.save(step, {"model": weights, "opt_state": opt_state}, metrics={"loss": loss}, force=last)
            if step % 50 == 0 or last:
                print(f"step {step:4}  loss {loss.item():.4f}")
            if run.preempted:
                break

    print(f"test accuracy {accuracy(forward(weights, {}, test_images), test_labels):.1%}")


def train_and_test_digits() -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Scikit-learn's 8x8 digits, each pixel as 3x3 and with a margin of 2: as large as the article's MNIST."""
    images, labels = load_digits(return_X_y=True)
    images = np.kron(images.reshape(-1, 8, 8) / 16, np.ones((1, 3, 3)))
    images = np.pad(images, ((0, 0), (2, 2), (2, 2))).reshape(-1, 28 * 28)
    shuffled = np.random.default_rng(0).permutation(len(labels))
    train, test = np.split(shuffled, [len(labels) * 4 // 5])
    return on_jax(images[train], labels[train]), on_jax(images[test], labels[test])


def on_jax(images: np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(images, dtype=torch.float32).to("jax"), torch.tensor(labels).to("jax")


def batch(images: torch.Tensor, labels: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    chosen = torch.tensor(np.random.default_rng(step).choice(len(labels), BATCH_SIZE)).to("jax")
    return images[chosen], labels[chosen]


def accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return float((logits.argmax(-1) == labels).float().mean().item())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default="runs/article", help="the run's folder")
    parser.add_argument("--steps", type=int, default=200, help="of the whole run")
    options = parser.parse_args()
    train(options.path, options.steps)


if __name__ == "__main__":
    main()
