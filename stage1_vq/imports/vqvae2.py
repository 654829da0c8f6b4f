"""VQ-VAE-2 as trained by the open implementation vq-vae-2-pytorch."""

from __future__ import annotations

import re
from itertools import count, takewhile

from common.errors import UserError
from common.foreign_weights import Arguments
from common.renaming import Weights, load_renamed, renamed
from stage1_vq.autoencoders.vqvae2 import VQVAE2, VQVAE2Config
from stage1_vq.imports.vqgan import image_size
from stage1_vq.quantizers import NearestQuantizerConfig

TRANSPOSED = r"quantize_[tb]\.embed(_avg)?$"  # codebooks lie there as d k


def import_vqvae2(weights: Weights, config: Arguments | None = None) -> VQVAE2:
    """weights: the file's state dict; config: constructor arguments of its `VQVAE`, which the shapes of the weights
    tell as well, and `image_size` or `image_hw`, which they do not tell. Raises UserError."""
    arguments = config or {}
    sizes = network_sizes(weights)
    for name, value in sizes.items():
        if arguments.get(name, value) != value:
            raise UserError(
                f"the config has {name}={arguments[name]}, but the weights are of a model with {name}={value}; give "
                "the config that belongs to these weights, or none"
            )
    model = VQVAE2(
        VQVAE2Config(
            channels=sizes["in_channel"],
            width=sizes["channel"],
            residual_width=sizes["n_res_channel"],
            residual_blocks=sizes["n_res_block"],
            quantizer=NearestQuantizerConfig(
                codebook_size=sizes["n_embed"], dim=sizes["embed_dim"], kmeans_iterations=0, revive_after=0
            ),
        ),
        image_size(arguments),
    )
    tensors = {name: tensor.t() if re.match(TRANSPOSED, name) else tensor for name, tensor in weights.items()}
    load_renamed(model, tensors, original_name)
    return model.eval()


def network_sizes(weights: Weights) -> dict[str, int]:
    """The arguments of the original's constructor that the shapes of the weights tell. Raises UserError."""

    def shape(name: str, axes: int) -> tuple[int, ...]:
        if name not in weights or weights[name].ndim != axes:
            raise UserError(
                f"the weights have no {name} of {axes} axes: they are not those of this --kind of model; check --kind"
            )
        return tuple(weights[name].shape)

    d, k = shape("quantize_t.embed", 2)
    blocks = takewhile(lambda number: f"enc_b.blocks.{5 + number}.conv.1.weight" in weights, count())
    return {
        "in_channel": shape("enc_b.blocks.0.weight", 4)[1],
        "channel": shape("enc_b.blocks.4.weight", 4)[0],
        "n_res_block": len(list(blocks)),
        "n_res_channel": shape("enc_b.blocks.5.conv.1.weight", 4)[0],
        "embed_dim": d,
        "n_embed": k,
    }


def original_name(key: str) -> str | None:
    """Level 0 is the top there, `t`, and level 1 the bottom, `b`."""
    if re.search(r"\.usage\.|\.steps_since_revival$", key):
        return None
    return renamed(
        key,
        {
            r"^encoders\.0\.": "enc_t.blocks.",
            r"^encoders\.1\.": "enc_b.blocks.",
            r"^conditioners\.0\.": "dec_t.blocks.",
            r"^decoder\.": "dec.blocks.",
            r"\.wide\.": ".conv.1.",
            r"\.narrow\.": ".conv.3.",
            r"^to_latents\.0\.": "quantize_conv_t.",
            r"^to_latents\.1\.": "quantize_conv_b.",
            r"^upsamplers\.0\.": "upsample_t.",
            r"^quantizers\.0\.": "quantize_t.",
            r"^quantizers\.1\.": "quantize_b.",
            r"\.codebook$": ".embed",
            r"\.vector_sums$": ".embed_avg",
            r"\.cluster_sizes$": ".cluster_size",
        },
    )
