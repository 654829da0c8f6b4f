"""MaskGIT's VQ-GAN (Chang et al. 2022, arXiv:2202.04200) as bytedance/1d-tokenizer and others carry it."""

from __future__ import annotations

from itertools import count, takewhile

from common.errors import UserError
from common.foreign_weights import Arguments
from common.renaming import Weights, load_renamed
from stage1_vq.autoencoders.maskgit_vqgan import MaskGITVQGAN, MaskGITVQGANConfig
from stage1_vq.imports.vqgan import NORM_GROUPS, codebook_sizes, image_size
from stage1_vq.quantizers import NearestQuantizerConfig

CODEBOOK = "quantize.embedding.weight"


def import_maskgit_vqgan(weights: Weights, config: Arguments | None = None) -> MaskGITVQGAN:
    """weights: the file's tensors; config: `commitment_cost`, `norm_num_groups` and `image_size` of other models than
    the published one. Shapes tell the sizes. Raises UserError."""
    arguments = config or {}
    k, d = codebook_sizes(weights, CODEBOOK)
    if "encoder.conv_in.weight" not in weights:
        raise UserError("the weights have no encoder.conv_in.weight: they are not those of this --kind of model")
    width, channels, *_ = weights["encoder.conv_in.weight"].shape
    level = "encoder.down.{}.block.0.conv2.weight"
    levels = list(takewhile(lambda number: level.format(number) in weights, count()))
    block = "encoder.down.0.block.{}.conv2.weight"
    quantizer = NearestQuantizerConfig(
        codebook_size=k,
        dim=d,
        commitment_weight=arguments.get("commitment_cost", 0.25),
        codebook_update="gradient",
        kmeans_iterations=0,
        revive_after=0,
    )
    model = MaskGITVQGAN(
        MaskGITVQGANConfig(
            channels=channels,
            width=width,
            multipliers=tuple(weights[level.format(number)].shape[0] // width for number in levels),
            residual_blocks=len(list(takewhile(lambda number: block.format(number) in weights, count()))),
            norm_groups=arguments.get("norm_num_groups", NORM_GROUPS),
            quantizer=quantizer,
        ),
        image_size(arguments),
    )
    load_renamed(model, of_our_pixels(weights), name_in_maskgit)
    return model.eval()


def name_in_maskgit(key: str) -> str | None:
    if key == "quantizer.codebook":
        return CODEBOOK
    return None if key.startswith("quantizer.") else key


def of_our_pixels(weights: Weights) -> Weights:
    """Their images come out as pixels from 0 to 1, ours from -1 to 1: the last layer takes that in."""
    last = "decoder.conv_out"
    if not {f"{last}.weight", f"{last}.bias"} <= weights.keys():
        return weights  # what is missing is told when they are loaded
    weight, bias = weights[f"{last}.weight"].float() * 2, weights[f"{last}.bias"].float() * 2 - 1
    return {**weights, f"{last}.weight": weight, f"{last}.bias": bias}
