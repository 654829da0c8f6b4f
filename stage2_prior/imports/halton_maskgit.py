"""The transformers of Halton-MaskGIT (Besnier et al. 2025, arXiv:2503.17076), over codes of LlamaGen's VQ-16."""

from __future__ import annotations

import re
from itertools import count, takewhile

from common.errors import UserError
from common.foreign_weights import Arguments, refuse
from common.renaming import Weights, load_renamed, renamed
from stage2_prior.imports.first_stage import STRIDE, FirstStage, check_vocabulary, heads_of, published, side_of_square
from stage2_prior.priors.halton_maskgit import HaltonMaskGIT, HaltonMaskGITConfig

# Heads of the published models, by layers and width: tiny, small (6 heads of 85 numbers), base, large.
HEADS = {(6, 384): 6, (12, 512): 6, (12, 768): 12, (24, 1024): 16}
IGNORED = r"head\.weight$"  # the embedding's, stored twice
NAMES = {
    r"^classes\.": "cls_emb.",
    r"^embedding\.": "tok_emb.",
    r"^places\.": "pos_emb.",
    r"^registers$": "reg_tokens.weight",
    r"^bias$": "head.bias",
    r"^norm\.": "last_norm.norm_final.",
    r"^modulation\.linear\.": "last_norm.mlp.1.",
    r"^blocks\.": "transformer.layers.",
    r"\.modulation\.linear\.": ".mlp.1.",
    r"\.attention_norm\.": ".ln1.",
    r"\.feed_forward_norm\.": ".ln2.",
    r"\.attention\.(q|k|v)\.": r".attn.w\1.",
    r"\.attention\.out\.": ".attn.wo.",
    r"\.feed_forward\.gate\.": ".ff.w1.",
    r"\.feed_forward\.down\.": ".ff.w2.",
    r"\.feed_forward\.up\.": ".ff.w3.",
}


def build_halton_maskgit(
    weights: Weights, config: Arguments | None = None, stage1: FirstStage | None = None
) -> HaltonMaskGIT:
    """weights: the file's `model_state_dict`; config: arguments of `Transformer`, of which the shapes tell all but
    `heads` of a size that was not published. Raises UserError."""
    arguments = config or {}
    refuse(arguments, {"proj": 1})
    # As torch.compile and DDP name them.
    weights = {re.sub(r"^(module\.|_orig_mod\.)+", "", name): tensor for name, tensor in weights.items()}
    for name in ("tok_emb.weight", "pos_emb.weight", "cls_emb.weight", "transformer.layers.0.ff.w1.weight"):
        if name not in weights:
            raise UserError(f"the weights have no {name}: they are not those of Halton-MaskGIT's transformer")
    (rows, width), places = weights["tok_emb.weight"].shape, len(weights["pos_emb.weight"])
    layers = len(list(takewhile(lambda number: f"transformer.layers.{number}.ln1.weight" in weights, count())))
    told_by_shapes = {
        "hidden_dim": width,
        "codebook_size": rows - 1,
        "depth": layers,
        "nclass": len(weights["cls_emb.weight"]) - 1,
        "register": len(weights.get("reg_tokens.weight", ())),
    }
    for name, value in told_by_shapes.items():
        if arguments.get(name, value) != value:
            raise UserError(
                f"the config has {name}={arguments[name]}, but the weights are of a model with {name}={value}; give "
                "the config of this model, or none"
            )
    stage1 = stage1 or published_stage(rows - 1, places)
    grid = stage1.only_grid()
    check_vocabulary(grid, rows - 1)
    if grid.size != places or grid.vocabulary != rows - 1:
        raise UserError(
            f"the weights are of a prior of {places} codes of {rows - 1}, but the first stage makes "
            f"{stage1.code_spec.describe()}; give --stage1 the model that it was trained with, imported with the "
            "--image_size of its images"
        )
    heads = heads_of({"n_head": arguments.get("heads")}, layers, width, HEADS)
    inner = len(weights["transformer.layers.0.attn.wq.weight"])
    if inner != width // heads * heads:
        raise UserError(
            f"heads={heads} of {width // heads} numbers make {width // heads * heads}, but the weights have {inner}; "
            "give the number of heads of this model in --config"
        )
    prior = HaltonMaskGIT(
        HaltonMaskGITConfig(
            layers=layers,
            width=width,
            heads=heads,
            hidden_width=len(weights["transformer.layers.0.ff.w1.weight"]),
            registers=told_by_shapes["register"],
            dropout=arguments.get("dropout", 0.0),
        ),
        stage1.code_spec,
        told_by_shapes["nclass"],
        stage1_fingerprint=stage1.fingerprint,
    )
    has_registers = "reg_tokens.weight" in weights
    load_renamed(
        prior,
        weights,
        lambda key: None if key == "registers" and not has_registers else renamed(key, NAMES),
        IGNORED,
    )
    return prior.eval()


def published_stage(vocabulary: int, places: int) -> FirstStage:
    side = side_of_square([places])
    if side is None:
        raise UserError(f"the weights have {places} places, expected a square number; give --stage1 their first stage")
    return published(vocabulary, (side, side), STRIDE)
