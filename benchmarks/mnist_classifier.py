"""Do generated digits show the class that was asked for? A judge from outside the product.

    python -m benchmarks.mnist_classifier --mnist mnist.npz --samples runs/quickstart/judged

Trains a small CNN on the 60,000 real training digits (kept in `runs/mnist_classifier.safetensors`), then prints its
accuracy on the 10,000 real test digits and its agreement with the labels in the `samples.jsonl` of
`zellige generate --model runs/quickstart/model --num 1000 --out runs/quickstart/judged`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WEIGHTS = Path("runs/mnist_classifier.safetensors")


def build_classifier() -> nn.Module:
    """Three convolutions and a linear layer: `b 1 28 28` in [0, 1] -> logits `b 10`."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 128, 3, padding=1), nn.BatchNorm2d(128), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(128, 10),
    )  # fmt: skip


class Judge(nn.Module):
    """The classifier in `WEIGHTS`, for `zellige generate --judge benchmarks.mnist_classifier:Judge`: `b 1 28 28` in
    [-1, 1] -> logits `b 10`. Whoever judges must not measure: train another with `--seed 1 --weights FILE` for that."""

    def __init__(self) -> None:
        super().__init__()
        self.network = build_classifier()
        self.network.load_state_dict(load_file(WEIGHTS))

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images + 1) / 2)


def to_images(digits: np.ndarray) -> Tensor:
    """uint8 `b H W` -> float32 `b 1 H W` in [0, 1]."""
    return rearrange(torch.from_numpy(digits).float() / 255, "b h w -> b 1 h w")


def shifted_batches(images: Tensor, labels: Tensor, batch_size: int, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches, each moved by up to two pixels: samples need not be centred as exactly as MNIST is."""
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(batch_size):
            shifts = torch.randint(-2, 3, (2,)).tolist()
            yield torch.roll(images[rows], shifts, dims=(2, 3)), labels[rows]


def train(images: Tensor, labels: Tensor, seed: int, epochs: int = 4, batch_size: int = 128) -> nn.Module:
    torch.manual_seed(seed)
    model = build_classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    steps = epochs * (len(images) // batch_size + 1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for batch, targets in shifted_batches(images, labels, batch_size, epochs):
        optimizer.zero_grad()
        F.cross_entropy(model(batch), targets).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def classify(model: nn.Module, images: Tensor) -> Tensor:
    """Most probable class of each image, `b`."""
    return torch.cat([model(batch).argmax(-1) for batch in images.split(500)])


def read_samples(folder: Path) -> tuple[Tensor, Tensor]:
    """Images `b 1 28 28` in [0, 1] and asked labels `b` of a folder that `zellige generate` wrote."""
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    digits = np.stack([np.asarray(Image.open(folder / row["file"]).convert("L")) for row in rows])
    return to_images(digits), torch.tensor([row["label"] for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, required=True, help="npz with train_images, train_labels, test_*")
    parser.add_argument("--samples", type=Path, nargs="*", default=[], help="folders written by `zellige generate`")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="kept here after training")
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    arguments = parser.parse_args()

    data = np.load(arguments.mnist)
    model = build_classifier().eval()
    if arguments.weights.exists():
        model.load_state_dict(load_file(arguments.weights))
    else:
        labels = torch.from_numpy(data["train_labels"]).long()
        model = train(to_images(data["train_images"]), labels, arguments.seed)
        arguments.weights.parent.mkdir(parents=True, exist_ok=True)
        save_file(model.state_dict(), arguments.weights)

    correct = classify(model, to_images(data["test_images"])) == torch.from_numpy(data["test_labels"])
    print(f"real test digits: {correct.float().mean():.2%} of {len(correct):,} classified as labelled")
    for folder in arguments.samples:
        images, labels = read_samples(folder)
        agrees = classify(model, images) == labels
        per_class = " ".join(
            f"{digit}:{agrees[labels == digit].float().mean():.0%}" for digit in labels.unique().tolist()
        )
        print(f"{folder}: {agrees.float().mean():.2%} of {len(agrees):,} samples classified as asked ({per_class})")


if __name__ == "__main__":
    main()
