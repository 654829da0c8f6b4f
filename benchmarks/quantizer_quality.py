"""Our quantizers beside those of vector-quantize-pytorch on the same latents: error and use after equal training.

    python -m benchmarks.quantizer_quality --model runs/cifar10_vqvae --images cifar10

The latents are what a trained encoder makes of the images before they are quantized, scaled to variance 1. Each
quantizer learns to give them back: `steps` batches, Adam on what it learns by gradient (the squared error, and its own
losses) and its own update for the rest; both sides see the same batches in the same order. Then held-out latents are
quantized: the
error is the mean squared error as a share of their variance, use is the share of codes that occur in them.
Prints a Markdown table.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from common.model_io import load_pretrained
from images.datasets import DataConfig, image_datasets, to_float
from stage1_vq.autoencoders import AUTOENCODERS
from stage1_vq.quantizers import (
    BSQConfig,
    FSQConfig,
    GroupedQuantizerConfig,
    LFQConfig,
    NearestQuantizerConfig,
    ResidualQuantizerConfig,
    SimVQConfig,
    build_quantizer,
)

LEARNING_RATE = 1e-3
BATCH = 64  # images


def pairs(d: int) -> dict[str, tuple[Any, Callable[[], nn.Module]]]:
    """By name: our config, and the peer with the same vocabulary and the settings its authors advise."""
    import vector_quantize_pytorch as peer

    plain = {"decay": 0.99, "kmeans_init": True, "threshold_ema_dead_code": 2, "rotation_trick": False}
    nearest = NearestQuantizerConfig(codebook_size=256, dim=d, revive_after=10)
    return {
        "nearest, 1,024": (
            # Rarely used codes count as dead too, as by the peer's threshold.
            NearestQuantizerConfig(codebook_size=1024, dim=d, revive_after=10, revive_below=0.25),
            lambda: peer.VectorQuantize(d, 1024, **plain),
        ),
        "nearest, 8 wide and l2-normalised, 1,024": (
            NearestQuantizerConfig(codebook_size=1024, dim=d, lookup_dim=8, l2_normalise=True, revive_after=10),
            lambda: peer.VectorQuantize(d, 1024, codebook_dim=8, use_cosine_sim=True, **plain),
        ),
        "residual, 4 x 256": (
            ResidualQuantizerConfig(depth=4, layer=nearest),
            lambda: peer.ResidualVQ(dim=d, num_quantizers=4, codebook_size=256, **plain),
        ),
        "grouped, 2 x 256": (
            GroupedQuantizerConfig(
                groups=2, layer=NearestQuantizerConfig(codebook_size=256, dim=d // 2, revive_after=10)
            ),
            lambda: peer.GroupedResidualVQ(dim=d, groups=2, num_quantizers=1, codebook_size=256, **plain),
        ),
        "SimVQ, 1,024": (
            SimVQConfig(codebook_size=1024, dim=d),
            lambda: peer.SimVQ(d, 1024, rotation_trick=False),
        ),
        "FSQ, 8-5-5-5": (
            FSQConfig(levels=(8, 5, 5, 5), dim=d),
            lambda: peer.FSQ([8, 5, 5, 5], dim=d),
        ),
        "LFQ, 2^10": (
            LFQConfig(bits=10, dim=d, entropy_bits=10),
            lambda: peer.LFQ(dim=d, codebook_size=2**10, entropy_loss_weight=0.1, commitment_loss_weight=0.25),
        ),
        "BSQ, 2^10": (
            BSQConfig(bits=10, dim=d, entropy_bits=10, inverse_temperature=30.0),
            lambda: peer.LFQ(dim=d, codebook_size=2**10, entropy_loss_weight=0.1, spherical=True),
        ),
    }


class Ours:
    """One of our quantizers, in the loop's order: forward, backward, optimiser, update."""

    def __init__(self, config: Any, first: Tensor) -> None:
        self.quantizer = build_quantizer(config)
        self.quantizer.initialise([first])

    def train(self, z: Tensor) -> Tensor:
        quantized = self.quantizer(z)
        return F.mse_loss(quantized.z_q, z) + torch.stack([torch.zeros(()), *quantized.losses.values()]).sum()

    def after_step(self) -> None:
        self.quantizer.update()

    def quantize(self, z: Tensor) -> tuple[Tensor, list[Tensor]]:
        quantized = self.quantizer(z)
        return quantized.z_q, list(quantized.codes)


class Peer:
    """The same of vector-quantize-pytorch, whose codebooks move in the forward pass."""

    def __init__(self, quantizer: nn.Module) -> None:
        self.quantizer = quantizer

    def train(self, z: Tensor) -> Tensor:
        z_q, _, loss = self.outputs(z)
        return F.mse_loss(z_q, z) + loss.sum()

    def after_step(self) -> None:
        pass

    def outputs(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z_q b d h w, indices, loss. The peer gets sequences, b n d: some of its classes fail on images."""
        z_q, indices, *losses = self.quantizer(rearrange(z, "b d h w -> b (h w) d"))
        return rearrange(z_q, "b (h w) d -> b d h w", h=z.shape[2]), indices, losses[0] if losses else torch.zeros(())

    def quantize(self, z: Tensor) -> tuple[Tensor, list[Tensor]]:
        z_q, indices, _ = self.outputs(z)
        if indices.ndim == 4:  # groups b n layers
            indices = rearrange(indices, "groups b n layers -> b n (groups layers)")
        return z_q, list(indices.reshape(len(z), z.shape[2] * z.shape[3], -1).unbind(-1))


@dataclass(frozen=True)
class Outcome:
    error: float  # share of the variance
    use: float  # share of codes, over all grids


def batches(train: Tensor, steps: int) -> Iterator[Tensor]:
    order = torch.Generator().manual_seed(0)
    for _ in range(steps):
        yield train[torch.randint(len(train), (BATCH,), generator=order)]


def study(side: Ours | Peer, train: Tensor, held_out: Tensor, vocabularies: list[int], steps: int) -> Outcome:
    weights = [weight for weight in side.quantizer.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=LEARNING_RATE) if weights else None
    side.quantizer.train()
    for z in batches(train, steps):
        loss = side.train(z)
        if optimizer and loss.requires_grad:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        side.after_step()
    side.quantizer.eval()
    with torch.no_grad():
        parts = [side.quantize(z) for z in held_out.split(BATCH)]
    error = F.mse_loss(torch.cat([z_q for z_q, _ in parts]), held_out) / held_out.var()
    grids = [torch.cat(grid) for grid in zip(*(codes for _, codes in parts), strict=True)]
    used = sum(len(grid.unique()) for grid in grids)
    return Outcome(float(error), used / sum(vocabularies))


@torch.no_grad()
def latents(model: Path, images: str, count: int) -> tuple[Tensor, Tensor]:
    """Of training and held-out images: b d h w each."""
    autoencoder = load_pretrained(model, AUTOENCODERS)
    size = autoencoder.image_size
    config = DataConfig(path=images, image_size=size, channels=autoencoder.channels, validation_count=1000)
    parts = []
    for dataset, number in zip(image_datasets(config, 0), (count, 1000), strict=True):
        z = []
        for start in range(0, min(number, len(dataset)), 250):
            indices = range(start, start + 250)
            z.append(autoencoder.latents(to_float(dataset.fetch(indices, indices)["images"])))
        parts.append(torch.cat(z))
    mean, scale = parts[0].mean(), parts[0].std()
    return (parts[0] - mean) / scale, (parts[1] - mean) / scale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a stage-one run whose encoder makes the latents")
    parser.add_argument("--images", required=True, help="what it was trained on: a folder, an .npz file or a name")
    parser.add_argument("--count", type=int, default=10000, help="training images")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=1, help="repetitions, of which the mean is printed")
    parser.add_argument("--only", nargs="*", help="quantizers whose name contains one of these")
    args = parser.parse_args()
    train, held_out = latents(args.model, args.images, args.count)
    print(
        f"torch {torch.__version__}; vector-quantize-pytorch {version('vector-quantize-pytorch')}; {args.steps} steps "
        f"of {BATCH} images, latents {tuple(train.shape[1:])}, {len(held_out)} held-out images, {args.seeds} seeds\n"
    )
    print("| quantizer | error, ours | error, peer | use, ours | use, peer |")
    print("|---|---:|---:|---:|---:|")
    for name, (config, make_peer) in pairs(train.shape[1]).items():
        if args.only and not any(part in name for part in args.only):
            continue
        ours, peers = [], []
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            side = Ours(config, next(batches(train, 1)))  # the peer takes its first batch too
            vocabularies = [grid.vocabulary for grid in side.quantizer.grids(*train.shape[2:])]
            ours.append(study(side, train, held_out, vocabularies, args.steps))
            torch.manual_seed(seed)
            peers.append(study(Peer(make_peer()), train, held_out, vocabularies, args.steps))
        mean = {
            (who, figure): sum(getattr(outcome, figure) for outcome in outcomes) / len(outcomes)
            for who, outcomes in (("ours", ours), ("peer", peers))
            for figure in ("error", "use")
        }
        print(
            f"| {name} | {mean['ours', 'error']:.4f} | {mean['peer', 'error']:.4f} | {mean['ours', 'use']:.1%} | "
            f"{mean['peer', 'use']:.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
