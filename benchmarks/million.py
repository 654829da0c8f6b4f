"""A million samples of a prior that costs nothing: what does everything but the model cost?

    python -m benchmarks.million --out /scratch/million            # 10,000 and 1,000,000 images of 8x8
    python -m benchmarks.million --out /scratch/million --large 100000

Writes both numbers of images by `zellige generate`, each in a process of its own, with a model that draws its codes
by copying and decodes them by copying too, and whose time is counted with the rest. Then repeats the command on the
complete folder. States for both: milliseconds an image, on the clock and on the processor, the peak of resident memory,
seconds of the repeated command, and the most files that lie in one folder.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from pipelines.commands.generate import GenerateConfig, generate_files
from pipelines.two_stage import TwoStagePipeline
from stage1_vq.autoencoders import VQVAE, VQVAEConfig
from stage1_vq.quantizers import NearestQuantizerConfig
from stage2_prior.priors import Transformer, TransformerConfig


def write_model(folder: Path, size: int = 8) -> None:
    """An untrained model of `size` x `size` grey pixels and ten classes."""
    quantizer = NearestQuantizerConfig(codebook_size=16, dim=4)
    config = VQVAEConfig(channels=1, width=8, residual_width=8, residual_blocks=1, quantizer=quantizer)
    autoencoder = VQVAE(config, (size, size)).eval()
    prior = Transformer(
        TransformerConfig(layers=1, width=16, heads=2),
        autoencoder.code_spec(),
        10,
        stage1_fingerprint=autoencoder.fingerprint(),
    )
    TwoStagePipeline(autoencoder, prior.eval()).save_pretrained(folder)


def generate(model: str, out: str, num: int, options: list[str]) -> dict[str, float]:
    """In this process, with a model that costs next to nothing; that little is counted too."""
    pictures = torch.rand(256, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def sample(self, indices, *arguments, **settings):
        return (torch.tensor(list(indices))[:, None, None] % 256,)

    def decode(self, codes):
        return pictures[codes[0].flatten()]

    TwoStagePipeline.sample, VQVAE.decode = sample, decode  # type: ignore[method-assign, assignment]
    config = GenerateConfig(model=model, out=out, num=num, device="cpu", **dict(zip(*[iter(options)] * 2, strict=True)))
    begin, processor = time.perf_counter(), time.process_time()
    generate_files(config)
    return {
        "seconds": time.perf_counter() - begin,
        "processor": time.process_time() - processor,
        "megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def in_a_process(model: Path, out: Path, num: int, options: list[str]) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.million", "--child", str(model), str(out), str(num), *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def most_files(folder: Path) -> int:
    return max(len(files) + len(folders) for _, folders, files in os.walk(folder))


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        model, out, num, *options = sys.argv[2:]
        print(json.dumps(generate(model, out, int(num), options)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--small", type=int, default=10_000)
    parser.add_argument("--large", type=int, default=1_000_000)
    parser.add_argument("--format", default="png")
    arguments = parser.parse_args()
    write_model(arguments.out / "model")
    print("images     ms an image  of processor  MB   again, s  of processor  entries of a folder")
    for num in (arguments.small, arguments.large):
        out = arguments.out / str(num)
        options = ["format", arguments.format]
        first = in_a_process(arguments.out / "model", out, num, options)
        again = in_a_process(arguments.out / "model", out, num, options)
        print(
            f"{num:<10} {1000 * first['seconds'] / num:<12.3f} {1000 * first['processor'] / num:<13.3f} "
            f"{max(first['megabytes'], again['megabytes']):<4.0f} {again['seconds']:<9.1f} {again['processor']:<13.1f} "
            f"{most_files(out)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
