"""Self-correction of a prior over codes of digits: with it and without, at equal steps, from the same seeds.

    python -m benchmarks.self_correction --stage1 runs/stage1 --codes runs/codes --seeds 0 1 2

Trains the prior of a recipe twice for each seed, as it is and with `flipped_codes`; nothing else differs. Of each it
prints

- how many of the digits that are drawn by class the classifier of `benchmarks.mnist_classifier` takes for that class,
  beside the same share of held-out digits, coded and decoded: what no prior over these codes can pass by much;
- bits per code of the held-out digits, which are given as they are: self-correction may cost some,

and then, over the seeds, the means and what self-correction changed with each. It goes on where an earlier call
stopped: a run at its last checkpoint, and what stands in `OUT/cells.jsonl` with the same settings is not made again.
`samples.png`: digits of the first seed.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.mnist_classifier import WEIGHTS, build_classifier, classify
from benchmarks.random_order import bits_per_code, drawn, pictures, sheet
from codes.shards import CodeDataset
from common.model_io import load_pretrained
from pipelines.model_folders import stage_folder
from pipelines.options import read_recipe
from pipelines.pictures import save_png
from stage1_vq.autoencoders import AUTOENCODERS, Autoencoder
from stage2_prior.priors import PRIORS, Prior
from stage2_prior.sampling import SamplingConfig
from stage2_prior.train import Stage2Config, train_stage2


def trained(args: argparse.Namespace, seed: int, share: float) -> Prior:
    run, every = args.out / f"{args.recipe}_{args.steps}steps_seed{seed}_flipped{share:g}", max(1, args.steps // 5)
    settings = {"train.tracker": "none", "train.preview_every": 0, "train.seed": seed, "flipped_codes": share}
    options = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    config, _ = read_recipe("train-stage2", Stage2Config, "stage2", ["--config", args.recipe, *options])
    warmup = min(config.train.warmup_steps, max(1, args.steps // 10))
    train = replace(config.train, steps=args.steps, warmup_steps=warmup, validate_every=every, save_every=every)
    train_stage2(replace(config, train=train), args.codes, run)
    return load_pretrained(run, PRIORS).eval()


def share_right(classifier: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((classify(classifier, (images + 1) / 2) == labels).float().mean())


class Cells:
    """What was measured, a line for each prior."""

    def __init__(self, path: Path):
        self.path = path
        self.lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def of(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        return next((line for line in self.lines if settings.items() <= line.items()), None)

    def add(self, line: dict[str, Any]) -> dict[str, Any]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.lines.append(line)
        return line


def samples_of(prior: Prior, autoencoder: Autoencoder, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Images, and the classes that were asked for in turn."""
    asked = torch.arange(args.count) % prior.num_classes
    return pictures(autoencoder, drawn(prior, asked, SamplingConfig(guidance=args.guidance))), asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage1", required=True, help="run or model folder of the autoencoder")
    parser.add_argument("--codes", type=Path, required=True, help="its code shards, of digits with their classes")
    parser.add_argument("--recipe", default="mnist_quickstart", help="of an ordered prior over such codes")
    parser.add_argument("--classifier", type=Path, default=WEIGHTS, help="weights of benchmarks.mnist_classifier")
    parser.add_argument("--flipped", type=float, default=0.3, help="flipped_codes of self-correction")
    parser.add_argument("--steps", type=int, default=900, help="of each training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of each training")
    parser.add_argument("--count", type=int, default=1000, help="digits to draw with each prior")
    parser.add_argument("--guidance", type=float, default=1.0, help="of the digits that are drawn")
    parser.add_argument("--out", type=Path, default=Path("runs/self_correction"))
    args = parser.parse_args()
    if not 0 < args.flipped < 1:
        parser.error(f"got --flipped {args.flipped}, expected a share above 0 and below 1; 0.3 is the paper's")
    torch.set_num_threads(1)

    autoencoder = load_pretrained(stage_folder(args.stage1, "stage1"), AUTOENCODERS).eval()
    classifier = build_classifier().eval()
    classifier.load_state_dict(load_file(args.classifier))
    data = CodeDataset(args.codes, "validation")
    every = list(range(len(data)))
    held_out = data.fetch(every, every)
    codes, labels = held_out["codes"], held_out["labels"]
    real = share_right(classifier, pictures(autoencoder, codes), labels)
    print(f"{args.recipe}, {args.steps} steps, {args.count} digits drawn with guidance {args.guidance:g}")
    print(f"held-out digits, coded: {real:.1%} of {len(labels)} classified as labelled")

    cells, kept, shares = Cells(args.out / "cells.jsonl"), ("recipe", "steps", "count", "guidance"), (0.0, args.flipped)
    common = {
        "stage1": autoencoder.fingerprint(),
        "codes": str(args.codes),
        **{name: getattr(args, name) for name in kept},
    }
    found: dict[float, list[dict[str, Any]]] = {share: [] for share in shares}
    shown = {}
    for seed in args.seeds:
        for share in shares:
            settings = {**common, "seed": seed, "flipped": share}
            cell = cells.of(settings)
            if cell is None or seed == args.seeds[0]:  # whose samples are shown
                prior = trained(args, seed, share)
                images, asked = samples_of(prior, autoencoder, args)
                if seed == args.seeds[0]:
                    shown[f"flipped {share:g}"] = images
                if cell is None:
                    agreed, bits = share_right(classifier, images, asked), bits_per_code(prior, codes, labels)
                    cell = cells.add({**settings, "agreed": agreed, "bits": bits})
            found[share].append(cell)
            print(f"seed {seed}, flipped_codes {share:g}: {cell['agreed']:.1%} as asked, {cell['bits']:.3f} bits")
    for share, those in found.items():
        agreed, bits = (fmean(cell[name] for cell in those) for name in ("agreed", "bits"))
        print(f"flipped_codes {share:g}, mean of {len(those)}: {agreed:.1%} as asked, {bits:.3f} bits per code")
    changes = [100 * (b["agreed"] - a["agreed"]) for a, b in zip(*found.values(), strict=True)]
    print(f"self-correction changed, seed by seed: {', '.join(f'{change:+.1f}' for change in changes)} points")
    save_png(sheet(shown), args.out / "samples.png")


if __name__ == "__main__":
    main()
