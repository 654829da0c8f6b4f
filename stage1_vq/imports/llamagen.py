"""The tokenizers VQ-8 and VQ-16 of LlamaGen (Sun et al. 2024, arXiv:2406.06525)."""

from __future__ import annotations

import re
from functools import partial

from common.foreign_weights import Arguments, given, refuse
from common.renaming import Weights, renamed
from stage1_vq.autoencoders.vqgan import VQGAN
from stage1_vq.imports.vqgan import (
    NORM_GROUPS,
    build_vqgan,
    codebook_sizes,
    image_size,
    network_sizes,
    taming_name,
)
from stage1_vq.quantizers import NearestQuantizerConfig

CODEBOOK = "quantize.embedding.weight"
IGNORED = r"quantize\.codebook_used$"  # statistics of the training


def import_llamagen(weights: Weights, config: Arguments | None = None) -> VQGAN:
    """weights: the file's `ema` or `model`; config: fields of `ModelArgs`, and `ch`, `num_res_blocks` and
    `norm_num_groups`. What the config leaves out the shapes of the weights tell. Raises UserError."""
    arguments = config or {}
    # The decoder's levels may only mirror the encoder's.
    refuse(arguments, {"decoder_ch_mult": arguments.get("encoder_ch_mult")})
    k, d = codebook_sizes(weights, CODEBOOK)
    sizes = {
        **network_sizes(weights, partial(name_in_llamagen, levels=0)),
        **given(
            arguments,
            {
                "multipliers": "encoder_ch_mult",
                "z_channels": "z_channels",
                "width": "ch",
                "residual_blocks": "num_res_blocks",
            },
        ),
        "norm_groups": arguments.get("norm_num_groups", NORM_GROUPS),
    }
    quantizer = NearestQuantizerConfig(
        codebook_size=arguments.get("codebook_size", k),
        dim=arguments.get("codebook_embed_dim", d),
        commitment_weight=arguments.get("commit_loss_beta", 0.25),
        codebook_update="gradient",
        l2_normalise=arguments.get("codebook_l2_norm", True),
        kmeans_iterations=0,
        revive_after=0,
    )
    original_name = partial(name_in_llamagen, levels=len(sizes["multipliers"]))
    return build_vqgan(sizes, quantizer, image_size(arguments), weights, original_name, IGNORED)


def name_in_llamagen(key: str, levels: int) -> str | None:
    """levels: of the decoder, which LlamaGen numbers from coarse to fine."""
    if key == "quantizer.codebook":
        return CODEBOOK
    name = taming_name(key)
    return name and renamed(
        name,
        {
            r"\.mid\.block_1\.": ".mid.0.",
            r"\.mid\.attn_1\.": ".mid.1.",
            r"\.mid\.block_2\.": ".mid.2.",
            r"\.block\.": ".res.",
            r"\.down\.": ".conv_blocks.",
            r"\.up\.(\d+)\.": partial(coarse_to_fine, levels=levels),
        },
    )


def coarse_to_fine(match: re.Match[str], levels: int) -> str:
    return f".conv_blocks.{levels - 1 - int(match[1])}."
