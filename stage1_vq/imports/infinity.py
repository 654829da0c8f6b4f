"""The tokenizers of FoundationVision/Infinity (Han et al. 2024, arXiv:2412.04431), of 16 to 64 bits to a place."""

from __future__ import annotations

import re
from itertools import count, takewhile

from common.errors import UserError
from common.foreign_weights import Arguments, first_few
from common.renaming import Weights, load_renamed
from stage1_vq.autoencoders.infinity import InfinityTokenizer, InfinityTokenizerConfig
from stage1_vq.imports.vqgan import NORM_GROUPS, image_size
from stage1_vq.quantizers import MultiscaleBSQConfig

IGNORED = r"quantizer?\.lfq\.mask$"  # powers of two
PUBLISHED_SCALES = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)  # of square images: those of 1024x1024 pixels


def import_infinity(weights: Weights, config: Arguments | None = None) -> InfinityTokenizer:
    """weights: what stands under `vae`, or `ema`, in the published file; config: `image_size`, left out 256, which says
    how many of the published scales there are, or `scales`, and `norm_num_groups`. What shapes tell is taken from them.
    Raises UserError."""
    arguments = config or {}
    first, last = (f"encoder.conv_{end}.conv.weight" for end in ("in", "out"))
    block, levels = "encoder.down.{}.block.{}.conv2.conv.weight", "encoder.down.{}.block.0.conv2.conv.weight"
    needed = (first, levels.format(0), last)
    missing = [name for name in needed if name not in weights]
    if missing or not any(re.match(IGNORED, name) for name in weights):
        named = first_few(missing or needed)
        raise UserError(f"the weights have no {named} beside quantizer.lfq.mask: they are not of Infinity's tokenizer")
    if any(".attn" in name for name in weights) or weights[first].ndim != 4:
        raise UserError("the weights have attention or see videos: no tokenizer of Infinity for images that is known")
    width, channels, *_ = weights[first].shape
    numbers = list(takewhile(lambda level: levels.format(level) in weights, count()))
    blocks = len(list(takewhile(lambda number: block.format(0, number) in weights, count())))
    stride = 2 ** (len(numbers) - 1)
    size = image_size(arguments)
    scales = tuple(arguments.get("scales") or (scale for scale in PUBLISHED_SCALES if scale * stride <= max(size)))
    if scales[-1] * stride != max(size):
        raise UserError(
            f"image_size={size[0]}x{size[1]} has {max(size) // stride} places along its longer side, which is none of "
            f"the published scales {', '.join(map(str, PUBLISHED_SCALES))}: give another image_size, or scales"
        )
    model = InfinityTokenizer(
        InfinityTokenizerConfig(
            channels=channels,
            width=width,
            multipliers=tuple(weights[levels.format(level)].shape[0] // width for level in numbers),
            residual_blocks=blocks,
            norm_groups=arguments.get("norm_num_groups", NORM_GROUPS),
            quantizer=MultiscaleBSQConfig(scales=scales, dim=weights[last].shape[0]),
        ),
        size,
    )
    load_renamed(model, weights, original_name, IGNORED)
    return model.eval()


def original_name(key: str) -> str | None:
    """Each convolution lies in a module of its own there, and so does each norm."""
    if key.startswith("quantizer."):
        return None
    inner = "norm" if re.search(r"\.norm(\d|_out)\.", key) else "conv"
    return re.sub(r"\.(weight|bias)$", rf".{inner}.\1", key)
