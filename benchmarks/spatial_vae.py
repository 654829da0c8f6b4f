"""Does a spatial-VAE find by which angle a digit was turned?

    python -m benchmarks.spatial_vae --mnist mnist.npz --work WORK [--turn 75] [--image_size 28] [--steps 6000]
                                    [--sharpened 0]

Turns every digit of MNIST by an angle and writes WORK/turned.npz; trains the recipe mnist_spatial on it, or goes on
where it stopped, and compares the mean of q(theta|x), which turns clockwise, with the true angle of 2,000 test digits,
class by class, by the circular correlation of Jammalamadaka and Sarma 1988. A model knows the angle of a class only up
to a constant, which that correlation does not see. Writes WORK/canonical.png: digits of each class as they were turned,
what the model decodes of them, and that with the angle set to 0.

Angles are alike within --turn degrees both ways. Bepler et al. 2019 (arXiv:1909.11663) draw them from N(0, 45^2), which
--turn 0 stands for: one of 22 is beyond a right angle then, where a 0, a 1 and an 8, and nearly a 2, a 5 and a 7, look
like themselves turned the other way, and the prior asks for that.

--sharpened: so many trainings of 5,000 steps follow, each from the weights of the one before, with a quarter of the KL
term's weight: what an image of half the size has lost of its likelihood beside it. From the beginning that weight lets
the content take a part of the turn; once angles agree, it makes the content tell digits apart that it confused.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from common.model_io import load_pretrained
from images.datasets import ImageDataset, open_images, to_float
from images.sheets import contact_sheet, to_pil
from pipelines.options import read_recipe
from stage1_vae.train import Stage1VAEConfig, train_vae
from stage1_vae.vae import VAE

PUBLISHED = math.pi / 4  # radians, standard deviation
TESTED, SHOWN = 2000, 10
SHARPENING, BETA = 5000, 0.25  # steps, and weight of the KL term in them


def turned(images: np.ndarray, seed: int, most: float) -> tuple[np.ndarray, np.ndarray]:
    """Digits, n 28 28, by angles in radians, counter-clockwise: both returned. most: degrees; 0: as published."""
    chance, count = np.random.default_rng(seed), len(images)
    angles = np.radians(chance.uniform(-most, most, count)) if most else chance.normal(0, PUBLISHED, count)
    found = np.empty_like(images)
    centre = (np.array(images.shape[1:]) - 1) / 2
    for i, (image, angle) in enumerate(zip(images, angles, strict=True)):
        # Rows go downwards: the place that pixel (row, column) shows is turned the other way.
        turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
        found[i] = ndimage.affine_transform(image, turn, centre - turn @ centre, order=1)
    return found, angles


def circular_correlation(first: np.ndarray, second: np.ndarray) -> float:
    def apart(angles: np.ndarray) -> np.ndarray:
        return np.sin(angles - np.arctan2(np.sin(angles).mean(), np.cos(angles).mean()))

    one, other = apart(first), apart(second)
    return float((one * other).sum() / math.sqrt((one**2).sum() * (other**2).sum()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--turn", type=float, default=75, help="degrees at most; 0: normal, 45 degrees")
    parser.add_argument("--image_size", type=int, default=28)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--sharpened", type=int, default=0, help="further trainings with a quarter of the KL term")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    digits = np.load(options.mnist)
    file = options.work / "turned.npz"
    train, _ = turned(digits["train_images"], 1, options.turn)
    test, angles = turned(digits["test_images"][:TESTED], 2, options.turn)
    if not file.is_file():
        np.savez(
            file,
            train_images=train,
            train_labels=digits["train_labels"],
            test_images=test,
            test_labels=digits["test_labels"][:TESTED],
        )
    given = ["--config", "mnist_spatial", "--data.path", str(file), "--data.image_size", str(options.image_size)]
    given += ["--train.seed", str(options.seed)]
    runs = [options.work / f"run{options.seed}{f'_{number}' * (number > 0)}" for number in range(options.sharpened + 1)]
    for number, run in enumerate(runs):
        its_own = ["--run", str(run), "--train.steps", str(SHARPENING if number else options.steps)]
        if number > 0:
            its_own += ["--objective.beta", str(BETA), "--start_from", str(runs[number - 1] / "model")]
        config, _ = read_recipe("train-vae", Stage1VAEConfig, "vae", given + its_own)
        if not train_vae(config, run).finished:
            return
    model = load_pretrained(runs[-1] / "model", {"vae": VAE})
    data, all_of_them = replace(config.data, split="test", validation_count=None), range(TESTED)
    images = to_float(ImageDataset(open_images(data), data).fetch(all_of_them, all_of_them)["images"])
    with torch.inference_mode():
        means = torch.cat([model.encode(part) for part in images.split(200)])
        decoded = model.decode(means)
        straight = model.decode(torch.cat([torch.zeros(len(means), 1), means[:, 1:]], dim=1))
    inferred = -means[:, 0].double().numpy() * model.decoder.network.config.angle_scale
    labels = digits["test_labels"][:TESTED]
    print("| digit | circular correlation of inferred and true angle | digits |\n|---|---|---|")
    found = []
    for digit in range(10):
        chosen = labels == digit
        found.append(circular_correlation(inferred[chosen], angles[chosen]))
        print(f"| {digit} | {found[-1]:.3f} | {chosen.sum()} |")
    print(f"above 0.9: {sum(value > 0.9 for value in found)} of 10 digits; median {np.median(found):.3f}")
    rows: list[list[Image.Image]] = []
    for digit in range(10):
        some = np.flatnonzero(labels == digit)[:SHOWN]
        rows += [[to_pil(pictures[i]) for i in some] for pictures in (images, decoded, straight)]
    contact_sheet(rows, ["turned", "decoded", "straight"] * 10, legible=28).save(options.work / "canonical.png")


if __name__ == "__main__":
    main()
