"""Random orders of codes against raster order, at equal steps: bits per code, a hole in the middle, steps in parallel.

    python -m benchmarks.random_order --stage1 runs/stage1 --codes runs/codes

Trains the transformer of `mnist_quickstart`, `mnist_rar_short` and `mnist_randar_short` on the same codes with the same
training settings, each of the same number of layers and width, and goes on where an earlier call stopped. Then prints

- bits per code of the held-out digits in raster order, and of RandAR in random orders too;
- of holes in the middle of held-out digits, filled without a class: how many the classifier of
  `benchmarks.mnist_classifier` takes for the digit that they were, beside the same digits coded and decoded;
- of digits asked for by class: how many the classifier agrees with, at a code a step and in a quarter of the steps.

`inpainted.png`: what is kept, then each prior's completion, then the coded digit.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.mnist_classifier import WEIGHTS, build_classifier, classify
from codes.shards import CodeDataset
from codes.spec import Codes
from common.model_io import load_pretrained
from pipelines.model_folders import stage_folder
from pipelines.options import read_recipe
from pipelines.pictures import contact_sheet, save_png, to_pil
from stage1_vq.autoencoders import AUTOENCODERS, Autoencoder
from stage2_prior.condition import Condition
from stage2_prior.priors import PRIORS, Prior, TransformerConfig
from stage2_prior.sampling import SamplingConfig, sample_codes
from stage2_prior.train import Stage2Config, train_stage2

RECIPES = {"transformer": "mnist_quickstart", "rar": "mnist_rar_short", "randar": "mnist_randar_short"}
ORDERS = 8  # of each image, for the bits in random orders
COLUMNS = 16
BATCH = 100


def trained(kind: str, args: argparse.Namespace, codes: Path) -> Prior:
    run, every = args.out / kind, max(1, args.steps // 3)
    settings = {"train.tracker": "none", "train.preview_every": 0, "model.layers": args.layers}
    settings |= {"model.width": args.width, "model.dropout": args.dropout}
    settings |= {"model.attention_dropout" if kind == "rar" else "model.residual_dropout": args.dropout}
    if kind == "rar":
        settings |= {"model.permuted_until": args.permuted_until, "model.raster_from": args.raster_from}
    if kind == "randar":  # as the transformer has it
        settings["model.hidden_width"] = TransformerConfig(width=args.width).hidden_width
    options = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    config, _ = read_recipe("train-stage2", Stage2Config, "stage2", ["--config", RECIPES[kind], *options])
    warmup = min(config.train.warmup_steps, max(1, args.steps // 10))
    train = replace(config.train, steps=args.steps, warmup_steps=warmup, validate_every=every, save_every=every)
    train_stage2(replace(config, train=train), codes, run)
    return load_pretrained(run, PRIORS).eval()


@torch.inference_mode()
def bits_per_code(prior: Prior, codes: Codes, labels: Tensor, in_random_order: bool = False) -> float:
    """Mean over images, each with its label; `ORDERS` orders of each."""
    generator, total = torch.Generator().manual_seed(0), 0.0
    for rows in torch.arange(len(labels)).split(BATCH):
        some, condition = tuple(grid[rows] for grid in codes), Condition(labels[rows])
        for _ in range(ORDERS if in_random_order else 1):
            if in_random_order:
                numbers = torch.rand(len(rows), prior.code_spec.codes_per_image, generator=generator)
                condition = replace(condition, order=numbers.argsort(dim=1))
            total += float(prior.nll(some, condition).mean(dim=1).sum()) / (ORDERS if in_random_order else 1)
    return total / len(labels) / math.log(2)


def drawn(prior: Prior, labels: Tensor, sampling: SamplingConfig, known: Codes | None = None) -> Codes:
    """Of samples 0, 1, ..., one for each label."""
    parts = []
    for rows in torch.arange(len(labels)).split(BATCH):
        kept = None if known is None else tuple(grid[rows] for grid in known)
        parts.append(sample_codes(prior, rows.tolist(), Condition(labels[rows]), 0, sampling, kept))
    return tuple(torch.cat(grids) for grids in zip(*parts, strict=True))


@torch.inference_mode()
def pictures(autoencoder: Autoencoder, codes: Codes) -> Tensor:
    """`b 1 28 28` in [-1, 1]."""
    parts = torch.arange(len(codes[0])).split(BATCH)
    return torch.cat([autoencoder.decode(tuple(grid[rows] for grid in codes)) for rows in parts]).clamp(-1, 1)


def agreement(classifier: nn.Module, images: Tensor, labels: Tensor) -> str:
    right = int((classify(classifier, (images + 1) / 2) == labels).sum())
    return f"{right / len(labels):.1%} ({right} of {len(labels)})"


def sheet(rows: dict[str, Tensor]) -> Image.Image:
    """Some of each row, evenly apart: held-out digits come class after class."""
    every = max(1, len(next(iter(rows.values()))) // COLUMNS)
    shown = [[to_pil(image) for image in images[::every][:COLUMNS]] for images in rows.values()]
    return contact_sheet(shown, list(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage1", required=True, help="run or model folder of the autoencoder")
    parser.add_argument("--codes", type=Path, required=True, help="its code shards, of digits with their classes")
    parser.add_argument("--classifier", type=Path, default=WEIGHTS, help="weights of benchmarks.mnist_classifier")
    parser.add_argument("--only", nargs="+", choices=list(RECIPES), default=list(RECIPES), help="these priors")
    parser.add_argument("--steps", type=int, default=900, help="of each training")
    parser.add_argument("--layers", type=int, default=4, help="of each prior")
    parser.add_argument("--width", type=int, default=128, help="of each prior")
    parser.add_argument("--dropout", type=float, default=0.1, help="of each prior")
    parser.add_argument("--permuted_until", type=float, default=0.5, help="of RAR: the share of the run; 0.5 published")
    parser.add_argument("--raster_from", type=float, default=0.75, help="of RAR, likewise; 0.75 published")
    parser.add_argument("--count", type=int, default=200, help="digits to fill in, and to draw")
    parser.add_argument("--hole", type=int, default=3, help="side of the hole, in codes")
    parser.add_argument("--guidance", type=float, default=1.5, help="of the digits that are drawn by class")
    parser.add_argument("--out", type=Path, default=Path("runs/random_order"))
    args = parser.parse_args()
    torch.set_num_threads(1)

    priors = {kind: trained(kind, args, args.codes) for kind in args.only}
    any_prior = next(iter(priors.values()))
    data = CodeDataset(args.codes, "validation")
    every = list(range(len(data)))
    batch = data.fetch(every, every)
    codes, labels = batch["codes"], batch["labels"]
    print(f"{args.steps} steps of {args.layers} layers of width {args.width}, {len(data)} held-out digits")
    for kind, prior in priors.items():
        weights = sum(weight.numel() for weight in prior.parameters())
        bits = bits_per_code(prior, codes, labels)
        print(f"{kind}: {weights / 1e6:.2f} million weights, {bits:.3f} bits per code in raster order")
    if "randar" in priors:
        random = bits_per_code(priors["randar"], codes, labels, in_random_order=True)
        print(f"randar: {random:.3f} bits per code in random orders")

    autoencoder = load_pretrained(stage_folder(args.stage1, "stage1"), AUTOENCODERS).eval()
    classifier = build_classifier().eval()
    classifier.load_state_dict(load_file(args.classifier))
    chosen = [i * len(data) // args.count for i in range(args.count)]
    digits, real = labels[chosen], tuple(grid[chosen] for grid in codes)
    grid = any_prior.code_spec.grids[0]
    top, left = (grid.height - args.hole) // 2, (grid.width - args.hole) // 2
    known = tuple(each.clone() for each in real)
    known[0][:, top : top + args.hole, left : left + args.hole] = -1
    decoded = pictures(autoencoder, real)
    stride = decoded.shape[2] // grid.height
    kept = decoded.clone()
    rows, columns = (slice(stride * first, stride * (first + args.hole)) for first in (top, left))
    kept[:, :, rows, columns] = 0  # grey
    print(f"real digits, coded: {agreement(classifier, decoded, digits)} classified as labelled")
    shown = {"kept": kept}
    no_class = torch.full_like(digits, any_prior.num_classes)
    for kind, prior in priors.items():
        filled = pictures(autoencoder, drawn(prior, no_class, SamplingConfig(), known))
        shown[kind] = filled
        agreed = agreement(classifier, filled, digits)
        print(f"{kind}, hole of {args.hole}x{args.hole} codes: {agreed} classified as labelled")
    save_png(sheet({**shown, "coded": decoded}), args.out / "inpainted.png")

    asked = torch.arange(args.count) % any_prior.num_classes
    samples = {}
    for kind, steps in [(kind, None) for kind in priors] + [("randar", grid.size // 4)] * ("randar" in priors):
        sampling = SamplingConfig(guidance=args.guidance, steps=steps, lookahead="off")
        begin = time.process_time()
        found = drawn(priors[kind], asked, sampling)
        seconds, name = time.process_time() - begin, f"{kind}, {steps or grid.size} steps"
        samples[name] = pictures(autoencoder, found)
        print(f"{name}: {agreement(classifier, samples[name], asked)} classified as asked, {seconds:.1f} s")
    save_png(sheet(samples), args.out / "samples.png")


if __name__ == "__main__":
    main()
