"""VD-VAE as its authors trained it (github.com/openai/vdvae): bare state dicts `*-model.th` and, of the averaged
weights, `*-model-ema.th`."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.foreign_weights import Arguments, given
from common.renaming import Weights, load_renamed, renamed
from stage1_vae.hierarchies.vdvae import VDVAE, VDVAEConfig
from stage1_vae.likelihoods import LogisticMixtureConfig

# Minus the mean of pixels in the training data, and 1 over their standard deviation, by the original's `dataset`.
PIXELS = {
    "cifar10": (-120.63838, 1 / 64.16736),
    "imagenet32": (-116.2373, 1 / 69.37404),
    "imagenet64": (-115.92961967, 1 / 69.37404),
    "ffhq_1024": (-0.4387 * 255, 1 / (0.2743 * 255)),  # of values from 0 to 1 there
}
LAYERS = {  # of the published models, encoder and decoder
    "cifar10": (
        "32x11,32d2,16x6,16d2,8x6,8d2,4x3,4d4,1x3",
        "1x1,4m1,4x2,8m4,8x5,16m8,16x10,32m16,32x21",
    ),
    "imagenet32": (
        "32x15,32d2,16x9,16d2,8x8,8d2,4x6,4d4,1x6",
        "1x2,4m1,4x4,8m4,8x9,16m8,16x19,32m16,32x40",
    ),
    "imagenet64": (
        "64x11,64d2,32x20,32d2,16x9,16d2,8x8,8d2,4x7,4d4,1x5",
        "1x2,4m1,4x3,8m4,8x7,16m8,16x15,32m16,32x31,64m32,64x12",
    ),
    "ffhq_1024": (
        "1024x1,1024d2,512x3,512d2,256x5,256d2,128x7,128d2,64x10,64d2,32x14,32d2,16x7,16d2,8x5,8d2,4x5,4d4,1x4",
        "1x2,4m1,4x3,8m4,8x4,16m8,16x9,32m16,32x20,64m32,64x14,128m64,128x7,256m128,256x2,512m256,1024m512",
    ),
}
WIDTHS = {"ffhq_1024": "512:32,256:64,128:512,64:512,32:512,16:512,8:512,4:512,1:512"}
FIELDS = {
    "width": "width",
    "widths": "custom_width_str",
    "latents": "zdim",
    "encoder_layers": "enc_blocks",
    "decoder_layers": "dec_blocks",
    "bottleneck_multiple": "bottleneck_multiple",
    "no_bias_above": "no_bias_above",
    "pixel_shift": "shift",
    "pixel_scale": "scale",
}


def published_configs() -> dict[str, VDVAEConfig]:
    """Of the published models of 8-bit images, by their `dataset`."""
    found = {}
    for name, (encoder, decoder) in LAYERS.items():
        shift, scale = PIXELS[name]
        found[name] = VDVAEConfig(
            width={"cifar10": 384, "ffhq_1024": 16}.get(name, 512),
            widths=WIDTHS.get(name, ""),
            encoder_layers=encoder,
            decoder_layers=decoder,
            pixel_shift=shift,
            pixel_scale=scale,
            likelihood=LogisticMixtureConfig(components=2 if name == "ffhq_1024" else 10),
        )
    return found


def import_vdvae(weights: Weights, config: Arguments | None = None) -> VDVAE:
    """weights: the file's state dict. config: what the original's command line says, of a model that is none of the
    published ones: `enc_blocks`, `dec_blocks`, `custom_width_str`, `bottleneck_multiple`, `no_bias_above`, and
    `dataset`, or `shift` and `scale` of 8-bit pixels. Raises UserError."""
    model_config = config_of(weights, config or {})
    model = VDVAE(model_config, (model_config.image_side, model_config.image_side))
    load_renamed(model, weights, original_name)
    return model.eval()


def config_of(weights: Weights, arguments: Arguments) -> VDVAEConfig:
    told = sizes_of(weights)
    for argument, value in told.items():
        if arguments.get(argument, value) != value:
            raise UserError(
                f"the config has {argument}={arguments[argument]}, but the weights are of a model with "
                f"{argument}={value}; give the config that belongs to these weights, or none"
            )
    named = arguments.get("dataset")
    if named == "ffhq_256":
        raise UserError(
            "dataset=ffhq_256, expected one of 8-bit images: its model is of images of 5 bits, and what it says of "
            "their values is no probability, as its bins overlap"
        )
    blocks = (count_blocks(weights, "encoder.enc_blocks"), count_blocks(weights, "decoder.dec_blocks"))
    base = None
    if "enc_blocks" not in arguments and "dec_blocks" not in arguments:
        for name, published in published_configs().items():
            counts = tuple(len(layers) for layers in published.layers)
            if counts == blocks and named in (None, name):
                base = published
        if base is None:
            raise UserError(
                f"the weights are of a VD-VAE of {blocks[0]} blocks in the encoder and {blocks[1]} in the decoder, "
                f"which is none of the published ones of 8-bit images ({', '.join(LAYERS)}); give the original's "
                "enc_blocks, dec_blocks and dataset in a file by --config"
            )
    values: dict[str, Any] = given({**told, **arguments}, FIELDS)
    if named in PIXELS:
        shift, scale = PIXELS[str(named)]
        values = {"pixel_shift": shift, "pixel_scale": scale, **values}
    if base is None and not {"pixel_shift", "pixel_scale"} <= values.keys():
        raise UserError(
            f"the config has dataset={named}, expected one of {', '.join(PIXELS)}, or shift and scale of 8-bit pixels: "
            "the network reads (pixel + shift) * scale"
        )
    likelihood = LogisticMixtureConfig(components=told["num_mixtures"])
    return replace(base or VDVAEConfig(), channels=told["image_channels"], likelihood=likelihood, **values)


def sizes_of(weights: Weights) -> dict[str, int]:
    """The arguments of the original that the shapes of the weights tell. Raises UserError."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in weights or weights[name].ndim != 4:
            raise UserError(
                f"the weights have no {name} of 4 axes: they are not those of a VD-VAE; check --kind, and name the "
                "file *-model-ema.th and not the optimizer's"
            )
        return tuple(weights[name].shape)

    return {
        "image_channels": shape("encoder.in_conv.weight")[1],
        "width": shape("decoder.gain")[1],
        "zdim": shape("decoder.dec_blocks.0.z_proj.weight")[1],
        "num_mixtures": shape("decoder.out_net.out_conv.weight")[0] // 10,
    }


def count_blocks(weights: Weights, name: str) -> int:
    return len({match[1] for key in weights if (match := re.match(rf"{re.escape(name)}\.(\d+)\.", key))})


def averaged_beside(path: Path) -> Path | None:
    """The file of the averaged weights beside that of the last ones, `*-model.th`; they are what the original judges
    and samples by."""
    beside = path.with_name(path.name.removesuffix("-model.th") + "-model-ema.th")
    return beside if path.name.endswith("-model.th") and beside.is_file() else None


def original_name(key: str) -> str:
    return renamed(
        key,
        {
            r"^encoder\.first\.": "encoder.in_conv.",
            r"^encoder\.blocks\.": "encoder.enc_blocks.",
            r"^decoder\.blocks\.": "decoder.dec_blocks.",
            r"\.posterior\.": ".enc.",
            r"\.project\.": ".z_proj.",
            r"\.residual\.": ".resnet.",
            r"\.narrow\.": ".c1.",
            r"(blocks\..*)\.first\.": r"\1.c2.",
            r"\.second\.": ".c3.",
            r"\.wide\.": ".c4.",
            r"^decoder\.starts\.": "decoder.bias_xs.",
            r"^decoder\.shift$": "decoder.bias",
            r"^decoder\.last\.": "decoder.out_net.out_conv.",
        },
    )
