"""PixelSNAIL as trained by the open implementation vq-vae-2-pytorch: the priors of its top and of its bottom codes."""

from __future__ import annotations

from itertools import count, takewhile
from typing import Any

from codes.spec import CodeSpec, Grid
from common.errors import UserError
from common.foreign_weights import Arguments
from common.renaming import Weights, load_renamed, renamed
from stage2_prior.priors.pixelsnail import PixelSNAIL, PixelSNAILConfig

HEADS = 8  # the original has no other number
STRIDES = {True: 4, False: 8}  # pixels to a code of its VQ-VAE-2: of the bottom, which is given the top, and of the top


def build_pixelsnail(weights: Weights, config: Arguments | None = None) -> PixelSNAIL:
    """weights: the file's state dict; config: constructor arguments of its `PixelSNAIL`, which the weights tell too but
    for `dropout`. Weights of a stack over given codes make a prior that is given a grid of half its sides, the top; all
    others make one that is given nothing. Raises UserError."""
    arguments = dict(config or {})
    sizes = network_sizes(weights)
    for name, value in sizes.items():
        given = arguments.get(name, value)
        if (list(given) if isinstance(given, tuple) else given) != value:
            raise UserError(
                f"the config has {name}={given}, but the weights are of a model with {name}={value}; give the config "
                "that belongs to these weights, or none"
            )
    height, width = sizes["shape"]
    conditional = "cond_resnet.blocks.0.conv.weight_v" in weights
    level, stride = int(conditional), STRIDES[conditional]
    given_stack: dict[str, Any] = {}
    if conditional:
        given_stack = {
            "given_blocks": sizes["n_cond_res_block"],
            "given_width": sizes["cond_res_channel"],
            "given_kernel_size": sizes["cond_res_kernel"],
        }
    prior = PixelSNAIL(
        PixelSNAILConfig(
            blocks=sizes["n_block"],
            residual_blocks=sizes["n_res_block"],
            width=sizes["channel"],
            residual_width=sizes["res_channel"],
            kernel_size=sizes["kernel_size"],
            attention=sizes["attention"],
            heads=HEADS,
            output_blocks=sizes["n_out_res_block"],
            dropout=arguments.get("dropout", 0.1),
            **given_stack,
        ),
        CodeSpec((Grid(f"level{level}", height, width, sizes["n_class"]),), stride * height, stride * width),
        num_classes=0,
        given=[Grid("level0", height // 2, width // 2, sizes["n_class"])] if conditional else [],
    )
    load_renamed(prior, weights, original_name(sizes["n_out_res_block"]), ignored="background$")
    return prior.eval()


def network_sizes(weights: Weights) -> dict[str, Any]:
    """The arguments of the original's constructor that names and shapes tell. Raises UserError."""

    def shape(name: str) -> list[int]:
        if name not in weights or weights[name].ndim != 4:
            raise UserError(
                f"the weights have no {name} of 4 axes: they are not those of this --kind of model; check --kind"
            )
        return list(weights[name].shape)

    def many(pattern: str) -> int:
        """How many weights there are of this name with a number in it, counted from the number that is there first."""
        return len(list(takewhile(lambda number: pattern.format(number) in weights, count())))

    first = shape("blocks.0.resblocks.0.conv1.conv.conv.weight_v")
    sizes = {
        "shape": shape("background")[2:],
        "n_class": shape("horizontal.conv.conv.weight_v")[1],
        "channel": first[1],
        "kernel_size": first[3],
        "n_block": many("blocks.{}.resblocks.0.conv1.conv.conv.weight_v"),
        "n_res_block": many("blocks.0.resblocks.{}.conv1.conv.conv.weight_v"),
        "res_channel": first[0],
        "attention": "blocks.0.causal_attention.query.weight_v" in weights,
        "n_out_res_block": many("out.{}.conv1.conv.weight_v"),
    }
    if "cond_resnet.blocks.0.conv.weight_v" in weights:
        width, _, kernel_size, _ = shape("cond_resnet.blocks.0.conv.weight_v")
        blocks = takewhile(lambda number: f"cond_resnet.blocks.{number}.conv1.conv.weight_v" in weights, count(1))
        sizes |= {"n_cond_res_block": len(list(blocks)), "cond_res_channel": width, "cond_res_kernel": kernel_size}
    return sizes


def original_name(output_blocks: int) -> Any:
    """The original's name for each of ours. Its last layers are one list: blocks, an activation, the output."""
    rules = {
        r"\.direction$": ".weight_v",
        r"\.gain$": ".weight_g",
        r"^above\.": "horizontal.conv.conv.",
        r"^left\.": "vertical.conv.conv.",
        r"^output\.": f"out.{output_blocks + 1}.conv.",
        r"^output_blocks\.": "out.",
        r"^given_codes\.stacks\.0\.0\.": "cond_resnet.blocks.0.conv.",
        r"^given_codes\.stacks\.0\.": "cond_resnet.blocks.",
        r"\.residuals\.(\d+)\.first\.": r".resblocks.\1.conv1.conv.conv.",  # causal convolutions are one level deeper
        r"\.residuals\.(\d+)\.second\.": r".resblocks.\1.conv2.conv.conv.",
        r"\.gate_biases\.(\d+)\.given\.": r".resblocks.\1.condition.conv.",
        r"\.keys\.": ".key_resblock.",
        r"\.queries\.": ".query_resblock.",
        r"\.attention\.": ".causal_attention.",
        r"\.out\.(weight_v|weight_g|bias)$": r".out.conv.\1",
        r"\.out\.(first|second|side)\.": r".out_resblock.\1.",
        r"\.first\.": ".conv1.conv.",
        r"\.second\.": ".conv2.conv.",
        r"\.side\.": ".aux_conv.conv.",
    }
    return lambda key: renamed(key, rules)
