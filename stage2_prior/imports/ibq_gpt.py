"""The priors of IBQ in SEED-Voken (Shi et al. 2024, arXiv:2412.02692), over the codes of its tokenizers."""

from __future__ import annotations

from common.foreign_weights import Arguments, refuse
from common.renaming import Weights, load_renamed, renamed
from stage2_prior.imports.first_stage import FirstStage, check_vocabulary, heads_of
from stage2_prior.imports.llamagen import published_stage, with_gate_up
from stage2_prior.imports.seed_voken import (
    BLOCK_NAMES,
    CLASSES,
    IGNORED,
    check_names,
    check_sizes,
    layers_of,
    own_arguments,
    own_weights,
)
from stage2_prior.priors.ibq_gpt import IBQGPT, IBQGPTConfig

# Heads of the published models, by layers and width: B, L, XL, XXL.
HEADS = {(16, 1024): 16, (20, 1280): 20, (24, 1536): 24, (30, 1920): 30}
NAMES = {
    r"^classes\.": "class_emb.embedding_table.",
    r"^embedding\.": "tok_emb.",
    r"^norm\.": "head_nm.rmsnorm.",
    r"^output_modulation\.linear\.": "head_nm.ada_lin.1.",
    r"^output\.": "head.",
    r"\.modulation\.linear\.": ".ada_lin.1.",
    **BLOCK_NAMES,
}


def build_ibq_gpt(weights: Weights, config: Arguments | None = None, stage1: FirstStage | None = None) -> IBQGPT:
    """weights: the checkpoint's `state_dict`, or the transformer's own; config: arguments of its `GPT`, at the top or
    in `transformer_config`, and `downsample_size`, the pixels to a code. What they leave out the shapes tell, or else
    the published models. Raises UserError."""
    weights, arguments = own_weights(weights), own_arguments(config)
    refuse(arguments, {"shared_aln": False})
    needed = ["tok_emb.weight", CLASSES, "head_nm.ada_lin.1.weight", "blocks.0.feed_forward.w1.weight"]
    check_names(weights, needed, "IBQ's")
    vocabulary, width = weights["tok_emb.weight"].shape
    layers = layers_of(weights, "blocks")
    stage1 = stage1 or published_stage(vocabulary, arguments)
    grid = stage1.only_grid()
    check_vocabulary(grid, vocabulary)
    told = {
        "n_embd": width,
        "cond_dim": width,
        "n_layer": layers,
        "vocab_size": vocabulary,
        "class_num": len(weights[CLASSES]) - 1,
        "block_size": grid.size,
    }
    check_sizes(arguments, told)
    prior = IBQGPT(
        IBQGPTConfig(
            layers=layers,
            width=width,
            heads=heads_of(arguments, layers, width, HEADS),
            hidden_width=len(weights["blocks.0.feed_forward.w1.weight"]),
        ),
        stage1.code_spec,
        len(weights[CLASSES]) - 1,
        stage1_fingerprint=stage1.fingerprint,
    )
    load_renamed(prior, with_gate_up(weights), lambda key: renamed(key, NAMES), IGNORED)
    return prior.eval()
