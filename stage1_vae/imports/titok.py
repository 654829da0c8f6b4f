"""TiTok of continuous tokens, of bytedance/1d-tokenizer: its VAEs, `quantize_mode: vae`."""

from __future__ import annotations

from common.errors import UserError
from common.foreign_weights import Arguments, look_up
from common.renaming import Weights, load_renamed, renamed
from common.titok_weights import NAMES, of_our_pixels, own_patch, own_side, shape, sizes_of
from stage1_vae.likelihoods import GaussianConfig
from stage1_vae.networks.titok import TiTokNetworkConfig
from stage1_vae.vae import VAE, VAEConfig


def import_titok_vae(weights: Weights, config: Arguments | None = None) -> VAE:
    """weights: the file's tensors; config: what `config.json` of the hub holds, of which `model.vq_model` is read.

    What shapes tell is taken from them. Of other widths than the published ones the number of heads is asked for, as
    `vit.heads`. Raises UserError for a model of codes, and for one whose decoder reads text.
    """
    arguments = config or {}
    if (look_up(arguments, "model.vq_model.quantize_mode") or "vae") != "vae" or "quantize.embedding.weight" in weights:
        raise UserError("these are weights of a TiTok of codes (quantize_mode: vq): give --kind titok")
    if any(name.startswith("decoder.text_guidance") for name in weights):
        raise UserError(
            "these are weights of a TA-TiTok of continuous tokens, whose decoder reads a caption: decoders of VAEs "
            "here read latents alone, so that is not supported; give a TiTok, such as titok_bl64_vae_c16_imagenet, or "
            "a TA-TiTok of codes as --kind tatitok"
        )
    tokens, patch, side = shape(weights, "latent_tokens")[0], own_patch(weights), own_side(weights)

    def network(half: str) -> TiTokNetworkConfig:
        sizes = sizes_of(weights, half, arguments)
        width, blocks, heads = sizes["width"], sizes["blocks"], sizes["heads"]
        return TiTokNetworkConfig(patch=patch, tokens=tokens, width=width, blocks=blocks, heads=heads)

    model = VAE(
        VAEConfig(
            channels=shape(weights, "encoder.patch_embed.weight")[1],
            latents=shape(weights, "decoder.decoder_embed.weight")[1],
            encoder=network("encoder"),
            decoder=network("decoder"),
            likelihood=GaussianConfig(),
        ),
        (side, side),
    )
    load_renamed(model, of_our_pixels(weights), name_in_titok)
    return model.eval()


def name_in_titok(key: str) -> str:
    return renamed(key.replace("decoder.network.", "decoder."), NAMES)
