"""Resident memory of long runs against short ones: training, encoding, generating and varying 1,000 and 20,000 images.

    python -m benchmarks.flat_memory
    python -m benchmarks.flat_memory --of train,encode --few 200 --many 2000

Each row is two runs of the command line, of a new process each, over images of 28x28 in a folder: a training that sees
so many (and validates, saves and logs as often in proportion), `encode` of a folder of so many, `generate` of so many,
`vary` of a folder of so many.
Memory is the peak of the largest process of the command, loader processes among them, as the kernel has it (`wait4`).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

BOUND = 1.05  # the long run may take so much of the short one's memory
BATCH = 50
OF = ("train", "encode", "generate", "vary")


def save_images(folder: Path, count: int) -> Path:
    """Grey noise of 28x28, which no two images share."""
    pixels = np.random.default_rng(count)
    for number in range(count):
        place = folder / f"{number // 1000:03d}" / f"{number:06d}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.integers(0, 256, (28, 28), dtype=np.uint8)).save(place)
    return folder


def peak(*command: object) -> float:
    """MiB of the largest process of `zellige COMMAND`. Raises SystemExit where it fails."""
    process = subprocess.Popen(
        [sys.executable, "-m", "zellige", *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    output = process.stdout.read().decode(errors="replace")  # until it ends
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"zellige {' '.join(map(str, command))} ended with {process.returncode}:\n{output}")
    return usage.ru_maxrss / 1024


def training(images: Path, run: Path, count: int) -> list[object]:
    steps = max(1, count // BATCH)
    given = {
        "data.path": images,
        "data.validation_count": 100,
        "model.width": 16,
        "model.residual_width": 16,
        "train.batch_size": BATCH,
        "train.steps": steps,
        "train.validate_every": max(1, steps // 4),
        "train.save_every": max(1, steps // 4),
        "train.log_every": 5,
        "train.workers": 1,
    }
    options = [part for name, value in given.items() for part in (f"--{name}", value)]
    return ["train-stage1", "--config", "mnist_quickstart", *options, "--run", run]


def measure(of: Sequence[str], few: int, many: int, work: Path) -> list[tuple[str, float, float]]:
    """Rows of what was done, and MiB with few and with many images."""
    folders = {count: save_images(work / f"images{count}", count) for count in (few, many)}
    rows: list[tuple[str, float, float]] = []
    trained = [peak(*training(folders[many], work / f"run{count}", count)) for count in (few, many)]
    if "train" in of:
        rows.append(("training", *trained))
    model = work / f"run{few}"
    codes = [
        peak("encode", "--model", model, "--data.path", folders[count], "--workers", 1, "--out", work / f"codes{count}")
        for count in ((few, many) if "encode" in of else (few,))
    ]
    if "encode" in of:
        rows.append(("encoding", *codes))
    if "generate" in of or "vary" in of:
        prior = ("--codes", work / f"codes{few}", "--train.steps", 2, "--train.batch_size", 8, "--run", work / "prior")
        peak("train-stage2", "--config", "mnist_quickstart", *prior)
        pipeline = work / "pipeline"
        peak("assemble", "--stage1", model, "--stage2", work / "prior", "--out", pipeline)
        if "generate" in of:
            made = [
                peak("generate", "--model", pipeline, "--num", count, "--out", work / f"out{count}")
                for count in (few, many)
            ]
            rows.append(("generating", *made))
        if "vary" in of:
            options = ("--variants", 1, "--batch_size", BATCH)
            varied = [
                peak("vary", "--model", pipeline, "--images", folders[n], *options, "--out", work / f"varied{n}")
                for n in (few, many)
            ]
            rows.append(("varying", *varied))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", default=",".join(OF), help="which, separated by commas")
    parser.add_argument("--few", type=int, default=1000)
    parser.add_argument("--many", type=int, default=20_000)
    asked = parser.parse_args(arguments)
    if unknown := set(asked.of.split(",")) - set(OF):
        parser.error(f"--of {','.join(sorted(unknown))}, expected some of {', '.join(OF)}")
    with tempfile.TemporaryDirectory() as work:
        rows = measure(asked.of.split(","), asked.few, asked.many, Path(work))
    print(f"| command | {asked.few:,} images, MiB | {asked.many:,} images, MiB | ratio |\n|---|---|---|---|")
    for name, short, long in rows:
        print(f"| {name} | {short:.0f} | {long:.0f} | {long / short:.3f} |")
    if too_much := [name for name, short, long in rows if long > BOUND * short]:
        sys.exit(f"more than {BOUND:g} times the memory: {', '.join(too_much)}")


if __name__ == "__main__":
    main()
