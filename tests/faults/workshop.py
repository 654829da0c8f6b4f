"""A folder with images and tiny recipes, and every job that is broken here: its command line, and what it leaves."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from pipelines.generation.records import PASSES

TRAIN = (
    "{steps: 9, batch_size: 8, log_every: 2, validate_every: 3, preview_every: 0, save_every: 2, keep_newest: 2, "
    "workers: 0, tracker: none}"
)
RECIPES = {
    "stage1.yaml": f"""
model: {{kind: vqvae, channels: 1, width: 8, residual_width: 8, residual_blocks: 1,
         quantizer: {{codebook_size: 16, dim: 4}}}}
data: {{path: images, image_size: 16, channels: 1, validation_count: 6, shift: 1}}
train: {TRAIN}
""",
    "stage2.yaml": f"""
model: {{kind: transformer, layers: 1, width: 16, heads: 2, dropout: 0.1}}
label_dropout: 0.1
train: {TRAIN}
""",
    "vae.yaml": f"""
model: {{kind: vae, channels: 1, latents: 2, encoder: {{kind: dense, hidden: [16]}},
         decoder: {{kind: dense, hidden: [16]}}, likelihood: {{kind: logistic_mixture, components: 2}}}}
objective: {{kind: elbo}}
data: {{path: images, image_size: 16, channels: 1, validation_count: 6}}
train: {TRAIN}
""",
}


class Job(NamedTuple):
    words: tuple[str, ...]  # of the command line, but for where the result goes
    out: str  # by which option it is told


VARIANTS = ("--variants", "3", "--batch_size", "4", "--format", "tar", "--images_per_shard", "8")
JOBS = {
    "train-stage1": Job(("train-stage1", "--config", "stage1.yaml"), "--run"),
    "train-vae": Job(("train-vae", "--config", "vae.yaml"), "--run"),
    "encode": Job(("encode", "--model", "train-stage1", "--shard_size", "7", "--workers", "0"), "--out"),
    "train-stage2": Job(("train-stage2", "--config", "stage2.yaml", "--codes", "encode"), "--run"),
    "assemble": Job(("assemble", "--stage1", "train-stage1", "--stage2", "train-stage2", "--codes", "encode"), "--out"),
    "generate": Job(("generate", "--model", "assemble", "--num", "10", "--batch_size", "4"), "--out"),
    "inpaint": Job(
        ("inpaint", "--model", "assemble", "--images", "images", "--variants", "2", "--images_per_shard", "7"), "--out"
    ),
    "vary": Job(("vary", "--model", "assemble", "--images", "images", *VARIANTS), "--out"),
    "compress": Job(("compress", "--model", "assemble", "--images", "images", "--batch_size", "5"), "--out"),
    "archive": Job(
        ("compress", "--model", "assemble", "--images", "images", "--batch_size", "5", "--archive", "true"), "--out"
    ),
    "lossless": Job(
        ("compress", "--model", "train-vae", "--images", "images", "--mode", "lossless", "--archive", "true"), "--out"
    ),
    "reconstruct": Job(("reconstruct", "--model", "train-stage1", "--images", "images"), "--out"),
    "evaluate": Job(
        ("evaluate", "--model", "assemble", "--data.path", "images", "--codes", "encode", "--batch_size", "7"), "--out"
    ),
    "report": Job(("report", "train-stage1", "train-stage2"), "--out"),
}
IMAGES = re.compile(rb'"images": "[^"]*"')
DATES = re.compile(rb'"date": "[^"]*"')
FILES = {"evaluate": "evaluation.json", "report": "report.html"}  # what is a file and no folder


def line(job: str, out: str) -> tuple[str, ...]:
    """The command line of a job whose result goes to `out`."""
    return (*JOBS[job].words, JOBS[job].out, out)


def lay_out(folder: Path) -> None:
    """Images and recipes."""
    chance = np.random.default_rng(0)
    for number in range(20):
        place = folder / "images" / ("left", "right")[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        pixels = chance.integers(0, 90, (16, 16), dtype=np.uint8)
        pixels[:, 8 * (number % 2) : 8 * (number % 2) + 8] += 120
        Image.fromarray(pixels).save(place / f"{number:02}.png")
        os.utime(place / f"{number:02}.png", (1e9, 1e9))
    for name, text in RECIPES.items():
        (folder / name).write_text(text, encoding="utf-8")


def contents(place: Path) -> Mapping[str, bytes]:
    """Every file of a result, but what says how long it took, or in how many passes; the locks and half-written files
    that should not be there are among them. Of what says where the images are and when, that is left out."""
    files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
    return {
        "" if place.is_file() else str(file.relative_to(place)): DATES.sub(b"", IMAGES.sub(b"", file.read_bytes()))
        for file in files
        if file.name != "timing.jsonl" and PASSES not in file.parts
    }
