"""VQModel and GumbelVQ of taming-transformers (Esser et al. 2021, arXiv:2012.09841).

The VQ autoencoders of latent-diffusion have the same names and arguments.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from common.foreign_weights import Arguments, given, look_up, refuse
from common.renaming import Weights
from stage1_vq.autoencoders.vqgan import VQGAN
from stage1_vq.imports.vqgan import (
    IMAGE_SIZE,
    NORM_GROUPS,
    build_vqgan,
    codebook_sizes,
    image_size,
    network_sizes,
    taming_name,
)
from stage1_vq.quantizers import GumbelQuantizerConfig, NearestQuantizerConfig, QuantizerConfig

# Before the names of a first stage that lies in the file of a Net2NetTransformer, beside the prior.
IN_NET2NET = "first_stage_model."
# The discriminator and the perceptual network of the loss; averages of the weights; a fixed random projection.
IGNORED = r"loss\.|model_ema\.|colorize$"


def import_vqmodel(weights: Weights, config: Arguments | None = None) -> VQGAN:
    """weights: the file's `state_dict`; config: arguments of `VQModel`, and `norm_num_groups`. Those of a
    Net2NetTransformer will do: its first stage is taken. Raises UserError.

    Where the arguments say nothing the shapes of the weights do, and the published models' 32 norm groups and 256
    pixels hold.
    """
    weights, arguments = first_stage(weights, config or {})
    k, d = codebook_sizes(weights, "quantize.embedding.weight")
    quantizer = NearestQuantizerConfig(
        codebook_size=arguments.get("n_embed", k),
        dim=arguments.get("embed_dim", d),
        codebook_update="gradient",
        kmeans_iterations=0,
        revive_after=0,
    )
    return build(weights, arguments, quantizer, {"quantizer.codebook": "quantize.embedding.weight"})


def import_gumbelvq(weights: Weights, config: Arguments | None = None) -> VQGAN:
    """As `import_vqmodel`, for `GumbelVQ`. Its codes here are the most likely ones: the original's encoder adds noise
    even in eval mode. Raises UserError."""
    weights, arguments = first_stage(weights, config or {})
    k, d = codebook_sizes(weights, "quantize.embed.weight")
    quantizer = GumbelQuantizerConfig(
        codebook_size=arguments.get("n_embed", k),
        dim=arguments.get("embed_dim", d),
        sample="straight-through",
        kl_weight=arguments.get("kl_weight", 1e-8),
        kl_warmup_steps=0,  # there the weight is the same at all steps
        **temperatures(arguments),
    )
    names = {
        "quantizer.logits.weight": "quantize.proj.weight",
        "quantizer.logits.bias": "quantize.proj.bias",
        "quantizer.embedding.weight": "quantize.embed.weight",
    }
    return build(weights, arguments, quantizer, names)


def temperatures(arguments: Arguments) -> dict[str, Any]:
    """The fields of GumbelQuantizerConfig that the original's temperature follows in training: half a cosine wave by
    its `LambdaWarmUpCosineScheduler`, if the arguments tell one; its warm-up, which the published models have not, is
    left out. Else the temperature is 1 throughout."""
    schedule = {"lr_max": 1.0, "lr_min": 1.0, "max_decay_steps": 0, "warm_up_steps": 0}
    schedule |= look_up(arguments, "temperature_scheduler_config.params") or {}
    return {
        "temperature_start": float(schedule["lr_max"]),
        "temperature_end": float(schedule["lr_min"]),
        "temperature_steps": max(0, int(schedule["max_decay_steps"] - schedule["warm_up_steps"])),
    }


def first_stage(weights: Weights, arguments: Arguments) -> tuple[Weights, Arguments]:
    """Of a Net2NetTransformer the part that is its first stage; anything else as it is."""
    part = {name.removeprefix(IN_NET2NET): tensor for name, tensor in weights.items() if name.startswith(IN_NET2NET)}
    if not part:
        return weights, arguments
    return part, look_up(arguments, "first_stage_config.params") or arguments


def build(weights: Weights, arguments: Arguments, quantizer: QuantizerConfig, names: dict[str, str]) -> VQGAN:
    """names: of the quantizer's tensors, ours and theirs."""
    original_name = partial(name_in_taming, quantizer_names=names)
    refuse(arguments, {"remap": None})
    sizes = {
        **network_sizes(weights, original_name),
        **sizes_of(arguments.get("ddconfig", {})),
        "norm_groups": arguments.get("norm_num_groups", NORM_GROUPS),
    }
    resolution = arguments.get("ddconfig", {}).get("resolution", IMAGE_SIZE)
    return build_vqgan(sizes, quantizer, image_size(arguments, resolution), weights, original_name, IGNORED)


def name_in_taming(key: str, quantizer_names: dict[str, str]) -> str | None:
    return quantizer_names.get(key) or taming_name(key)


def sizes_of(ddconfig: Arguments) -> dict[str, Any]:
    """The fields of VQGANConfig that `ddconfig`, the arguments of the networks, tells. Raises UserError."""
    refuse(ddconfig, {"double_z": False, "resamp_with_conv": True, "give_pre_end": False, "tanh_out": False})
    refuse(ddconfig, {"out_ch": ddconfig.get("in_channels", ddconfig.get("out_ch"))})
    sizes = given(
        ddconfig,
        {
            "channels": "in_channels",
            "width": "ch",
            "multipliers": "ch_mult",
            "residual_blocks": "num_res_blocks",
            "z_channels": "z_channels",
        },
    )
    if {"attn_resolutions", "resolution", "ch_mult"} <= ddconfig.keys():
        # Sides at which there is attention, in an image of `resolution`; at any other size the levels are the same.
        sides = [ddconfig["resolution"] // 2**level for level in range(len(ddconfig["ch_mult"]))]
        attended = tuple(level for level, side in enumerate(sides) if side in ddconfig["attn_resolutions"])
        sizes["attention_levels"] = attended
    return sizes
