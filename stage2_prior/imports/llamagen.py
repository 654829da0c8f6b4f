"""The class- and text-conditional transformers of LlamaGen (Sun et al. 2024, arXiv:2406.06525)."""

from __future__ import annotations

import re
from itertools import count, takewhile

import torch
from torch import Tensor

from common.errors import UserError
from common.foreign_weights import Arguments, given, refuse
from common.renaming import Weights, load_renamed, renamed
from stage2_prior.condition import EmbeddingSpec
from stage2_prior.imports.first_stage import (
    STRIDE,
    FirstStage,
    check_vocabulary,
    heads_of,
    published,
    side_of_square,
)
from stage2_prior.priors.llamagen import EPSILON, ROPE_BASE, LlamaGen, LlamaGenConfig

# Heads of the published models, by layers and width: B, L, XL, XXL, 3B, 1B, 7B.
HEADS = {
    (12, 768): 12, (24, 1024): 16, (36, 1280): 20, (48, 1536): 24, (24, 3200): 32, (22, 2048): 32, (32, 4096): 32,
}  # fmt: skip
BLOCK_SIZE = 256  # codes: 16x16
CLASSES = "cls_embedding.embedding_table.weight"
CAPTION = "cls_embedding.uncond_embedding"
TEXT_ENCODER = "google/flan-t5-xl"  # of the published text-conditional models

IGNORED = r"freqs_cis$"
NAMES = {
    r"^classes\.": "cls_embedding.embedding_table.",
    r"^caption\.null$": CAPTION,
    r"^caption\.hidden\.": "cls_embedding.cap_proj.fc1.",
    r"^caption\.out\.": "cls_embedding.cap_proj.fc2.",
    r"^embedding\.": "tok_embeddings.",
    r"^blocks\.": "layers.",
    r"\.attention\.qkv\.": ".attention.wqkv.",
    r"\.attention\.out\.": ".attention.wo.",
    r"\.feed_forward_norm\.": ".ffn_norm.",
    r"\.feed_forward\.gate_up\.": ".feed_forward.w13.",
    r"\.feed_forward\.down\.": ".feed_forward.w2.",
}


def build_llamagen(weights: Weights, config: Arguments | None = None, stage1: FirstStage | None = None) -> LlamaGen:
    """weights: the file's `model`, `module` or `state_dict`; config: fields of `ModelArgs`, and `downsample_size`, the
    pixels to a code. What they leave out the shapes tell, or else the published models. Raises UserError."""
    arguments = config or {}
    refuse(arguments, {"rope_base": ROPE_BASE, "norm_eps": EPSILON, "n_kv_head": arguments.get("n_head")})
    for name in ("tok_embeddings.weight", "layers.0.feed_forward.w1.weight"):
        if name not in weights:
            raise UserError(f"the weights have no {name}: they are not those of LlamaGen's transformer")
    if (CLASSES in weights) == (CAPTION in weights):
        raise UserError(f"the weights have neither {CLASSES} nor {CAPTION}, or both: they are not LlamaGen's")
    vocabulary, width = weights["tok_embeddings.weight"].shape
    layers = len(list(takewhile(lambda number: f"layers.{number}.attention.wo.weight" in weights, count())))
    stage1 = stage1 or published_stage(vocabulary, arguments)
    grid = stage1.only_grid()
    check_vocabulary(grid, vocabulary)
    if arguments.get("block_size", grid.size) != grid.size:
        raise UserError(
            f"the config has block_size={arguments['block_size']}, but the first stage makes "
            f"{stage1.code_spec.describe()}; import it anew with the --image_size of this prior"
        )
    told_by_shapes = {"dim": width, "n_layer": layers, "vocab_size": vocabulary}
    if CAPTION in weights:
        told_by_shapes |= dict(zip(("cls_token_num", "caption_dim"), weights[CAPTION].shape, strict=True))
    for name, value in told_by_shapes.items():
        if arguments.get(name, value) != value:
            raise UserError(
                f"the config has {name}={arguments[name]}, but the weights are of a model with {name}={value}; give "
                "the config of this model, or none"
            )
    prior_config = LlamaGenConfig(
        layers=layers,
        width=width,
        heads=heads_of(arguments, layers, width, HEADS),
        hidden_width=len(weights["layers.0.feed_forward.w1.weight"]),
        **given(arguments, {"dropout": "token_dropout_p", "residual_dropout": "resid_dropout_p"}),
    )
    num_classes, knows_null_label, weights = classes_of(weights, arguments)
    embeddings = None
    if CAPTION in weights:
        length, width = weights[CAPTION].shape
        embeddings = EmbeddingSpec(length, width, TEXT_ENCODER)
    prior = LlamaGen(
        prior_config,
        stage1.code_spec,
        num_classes,
        embeddings=embeddings,
        stage1_fingerprint=stage1.fingerprint,
        knows_null_label=knows_null_label,
    )
    load_renamed(prior, with_gate_up(weights), lambda key: renamed(key, NAMES), IGNORED)
    return prior.eval()


def published_stage(vocabulary: int, arguments: Arguments) -> FirstStage:
    size = arguments.get("block_size", BLOCK_SIZE)
    side = side_of_square([size])
    if side is None:
        raise UserError(f"the config has block_size={size}, expected a square number, the codes of an image")
    return published(vocabulary, (side, side), arguments.get("downsample_size", STRIDE))


def classes_of(weights: Weights, arguments: Arguments) -> tuple[int, bool, Weights]:
    """The number of classes, whether there is a null label, and the weights with a row for it: a model that was trained
    without has none, and its row here, which is never used, is zero."""
    if CLASSES not in weights:
        return 0, True, weights
    rows = weights[CLASSES]
    given_classes = arguments.get("num_classes")
    if given_classes not in (None, len(rows), len(rows) - 1):
        raise UserError(
            f"the config has num_classes={given_classes}, but the table of classes has {len(rows)} rows: expected "
            f"{len(rows) - 1}, and a row for no class, or {len(rows)}; give the config of this model, or none"
        )
    if given_classes == len(rows):
        return len(rows), False, {**weights, CLASSES: torch.cat([rows, torch.zeros_like(rows[:1])])}
    return len(rows) - 1, True, weights


def with_gate_up(weights: Weights) -> dict[str, Tensor]:
    """With the two layers that SwiGLU begins with as one."""
    joined = dict(weights)
    for name in weights:
        if match := re.fullmatch(r"(.*\.feed_forward\.)w1\.weight", name):
            up = f"{match[1]}w3.weight"
            if up in weights:
                joined[f"{match[1]}w13.weight"] = torch.cat([joined.pop(name), joined.pop(up)])
    return joined
