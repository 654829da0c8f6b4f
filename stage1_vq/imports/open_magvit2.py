"""The tokenizers Open-MAGVIT2 of SEED-Voken (Luo et al. 2024, arXiv:2409.04410)."""

from __future__ import annotations

from itertools import count, takewhile

from common.errors import UserError
from common.foreign_weights import Arguments, look_up, refuse
from common.renaming import Weights, load_renamed
from stage1_vq.autoencoders.open_magvit2 import OpenMAGVIT2, OpenMAGVIT2Config
from stage1_vq.imports.ibq import AVERAGES, averaged
from stage1_vq.imports.taming import first_stage
from stage1_vq.imports.vqgan import NORM_GROUPS, image_size
from stage1_vq.quantizers import LFQConfig

# The discriminator and the perceptual network of the loss; averages, which by then are in their places or of no use.
IGNORED = r"loss\.|model_ema\."
SIDE = 16  # codes along each side of an image, of all published models; the `resolution` of their files is another


def import_open_magvit2(weights: Weights, config: Arguments | None = None) -> OpenMAGVIT2:
    """weights: the file's `state_dict`, or that of a prior with its first stage; config: arguments of `VQModel`, at the
    top or in `first_stage_config`, and `norm_num_groups`. Shapes tell the sizes.

    The weights themselves are taken, of which the project's priors have their codes; with `use_ema: true` the averages
    that the file holds. Raises UserError.
    """
    weights, arguments = first_stage(weights, config or {})
    refuse(arguments, {"remap": None})
    if arguments.get("use_ema", False):
        if not any(name.startswith(AVERAGES) for name in weights):
            raise UserError(f"use_ema: true, but the weights hold no averages, {AVERAGES}*: leave it out")
        weights = averaged(weights)
    if "encoder.conv_in.weight" not in weights or "encoder.conv_out.weight" not in weights:
        raise UserError(
            "the weights have no encoder.conv_in.weight and encoder.conv_out.weight: they are not those of this "
            "--kind of model"
        )
    width, channels, *_ = weights["encoder.conv_in.weight"].shape
    bits = weights["encoder.conv_out.weight"].shape[0]
    level = "encoder.down.{}.block.0.conv2.weight"
    levels = list(takewhile(lambda number: level.format(number) in weights, count()))
    block = "encoder.down.0.block.{}.conv2.weight"
    sizes = OpenMAGVIT2Config(
        channels=channels,
        width=width,
        multipliers=tuple(weights[level.format(number)].shape[0] // width for number in levels),
        residual_blocks=len(list(takewhile(lambda number: block.format(number) in weights, count()))),
        norm_groups=arguments.get("norm_num_groups", NORM_GROUPS),
        quantizer=quantizer_config(bits, arguments),
    )
    model = OpenMAGVIT2(sizes, image_size(arguments, SIDE * sizes.stride))
    load_renamed(model, of_our_bits(weights), name_in_open_magvit2, IGNORED)
    return model.eval()


def quantizer_config(bits: int, arguments: Arguments) -> LFQConfig:
    """Weights of the losses: by name, or as `lossconfig` has them, or those of the published models."""
    of_loss = look_up(arguments, "lossconfig.params") or look_up(arguments, "lossconfig.init_args") or {}
    entropy_weight = arguments.get("entropy_loss_weight", of_loss.get("codebook_weight", 0.1))
    sample_weight = arguments.get("sample_minimization_weight", 1.0)
    return LFQConfig(
        bits=bits,
        dim=bits,
        commitment_weight=arguments.get("commit_weight", of_loss.get("commit_weight", 0.25)),
        entropy_weight=entropy_weight * sample_weight,
        diversity=arguments.get("batch_maximization_weight", 1.0) / sample_weight if sample_weight else 0.0,
        inverse_temperature=100.0,  # theirs is fixed
        factorized_bits=factorized_bits(bits, arguments),
    )


def factorized_bits(bits: int, arguments: Arguments) -> tuple[int, ...] | None:
    """Of the factors that its prior knows codes by; None for whole codes. Raises UserError for such as cannot be."""
    if not arguments.get("token_factorization", False):
        return None
    found = tuple(arguments.get("factorized_bits", ()))
    if sum(found) != bits or min(found, default=0) < 1:
        raise UserError(
            f"token_factorization: true with factorized_bits={list(found)}, expected numbers of at least 1 that are "
            f"{bits} together, the bits of a code; 18 are published as [6, 12]"
        )
    return found


def of_our_bits(weights: Weights) -> Weights:
    """Their first channel of z is the least significant bit of a code, ours the most significant one. With the channels
    in reverse, where z comes out of a layer and where z_q goes into one, codes are the same numbers."""
    return {
        name: tensor.flip(axis) if (axis := axis_of_bits(name)) is not None else tensor
        for name, tensor in weights.items()
    }


def axis_of_bits(name: str) -> int | None:
    """The axis along which a tensor has an entry for each channel of z or z_q; None for most."""
    if name in ("encoder.conv_out.weight", "encoder.conv_out.bias"):
        return 0
    adaptive = name.startswith("decoder.adaptive.") and name.endswith((".gamma.weight", ".beta.weight"))
    return 1 if adaptive or name == "decoder.conv_in.weight" else None


def name_in_open_magvit2(key: str) -> str | None:
    return None if key.startswith("quantizer.") else key
