"""Memory and communication of a step on many GPUs, on paper: of models of real sizes, built without memory.

    python -m benchmarks.scaling_paper

W weights of 4 bytes, S of them in the blocks that FSDP2 spreads, B in the largest block, P processes. In bytes:

    memory   DDP     16 W + 4 W      weights, gradients and two moments; and gradients once more, in messages
             FSDP2   16 (W - S + S / P) + 8 (W - S) + 16 B
                                     of the rest the message and its copy; two blocks whole, with their gradients
    sent     DDP     8 W (P - 1) / P          a ring that averages gradients
             FSDP2   8 (W - S) (P - 1) / P + 12 S (P - 1) / P
                                     blocks gathered for the forward pass and again for the backward pass, gradients
                                     scattered; 8 S of 12 S where they are kept in between

both by each process in a step without accumulation. A discriminator, a companion, is whole on each process. Activations
come on top; they are counted here for one image, as what autograd keeps of the forward pass, in float32. GB are 10^9
bytes.
"""

from __future__ import annotations

import argparse
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor, nn

import configs
from codes.spec import CodeSpec, Grid
from stage1_vq.autoencoders import VQGANConfig
from stage1_vq.autoencoders.vqgan import VQGAN
from stage1_vq.losses.discriminators import PatchGANConfig, build_discriminator
from stage1_vq.quantizers import NearestQuantizerConfig
from stage2_prior.priors import PRIORS, LlamaGenConfig
from training.sharding import units_of

GPUS = 64
GB = 1e9
WAYS = (("DDP", False, True), ("FSDP2", True, True), ("FSDP2, not resharded", True, False))


class Sizes(NamedTuple):
    """In weights."""

    all: int
    shared: int  # in the blocks that have shares
    largest: int  # of them


def sizes_of(model: nn.Module) -> Sizes:
    blocks = [sum(weight.numel() for weight in unit.parameters()) for unit in units_of(model)]
    return Sizes(sum(weight.numel() for weight in model.parameters()), sum(blocks), max(blocks, default=0))


def memory(sizes: Sizes, processes: int, shares: bool) -> float:
    """Bytes of a process, activations apart."""
    if not shares:
        return 20.0 * sizes.all
    whole = sizes.all - sizes.shared
    return 16 * (whole + sizes.shared / processes) + 8 * whole + 16 * sizes.largest


def sent(sizes: Sizes, processes: int, shares: bool, reshard: bool = True) -> float:
    """Bytes that a process sends in a step."""
    part = (processes - 1) / processes
    if not shares:
        return 8 * sizes.all * part
    return (8 * (sizes.all - sizes.shared) + (12 if reshard else 8) * sizes.shared) * part


def vqgan() -> VQGAN:
    """Of the recipe imagenet256_vqgan, for 256x256 pixels."""
    recipe = yaml.safe_load((Path(str(files(configs))) / "stage1" / "imagenet256_vqgan.yaml").read_text())["model"]
    fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in recipe.items()}
    quantizer = {name: value for name, value in fields.pop("quantizer").items() if name != "kind"}
    return VQGAN(VQGANConfig(**fields, quantizer=NearestQuantizerConfig(**quantizer)), (256, 256))


def kept_by_autograd(run: Any) -> int:
    """Bytes that the backward pass of what `run` computes would need, each tensor once."""
    kept: dict[int, int] = {}
    tensors: list[Tensor] = []  # held, so that no two have one address

    def pack(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(kept.values())


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with torch.device("meta"):
        autoencoder = vqgan()
        discriminator = build_discriminator(PatchGANConfig(), 3, (256, 256))
        codes = CodeSpec((Grid("codes", 24, 24, 16384),), 384, 384, 3)
        prior = PRIORS["llamagen"](LlamaGenConfig(layers=24, width=3200, heads=32), codes, 1000)
        image = torch.empty(1, 3, 256, 256)
        latents = torch.empty(1, autoencoder.quantizer.dim, 16, 16)
        activations = kept_by_autograd(lambda: (autoencoder.encoder(image), autoencoder.decoder(latents)))
    beside = sum(weight.numel() for weight in discriminator.parameters())
    print("| model | way | weights, M | in blocks, M | memory, GB | sent in a step, GB |")
    print("|---|---|---|---|---|---|")
    for name, model, companion in (("VQ-GAN", autoencoder, beside), ("prior", prior, 0)):
        sizes = sizes_of(model)
        weights = f"{sizes.all / 1e6:.0f} | {sizes.shared / 1e6:.0f}"
        for way, shares, reshard in WAYS:
            kept = memory(sizes, GPUS, shares) + 20 * companion + (0 if reshard else 4 * sizes.shared)
            moved = sent(sizes, GPUS, shares, reshard) + 8 * companion * (GPUS - 1) / GPUS
            print(f"| {name} | {way} | {weights} | {kept / GB:.1f} | {moved / GB:.1f} |")
    print(f"activations of one image in the VQ-GAN: {activations / GB:.1f} GB")


if __name__ == "__main__":
    main()
