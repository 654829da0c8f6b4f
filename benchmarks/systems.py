"""Every stage-one system on the same images for the same time: the table and the picture of docs/results.md.

    python -m benchmarks.systems --images cifar10/train --test cifar10/test --minutes 2 --out runs/systems

For each row a short run measures how many steps fit into the time; then the recipe trains with that many, its schedules
(those counted in steps) shrunk alike, as `zellige train-stage1` would. Test images are then encoded and decoded: PSNR
and SSIM (torchmetrics) are means over images; use is the share of codes that occur in the test set; bits are those of
an image's codes, packed. A row that is already in `--out` is not trained again. Prints a Markdown table and writes
`systems.png`: test images on top, below them each system's reconstructions in the order of the table.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from common.model_io import load_pretrained
from images.datasets import DataConfig, image_datasets, to_float, to_uint8
from metrics.similarity import psnr
from pipelines.options import read_recipe
from stage1_vq.autoencoders import AUTOENCODERS, Autoencoder
from stage1_vq.train import Stage1Config, train_stage1

PROBE_STEPS = 12  # of which the first are slower
TEST_IMAGES, SHOWN = 1000, 8
VQVAE = "cifar10_vqvae_short"
QUANTIZER = "--model.quantizer"
# Recipe, and overrides: one row each. All of about 10 bits for each of 8x8 places, but where the system is another.
SYSTEMS: dict[str, tuple[str, ...]] = {
    "VQ-VAE, nearest code": (VQVAE,),
    "VQ-VAE, nearest code, 16,384": (VQVAE, f"{QUANTIZER}.codebook_size=16384"),
    "VQ-VAE, FSQ": (VQVAE, f"{QUANTIZER}.kind=fsq", f"{QUANTIZER}.levels=[8,5,5,5]", f"{QUANTIZER}.dim=64"),
    "VQ-VAE, LFQ": (VQVAE, f"{QUANTIZER}.kind=lfq", f"{QUANTIZER}.bits=10", f"{QUANTIZER}.dim=64"),
    "VQ-VAE, BSQ": (VQVAE, f"{QUANTIZER}.kind=bsq", f"{QUANTIZER}.bits=10", f"{QUANTIZER}.dim=64"),
    "VQ-VAE, SimVQ": (VQVAE, f"{QUANTIZER}.kind=simvq", f"{QUANTIZER}.codebook_size=1024"),
    "VQ-VAE, IBQ": (VQVAE, f"{QUANTIZER}.kind=ibq", f"{QUANTIZER}.codebook_size=1024", f"{QUANTIZER}.dim=64"),
    "VQ-VAE, grouped": (VQVAE, f"{QUANTIZER}.kind=grouped"),
    "VQ-VAE, residual": ("cifar10_residual",),
    "VQ-VAE, multi-scale": ("cifar10_multiscale",),
    "VQ-VAE, binary": (VQVAE, f"{QUANTIZER}.kind=binary", f"{QUANTIZER}.dim=10"),
    "VQ-VAE-2": ("cifar10_vqvae2",),
    "dVAE": ("cifar10_dvae",),
    "VQ-GAN": ("cifar10_vqgan",),
    "ViT-VQGAN": ("cifar10_vit_vqgan",),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    system: str
    recipe: str
    parameters: int
    grids: str
    bits: float  # of an image's codes
    psnr: float
    ssim: float
    use: float
    minutes: float
    images_per_second: float


def slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name.lower())


def scaled(config: Any, factor: float) -> Any:
    """A config with every number of steps, its own or in a config inside it, multiplied."""
    changes = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            changes[field.name] = scaled(value, factor)
        elif field.name.endswith("_steps") and isinstance(value, int) and value:
            changes[field.name] = max(1, round(value * factor))
    return replace(config, **changes)


def config_of(arguments: tuple[str, ...], images: str) -> Stage1Config:
    recipe, *overrides = arguments
    given = ["--config", recipe, "--data.path", images, *(f"{override}" for override in overrides)]
    return read_recipe("train-stage1", Stage1Config, "stage1", given)[0]


def train(config: Stage1Config, minutes: float, run: Path) -> float:
    """Trains for about so long; returns training images per second."""
    quiet = {"validate_every": 0, "preview_every": 0, "save_every": 10**9, "tracker": "none"}
    probe = replace(config, train=replace(config.train, steps=PROBE_STEPS, log_every=4, **quiet))
    speed = train_stage1(probe, run.with_name(f"{run.name}_probe")).images_per_second
    steps = max(PROBE_STEPS, round(60 * minutes * speed / config.train.batch_size))
    factor = steps / config.train.steps
    model = scaled(config.model, factor)
    warmup = max(1, round(config.train.warmup_steps * factor))
    settings = replace(config.train, steps=steps, warmup_steps=warmup, log_every=50, **quiet)
    settings = replace(settings, validate_every=steps, preview_every=steps)
    return train_stage1(replace(config, model=model, train=settings), run).images_per_second


@torch.no_grad()
def judge(autoencoder: Autoencoder, images: Tensor) -> tuple[Tensor, float, float, float]:
    """Reconstructions, mean PSNR, mean SSIM, share of codes used."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    codes = [autoencoder.encode(part) for part in images.split(50)]
    decoded = torch.cat([autoencoder.decode(part).float() for part in codes])
    error = rearrange(F.mse_loss(decoded, images, reduction="none"), "b c h w -> b (c h w)").mean(1)
    similarity = structural_similarity_index_measure(decoded, images, data_range=(-1.0, 1.0))
    grids = autoencoder.code_spec().grids
    used = sum(len(torch.cat(grid).unique()) for grid in zip(*codes, strict=True))
    assert isinstance(similarity, Tensor)
    return decoded, float(psnr(error).mean()), float(similarity), used / sum(grid.vocabulary for grid in grids)


def describe(autoencoder: Autoencoder) -> tuple[str, float]:
    """Grids as text, those of one size and vocabulary counted, and bits of an image."""
    grids = autoencoder.code_spec().grids
    texts: list[str] = []
    for grid in grids:
        text = f"{grid.height}x{grid.width} of {grid.vocabulary:,}"
        if texts and texts[-1].endswith(text):
            count = int(texts[-1].split(" x ")[0]) if " x " in texts[-1] else 1
            texts[-1] = f"{count + 1} x {text}"
        else:
            texts.append(text)
    return "; ".join(texts), sum(grid.size * math.log2(grid.vocabulary) for grid in grids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="training images: a folder")
    parser.add_argument("--test", required=True, help="test images: a folder")
    parser.add_argument("--minutes", type=float, default=2.0, help="of training for each system")
    parser.add_argument("--out", type=Path, default=Path("runs/systems"))
    parser.add_argument("--only", nargs="*", help="systems whose name contains one of these")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows, pictures = [], []
    for system, arguments in SYSTEMS.items():
        if args.only and not any(part in system for part in args.only):
            continue
        run = args.out / slug(system)
        config = config_of(arguments, args.images)
        finished = run / "row.json"
        test = DataConfig(path=args.test, image_size=config.data.image_size, channels=3, validation_count=0)
        dataset, _ = image_datasets(test, 0)
        indices = range(0, len(dataset), max(1, len(dataset) // TEST_IMAGES))[:TEST_IMAGES]
        images = to_float(dataset.fetch(indices, indices)["images"])
        if not finished.exists():
            speed = train(config, args.minutes, run)
            result = json.loads((run / "model" / "config.json").read_text())  # the run is complete
            assert result["kind"] in AUTOENCODERS
            finished.write_text(json.dumps({"images_per_second": speed}))
        speed = json.loads(finished.read_text())["images_per_second"]
        autoencoder = load_pretrained(run, AUTOENCODERS)
        decoded, quality, similarity, use = judge(autoencoder, images)
        grids, bits = describe(autoencoder)
        row = Row(
            system=system,
            recipe=arguments[0],
            parameters=sum(weight.numel() for weight in autoencoder.parameters()),
            grids=grids,
            bits=bits,
            psnr=quality,
            ssim=similarity,
            use=use,
            minutes=args.minutes,
            images_per_second=speed,
        )
        rows.append(row)
        print(json.dumps(asdict(row)), flush=True)
        shown = slice(0, None, len(images) // SHOWN)
        if not pictures:
            pictures.append(images[shown][:SHOWN])
        pictures.append(decoded[shown][:SHOWN])
    sheet = rearrange(torch.stack(pictures), "row column c h w -> (row h) (column w) c")
    pixels = to_uint8(sheet).repeat_interleave(2, 0).repeat_interleave(2, 1)
    Image.fromarray(pixels.numpy()).save(args.out / "systems.png")
    print("\n| system | recipe | parameters, M | grids | bits per image | PSNR, dB | SSIM | codes in use | images/s |")
    print("|---|---|---:|---|---:|---:|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row.system} | `{row.recipe}` | {row.parameters / 1e6:.2f} | {row.grids} | {row.bits:,.0f} | "
            f"{row.psnr:.2f} | {row.ssim:.3f} | {row.use:.0%} | {row.images_per_second:,.0f} |"
        )


if __name__ == "__main__":
    main()
