"""TA-TiTok of bytedance/1d-tokenizer (Kim et al. 2025, arXiv:2501.07730), of discrete tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from common.errors import UserError
from common.foreign_weights import Arguments, look_up
from common.renaming import Weights, load_renamed
from common.titok_weights import of_our_pixels, own_patch, own_side, shape
from stage1_vq.autoencoders.tatitok import TATiTok, TATiTokConfig
from stage1_vq.imports.titok import (
    IGNORED,
    has_codes,
    name_in_titok,
    own_quantizer,
    own_sizes,
)
from stage1_vq.imports.vqgan import image_size

TEXT_POSITIONS = "decoder.text_guidance_positional_embedding"
TOKEN_POSITIONS = "decoder.latent_token_positional_embedding"
SHARES = "quantize.embed_prob"
NAMES = {
    "decoder.text.weight": "decoder.text_guidance_proj.weight",
    "decoder.text.bias": "decoder.text_guidance_proj.bias",
    "quantizer.shares": SHARES,
}


def import_tatitok(
    weights: Weights, config: Arguments | None = None, no_text: Tensor | None = None, encoder: str | None = None
) -> TATiTok:
    """weights, config and errors: those of `import_titok`. no_text: t d, the vectors of the empty caption, read where
    none is given; None: zeros, for a model that is to be given captions always. encoder: whose vectors they are, a
    folder or hub id; None: the published model's."""
    arguments = config or {}
    vq = look_up(arguments, "model.vq_model") or {}
    text_length = text_length_of(weights)
    if not has_codes(weights, vq):
        raise UserError(
            "these are weights of a TA-TiTok of continuous tokens (quantize_mode: vae): decoders of VAEs here read "
            "latents alone, so that is not supported; give one of quantize_mode: vq, such as tatitok_bl32_vq"
        )
    refresh = bool(vq.get("clustering_vq", False)) and SHARES in weights
    model = TATiTok(
        TATiTokConfig(
            **own_sizes(weights, arguments),
            patch=own_patch(weights),
            text_length=text_length,
            text_width=shape(weights, "decoder.text_guidance_proj.weight")[1],
            text_encoder=encoder or TATiTokConfig.text_encoder,
            quantizer=own_quantizer(weights, vq, refresh=refresh),
        ),
        image_size(arguments, own_side(weights)),
    )
    # The tokens of a caption stand behind those of the image, and so do their positions.
    changed = of_our_pixels(weights)
    changed[TOKEN_POSITIONS] = torch.cat([weights[TOKEN_POSITIONS], changed.pop(TEXT_POSITIONS)])
    load_renamed(model, changed, name_in_tatitok, IGNORED)
    if no_text is None:
        model.decoder.no_text.zero_()
    else:
        check_no_text(no_text, model)
        model.decoder.no_text.copy_(no_text)
    return model.eval()


def text_length_of(weights: Weights) -> int:
    """How many vectors of a caption the decoder reads. Raises UserError for weights of another model."""
    if TEXT_POSITIONS not in weights:
        raise UserError(f"the weights have no {TEXT_POSITIONS}: they are not those of a TA-TiTok; give --kind titok")
    return shape(weights, TEXT_POSITIONS)[0]


def name_in_tatitok(key: str) -> str | None:
    return None if key == "decoder.no_text" else NAMES.get(key) or name_in_titok(key)


def check_no_text(no_text: Tensor, model: TATiTok) -> None:
    expected = tuple(model.decoder.no_text.shape)
    if tuple(no_text.shape) != expected:
        raise UserError(
            f"the text encoder tells of a caption in {' vectors of '.join(map(str, no_text.shape))} numbers, expected "
            f"{' of '.join(map(str, expected))}: name the CLIP that this model was trained with as --text_encoder"
        )
