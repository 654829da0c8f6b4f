"""Peak memory of `zellige train-stage1`, this build's and another's.

    python -m benchmarks.stage1_memory --before FOLDER

Trains the recipe for a few steps, each time in a process of its own with the modules of one of the two builds, and
prints a Markdown table of the most memory that was resident in it: imports, weights, gradients, moments, activations,
and the checkpoint at the end. The recipe's discriminator learns from the first step on, or not at all; its perceptual
loss has VGG16 with random weights, as the memory is the same.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image

IMAGES = 16
PHASES = {
    "with discriminator and perceptual loss": ["--adversarial.start", "0"],
    "with discriminator": ["--adversarial.start", "0", "--perceptual.weight", "0"],
    "neither": ["--adversarial.weight", "0", "--perceptual.weight", "0"],
}


def write_images(folder: Path, side: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for number in range(IMAGES):
        pixels = torch.randint(256, (side, side, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")


def write_vgg(path: Path) -> None:
    """A file as torchvision's, of random weights."""
    from torchvision.models import vgg16

    torch.save(vgg16(weights=None).state_dict(), path)


def peak_memory(tree: Path, arguments: list[str], threads: int) -> int:
    """Bytes of `train-stage1` with the modules in `tree`."""
    code = "import sys; from pipelines.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "train-stage1", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(command, env=environment, cwd=tree, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(said.decode())
    return 1024 * usage.ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="a checkout of another build")
    parser.add_argument("--config", default="imagenet256_vqgan")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--side", type=int, default=128, help="pixels")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    print(f"{options.config}, batch {options.batch}, {options.side} pixels, {options.threads} threads\n")
    print("| training | before, MB | now, MB | now / before |\n| --- | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        images, weights = Path(folder) / "images", Path(folder) / "vgg16.pth"
        images.mkdir()
        write_images(images, options.side)
        write_vgg(weights)
        for phase in options.phases:
            peaks = []
            for name, tree in (("before", options.before), ("now", Path.cwd())):
                settings = {
                    "config": options.config,
                    "data.path": images,
                    "data.validation_count": 2,
                    "data.image_size": options.side,
                    "train.batch_size": options.batch,
                    "train.steps": options.steps,
                    "train.workers": 0,
                    "train.tracker": "none",
                    "train.validate_every": 0,
                    "train.preview_every": 0,
                    "perceptual.weights": weights,
                    "run": Path(folder) / name / phase.replace(" ", "_"),
                }
                arguments = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
                peaks.append(peak_memory(tree, [*arguments, *PHASES[phase]], options.threads))
            before, now = peaks
            print(f"| {phase} | {before / 1e6:,.0f} | {now / 1e6:,.0f} | {now / before:.2f} |", flush=True)


if __name__ == "__main__":
    main()
