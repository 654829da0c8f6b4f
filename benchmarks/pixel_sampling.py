"""What sampling a grid with the gated PixelCNN and with PixelSNAIL costs, in full forward passes of the same batch.

`python -m benchmarks.pixel_sampling` prints a Markdown table for each. The naive loop, one full pass for each code,
costs 256 passes for a 16x16 grid. The steppers compute each feature once and give the same codes: this is checked code
for code at batch 1. Vocabulary 512. PixelCNN: 12 layers of width 128, kernels 7 and 3, output width 512. PixelSNAIL: 2
blocks of 4 residual blocks, width 64, kernel 5, attention of 8 heads. A pass and a grid take turns in one process; a
figure is the median of the runs. The grid's time includes the draws. Float32 on the CPU.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from torch import Tensor

from benchmarks.timing import medians
from codes.spec import CodeSpec, Grid
from stage2_prior.condition import Condition
from stage2_prior.drawing import inverse_cdf, noise, probabilities
from stage2_prior.priors import PixelCNN, PixelCNNConfig, PixelSNAIL, PixelSNAILConfig
from stage2_prior.sampling import SamplingConfig, sample_codes

SIDE, VOCABULARY, CLASSES = 16, 512, 10
SPEC = CodeSpec((Grid("codes", SIDE, SIDE, VOCABULARY),), 4 * SIDE, 4 * SIDE)
PIXELCNN = PixelCNNConfig(layers=12, width=128, first_kernel_size=7, kernel_size=3, output_width=512)
PIXELSNAIL = PixelSNAILConfig(blocks=2, residual_blocks=4, width=64, residual_width=64, kernel_size=5, heads=8)
BOUNDS = {8: 3.0}  # batch: full forward passes


@torch.inference_mode()
def naive(prior: PixelCNN | PixelSNAIL, condition: Condition, batch: int) -> Tensor:
    """The same draws, with a full pass for each code."""
    uniforms, sampling = noise(0, range(batch), SIDE * SIDE), SamplingConfig()
    codes = torch.zeros(batch, SIDE * SIDE, dtype=torch.int64)
    for position in range(SIDE * SIDE):
        logits = prior.logits((codes.view(batch, SIDE, SIDE),), condition)[:, position]
        codes[:, position] = inverse_cdf(probabilities(logits, sampling), uniforms[:, position])
    return codes.view(batch, SIDE, SIDE)


def sample(prior: PixelCNN | PixelSNAIL, condition: Condition, batch: int) -> Tensor:
    return sample_codes(prior, range(batch), condition, 0, SamplingConfig())[0]


def measure(prior: PixelCNN | PixelSNAIL, repeats: int) -> list[str]:
    """Prints the figures of one prior and returns what it missed."""
    size = sum(parameter.numel() for parameter in prior.parameters()) / 1e6
    one = Condition(torch.tensor([3]))
    begin = time.perf_counter()
    expected = naive(prior, one, 1)
    seconds = time.perf_counter() - begin
    different = int((sample(prior, one, 1) != expected).sum())
    print(
        f"\n{prior.kind}, {size:.1f} million parameters; naive loop at batch 1: {seconds:.1f} s; {different} of "
        f"{SIDE * SIDE} codes differ from it\n"
    )
    print("| batch | full pass, ms | grid, ms | full passes per grid | bound |\n|---:|---:|---:|---:|---:|")
    missed = [f"{prior.kind}: the naive loop's codes"] if different else []
    for batch in (1, 8, 64):
        condition = Condition(torch.arange(batch) % CLASSES)
        codes = (sample(prior, condition, batch),)

        @torch.inference_mode()
        def full_pass(codes: tuple[Tensor, ...] = codes, condition: Condition = condition) -> Tensor:
            return prior.logits(codes, condition)

        def grid(condition: Condition = condition, batch: int = batch) -> Tensor:
            return sample(prior, condition, batch)

        took = medians({"pass": full_pass, "grid": grid}, repeats)
        passes = took["grid"] / took["pass"]
        bound = BOUNDS.get(batch, "-")
        print(
            f"| {batch} | {1000 * took['pass']:.1f} | {1000 * took['grid']:.1f} | {passes:.2f} | {bound} |", flush=True
        )
        if batch in BOUNDS and passes > BOUNDS[batch]:
            missed.append(f"{prior.kind}: batch {batch}")
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="runs of each that count")
    parser.add_argument("--threads", type=int, default=None, help="of PyTorch; default: its own choice")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    pixelcnn, pixelsnail = PixelCNN(PIXELCNN, SPEC, CLASSES).eval(), PixelSNAIL(PIXELSNAIL, SPEC, CLASSES).eval()
    with torch.no_grad():  # fresh weights give nearly equal logits, which would hide an error
        pixelcnn.output.weight.mul_(8)
        pixelsnail.output.gain.mul_(8)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; medians of {args.repeats}")
    missed = measure(pixelcnn, args.repeats) + measure(pixelsnail, args.repeats)
    print(f"\nmissed: {'; '.join(missed)}" if missed else "\nall bounds met")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
