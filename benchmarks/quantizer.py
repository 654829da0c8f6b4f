"""Our quantizer beside `VectorQuantize` of vector-quantize-pytorch: time and memory of a training step and of encoding.

`python -m benchmarks.quantizer` prints a Markdown table. Both get the same latents in the same process and take turns;
a figure is the median of the runs. "Product" is the one matrix product that any exact search must do. A training
step is forward, backward to the latents and the EMA update; encoding is the forward pass in eval mode without
gradients. Memory is the peak over what the process held before, each in a process of its own. Both: Euclidean distance,
codebook by EMA, straight-through gradient, float32, no revival.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version

import torch
from torch import Tensor, nn

from benchmarks.timing import medians
from stage1_vq.quantizers import NearestQuantizer, NearestQuantizerConfig

SHAPES = {(64, 512): 8, (256, 1024): 5, (32, 8192): 20, (8, 16384): 35}  # (d, k): times as fast, the bound
MEMORY_BOUND = 100  # MB, for ours
IMAGES, SIDE = 16, 32  # 16 images of 32x32 latents: 16,384 vectors


def ours(d: int, k: int) -> nn.Module:
    return NearestQuantizer(NearestQuantizerConfig(codebook_size=k, dim=d, kmeans_iterations=0, revive_after=0))


def peer(d: int, k: int) -> nn.Module:
    from vector_quantize_pytorch import VectorQuantize

    return VectorQuantize(
        d, k, decay=0.99, commitment_weight=0.25, rotation_trick=False, accept_image_fmap=True, channel_last=False
    )


def train_step(quantizer: nn.Module, z: Tensor) -> None:
    quantizer.train()
    z.grad = None
    if isinstance(quantizer, NearestQuantizer):
        quantized = quantizer(z)
        z_q, loss = quantized.z_q, quantized.losses["commitment_loss"]
    else:
        z_q, _, loss = quantizer(z)  # the EMA update is part of its forward pass
    torch.autograd.backward([z_q, loss.sum()], [torch.ones_like(z_q), None])
    if isinstance(quantizer, NearestQuantizer):
        quantizer.update()


@torch.no_grad()
def encode(quantizer: nn.Module, z: Tensor) -> None:
    quantizer.eval()
    quantizer(z)


@torch.no_grad()
def matrix_product(codebook: Tensor, vectors: Tensor, buffer: Tensor) -> None:
    """Scores of all vectors and codes, a tile at a time, and nothing else: no exact search can be faster."""
    for tile in vectors.split(buffer.shape[1]):
        torch.mm(codebook, tile.t(), out=buffer)


WORK: dict[str, Callable[[nn.Module, Tensor], None]] = {"training": train_step, "encode": encode}


def latents(d: int, images: int = IMAGES, side: int = SIDE) -> Tensor:
    return torch.randn(images, d, side, side, generator=torch.Generator().manual_seed(0)).requires_grad_()


def memory_of_one_step(side: str, d: int, k: int) -> float:
    """MB that one training step adds at its peak, in this process; Linux only."""

    def status(field: str) -> float:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) / 1024 for line in file if line.startswith(field))

    quantizer, z = {"ours": ours, "peer": peer}[side](d, k), latents(d)
    train_step(quantizer, latents(d, images=1, side=4))  # libraries allocate once
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak so far
    before = status("VmRSS")
    train_step(quantizer, z)
    return status("VmHWM") - before


def memory(side: str, d: int, k: int) -> float:
    """`memory_of_one_step` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.quantizer", "--memory", side, str(d), str(k)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="runs of each that count")
    parser.add_argument("--threads", type=int, default=None, help="of PyTorch; default: its own choice")
    parser.add_argument("--memory", nargs=3, metavar=("SIDE", "D", "K"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        print(memory_of_one_step(args.memory[0], int(args.memory[1]), int(args.memory[2])))
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; vector-quantize-pytorch "
        f"{version('vector-quantize-pytorch')}; {IMAGES * SIDE**2:,} vectors, float32, medians of {args.repeats}\n"
    )
    print("| d, k | work | product, ms | ours, ms | peer, ms | times as fast | bound | ours, MB | peer, MB |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|")
    missed = []
    for (d, k), bound in SHAPES.items():
        z, sides = latents(d), {"ours": ours(d, k), "peer": peer(d, k)}
        rows = max(32, min(512, 2**20 // k))
        floor = partial(matrix_product, torch.randn(k, d), torch.randn(IMAGES * SIDE**2, d), torch.empty(k, rows))
        for name, work in WORK.items():
            works: dict[str, Callable[[], None]] = {side: partial(work, module, z) for side, module in sides.items()}
            took = medians({**works, "floor": floor}, args.repeats)
            ratio = took["peer"] / took["ours"]
            times = " | ".join(f"{1000 * took[side]:.1f}" for side in ("floor", "ours", "peer"))
            row = f"| {d}, {k:,} | {name} | {times} | {ratio:.1f} | "
            if name == "training":
                peaks = {side: memory(side, d, k) for side in sides}
                print(f"{row}{bound} | {peaks['ours']:.0f} | {peaks['peer']:.0f} |", flush=True)
                if ratio < bound or peaks["ours"] > MEMORY_BOUND:
                    missed.append(f"d={d}, k={k}")
            else:
                print(f"{row}- | - | - |", flush=True)
    print(f"\nbounds missed at {'; '.join(missed)}" if missed else "\nall bounds met")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
