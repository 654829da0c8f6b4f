"""Do two processes with half the batch each do what one process does?

    python -m benchmarks.two_processes --model runs/quickstart/model

Trains `zellige train-stage1` on the bundled digits with one process and with two (torchrun, gloo, on the CPU) and
states the largest differences of codebook, weights and losses. Then generates with one and with two processes and
compares the files byte for byte.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file

ONE = [sys.executable, "-m", "pipelines"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "pipelines", "--"]
TRAIN = [
    "train-stage1",
    "--config",
    "mnist_quickstart",
    "--train.log_every",
    "1",
    "--train.validate_every",
    "20",
]


def run(launcher: list[str], arguments: list[str], **environment: str) -> None:
    subprocess.run([*launcher, *arguments], check=True, capture_output=True, env={**os.environ, **environment})


def metrics(run_folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def compare_training(folder: Path, steps: int) -> None:
    for name, launcher in (("one", ONE), ("two", TWO)):
        run(launcher, [*TRAIN, "--train.steps", str(steps), "--run", str(folder / name)])
    one, two = (load_file(folder / name / "model" / "model.safetensors") for name in ("one", "two"))
    differences = {name: float((one[name].float() - two[name].float()).abs().max()) for name in one}
    codebook, scale = differences["quantizer.codebook"], float(one["quantizer.codebook"].abs().max())
    print(f"after {steps} steps: codebook differs by at most {codebook:.2g} (largest entry {scale:.2g})")
    print(f"all weights and buffers differ by at most {max(differences.values()):.2g}")
    rows = list(zip(metrics(folder / "one"), metrics(folder / "two"), strict=True))
    for key in ("loss", "mse", "psnr"):
        relative = [abs(a[key] - b[key]) / abs(a[key]) for a, b in rows if key in a]
        print(f"{key}: relative difference at most {max(relative):.2g} in {len(relative)} lines")


def compare_generating(folder: Path, model: Path, num: int) -> None:
    for name, launcher in (("one", ONE), ("two", TWO)):
        run(
            launcher,
            [
                "generate",
                "--model",
                str(model),
                "--num",
                str(num),
                "--batch_size",
                "16",
                "--out",
                str(folder / name),
            ],
        )
    one, two = (files_in(folder / name) for name in ("one", "two"))
    same, different, _ = filecmp.cmpfiles(folder / "one", folder / "two", sorted(one & two), shallow=False)
    print(f"generate, {num} images: {len(same)} files equal, {len(different)} different {different[:3]}, "
          f"{len(one ^ two)} in one folder only")  # fmt: skip


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="an assembled model folder")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--num", type=int, default=256)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare_training(Path(folder) / "train", arguments.steps)
        compare_generating(Path(folder) / "generate", arguments.model, arguments.num)


if __name__ == "__main__":
    main()
