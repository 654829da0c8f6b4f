"""Memory of a step with and without `train.checkpoint_activations`: bytes of all tensors at the fullest moment of a
forward and backward pass, weights and gradients included, in float32; and the time of both, which is the machine's.

    python -m benchmarks.recompute
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker

from codes.spec import CodeSpec, Grid
from common.recompute import Recomputation, blocks_of
from stage1_vae.binarise import Binarised
from stage1_vae.hierarchies.vdvae import VDVAEConfig
from stage1_vae.likelihoods import BernoulliConfig
from stage1_vae.models import build_model
from stage1_vae.objectives.terms import elbo
from stage1_vq.autoencoders import AUTOENCODERS, VQGANConfig
from stage1_vq.quantizers import NearestQuantizerConfig
from stage2_prior.condition import Condition
from stage2_prior.priors import PRIORS, TransformerConfig

SIDE, BATCH = 32, 4


def prior() -> tuple[nn.Module, Callable[[Any], Tensor]]:
    spec = CodeSpec((Grid("codes", 16, 16, 512),), 64, 64, 3)
    model = PRIORS["transformer"](TransformerConfig(layers=12, width=64, heads=4), spec, 0)
    codes = (torch.randint(512, (BATCH, 16, 16)),)
    return model, lambda called: called(codes, Condition(None)).loss.mean()


def autoencoder() -> tuple[nn.Module, Callable[[Any], Tensor]]:
    quantizer = NearestQuantizerConfig(codebook_size=256, dim=16)
    config = VQGANConfig(
        width=16, multipliers=(1, 2, 2), norm_groups=8, z_channels=16, attention_levels=(2,), quantizer=quantizer
    )
    model, images = AUTOENCODERS["vqgan"](config, (SIDE, SIDE)), torch.rand(BATCH, 3, SIDE, SIDE) * 2 - 1
    return model, lambda called: torch.stack(list(called(images).losses.values())).sum()


def vae(config: Any) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    model = build_model(config, (SIDE, SIDE), Binarised("once", 0))
    images = (torch.rand(BATCH, 1, SIDE, SIDE) > 0.5).float() * 2 - 1
    return model, lambda called: -elbo(called(images)).mean()


VDVAE = VDVAEConfig(
    channels=1,
    width=32,
    latents=4,
    encoder_layers="32x6,32d2,16x4",
    decoder_layers="16x4,32m16,32x5",
    likelihood=BernoulliConfig(),
)
FAMILIES: dict[str, Callable[[], tuple[nn.Module, Callable[[Any], Tensor]]]] = {
    "transformer of 12 blocks": prior,
    "VQ-GAN": autoencoder,
    "VD-VAE of 10 groups": lambda: vae(VDVAE),
}


def measure(name: str, *, recompute: bool) -> tuple[float, float]:
    """Megabytes at the fullest moment, and seconds of a pass that is not watched."""
    torch.manual_seed(0)
    model, loss = FAMILIES[name]()
    model.train()
    recomputation = Recomputation(blocks_of(model) if recompute else [])

    def passes() -> None:
        with recomputation.on():
            found = loss(model)
        found.backward()

    with MemTracker() as tracker:
        passes()
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        passes()
        seconds.append(time.perf_counter() - begin)
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] / 1e6, min(seconds)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    print(f"{'':26}{'MB kept':>10}{'recomputed':>12}{'share':>8}{'time':>8}")
    for name in FAMILIES:
        kept, before = measure(name, recompute=False)
        recomputed, after = measure(name, recompute=True)
        print(f"{name:26}{kept:10.1f}{recomputed:12.1f}{recomputed / kept:8.2f}{after / before:7.1f}x", flush=True)


if __name__ == "__main__":
    main()
