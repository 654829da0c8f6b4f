"""What bfloat16 changes of a two-stage model: codes, samples, and decoded pixels of the same codes.

    python -m benchmarks.cast_models --model runs/quickstart/model

Encodes images with the model and with the model cast to bfloat16, draws samples of one seed with both, and decodes the
same codes with both. Prints the shares of codes that differ, and the largest difference of a pixel in [-1, 1].
"""

from __future__ import annotations

import argparse

import torch

from codes.spec import Codes
from images.datasets import DataConfig, image_datasets, to_float
from pipelines.two_stage import TwoStagePipeline


def differing(codes: Codes, others: Codes) -> float:
    return sum(int((a != b).sum()) for a, b in zip(codes, others, strict=True)) / sum(grid.numel() for grid in codes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="an assembled model folder")
    parser.add_argument(
        "--data", default="bundled-mnist", help="images of the model's size: a name, .npz file or folder"
    )
    parser.add_argument("--num", type=int, default=200, help="images")
    options = parser.parse_args()
    plain = TwoStagePipeline.from_pretrained(options.model, device="cpu")
    cast = TwoStagePipeline.from_pretrained(options.model, device="cpu").to(torch.bfloat16)
    spec = plain.prior.code_spec
    config = DataConfig(
        path=options.data, image_size=(spec.image_height, spec.image_width), channels=spec.image_channels
    )
    numbers = range(options.num)
    images = to_float(image_datasets(config, seed=0)[0].fetch(numbers, numbers)["images"])
    codes = plain.encode(images)
    print(f"{options.num} images of {spec.codes_per_image} codes, torch {torch.__version__}")
    print(f"codes that differ: {differing(codes, cast.encode(images)):.1%}")
    samples, others = plain.generate(options.num, seed=0), cast.generate(options.num, seed=0)
    print(f"codes of samples that differ: {differing(samples.codes, others.codes):.0%}")
    apart = (plain.decode(codes) - cast.decode(codes)).abs().max().item()
    print(f"pixels of the same codes: up to {apart:.3f} of 2")


if __name__ == "__main__":
    main()
