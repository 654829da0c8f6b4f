"""Half-hidden digits: completed by a VAE that has never seen a whole one, beside nearest neighbours that have.

    zellige train-vae --config mnist_holes --data.path mnist.npz --run runs/holes
    python -m benchmarks.holes --model runs/holes --data mnist.npz [--count 1000] [--out holes.png]

Of test digits, black or white by one draw, a half by chance is hidden. The error is the mean square of the hidden
pixels, of 0 and 1, for the expected pixels by 500 draws of each digit's latents, for one completion drawn, for the
training digit that is nearest in the seen pixels, the mean of the ten nearest, and the mean of all.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from images.datasets import DataConfig, ImageDataset, open_images
from images.sheets import contact_sheet
from pipelines.latents.models import load_vae
from pipelines.pictures import save_png, to_pil
from stage1_vae.binarise import NumberedImages
from stage1_vae.completing import check_knows_holes, complete
from stage1_vae.holes import HolesConfig

SHOWN = 12


def digits(path: str, split: str, count: int, holes: HolesConfig | None) -> tuple[Tensor, Tensor]:
    """Of 0 and 1, n 784, and which pixels are seen."""
    config = DataConfig(path=path, split=split, image_size=28, channels=1)
    data = NumberedImages(ImageDataset(open_images(config), config), "once", training=False, holes=holes)
    chosen = range(min(count, len(data)))
    batch = data.fetch(chosen, chosen)
    whole = batch["images"].flatten(1).float() / 255
    return whole, torch.ones_like(whole) if holes is None else (~batch["holes"]).flatten(1).float()


def nearest(train: Tensor, seen: Tensor, test: Tensor, count: int) -> Tensor:
    """The mean of the training digits that differ least in the seen pixels, n 784."""
    found = []
    for digit, mask in zip((test * seen).split(100), seen.split(100), strict=True):
        # of 0 and 1: |a - b| summed over seen pixels, less what is the same for all training digits
        distance = mask @ train.T - 2 * digit @ train.T
        found.append(train[distance.topk(count, largest=False).indices].mean(1))
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--out")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = check_knows_holes(load_vae(given.model))
    train, _ = digits(given.data, "train", 60_000, None)
    test, seen = digits(given.data, "test", given.count, HolesConfig(drawn="half", seed=1))
    holed = (2 * test - 1).masked_fill(seen == 0, math.nan).view(-1, 1, 28, 28)
    completed = complete(model, holed, draws=given.draws, drawn=3)
    rows = {
        "expected": (completed.expected.flatten(1) + 1) / 2,
        "drawn": (completed.drawn[0].flatten(1) + 1) / 2,
        "nearest": nearest(train, seen, test, 1),
        "10 nearest": nearest(train, seen, test, 10),
        "mean digit": train.mean(0).expand_as(test),
    }
    hidden = seen == 0
    for name, found in rows.items():
        errors = ((found - test).square() * hidden).sum(1) / hidden.sum(1)
        print(f"{name}: {float(errors.mean()):.4f} +- {float(errors.std() / len(errors) ** 0.5):.4f}")
    if given.out is not None:
        pictures = [
            [to_pil(image) for image in images[:SHOWN]]
            for images in (
                (2 * test - 1).view(-1, 1, 28, 28),
                holed.nan_to_num(0.0),
                completed.expected,
                *completed.drawn,
                torch.where(hidden, 2 * rows["nearest"] - 1, 2 * test - 1).view(-1, 1, 28, 28),
            )
        ]
        names = ["digit", "seen", "expected", "drawn", "drawn", "drawn", "nearest"]
        save_png(contact_sheet(pictures, names, legible=56), Path(given.out))


if __name__ == "__main__":
    main()
