"""The multi-scale tokenizer of VAR (Tian et al. 2024, arXiv:2404.02905)."""

from __future__ import annotations

import re
from itertools import count, takewhile

from common.errors import UserError
from common.foreign_weights import Arguments, given, refuse
from common.renaming import Weights
from stage1_vq.autoencoders.vqgan import VQGAN
from stage1_vq.imports.vqgan import (
    NORM_GROUPS,
    build_vqgan,
    codebook_sizes,
    image_size,
    network_sizes,
    taming_name,
)
from stage1_vq.quantizers import MultiscaleQuantizerConfig

CODEBOOK = "quantize.embedding.weight"
PHI = "quantize.quant_resi.qresi_ls.{}.weight"
IGNORED = r"quantize\.ema_vocab_hit_SV$"  # statistics of the training
PUBLISHED_SCALES = [1, 2, 3, 4, 5, 6, 8, 10, 13, 16]


def import_var(weights: Weights, config: Arguments | None = None) -> VQGAN:
    """weights: the published file, or `trainer.vae_local` of one that training wrote; config: arguments of `VQVAE`, and
    `ch_mult`, `num_res_blocks` and `norm_num_groups`. What the config leaves out the shapes of the weights tell, or
    else the published model. Raises UserError."""
    arguments = config or {}
    phis = len(list(takewhile(lambda number: PHI.format(number) in weights, count())))
    if not phis:
        raise UserError(f"the weights have no {PHI.format(0)}: they are not those of VAR's tokenizer")
    refuse(arguments, {"using_znorm": False, "share_quant_resi": phis})
    weights = with_projections_apart(weights)
    k, d = codebook_sizes(weights, CODEBOOK)
    quantizer = MultiscaleQuantizerConfig(
        scales=tuple(arguments.get("v_patch_nums", PUBLISHED_SCALES)),
        codebook_size=arguments.get("vocab_size", k),
        dim=arguments.get("z_channels", d),
        commitment_weight=arguments.get("beta", 0.25),
        codebook_update="gradient",
        phis=phis,
        phi_share=abs(arguments.get("quant_resi", 0.5)),
        kmeans_iterations=0,
        revive_after=0,
    )
    sizes = {
        **network_sizes(weights, name_in_var),
        **given(
            arguments,
            {
                "z_channels": "z_channels",
                "width": "ch",
                "multipliers": "ch_mult",
                "residual_blocks": "num_res_blocks",
                "quant_conv_kernel": "quant_conv_ks",
            },
        ),
        "norm_groups": arguments.get("norm_num_groups", NORM_GROUPS),
    }
    side = quantizer.scales[-1] * 2 ** (len(sizes["multipliers"]) - 1)
    return build_vqgan(sizes, quantizer, image_size(arguments, side), weights, name_in_var, IGNORED)


def with_projections_apart(weights: Weights) -> Weights:
    """With `q`, `k` and `v` of each attention layer, which VAR has in one convolution, as three."""
    apart = {name: tensor for name, tensor in weights.items() if ".qkv." not in name}
    for name in weights.keys() - apart.keys():
        for letter, part in zip("qkv", weights[name].chunk(3), strict=True):
            apart[name.replace(".qkv.", f".{letter}.")] = part
    return apart


def name_in_var(key: str) -> str | None:
    if match := re.fullmatch(r"quantizer\.phis\.(\d+\.(?:weight|bias))", key):
        return f"quantize.quant_resi.qresi_ls.{match[1]}"
    return CODEBOOK if key == "quantizer.layer.codebook" else taming_name(key)
