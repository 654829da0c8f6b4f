"""Memory and time of a training step with a vocabulary of 2^18 codes: nearest, LFQ and IBQ.

`python -m benchmarks.quantizer_memory` prints a Markdown table. A training step is forward, backward to the latents and
the weights, and the update of the codebook; memory is the peak over what the process held before, gradients included,
each in a process of its own (Linux only). `--latents 2048` are 8 images of 16x16 places. The table of all latents by
all codes alone would be 64 GiB.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

import torch

from stage1_vq.quantizers import IBQConfig, LFQConfig, NearestQuantizerConfig, Quantizer, build_quantizer

BITS, SIDE = 18, 32
BOUND = 1024  # MiB
CONFIGS = {
    "nearest, by EMA": NearestQuantizerConfig(codebook_size=2**BITS, dim=16),
    "nearest, by gradient": NearestQuantizerConfig(codebook_size=2**BITS, dim=16, codebook_update="gradient"),
    "LFQ": LFQConfig(bits=BITS, dim=BITS),
    "LFQ, groups of 9 bits": LFQConfig(bits=BITS, dim=BITS, entropy_bits=9),
    "IBQ": IBQConfig(codebook_size=2**BITS, dim=16),
    "IBQ, 256 wide": IBQConfig(codebook_size=2**BITS, dim=256),
    "IBQ, without entropy terms": IBQConfig(codebook_size=2**BITS, dim=16, entropy_weight=0),
}


def train_step(quantizer: Quantizer, images: int, side: int) -> None:
    z = torch.randn(images, quantizer.dim, side, side, generator=torch.Generator().manual_seed(0)).requires_grad_()
    quantized = quantizer(z)
    (quantized.z_q.square().mean() + torch.stack(list(quantized.losses.values())).sum()).backward()
    quantizer.update()


def status(field: str) -> float:
    """MiB, from the kernel's account of this process."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith(field))


def measure(name: str, latents: int) -> tuple[float, float]:
    """MiB that a training step adds at its peak, and its seconds, in this process."""
    quantizer = build_quantizer(CONFIGS[name])
    train_step(quantizer, images=1, side=2)  # libraries allocate once
    for weight in quantizer.parameters():
        weight.grad = None
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak so far
    before, start = status("VmRSS"), time.perf_counter()
    train_step(quantizer, latents // SIDE**2, SIDE)
    return status("VmHWM") - before, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, default=65536, help=f"a multiple of {SIDE**2}")
    parser.add_argument("--only", choices=list(CONFIGS), help="one row of the table")
    parser.add_argument("--measure", choices=list(CONFIGS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(*measure(args.measure, args.latents))
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {args.latents:,} latents, 2^{BITS} codes\n")
    print("| quantizer | MiB at the peak | bound | seconds |")
    print("|---|---:|---:|---:|")
    missed = []
    for name in [args.only] if args.only else CONFIGS:
        command = [sys.executable, "-m", "benchmarks.quantizer_memory", "--measure", name]
        command += ["--latents", str(args.latents)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        memory, seconds = map(float, output.split())
        print(f"| {name} | {memory:.0f} | {BOUND} | {seconds:.1f} |", flush=True)
        if memory > BOUND:
            missed.append(name)
    print(f"\nbound missed by {'; '.join(missed)}" if missed else "\nall bounds met")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
