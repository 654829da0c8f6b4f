"""VQModel of diffusers, and with `norm_type: spatial` MoVQ (Zheng et al. 2022, arXiv:2209.09002)."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from common.errors import UserError
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
# Names inside an attention layer, ours and theirs; and those that files from before diffusers 0.17 have.
PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OLD_PROJECTIONS = {"q": "query", "k": "key", "v": "value", "proj_out": "proj_attn"}


def import_diffusers(weights: Weights, config: Arguments | None = None) -> VQGAN:
    """weights: of `diffusion_pytorch_model.safetensors`; config: its `config.json`, the constructor's arguments. What
    the config leaves out the shapes of the weights tell. Raises UserError."""
    arguments = config or {}
    k, d = codebook_sizes(weights, CODEBOOK)
    original_name = partial(name_in_diffusers, levels=0, old=any(".query." in name for name in weights))
    sizes = {**network_sizes(weights, original_name), **sizes_of(arguments)}
    quantizer = NearestQuantizerConfig(
        codebook_size=arguments.get("num_vq_embeddings", k),
        dim=given(arguments, {"dim": "vq_embed_dim"}).get("dim", d),
        codebook_update="gradient",
        kmeans_iterations=0,
        revive_after=0,
    )
    original_name = partial(original_name, levels=len(sizes["multipliers"]))
    return build_vqgan(sizes, quantizer, image_size(arguments), weights, original_name)


def sizes_of(arguments: Arguments) -> dict[str, Any]:
    """The fields of VQGANConfig that the arguments tell. Raises UserError."""
    groups = arguments.get("norm_num_groups", NORM_GROUPS)
    refuse(arguments, {"act_fn": "silu", "mid_block_add_attention": True, "out_channels": arguments.get("in_channels")})
    if arguments.get("norm_type") == "spatial" and arguments.get("spatial_norm_groups", NORM_GROUPS) != groups:
        raise UserError(
            f"the original's norm_num_groups={groups} with norm_type=spatial is not supported: expected {NORM_GROUPS}, "
            "the number of groups inside its spatial norms"
        )
    sizes = given(
        arguments, {"channels": "in_channels", "z_channels": "latent_channels", "residual_blocks": "layers_per_block"}
    )
    sizes["norm_groups"] = groups
    if "norm_type" in arguments:
        sizes["spatial_norm"] = arguments["norm_type"] == "spatial"
    if "block_out_channels" in arguments:
        width, *others = arguments["block_out_channels"]
        sizes.update(width=width, multipliers=(1, *(other / width for other in others)))
    if "down_block_types" in arguments:
        down = ["Attn" in block for block in arguments["down_block_types"]]
        up = ["Attn" in block for block in arguments.get("up_block_types", arguments["down_block_types"][::-1])]
        if down != up[::-1]:
            raise UserError(
                f"the original's up_block_types={arguments['up_block_types']} is not supported: expected the mirror "
                "image of down_block_types"
            )
        sizes["attention_levels"] = tuple(level for level, attends in enumerate(down) if attends)
    return sizes


def name_in_diffusers(key: str, levels: int, old: bool) -> str | None:
    """levels: of the decoder, which diffusers numbers from coarse to fine; old: with the attention's former names."""
    if key == "quantizer.codebook":
        return CODEBOOK
    name = taming_name(key)
    projections = OLD_PROJECTIONS if old else PROJECTIONS
    return name and renamed(
        name,
        {
            r"\.mid\.block_1\.": ".mid_block.resnets.0.",
            r"\.mid\.block_2\.": ".mid_block.resnets.1.",
            r"\.mid\.attn_1\.": ".mid_block.attentions.0.",
            r"\.down\.": ".down_blocks.",
            r"\.up\.(\d+)\.": partial(coarse_to_fine, levels=levels),
            r"\.block\.": ".resnets.",
            r"\.attn\.": ".attentions.",
            r"\.downsample\.": ".downsamplers.0.",
            r"\.upsample\.": ".upsamplers.0.",
            r"\.nin_shortcut\.": ".conv_shortcut.",
            r"\.norm_out\.": ".conv_norm_out.",
            r"(attentions\.\d+)\.norm\.(norm_layer|conv_y|conv_b)\.": r"\1.spatial_norm.\2.",
            r"(attentions\.\d+)\.norm\.": r"\1.group_norm.",
            **{rf"(attentions\.\d+)\.{ours}\.": rf"\1.{theirs}." for ours, theirs in projections.items()},
        },
    )


def coarse_to_fine(match: re.Match[str], levels: int) -> str:
    return f".up_blocks.{levels - 1 - int(match[1])}."
