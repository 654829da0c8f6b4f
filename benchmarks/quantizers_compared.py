"""Every quantizer in one autoencoder, on the same images, for equal steps, and a prior on the codes of each.

    python -m benchmarks.quantizers_compared --images cifar10 --out runs/quantizers --steps 2000 --prior-steps 1000

The autoencoder is that of the recipe `cifar10_vqvae_short`, `--width` wide, at 64 places of about 10 bits each; the
quantizers differ in nothing else, and each has the defaults of its config but for its size. After training:

* error: squared error of pixels in [-1, 1], a mean over test images, and their mean PSNR;
* use: the share of codes that occur in the codes of all training images, and their perplexity, a mean over grids;
* seconds and memory: those of a training step, the median of the processor's time of steps, and what the process took
  at its peak over what it held when the data were read (Linux only);
* a small transformer learns the codes of the training images: bits of a test image's codes under it, and for each
  code.

A cell is one quantizer with one seed, in a process of its own; its result is a line of `OUT/cells.jsonl`, and cells
that stand there are not made again. Without `--images` the table of what stands there is printed.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import numpy as np
import torch
from einops import reduce
from torch import Tensor, nn

from codes.spec import Codes
from common.memory import keep_freed_memory
from images.datasets import DataConfig, image_datasets, to_float
from metrics.similarity import psnr
from pipelines.options import read_recipe
from stage1_vq.autoencoders import VQVAE, VQVAEConfig
from stage1_vq.quantizers import (
    BinaryMapperConfig,
    BinaryQuantizerConfig,
    BSQConfig,
    DiVeQConfig,
    FSPConfig,
    FSQConfig,
    FVQConfig,
    GroupedQuantizerConfig,
    GumbelQuantizerConfig,
    IBQConfig,
    LFQConfig,
    MultiscaleQuantizerConfig,
    NearestQuantizerConfig,
    ResidualQuantizerConfig,
    ResidualScalarConfig,
    SimVQConfig,
)
from stage1_vq.train import Stage1Config
from stage2_prior.condition import Condition
from stage2_prior.priors.transformer import Transformer
from stage2_prior.priors.transformer_layers import TransformerConfig
from training.schedules import learning_rate

RECIPE = "cifar10_vqvae_short"
D, K, BITS = 64, 1024, 10
HALF = NearestQuantizerConfig(codebook_size=32, dim=D)  # two of them say as much as one of 1,024
TRAINING, TEST = 10_000, 1_000  # images
QUANTIZERS: dict[str, Any] = {
    "nearest": NearestQuantizerConfig(codebook_size=K, dim=D),
    "nearest, as first published": NearestQuantizerConfig(
        codebook_size=K, dim=D, codebook_update="gradient", kmeans_iterations=0, revive_after=0
    ),
    "nearest, rotation trick": NearestQuantizerConfig(codebook_size=K, dim=D, gradient="rotation"),
    "nearest, 8 wide, l2-normalised": NearestQuantizerConfig(codebook_size=K, dim=D, lookup_dim=8, l2_normalise=True),
    "simvq": SimVQConfig(codebook_size=K, dim=D),
    "ibq": IBQConfig(codebook_size=K, dim=D),
    "gumbel": GumbelQuantizerConfig(codebook_size=K, dim=D, kmeans_iterations=10),
    "fsq": FSQConfig(levels=(8, 5, 5, 5), dim=D),
    "lfq": LFQConfig(bits=BITS, dim=D),
    "bsq": BSQConfig(bits=BITS, dim=D),
    "binary": BinaryQuantizerConfig(dim=BITS),
    "binary_mapper": BinaryMapperConfig(bits=BITS, dim=D, free_nats=BITS * math.log(2)),
    "fsq, rotated, noise": FSQConfig(
        levels=(8, 5, 5, 5), dim=D, preserve_symmetry=True, noise_dropout=0.5, orthogonal_rotation=True
    ),
    "fsp": FSPConfig(levels=(8, 5, 5, 5), dim=D),
    "diveq": DiVeQConfig(codebook_size=K, dim=D),
    "diveq, space-filling": DiVeQConfig(codebook_size=K, dim=D, space_filling=True),
    "nsvq": DiVeQConfig(codebook_size=K, dim=D, direction="random"),
    "fvq": FVQConfig(codebook_size=K, dim=D, width=128),
    "residual": ResidualQuantizerConfig(depth=2, layer=HALF),
    "residual_scalar": ResidualScalarConfig(
        depth=2, layer=FSQConfig(levels=(4, 4, 2), dim=3, preserve_symmetry=True, orthogonal_rotation=True), dim=D
    ),
    "grouped": GroupedQuantizerConfig(groups=2, layer=replace(HALF, dim=D // 2)),
    "multiscale": MultiscaleQuantizerConfig(scales=(1, 2, 4, 8), codebook_size=184, dim=D),
}


def schedules(config: Any, steps: int) -> Any:
    """A config whose own schedules, where it has any, end with the training."""
    names = [name for name in ("temperature_steps", "kl_warmup_steps") if hasattr(config, name)]
    return replace(config, **{name: max(1, steps * 3 // 4) for name in names})


# ---- images, once ---------------------------------------------------------------------------------------------------


def prepared(images: Path, out: Path) -> Path:
    """uint8 arrays `train` and `test`, b c H W, of the folders of that name; classes take turns."""
    path = out / "images.npz"
    if not path.exists():
        parts = {}
        for part, count in (("train", TRAINING), ("test", TEST)):
            data = DataConfig(path=str(images / part), image_size=32, channels=3, validation_count=0)
            dataset, _ = image_datasets(data, 0)
            indices = [number * len(dataset) // count for number in range(count)]
            parts[part] = torch.cat(
                [dataset.fetch(indices[start : start + 500], range(500))["images"] for start in range(0, count, 500)]
            ).numpy()
        np.savez(path, **parts)
    return path


# ---- one cell -------------------------------------------------------------------------------------------------------


def peak() -> float:
    """MiB that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@dataclass(frozen=True)
class Given:
    """What all cells share."""

    steps: int
    prior_steps: int
    width: int
    batch: int = 32  # images
    prior_width: int = 96


def train(
    module: nn.Module, loss_of: Callable[[int], Tensor], steps: int, rate: float, *, after: Callable[[], Any] | None
) -> list[float]:
    """Adam with warm-up and cosine, gradients clipped at norm 1 as by default in a run; returns each step's seconds of
    the processor, which other work on the machine does not lengthen much."""
    optimizer, seconds = torch.optim.Adam(module.parameters(), lr=rate), []
    module.train()
    for step in range(steps):
        started = time.process_time()
        now = learning_rate(step, peak=rate, warmup_steps=steps // 20, steps=steps, schedule="cosine", final_factor=0.0)
        for group in optimizer.param_groups:
            group["lr"] = now
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        if after is not None:
            after()
        seconds.append(time.process_time() - started)
    module.eval()
    return seconds


def autoencoder_of(quantizer: Any, width: int) -> VQVAE:
    recipe, _ = read_recipe("train-stage1", Stage1Config, "stage1", ["--config", RECIPE, "--data.path", "."])
    assert isinstance(recipe.model, VQVAEConfig)
    config = replace(recipe.model, width=width, residual_width=width // 2, quantizer=quantizer)
    return VQVAE(config, (32, 32))


@torch.no_grad()
def encoded(model: VQVAE, images: Tensor) -> Codes:
    parts = [model.encode(to_float(part)) for part in images.split(250)]
    return tuple(torch.cat(grid) for grid in zip(*parts, strict=True))


@torch.no_grad()
def reconstructions(model: VQVAE, codes: Codes) -> Tensor:
    starts = range(0, len(codes[0]), 250)
    return torch.cat([model.decode(tuple(grid[start : start + 250] for grid in codes)) for start in starts])


def use_of(codes: Codes, vocabularies: list[int]) -> tuple[float, float]:
    """Share of the codes that occur, of all grids together, and perplexity as a share of the vocabulary, a mean over
    grids."""
    used, shares = 0, []
    for grid, k in zip(codes, vocabularies, strict=True):
        counts = torch.bincount(grid.flatten(), minlength=k)
        used += int((counts > 0).sum())
        shares.append(float(torch.special.entr(counts / counts.sum()).sum().exp()) / k)
    return used / sum(vocabularies), fmean(shares)


def prior_bits(model: VQVAE, train_codes: Codes, test_codes: Codes, given: Given) -> float:
    """Bits of a test image's codes under a transformer that has learned those of the training images."""
    prior = Transformer(TransformerConfig(layers=2, width=given.prior_width, heads=4), model.code_spec(), 0)
    order = torch.Generator().manual_seed(0)

    def loss(step: int) -> Tensor:
        chosen = torch.randint(len(train_codes[0]), (given.batch,), generator=order)
        return prior(tuple(grid[chosen] for grid in train_codes), Condition()).loss.mean()

    train(prior, loss, given.prior_steps, 2e-3, after=None)
    with torch.no_grad():
        parts = zip(*(grid.split(100) for grid in test_codes), strict=True)
        nats = torch.cat([prior.nll(part, Condition()).double().sum(1) for part in parts])
    return float(nats.mean()) / math.log(2)


def cell(name: str, seed: int, data: Path, given: Given) -> dict[str, Any]:
    """One quantizer with one seed."""
    keep_freed_memory()
    with np.load(data) as arrays:
        images, test = torch.from_numpy(arrays["train"]), torch.from_numpy(arrays["test"])
    torch.manual_seed(seed)
    model = autoencoder_of(schedules(QUANTIZERS[name], given.steps), given.width)
    order = torch.Generator().manual_seed(seed)

    def batch() -> Tensor:
        chosen = images[torch.randint(len(images), (given.batch,), generator=order)]
        flipped = torch.rand(len(chosen), 1, 1, 1, generator=order) < 0.5
        return to_float(torch.where(flipped, chosen.flip(3), chosen))

    def loss(step: int) -> Tensor:
        model.begin_step(step)
        return torch.stack(list(model(batch()).losses.values())).sum()

    held = peak()
    model.initialise([batch() for _ in range(8)])
    seconds = train(model, loss, given.steps, 8e-4, after=model.update)
    memory = peak() - held

    train_codes, test_codes = encoded(model, images), encoded(model, test)
    difference = reconstructions(model, test_codes) - to_float(test)
    error = reduce(difference.square(), "b c h w -> b", "mean")
    grids = model.code_spec().grids
    use, perplexity = use_of(train_codes, [grid.vocabulary for grid in grids])
    bits = prior_bits(model, train_codes, test_codes, given)
    count = sum(grid.size for grid in grids)
    return {
        "quantizer": name,
        "seed": seed,
        **asdict(given),
        "codes": count,
        "raw_bits": model.code_spec().bits_per_image,
        "mse": float(error.mean()),
        "psnr": float(psnr(error).mean()),
        "use": use,
        "perplexity_share": perplexity,
        "prior_bits": bits,
        "bits_per_code": bits / count,
        "milliseconds": 1000 * median(seconds),
        "megabytes": memory,
        "parameters": sum(weight.numel() for weight in model.quantizer.parameters()),
    }


# ---- all cells ------------------------------------------------------------------------------------------------------

COLUMNS = {  # heading: field, factor, digits
    "MSE, 1e-3": ("mse", 1000, 2),
    "PSNR, dB": ("psnr", 1, 2),
    "use, %": ("use", 100, 1),
    "perplexity, % of the vocabulary": ("perplexity_share", 100, 1),
    "bits raw": ("raw_bits", 1, 0),
    "bits under the prior": ("prior_bits", 1, 0),
    "bits a code": ("bits_per_code", 1, 2),
    "ms a step": ("milliseconds", 1, 0),
    "MiB": ("megabytes", 1, 0),
}


def table(cells: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A row for each quantizer, the best reconstruction first: means over its seeds, and of the error and of the
    prior's bits the standard deviation over them."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for result in cells:
        by_name.setdefault(result["quantizer"], []).append(result)
    yield "| quantizer | seeds | " + " | ".join(COLUMNS) + " |"
    yield "|---|---:|" + "---:|" * len(COLUMNS)
    for name, results in sorted(by_name.items(), key=lambda row: fmean(result["mse"] for result in row[1])):
        texts = []
        for field, factor, digits in COLUMNS.values():
            values = [factor * result[field] for result in results]
            spread = f" ± {stdev(values):.{digits}f}" if field in ("mse", "prior_bits") and len(values) > 1 else ""
            texts.append(f"{fmean(values):.{digits}f}{spread}")
        yield f"| {name} | {len(results)} | " + " | ".join(texts) + " |"


def finished(path: Path, given: Given) -> list[dict[str, Any]]:
    """The cells of this file that were made with the same settings."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [result for result in map(json.loads, lines) if asdict(given).items() <= result.items()]


def add_cell(cells: Path, name: str, seed: int, given: Given) -> None:
    result = cell(name, seed, cells.with_name("images.npz"), given)
    with cells.open("a") as file:
        file.write(json.dumps(result) + "\n")
    print(json.dumps(result), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a folder with folders `train` and `test`")
    parser.add_argument("--out", type=Path, default=Path("runs/quantizers"))
    parser.add_argument("--steps", type=int, default=2000, help="of the autoencoder")
    parser.add_argument("--prior-steps", type=int, default=1000)
    parser.add_argument("--width", type=int, default=96, help="of the autoencoder's layers; 96 is the recipe's")
    parser.add_argument("--batch", type=int, default=32, help="images")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--only", nargs="*", choices=list(QUANTIZERS), default=list(QUANTIZERS))
    args = parser.parse_args()
    torch.set_num_threads(1)  # before anything is computed: threads do not survive a fork
    given = Given(steps=args.steps, prior_steps=args.prior_steps, width=args.width, batch=args.batch)
    cells = args.out / "cells.jsonl"
    if args.images:
        args.out.mkdir(parents=True, exist_ok=True)
        prepared(args.images, args.out)
        for seed in args.seeds:
            for name in args.only:
                if any((done["quantizer"], done["seed"]) == (name, seed) for done in finished(cells, given)):
                    continue
                process = get_context("fork").Process(target=add_cell, args=(cells, name, seed, given))
                process.start()
                process.join()
                if process.exitcode:
                    sys.exit(f"{name}, seed {seed}: ended with {process.exitcode}")
    print("\n".join(table(finished(cells, given))))


if __name__ == "__main__":
    main()
