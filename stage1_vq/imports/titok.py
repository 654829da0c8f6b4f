"""TiTok of bytedance/1d-tokenizer (Yu et al. 2024, arXiv:2406.07550; Kim et al. 2025, arXiv:2501.07730), of discrete
tokens: its models in one stage, with a head for pixels, and those in two, with the decoder of MaskGIT's VQ-GAN."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count, takewhile
from typing import Any

from common.errors import UserError
from common.foreign_weights import Arguments, look_up
from common.renaming import Weights, load_renamed, renamed
from common.titok_weights import NAMES, of_our_pixels, own_patch, own_side, shape, sizes_of
from stage1_vq.autoencoders.titok import TiTok, TiTokConfig
from stage1_vq.autoencoders.titok_two_stage import TwoStageTiTok, TwoStageTiTokConfig
from stage1_vq.imports.vqgan import NORM_GROUPS, codebook_sizes, image_size
from stage1_vq.quantizers import NearestQuantizerConfig

CODEBOOK = "quantize.embedding.weight"
IGNORED = r"quantize\.embed_prob$"  # how often codes were in use, by which training revives them
PIXELS = "decoder.pixels."  # MaskGIT's decoder of a model in two stages
OF_CODES = {
    r"^decoder\.codebook$": "pixel_quantize.embedding.weight",
    r"^quantizer\.codebook$": CODEBOOK,
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
    patch, size = own_patch(weights), image_size(arguments, own_side(weights))
    model: TiTok | TwoStageTiTok
    if in_two_stages(weights):
        sizes |= pixel_sizes(weights, patch, arguments)
        model = TwoStageTiTok(TwoStageTiTokConfig(quantizer=quantizer, **sizes), size)
    else:
        model = TiTok(TiTokConfig(quantizer=quantizer, patch=patch, **sizes), size)
    last = "pixel_decoder.conv_out" if in_two_stages(weights) else "decoder.conv_out"
    load_renamed(model, of_our_pixels(weights, last), name_in_titok, IGNORED)
    return model.eval()


def own_sizes(weights: Weights, arguments: Arguments) -> dict[str, Any]:
    """The fields that the configs of the family have in common, as shapes tell them."""
    tokens, _ = shape(weights, "latent_tokens")
    sizes: dict[str, Any] = {"channels": shape(weights, "encoder.patch_embed.weight")[1], "tokens": tokens}
    for half in ("encoder", "decoder"):
        sizes |= {f"{half}_{name}": size for name, size in sizes_of(weights, half, arguments).items()}
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
    return renamed(key, {**NAMES, **OF_CODES})


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
    if not has_codes(weights, vq):
        raise UserError(
            "these are weights of a TiTok of continuous tokens (quantize_mode: vae), which has no codes: give --kind "
            "titok-vae, or weights of quantize_mode: vq, such as titok_bl64_vq8k_imagenet"
        )


def has_codes(weights: Weights, vq: Mapping[str, Any]) -> bool:
    """Whether the tokens are discrete."""
    return vq.get("quantize_mode", "vq") == "vq" and CODEBOOK in weights
