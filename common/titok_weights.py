"""The weights of bytedance/1d-tokenizer (TiTok, Yu et al. 2024, arXiv:2406.07550; TA-TiTok, Kim et al. 2025,
arXiv:2501.07730), whatever their tokens are: names, what their shapes tell, and their pixels as ours."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from common.errors import UserError
from common.foreign_weights import Arguments, look_up
from common.renaming import Weights

HEADS = {512: 8, 768: 12, 1024: 16}  # of the published sizes, by their width
NAMES = {  # ours, and theirs
    r"^encoder\.tokens$": "latent_tokens",
    r"^encoder\.patches\.": "encoder.patch_embed.",
    r"^encoder\.output\.": "encoder.conv_out.",
    r"^decoder\.input\.": "decoder.decoder_embed.",
    r"^decoder\.head\.(?=\d)": "decoder.ffn.",  # of two stages, whose head has layers
    r"^decoder\.head\.": "decoder.ffn.0.",
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


def shape(weights: Weights, name: str) -> tuple[int, ...]:
    if name not in weights:
        raise UserError(f"the weights have no {name}: they are not those of this --kind of model")
    return tuple(weights[name].shape)


def own_patch(weights: Weights) -> int:
    """Pixels along each side of a patch."""
    return shape(weights, "encoder.patch_embed.weight")[2]


def own_side(weights: Weights) -> int:
    """Pixels along each side of an image, a square."""
    return math.isqrt(shape(weights, "encoder.positional_embedding")[0] - 1) * own_patch(weights)


def sizes_of(weights: Weights, half: str, arguments: Arguments) -> dict[str, int]:
    """width, blocks and heads of encoder or decoder. Of other widths than the published ones the number of heads is
    asked for, as `vit.heads`. Raises UserError."""
    width = shape(weights, f"{half}.positional_embedding")[1]
    blocks = {name.split(".")[2] for name in weights if name.startswith(f"{half}.transformer.")}
    return {"width": width, "blocks": len(blocks), "heads": heads_of(width, arguments)}


def heads_of(width: int, arguments: Arguments) -> int:
    heads = look_up(arguments, "vit.heads") or HEADS.get(width)
    if heads is None:
        raise UserError(
            f"a TiTok of width {width} is none of the published ones ({', '.join(map(str, HEADS))}), and no shape "
            "tells its number of heads: give it as vit.heads in --config"
        )
    return heads


def of_our_pixels(weights: Weights, last: str = "decoder.conv_out") -> dict[str, Any]:
    """Their pixels are from 0 to 1, ours from -1 to 1: the first layer and the `last` one take that in. And 1x1
    convolutions of tokens are linear layers here."""
    changed: dict[str, Tensor] = dict(weights)
    first = "encoder.patch_embed"
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
