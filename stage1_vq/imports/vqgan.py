"""What the imports of taming-transformers, LlamaGen, VAR and diffusers share: they hold the same networks, those of
stage1_vq/networks/resnet.py, under four schemes of names."""

from __future__ import annotations

from itertools import count, takewhile
from typing import Any

from common.errors import UserError
from common.foreign_weights import Arguments
from common.renaming import OriginalName, Weights, load_renamed
from stage1_vq.autoencoders.vqgan import VQGAN, VQGANConfig
from stage1_vq.quantizers import QuantizerConfig

NORM_GROUPS = 32  # fixed in the code of taming-transformers, LlamaGen and VAR
IMAGE_SIZE = 256  # pixels, of all published models


def taming_name(key: str) -> str | None:
    """The name of a tensor outside the quantizer in taming-transformers, from which the other schemes differ little."""
    for ours, theirs in (
        ("encoder.body.", "encoder."),
        ("encoder.quant_conv.", "quant_conv."),
        ("decoder.post_quant_conv.", "post_quant_conv."),
        ("decoder.body.", "decoder."),
    ):
        if key.startswith(ours):
            return theirs + key.removeprefix(ours)
    return None


def network_sizes(weights: Weights, original_name: OriginalName) -> dict[str, Any]:
    """The fields of VQGANConfig that the shapes of the weights tell. Raises UserError."""

    def has(key: str) -> bool:
        return original_name(key) in weights

    def shape(key: str) -> tuple[int, ...]:
        if not has(key):
            raise UserError(f"the weights have no {original_name(key)}: they are not those of this --kind of model")
        return tuple(weights[str(original_name(key))].shape)

    def numbered(key: str) -> list[int]:
        """The numbers, from 0 on, with which the key is there."""
        return list(takewhile(lambda number: has(key.format(number)), count()))

    width, channels, *_ = shape("encoder.body.conv_in.weight")
    shape("encoder.body.down.0.block.0.conv1.weight")
    levels = numbered("encoder.body.down.{}.block.0.conv1.weight")
    return {
        "channels": channels,
        "width": width,
        "multipliers": tuple(shape(f"encoder.body.down.{i}.block.0.conv1.weight")[0] / width for i in levels),
        "residual_blocks": len(numbered("encoder.body.down.0.block.{}.conv1.weight")),
        "attention_levels": tuple(i for i in levels if has(f"encoder.body.down.{i}.attn.0.proj_out.weight")),
        "spatial_norm": has("decoder.body.norm_out.conv_y.weight"),
        "z_channels": shape("encoder.body.conv_out.weight")[0],
        "quant_conv_kernel": shape("encoder.quant_conv.weight")[-1],
    }


def codebook_sizes(weights: Weights, name: str) -> tuple[int, int]:
    """(k, d) of the codebook of that name. Raises UserError."""
    if name not in weights or weights[name].ndim != 2:
        raise UserError(f"the weights have no codebook {name} of two axes: they are not those of this --kind of model")
    k, d = weights[name].shape
    return k, d


def build_vqgan(
    sizes: Arguments,
    quantizer: QuantizerConfig,
    image_size: tuple[int, int],
    weights: Weights,
    original_name: OriginalName,
    ignored: str = r"(?!)",
) -> VQGAN:
    """The model, in eval mode. sizes: fields of VQGANConfig; ignored: pattern of names that are of no use."""
    if sizes["width"] % sizes["norm_groups"]:
        raise UserError(
            f"{sizes['norm_groups']} norm groups do not divide the {sizes['width']} channels of this model: give its "
            "own number as norm_num_groups in --config"
        )
    model = VQGAN(VQGANConfig(**sizes, quantizer=quantizer), image_size)
    load_renamed(model, weights, original_name, ignored)
    return model.eval()


def image_size(arguments: Arguments, default: int = IMAGE_SIZE) -> tuple[int, int]:
    """(H, W): `image_size` or `image_hw` of the config, which no constructor has, or the default."""
    size = arguments.get("image_size") or arguments.get("image_hw") or default
    return (size, size) if isinstance(size, int) else (size[0], size[1])
