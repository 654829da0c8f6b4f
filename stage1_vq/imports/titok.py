"""TiTok with a head for pixels, of bytedance/1d-tokenizer (Yu et al. 2024, arXiv:2406.07550; Kim et al. 2025,
arXiv:2501.07730): its single-stage models of discrete tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from common.errors import UserError
from common.foreign_weights import Arguments, look_up
from common.renaming import Weights, load_renamed, renamed
from stage1_vq.autoencoders.titok import TiTok, TiTokConfig
from stage1_vq.imports.vqgan import codebook_sizes, image_size
from stage1_vq.quantizers import NearestQuantizerConfig

CODEBOOK = "quantize.embedding.weight"
IGNORED = r"quantize\.embed_prob$"  # how often codes were in use, by which training revives them
HEADS = {512: 8, 768: 12, 1024: 16}  # of the published sizes, by their width
NAMES = {  # ours, and theirs
    r"^encoder\.tokens$": "latent_tokens",
    r"^encoder\.patches\.": "encoder.patch_embed.",
    r"^encoder\.output\.": "encoder.conv_out.",
    r"^decoder\.input\.": "decoder.decoder_embed.",
    r"^decoder\.head\.": "decoder.ffn.0.",
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


def import_titok(weights: Weights, config: Arguments | None = None) -> TiTok:
    """weights: the file's tensors; config: what `config.json` of the hub holds, of which `model.vq_model` is read.

    What shapes tell is taken from them: sizes, number of tokens, size of images. Of other widths than the published
    ones the number of heads is asked for, as `vit.heads`. Raises UserError for a model in two stages, for one of
    continuous tokens, and for one whose decoder reads text.
    """
    arguments = config or {}
    vq = look_up(arguments, "model.vq_model") or {}
    check_supported(weights, vq)
    k, d = codebook_sizes(weights, CODEBOOK)
    tokens, _ = shape(weights, "latent_tokens")
    _, channels, patch, _ = shape(weights, "encoder.patch_embed.weight")
    sizes: dict[str, Any] = {"patch": patch, "channels": channels, "tokens": tokens}
    for half in ("encoder", "decoder"):
        width = shape(weights, f"{half}.positional_embedding")[1]
        sizes |= {f"{half}_width": width, f"{half}_blocks": blocks_of(weights, half)}
        sizes[f"{half}_heads"] = heads_of(width, arguments)
    quantizer = NearestQuantizerConfig(
        codebook_size=k,
        dim=d,
        commitment_weight=vq.get("commitment_cost", 0.25),
        codebook_update="gradient",
        l2_normalise=vq.get("use_l2_norm", False),
        kmeans_iterations=0,
        revive_after=0,
    )
    side = math.isqrt(shape(weights, "encoder.positional_embedding")[0] - 1) * patch
    model = TiTok(TiTokConfig(quantizer=quantizer, **sizes), image_size(arguments, side))
    load_renamed(model, of_our_pixels(weights), name_in_titok, IGNORED)
    return model.eval()


def name_in_titok(key: str) -> str | None:
    if key.startswith("quantizer.") and key != "quantizer.codebook":
        return None  # counters of our own
    return renamed(key, NAMES)


def check_supported(weights: Weights, vq: Mapping[str, Any]) -> None:
    """Raises UserError for a relative whose codes or decoder are others."""
    if "decoder.ffn.2.weight" in weights:
        raise UserError(
            "these are weights of a TiTok in two stages, whose decoder makes codes of a MaskGIT-VQGAN: that is not "
            "supported; give one with a head for pixels (is_legacy: false), such as titok_bl64_vq8k_imagenet"
        )
    if any(name.startswith("decoder.text_guidance") for name in weights):
        raise UserError(
            "these are weights of a TA-TiTok, whose decoder reads a caption beside the codes: that is not supported, "
            "as codes here are all that an image is made of; give a TiTok, such as titok_bl64_vq8k_imagenet"
        )
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
    first, last = "encoder.patch_embed", "decoder.conv_out"
    for name in (f"{first}.weight", f"{first}.bias", f"{last}.weight", f"{last}.bias"):
        shape(weights, name)
    patches = weights[f"{first}.weight"].float() / 2
    changed[f"{first}.weight"] = patches
    changed[f"{first}.bias"] = weights[f"{first}.bias"].float() + patches.sum((1, 2, 3))
    changed[f"{last}.weight"] = weights[f"{last}.weight"].float() * 2
    changed[f"{last}.bias"] = weights[f"{last}.bias"].float() * 2 - 1
    for name in ("encoder.conv_out.weight", "decoder.ffn.0.weight"):
        if name in weights:
            changed[name] = weights[name].flatten(1)
    if "decoder.mask_token" in weights:
        changed["decoder.mask_token"] = weights["decoder.mask_token"].flatten(1).reshape(1, -1)
    return changed
