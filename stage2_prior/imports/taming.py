"""The GPT of taming-transformers (Esser et al. 2021, arXiv:2012.09841): its weights alone, or in a Net2NetTransformer
with the first stage and what conditions it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count, takewhile
from typing import Any

import torch
from torch import Tensor

from codes.spec import Grid
from common.errors import UserError
from common.foreign_weights import Arguments, given, look_up, refuse
from common.renaming import Weights, load_renamed, renamed
from stage2_prior.imports.first_stage import (
    STRIDE,
    FirstStage,
    both_sides,
    check_vocabulary,
    heads_of,
    published,
    side_of_square,
)
from stage2_prior.priors.mingpt import MinGPT, MinGPTConfig

# Heads of the published models by layers and width: D-RIN and S-FLCKR, FFHQ and CelebA-HQ, COCO, class-conditional
# ImageNet.
HEADS = {(24, 1024): 16, (24, 1664): 16, (40, 1408): 16, (48, 1536): 24}
CLASSES = {(48, 1536): 1000}  # of a published model whose file does not tell

PERMUTATION = "permuter.forward_shuffle_idx"
IGNORED = r"blocks\.\d+\.attn\.mask$"
NAMES = {
    r"^embedding\.": "tok_emb.",
    r"^positions$": "pos_emb",
    r"^norm\.": "ln_f.",
    r"^output\.": "head.",
    r"\.attention_norm\.": ".ln1.",
    r"\.feed_forward_norm\.": ".ln2.",
    r"\.attention\.out\.": ".attn.proj.",
    r"\.attention\.": ".attn.",
    r"\.up\.": ".mlp.0.",
    r"\.down\.": ".mlp.2.",
}


@dataclass(frozen=True, kw_only=True)
class Before:
    """What comes before the codes."""

    num_classes: int = 0
    start: int = 0  # the token, where there are neither classes nor codes
    codes: tuple[Grid, ...] = ()


def told(arguments: Arguments) -> Before | None:
    """By the names of ours that a config may have beside the original's; None where it has neither."""
    if "n_classes" in arguments:
        return Before(num_classes=int(arguments["n_classes"]))
    if "cond_hw" in arguments:
        vocabulary = int(arguments.get("cond_vocab_size", arguments.get("vocab_size", 1)))
        return Before(codes=(Grid("condition", *both_sides(arguments["cond_hw"]), vocabulary),))
    return None


def build_gpt(weights: Weights, config: Arguments | None = None, stage1: FirstStage | None = None) -> MinGPT:
    """weights: of `GPT`; config: its arguments, and of the names below those that apply. Raises UserError.

    hw: codes of the image, a side or [h, w]; n_classes: of a class before the codes; cond_hw and cond_vocab_size: of
    other codes before the codes; sos_token: what comes before them else, 0 if not given.
    """
    arguments = config or {}
    before = told(arguments) or Before(start=int(arguments.get("sos_token", 0)))
    return build(weights, arguments, before, stage1)


def build_net2net(weights: Weights, config: Arguments | None = None, stage1: FirstStage | None = None) -> MinGPT:
    """weights: the file's `state_dict`; config: arguments of `Net2NetTransformer`, or those of its GPT with the names
    of `build_gpt`. What they leave out the weights tell, or else the published models. Raises UserError."""
    arguments = config or {}
    order = order_of(weights, arguments)
    own = {name.removeprefix("transformer."): tensor for name, tensor in weights.items() if name.startswith("transf")}
    own_arguments = {**arguments, **parameters(arguments, "transformer_config")}
    before = condition_of(weights, arguments, own)
    return build(own, own_arguments, before, stage1 or first_stage_of(weights, arguments), order)


def build(
    weights: Weights,
    arguments: Arguments,
    before: Before,
    stage1: FirstStage | None,
    order: tuple[int, ...] = (),
) -> MinGPT:
    refuse(arguments, {"target": "taming.modules.transformer.mingpt.GPT"})
    for name in ("tok_emb.weight", "pos_emb", "blocks.0.attn.key.weight"):
        if name not in weights:
            raise UserError(f"the weights have no {name}: they are not those of taming-transformers' GPT")
    vocabulary, width = weights["tok_emb.weight"].shape
    positions = weights["pos_emb"].shape[1]
    layers = len(list(takewhile(lambda number: f"blocks.{number}.attn.key.weight" in weights, count())))
    stage1 = stage1 or published(vocabulary, side_of(arguments, positions))
    check_vocabulary(stage1.only_grid(), vocabulary)
    config = MinGPTConfig(
        layers=layers,
        width=width,
        heads=heads_of(arguments, layers, width, HEADS),
        vocabulary=vocabulary,
        positions=positions,
        unmasked=unmasked(weights, arguments),
        start=before.start,
        order=order,
        **given(
            arguments,
            {"dropout": "embd_pdrop", "residual_dropout": "resid_pdrop", "attention_dropout": "attn_pdrop"},
        ),
    )
    prior = MinGPT(
        config,
        stage1.code_spec,
        before.num_classes,
        given=before.codes,
        stage1_fingerprint=stage1.fingerprint,
        knows_null_label=False,
    )
    load_renamed(prior, with_qkv(weights), lambda key: renamed(key, NAMES), IGNORED)
    return prior.eval()


def with_qkv(weights: Weights) -> dict[str, Tensor]:
    """With query, key and value of each block, three layers there, as one, and positions without their batch axis."""
    joined = dict(weights)
    for name in weights:
        if match := re.fullmatch(r"(blocks\.\d+\.attn\.)query\.(weight|bias)", name):
            parts = [f"{match[1]}{part}.{match[2]}" for part in ("query", "key", "value")]
            if all(part in weights for part in parts):
                joined[f"{match[1]}qkv.{match[2]}"] = torch.cat([joined.pop(part) for part in parts])
    joined["pos_emb"] = weights["pos_emb"][0]
    return joined


def unmasked(weights: Weights, arguments: Arguments) -> int:
    """Places that see each other: the argument, or what the first row of the stored mask shows."""
    if "n_unmasked" in arguments:
        return int(arguments["n_unmasked"])
    mask = weights.get("blocks.0.attn.mask")
    seen = 1 if mask is None else int(mask[0, 0, 0].sum())
    return seen if seen > 1 else 0


def side_of(arguments: Arguments, positions: int) -> tuple[int, int]:
    """Codes (h, w) of an image: `hw` of the config, or a square that fills the positions. Raises UserError."""
    if "hw" in arguments:
        return both_sides(arguments["hw"])
    # Of n codes behind one token, all but the last have a position; others have one more, or two for each code.
    side = side_of_square([positions, positions - 1, positions // 2])
    if side is None:
        raise UserError(
            f"{positions} positions do not tell how many codes an image has; give --stage1 the model of the first "
            "stage, or hw, the side of the grid, in --config"
        )
    return side, side


# ---- what is beside the GPT in a Net2NetTransformer ------------------------------------------------------------------


def parameters(arguments: Arguments, part: str) -> dict[str, Any]:
    """`params` of a part of the config, such as first_stage_config; empty where it has none."""
    found = look_up(arguments, f"{part}.params")
    return dict(found) if isinstance(found, Mapping) else {}


def target(arguments: Arguments, part: str) -> str:
    """The class of a part of the config, without its modules, or the word that stands in its place."""
    found = arguments.get(part)
    return str(found.get("target", "")).rpartition(".")[2] if isinstance(found, Mapping) else str(found or "")


def order_of(weights: Weights, arguments: Arguments) -> tuple[int, ...]:
    """The raster places of the codes in the order of the original's permuter; empty for raster order. Raises UserError
    for a permuter whose order the file does not hold."""
    if (stored := weights.get(PERMUTATION)) is not None:
        order = tuple(stored.flatten().tolist())
        return () if order == tuple(range(len(order))) else order
    if target(arguments, "permuter_config") not in ("", "Identity"):
        raise UserError(
            f"the original permutes the codes (permuter_config), and the weights have no {PERMUTATION}, which tells "
            "the order; give the file that training wrote, or permuter_config Identity for raster order"
        )
    return ()


def grid_of(params: Arguments, name: str, resolution: int | None = None) -> Grid | None:
    """The codes of a VQModel with these parameters; None where they do not tell."""
    network = params.get("ddconfig")
    if not isinstance(network, Mapping) or not {"resolution", "ch_mult"} <= network.keys() or "n_embed" not in params:
        return None
    side = (resolution or network["resolution"]) // 2 ** (len(network["ch_mult"]) - 1)
    return Grid(name, side, side, params["n_embed"])


def first_stage_of(weights: Weights, arguments: Arguments) -> FirstStage | None:
    """As the config or the weights beside the GPT describe it; None where they do not."""
    params = parameters(arguments, "first_stage_config")
    grid = grid_of(params, "codes")
    if grid is not None:
        return published(grid.vocabulary, (grid.height, grid.width), params["ddconfig"]["resolution"] // grid.height)
    codebook = stored_codebook(weights, "first_stage_model.")
    if codebook is None:
        return None
    levels = stored_levels(weights, "first_stage_model.")
    side = both_sides(arguments["hw"]) if "hw" in arguments else (256 // 2 ** (levels - 1),) * 2
    return published(codebook, side, 2 ** (levels - 1))


def stored_codebook(weights: Weights, prefix: str) -> int | None:
    """The codes of a VQModel or GumbelVQ whose names have this prefix."""
    names = [f"{prefix}quantize.{name}.weight" for name in ("embedding", "embed")]
    return next((len(weights[name]) for name in names if name in weights), None)


def stored_levels(weights: Weights, prefix: str) -> int:
    names = (f"{prefix}encoder.down.{number}.block.0.conv1.weight" for number in count())
    return len(list(takewhile(lambda name: name in weights, names)))


def condition_of(weights: Weights, arguments: Arguments, own: Weights) -> Before:
    """Classes, a start token, or codes of another model, as the config or the stored condition stage tells. Raises
    UserError."""
    params, kind = parameters(arguments, "cond_stage_config"), target(arguments, "cond_stage_config")
    start = int(arguments.get("sos_token", params.get("sos_token", 0)))
    if (before := told(arguments)) is not None:
        return before
    if kind == "Labelator":
        return Before(num_classes=int(params["n_classes"]))
    if arguments.get("unconditional") or kind in ("__is_unconditional__", "SOSProvider"):
        return Before(start=start)
    resolution = int(arguments.get("downsample_cond_size", -1))
    if kind == "__is_first_stage__":
        params = parameters(arguments, "first_stage_config")
    if kind == "CoordStage":
        image = look_up(arguments, "first_stage_config.params.ddconfig.resolution") or 256
        side = int(image) // int(params.get("down_factor", STRIDE))
        return Before(codes=(Grid("condition", side, side, int(params["n_embed"])),))
    if (grid := grid_of(params, "condition", resolution if resolution > 0 else None)) is not None:
        return Before(codes=(grid,))
    if not kind and (codebook := stored_codebook(weights, "cond_stage_model.")) is not None:
        side = 256 // 2 ** (stored_levels(weights, "cond_stage_model.") - 1)
        return Before(codes=(Grid("condition", side, side, codebook),))
    sizes = len([name for name in own if name.endswith(".attn.key.weight")]), own["tok_emb.weight"].shape[1]
    if not kind and sizes in CLASSES:
        return Before(num_classes=CLASSES[sizes])
    raise UserError(
        f"the original's condition ({kind or 'no cond_stage_config'}) is not known; give the original's own config as "
        "--config, or one with n_classes: NUMBER, or unconditional: true"
    )
