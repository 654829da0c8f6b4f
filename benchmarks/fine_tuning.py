"""Starting from weights: how many steps a model of MNIST needs on other pictures to be as good as a fresh one.

    python -m benchmarks.fine_tuning --mnist mnist.npz --photos PHOTOS --runs RUNS [--steps 1000] [--seeds 0 1 2]

Stage one: the VQ-VAE of the recipe `mnist_quickstart`, trained on MNIST for 1,500 steps; then on grey crops of 28x28
pixels of photos (a folder or a tar), random parts of each, fresh and with `start_from`. Stage two: a transformer over
the codes of these crops by the first tokenizer, fresh and from one that learned MNIST's codes by the same. Learning
rates are constant and the same on both sides; held-out pictures are judged every 25 steps. Prints, for each seed,
when each was as good as the fresh one is after an eighth, a quarter, a half and all of its steps. Runs go on where they
stopped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from images.encoding import EncodeConfig, EncodeDataConfig
from pipelines.commands.encode import encode_images
from pipelines.trainings import read_config, train_stage1, train_stage2
from stage1_vq.train import Stage1Config
from stage2_prior.train import Stage2Config

EVERY = 25


def curve(run: Path, metric: str) -> dict[int, float]:
    """A metric of held-out pictures by step."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[metric] for line in lines if line["split"] == "validation"}


def compare(name: str, metric: str, fresh: Path, begun: Path) -> None:
    """When both were what the fresh run came to after an eighth, a quarter, a half and all of its steps."""
    first, second = curve(fresh, metric), curve(begun, metric)
    for share in (8, 4, 2, 1):
        step = max(first) // share // EVERY * EVERY
        value = min(found for at, found in first.items() if at <= step)
        needed = min(at for at, found in first.items() if found <= value)
        reached = next((at for at, found in sorted(second.items()) if found <= value), None)
        said = "never" if reached is None else f"step {reached}, {reached / needed:.2f} of them"
        print(f"{name}: {metric} {value:.5f}: fresh at step {needed}, from MNIST {said}", flush=True)
    print(f"{name}: at the end fresh {min(first.values()):.5f}, from MNIST {min(second.values()):.5f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", required=True)
    parser.add_argument("--photos", required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--steps", type=int, default=1_000)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    given = parser.parse_args()
    torch.set_num_threads(1)
    runs = given.runs
    quiet = {"train.tracker": "none", "train.preview_every": 0, "train.workers": 0, "train.save_every": 500}
    train_stage1(read_config(Stage1Config, "mnist_quickstart", {**quiet, "data.path": given.mnist}), runs / "mnist")

    judged: dict[str, Any] = {
        **quiet,
        "train.steps": given.steps,
        "train.schedule": "constant",
        "train.validate_every": EVERY,
    }
    crops = {
        "data.path": given.photos,
        "data.crop": "random_resized",
        "data.crop_scale": [0.3, 1.0],
        "data.shift": 0,
        "data.validation_count": 100,
    }
    for seed in given.seeds:
        pair = [runs / f"photos_{kind}_{seed}" for kind in ("fresh", "begun")]
        for run, start in zip(pair, ({}, {"start_from": str(runs / "mnist")}), strict=True):
            config = read_config(Stage1Config, "mnist_quickstart", {**judged, **crops, **start, "train.seed": seed})
            train_stage1(config, run)
        compare(f"stage one, seed {seed}", "mse", *pair)

    for name, data in (("mnist", given.mnist), ("photos", given.photos)):
        out = runs / f"codes_{name}"
        if not out.exists():
            encode_images(
                EncodeConfig(
                    model=str(runs / "mnist"),
                    out=str(out),
                    data=EncodeDataConfig(path=data),
                    augment_copies=8 if name == "photos" else 1,
                )
            )
    prior = {**judged, "num_classes": 0, "label_dropout": 0.0}
    learned = {**quiet, "num_classes": 0, "label_dropout": 0.0, "codes": str(runs / "codes_mnist")}
    train_stage2(read_config(Stage2Config, "mnist_quickstart", learned), runs / "mnist_prior")
    for seed in given.seeds:
        pair = [runs / f"prior_{kind}_{seed}" for kind in ("fresh", "begun")]
        for run, start in zip(pair, ({}, {"start_from": str(runs / "mnist_prior")}), strict=True):
            changes = {**prior, **start, "codes": str(runs / "codes_photos"), "train.seed": seed}
            train_stage2(read_config(Stage2Config, "mnist_quickstart", changes), run)
        compare(f"stage two, seed {seed}", "bits_per_code", *pair)


if __name__ == "__main__":
    main()
