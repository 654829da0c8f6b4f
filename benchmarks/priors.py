"""Every prior on the same codes for the same time: the table and the picture of docs/results.md.

    python -m benchmarks.priors --stage1 vqvae=runs/a vqvae2=runs/b multiscale=runs/c \\
      --codes vqvae=codes/a vqvae2=codes/b multiscale=codes/c --minutes 4 --out runs/priors

Time is that of one core, counted by the processor and not by the clock: other work on the machine changes nothing. For
each row two short runs measure how many steps fit into it; then the recipe trains with that many, its warm-up
shrunk alike, as `zellige train-stage2` would, and is assembled with its first stage into `--out/ROW/pipeline`. Bits are
those of the held-out images; those of masked priors are a bound from above. Seconds are for 64 images without guidance,
decoding included, the median of `--repeats`; guidance costs so many times that of sampling without. A row that is
already in `--out` is not trained again: run with `--only` in each of two processes that train, then once more, alone,
for the times. Prints a Markdown table and writes `samples.png`: real images, coded and decoded, on top, then a row of
samples for each prior in the order of the table.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from benchmarks.systems import slug
from benchmarks.timing import medians
from codes.shards import CodeDataset
from common.model_io import load_pretrained
from pipelines.options import read_recipe
from pipelines.pictures import contact_sheet, save_png, to_pil
from pipelines.prior_requests import labels_of
from pipelines.two_stage import TwoStagePipeline
from stage1_vq.autoencoders import AUTOENCODERS
from stage2_prior.priors import PRIORS
from stage2_prior.sampling import SamplingConfig
from stage2_prior.train import Stage2Config, train_stage2

PROBE_STEPS = (4, 16)  # of two runs: their difference is free of what is done once
COLUMNS = 10
# Codes, recipe, and overrides: one row each. Sizes are those of the recipes, for a CPU.
ROWS: dict[str, tuple[str, ...]] = {
    "transformer": ("vqvae", "mnist_quickstart"),
    "gated PixelCNN": ("vqvae", "cifar10_pixelcnn_short"),
    "PixelSNAIL": ("vqvae", "cifar10_pixelsnail_short"),
    "MaskGIT": ("vqvae", "cifar10_maskgit_short"),
    "absorbing diffusion": ("vqvae", "cifar10_diffusion_short"),
    "hierarchical, two PixelSNAILs": ("vqvae2", "mnist_vqvae2_short"),
    "VAR": ("multiscale", "cifar10_var_short"),
}


def train(config: Stage2Config, codes: Path, minutes: float, run: Path) -> None:
    """Trains for about so many minutes of one core."""
    torch.set_num_threads(1)
    quiet = {
        "validate_every": 0,
        "preview_every": 0,
        "save_every": 10**9,
        "tracker": "none",
        "patience": 0,
        "workers": 0,
    }
    config = replace(config, train=replace(config.train, **quiet))
    seconds = []
    for steps in PROBE_STEPS:
        begin = time.process_time()
        probe = replace(config, train=replace(config.train, steps=steps, log_every=4))
        train_stage2(probe, codes, run.with_name(f"{run.name}_probe_{steps}"))
        seconds.append(time.process_time() - begin)
    per_step = (seconds[1] - seconds[0]) / (PROBE_STEPS[1] - PROBE_STEPS[0])
    steps = max(PROBE_STEPS[1], round(60 * minutes / per_step))
    warmup = max(1, min(config.train.warmup_steps, steps // 10))
    settings = replace(config.train, steps=steps, warmup_steps=warmup, log_every=50)
    settings = replace(settings, validate_every=steps, save_every=max(1, steps // 4))
    train_stage2(replace(config, train=settings), codes, run)


def seconds_for_64(pipeline: TwoStagePipeline, repeats: int) -> dict[str, float]:
    """Of images, decoding included, of codes, and of codes with guidance."""
    labels = labels_of(pipeline.prior, range(64))
    plain, guided = SamplingConfig(), SamplingConfig(guidance=1.5)
    return medians(
        {
            "images": lambda: pipeline.generate(64, batch_size=64, sampling=plain),
            "codes": lambda: pipeline.sample(range(64), labels, 0, plain),
            "guided": lambda: pipeline.sample(range(64), labels, 0, guided),
        },
        repeats,
    )


def named_paths(pairs: list[str]) -> dict[str, Path]:
    return {name: Path(path) for name, path in (pair.split("=", 1) for pair in pairs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage1", nargs="+", required=True, help="NAME=RUN of each first stage")
    parser.add_argument("--codes", nargs="+", required=True, help="NAME=FOLDER of its code shards")
    parser.add_argument("--minutes", type=float, default=4.0, help="of one core, to train each prior")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each that count for the times")
    parser.add_argument("--guidance", type=float, default=1.5, help="of the samples in the picture")
    parser.add_argument("--out", type=Path, default=Path("runs/priors"))
    parser.add_argument("--only", nargs="*", help="rows whose name contains one of these")
    args, threads = parser.parse_args(), torch.get_num_threads()
    stage1, codes = named_paths(args.stage1), named_paths(args.codes)
    table, pictures, names = [], [], []
    for title, (key, recipe, *overrides) in ROWS.items():
        if key not in codes or (args.only and not any(part in title for part in args.only)):
            continue
        run = args.out / slug(title)
        finished, folder = run / "row.json", run / "pipeline"
        if not finished.exists():
            config, _ = read_recipe("train-stage2", Stage2Config, "stage2", ["--config", recipe, *overrides])
            train(config, codes[key], args.minutes, run)
            autoencoder, prior = load_pretrained(stage1[key], AUTOENCODERS), load_pretrained(run, PRIORS)
            TwoStagePipeline(autoencoder, prior, SamplingConfig(guidance=args.guidance)).save_pretrained(folder)
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            bits = [line["bits_per_code"] for line in lines if line["split"] == "validation"][-1]
            finished.write_text(json.dumps({"bits": bits, "steps": lines[-1]["step"]}))
        torch.set_num_threads(threads)
        row = json.loads(finished.read_text())
        pipeline = TwoStagePipeline.from_pretrained(folder)
        parameters = sum(weight.numel() for weight in pipeline.prior.parameters())
        spec = pipeline.prior.code_spec
        grids, took = spec.describe().partition(" (")[0], seconds_for_64(pipeline, args.repeats)
        table.append(
            f"| {title} | `{recipe}` | {grids} | {parameters / 1e6:.2f} | {row['steps']:,} | "
            f"{row['bits']:.3f} | {row['bits'] * spec.codes_per_image:,.0f} | {took['images']:.2f} | "
            f"{took['guided'] / took['codes']:.2f} |"
        )
        if not pictures:
            held_out = CodeDataset(codes[key], "validation")
            chosen = [i * len(held_out) // COLUMNS for i in range(COLUMNS)]
            pictures.append(row_of(pipeline.decode(held_out.fetch(chosen, chosen)["codes"])))
            names.append("real")
        pictures.append(row_of(pipeline.generate(COLUMNS, seed=1).images))
        names.append(title.partition(",")[0])
    save_png(contact_sheet(pictures, names), args.out / "samples.png")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, {args.minutes} minutes of one core each\n")
    print(
        "| prior | recipe | codes | parameters, M | steps | bits per code | bits per image | s per 64 images | "
        "guidance costs |"
    )
    print("|---|---|---|---:|---:|---:|---:|---:|---:|")
    print("\n".join(table))


def row_of(images: torch.Tensor) -> list[Image.Image]:
    return [to_pil(image) for image in images]


if __name__ == "__main__":
    main()
