"""Two published setups on MNIST binarised by one draw, over seeds: do our bounds come out where theirs do?

    python -m benchmarks.vae_published --data mnist.npz --runs RUNS [--setups flax jaanli] [--seeds 0 1 2]

`flax`: the VAE example of Flax: 784-500-(20, 20), 20-500-784, ReLU, Adam 1e-3, batches of 128, 30 epochs of 50,000; its
log ends at a test -ELBO of 107.05, on the file of Larochelle; benchmarks/vae_flax.py trains it on our digits. `jaanli`:
the public implementation of that name: 128 latents, two layers of 256, softplus scales, centred RMSprop 1e-3, batches
of 128; after 10,000 steps its validation ELBO is -109.1 and its log p(x), of 1,000 importance samples, -103.1. Held out
are 10,000 of the training digits, as in that file; our draw of the pixels is not theirs.

Runs go on where they stopped. Prints, for each seed, -ELBO and log p(x) of held-out and of test digits with the
standard error over images, training seconds, and the mean and spread over seeds.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import numpy as np

from common.model_io import load_pretrained
from images.datasets import DataConfig, ImageDataset, image_datasets, open_images, to_float
from stage1_vae.binarise import NumberedImages
from stage1_vae.evaluation import Mean, judge, mean_of
from stage1_vae.networks import DenseConfig
from stage1_vae.posteriors import DiagonalGaussianConfig
from stage1_vae.train import Stage1VAEConfig, train_vae
from stage1_vae.vae import VAE, VAEConfig
from training.config import TrainConfig

HELD_OUT = 10_000
PUBLISHED = {"flax": {"test": 107.05}, "jaanli": {"validation": 109.1, "validation log p": -103.1}}


def config_of(setup: str, data: Path, seed: int) -> Stage1VAEConfig:
    if setup == "flax":
        network = DenseConfig(hidden=(500,))
        model = VAEConfig(latents=20, encoder=network, decoder=network)
        steps, optimizer = 30 * 50_000 // 128, "adam"
    else:
        network = DenseConfig(hidden=(256, 256))
        posterior = DiagonalGaussianConfig(scale="softplus")
        model = VAEConfig(latents=128, encoder=network, decoder=network, posterior=posterior)
        steps, optimizer = 10_000, "rmsprop"
    return Stage1VAEConfig(
        model=model,
        data=DataConfig(path=str(data), image_size=28, channels=1, validation_count=HELD_OUT),
        train=TrainConfig(
            steps=steps,
            batch_size=128,
            learning_rate=1e-3,
            schedule="constant",
            optimizer=optimizer,
            max_grad_norm=0.0,
            validate_every=steps,
            preview_every=steps,
            save_every=2000,
            log_every=1000,
            keep_newest=1,
            workers=0,
            tracker="none",
            seed=seed,
        ),
        binarised="once",
    )


def judged(model: VAE, images: ImageDataset, draws: int, count: int) -> tuple[Mean, Mean]:
    """-ELBO and log p(x) of so many of the images, evenly spread."""
    data, chosen = NumberedImages(images, "once", training=False), [i * len(images) // count for i in range(count)]
    batch = data.fetch(chosen, chosen)
    found = judge(model, to_float(batch["images"]), batch["numbers"].tolist(), draws, bounds=())
    return mean_of(-found.elbo), mean_of(found.log_p)


def export(data: Path, file: Path) -> None:
    """The digits as the trainings see them, uint8 n 28 28 of 0 and 1: train, validation and test."""
    config = config_of("flax", data, 0)
    test = open_images(DataConfig(path=str(data), split="test", image_size=28, channels=1))
    parts = dict(zip(("train", "validation"), image_datasets(config.data, 0), strict=True))
    parts["test"] = ImageDataset(test, config.data)
    found = {}
    for name, images in parts.items():
        whole = range(len(images))
        found[name] = NumberedImages(images, "once", training=False).fetch(whole, whole)["images"][:, 0].numpy() // 255
    np.savez_compressed(file, **found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--setups", nargs="+", default=["flax", "jaanli"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--images", type=int, default=2000, help="of each part, whose log p(x) is estimated")
    parser.add_argument("--train_only", action="store_true")
    parser.add_argument("--export", type=Path, help="write the digits to this .npz file, for benchmarks/vae_flax.py")
    given = parser.parse_args()
    if given.export is not None:
        export(given.data, given.export)
        return
    for setup in given.setups:
        found: dict[str, list[float]] = {}
        for seed in given.seeds:
            config, run = config_of(setup, given.data, seed), given.runs / f"{setup}_{seed}"
            result = train_vae(config, run)
            if given.train_only:
                continue
            model = load_pretrained(run / "model", {"vae": VAE})
            test = open_images(DataConfig(path=str(given.data), split="test", image_size=28, channels=1))
            parts = {"validation": image_datasets(config.data, seed)[1], "test": ImageDataset(test, config.data)}
            for name, images in parts.items():
                bound, likelihood = judged(model, images, given.draws, min(given.images, len(images)))
                found.setdefault(name, []).append(bound.value)
                found.setdefault(f"{name} log p", []).append(likelihood.value)
                print(
                    f"{setup} seed {seed} {name}: -ELBO {bound.value:.2f} ± {bound.images_error:.2f}, log p(x) "
                    f"{likelihood.value:.2f} ± {likelihood.images_error:.2f} ({given.draws} samples of {given.images} "
                    f"digits), {60 * result.minutes:.0f} s of training",
                    flush=True,
                )
        for name, values in found.items():
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            published = PUBLISHED[setup].get(name)
            beside = "" if published is None else f", published {published}"
            print(f"{setup} {name}: {statistics.mean(values):.2f}, spread {spread:.2f}{beside}")


if __name__ == "__main__":
    main()
