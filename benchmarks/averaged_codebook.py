"""A codebook by EMA beside averaged networks: copied as it is, or averaged as they are.

    python -m benchmarks.averaged_codebook --images cifar10

A narrow VQ-VAE is trained at a constant rate; at some steps its averaged encoder and decoder give held-out images back,
with either codebook. Prints a Markdown table of the quantisation error, per element, and the PSNR.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor

from images.datasets import DataConfig, image_datasets, to_float
from metrics.similarity import psnr
from stage1_vq.autoencoders import VQVAE, VQVAEConfig
from stage1_vq.quantizers import NearestQuantizer, NearestQuantizerConfig
from training.ema import EMA

BATCH = 64
REPORTS = (50, 100, 200, 400, 800, 1500, 3000, 6000)


@torch.no_grad()
def figures(model: VQVAE, images: Tensor, codebook: Tensor | None = None) -> str:
    """Of the model at rest, or of one with another codebook; the model is left as it was."""
    assert isinstance(model.quantizer, NearestQuantizer)
    own = model.quantizer.codebook.clone()
    if codebook is not None:
        model.quantizer.codebook.copy_(codebook)
    model.eval()
    outputs = [model(part) for part in images.split(250)]
    model.quantizer.codebook.copy_(own)
    error = torch.stack([output.statistics["quantization_error"] for output in outputs]).mean()
    reconstructions = torch.cat([output.reconstruction for output in outputs]).clamp(-1, 1)
    return f"{error:.4f}, {psnr(F.mse_loss(reconstructions, images)):.2f} dB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--decay", type=float, default=0.999)
    options = parser.parse_args()

    data = DataConfig(path=options.images, image_size=32, channels=3, flip=True, validation_count=1000)
    train, held_out = image_datasets(data, seed=0)
    images = to_float(held_out.fetch(range(len(held_out)), range(len(held_out)))["images"])
    torch.manual_seed(0)
    quantizer = NearestQuantizerConfig(codebook_size=512, dim=64)
    model = VQVAE(VQVAEConfig(width=48, residual_width=32, data_variance=0.253, quantizer=quantizer), (32, 32))
    assert isinstance(model.quantizer, NearestQuantizer)

    def batch() -> Tensor:
        numbers = torch.randint(len(train), (BATCH,)).tolist()
        return to_float(train.fetch(numbers, numbers)["images"])

    with torch.no_grad():
        model.initialise([batch()])
    ema, average = EMA(model, options.decay), model.quantizer.codebook.clone()
    averaged = ema.model
    assert isinstance(averaged, VQVAE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    print("| step | the model itself | averaged, codebook as it is | averaged, codebook averaged |\n|---|---|---|---|")
    for step in range(options.steps):
        torch.stack(list(model.train()(batch()).losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.update()
        ema.update(step)
        live, revived = model.quantizer.codebook, model.quantizer.entries.steps_since_revival == 0
        average.lerp_(live, 1 - min(options.decay, (1 + step) / (10 + step)))
        average[revived] = live[revived]
        if step + 1 in (*REPORTS, options.steps):
            row = figures(model, images), figures(averaged, images), figures(averaged, images, average)
            print(f"| {step + 1} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
