"""TiTok of bytedance/1d-tokenizer (Yu et al. 2024, arXiv:2406.07550; Kim et al. 2025, arXiv:2501.07730), of discrete
tokens: its models in one stage, with a head for pixels, and those in two, with the decoder of MaskGIT's VQ-GAN."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import count, takewhile
from typing import Any

import torch

from common.errors import UserError
from common.foreign_weights import Arguments, look_up
from common.renaming import Weights, load_renamed, renamed
from stage1_vq.autoencoders.titok import TiTok, TiTokConfig
from stage1_vq.autoencoders.titok_two_stage import TwoStageTiTok, TwoStageTiTokConfig
from stage1_vq.imports.vqgan import NORM_GROUPS, codebook_sizes, image_size
from stage1_vq.quantizers import NearestQuantizerConfig

CODEBOOK = "quantize.embedding.weight"
IGNORED = r"quantize\.embed_prob$"  # how often codes were in use, by which training revives them
PIXELS = "decoder.pixels."  # MaskGIT's decoder of a model in two stages
HEADS = {512: 8, 768: 12, 1024: 16}  # of the published sizes, by their width
NAMES = {  # ours, and theirs
    r"^encoder\.tokens$": "latent_tokens",
    r"^encoder\.patches\.": "encoder.patch_embed.",
    r"^encoder\.output\.": "encoder.conv_out.",
    r"^decoder\.input\.": "decoder.decoder_embed.",
    r"^decoder\.head\.(?=\d)": "decoder.ffn.",  # of two stages, whose head has layers
    r"^decoder\.head\.": "decoder.ffn.0.",
    r"^decoder\.codebook$": "pixel_quantize.embedding.weight",
    r"^quantizer\.codebook$": CODEBOOK,
    r"\.transformer\.blocks\.": ".transformer.",
    r"\.transformer\.class_token$": ".class_embedding",
    r"\.transformer\.positions$": ".positional_embedding",
    r"\.transformer\.token_positions$": ".latent_token_positional_embedding",
    r"\.transformer\.norm_before\.": ".ln_pre.",
    r"\.transformer\.norm_after\.": ".ln_post.",
    r"\.norm([12])\.": r".ln_\1.",
    r"\.attn\.qkv\.": ".attn.in_proj_",
    r"\.attn\.proj\.": ".attn.out_proj.",
    r"\.mlp\.fc1\.": ".mlp.c_fc.",
    r"\.mlp\.fc2\.": ".mlp.c_proj.",
}


def import_titok(weights: Weights, config: Arguments | None = None) -> TiTok | TwoStageTiTok:
    """weights: the file's tensors; config: what `config.json` of the hub holds, of which `model.vq_model` is read.

    What shapes tell is taken from them: sizes, number of tokens, size of images. Of other widths than the published
    ones the number of heads is asked for, as `vit.heads`. Raises UserError for a model of continuous tokens, and for
    one whose decoder reads text.
    """
    arguments = config or {}
    vq = look_up(arguments, "model.vq_model") or {}
    check_supported(weights, vq)
    sizes, quantizer = own_sizes(weights, arguments), own_quantizer(weights, vq)
    patch, size = shape(weights, "encoder.patch_embed.weight")[2], own_image_size(weights, arguments)
    model: TiTok | TwoStageTiTok
    if in_two_stages(weights):
        sizes |= pixel_sizes(weights, patch, arguments)
        model = TwoStageTiTok(TwoStageTiTokConfig(quantizer=quantizer, **sizes), size)
    else:
        model = TiTok(TiTokConfig(quantizer=quantizer, patch=patch, **sizes), size)
    load_renamed(model, of_our_pixels(weights), name_in_titok, IGNORED)
    return model.eval()


def own_sizes(weights: Weights, arguments: Arguments) -> dict[str, Any]:
    """The fields that the configs of the family have in common, as shapes tell them."""
    tokens, _ = shape(weights, "latent_tokens")
    sizes: dict[str, Any] = {"channels": shape(weights, "encoder.patch_embed.weight")[1], "tokens": tokens}
    for half in ("encoder", "decoder"):
        width = shape(weights, f"{half}.positional_embedding")[1]
        sizes |= {f"{half}_width": width, f"{half}_blocks": blocks_of(weights, half)}
        sizes[f"{half}_heads"] = heads_of(width, arguments)
    return sizes


def own_quantizer(weights: Weights, vq: Mapping[str, Any], *, refresh: bool = False) -> NearestQuantizerConfig:
    k, d = codebook_sizes(weights, CODEBOOK)
    return NearestQuantizerConfig(
        codebook_size=k,
        dim=d,
        commitment_weight=vq.get("commitment_cost", 0.25),
        codebook_update="gradient",
        l2_normalise=vq.get("use_l2_norm", False),
        kmeans_iterations=0,
        revive_after=0,
        refresh=refresh,
    )


def own_image_size(weights: Weights, arguments: Arguments) -> tuple[int, int]:
    """(H, W): of the config, or of a square of as many patches as have positions."""
    patch = shape(weights, "encoder.patch_embed.weight")[2]
    return image_size(arguments, math.isqrt(shape(weights, "encoder.positional_embedding")[0] - 1) * patch)


def in_two_stages(weights: Weights) -> bool:
    return "decoder.ffn.2.weight" in weights


def pixel_sizes(weights: Weights, patch: int, arguments: Arguments) -> dict[str, Any]:
    """The fields of TwoStageTiTokConfig that are of its codebook and of MaskGIT's decoder. Raises UserError."""
    k, d = codebook_sizes(weights, "pixel_quantize.embedding.weight")
    level = "pixel_decoder.up.{}.block.0.conv2.weight"
    levels = list(takewhile(lambda number: level.format(number) in weights, count()))
    if 2 ** (len(levels) - 1) != patch:
        raise UserError(
            f"the pixel decoder of these weights has {len(levels)} levels, which do not make patches of {patch} "
            "pixels: they are not those of a TiTok in two stages"
        )
    width = shape(weights, "pixel_decoder.conv_out.weight")[1]
    block = "pixel_decoder.up.0.block.{}.conv2.weight"
    return {
        "pixel_codebook_size": k,
        "pixel_dim": d,
        "pixel_width": width,
        "pixel_multipliers": tuple(weights[level.format(number)].shape[0] // width for number in levels),
        "pixel_residual_blocks": len(list(takewhile(lambda number: block.format(number) in weights, count()))),
        "norm_groups": arguments.get("norm_num_groups", NORM_GROUPS),
    }


def name_in_titok(key: str) -> str | None:
    if key.startswith("quantizer.") and key != "quantizer.codebook":
        return None  # counters of our own
    if key.startswith(PIXELS):
        return f"pixel_decoder.{key.removeprefix(PIXELS)}"
    return renamed(key, NAMES)


def check_supported(weights: Weights, vq: Mapping[str, Any]) -> None:
    """Raises UserError for a relative whose codes or decoder are others."""
    if in_two_stages(weights) and not vq.get("is_legacy", True):
        raise UserError(
            "these are weights of a TiTok in two stages with is_legacy: false, whose tokens lie in another order: none "
            "was published, and that is not supported; give one of is_legacy: true, such as titok_l32_imagenet"
        )
    if in_two_stages(weights) and not vq.get("finetune_decoder", True):
        raise UserError(
            "these are weights of a TiTok whose decoder was not trained on pixels (finetune_decoder: false), half of a "
            "training in two stages: that is not supported; give the model of its second stage"
        )
    if any(name.startswith("decoder.text_guidance") for name in weights):
        raise UserError(
            "these are weights of a TA-TiTok, whose decoder reads a caption beside the codes: give --kind tatitok"
        )
    check_codes_are_discrete(weights, vq)


def check_codes_are_discrete(weights: Weights, vq: Mapping[str, Any]) -> None:
    if vq.get("quantize_mode", "vq") != "vq" or CODEBOOK not in weights:
        raise UserError(
            "these are weights of a TiTok of continuous tokens (quantize_mode: vae), which has no codes: that is not "
            "supported; give one of quantize_mode: vq, such as titok_bl64_vq8k_imagenet"
        )


def shape(weights: Weights, name: str) -> tuple[int, ...]:
    if name not in weights:
        raise UserError(f"the weights have no {name}: they are not those of this --kind of model")
    return tuple(weights[name].shape)


def blocks_of(weights: Weights, half: str) -> int:
    found = {name.split(".")[2] for name in weights if name.startswith(f"{half}.transformer.")}
    return len(found)


def heads_of(width: int, arguments: Arguments) -> int:
    heads = look_up(arguments, "vit.heads") or HEADS.get(width)
    if heads is None:
        raise UserError(
            f"a TiTok of width {width} is none of the published ones ({', '.join(map(str, HEADS))}), and no shape "
            "tells its number of heads: give it as vit.heads in --config"
        )
    return heads


def of_our_pixels(weights: Weights) -> dict[str, torch.Tensor]:
    """Their pixels are from 0 to 1, ours from -1 to 1: the first layer and the last one take that in. And 1x1
    convolutions of tokens are linear layers here."""
    changed = dict(weights)
    first, last = "encoder.patch_embed", "pixel_decoder.conv_out" if in_two_stages(weights) else "decoder.conv_out"
    for name in (f"{first}.weight", f"{first}.bias", f"{last}.weight", f"{last}.bias"):
        shape(weights, name)
    patches = weights[f"{first}.weight"].float() / 2
    changed[f"{first}.weight"] = patches
    changed[f"{first}.bias"] = weights[f"{first}.bias"].float() + patches.sum((1, 2, 3))
    changed[f"{last}.weight"] = weights[f"{last}.weight"].float() * 2
    changed[f"{last}.bias"] = weights[f"{last}.bias"].float() * 2 - 1
    for name in ("encoder.conv_out.weight", "decoder.ffn.0.weight", "decoder.ffn.2.weight"):
        if name in weights:
            changed[name] = weights[name].flatten(1)
    if "decoder.mask_token" in weights:
        changed["decoder.mask_token"] = weights["decoder.mask_token"].flatten(1).reshape(1, -1)
    return changed
