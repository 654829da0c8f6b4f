"""The priors of IBQ in SEED-Voken (Shi et al. 2024, arXiv:2412.02692), over the codes of its tokenizers."""

from __future__ import annotations

from itertools import count, takewhile

from common.errors import UserError
from common.foreign_weights import Arguments, first_few, look_up, refuse
from common.renaming import Weights, load_renamed, renamed
from stage2_prior.imports.first_stage import FirstStage, check_vocabulary, heads_of
from stage2_prior.imports.llamagen import published_stage, with_gate_up
from stage2_prior.priors.ibq_gpt import IBQGPT, IBQGPTConfig

# Heads of the published models, by layers and width: B, L, XL, XXL.
HEADS = {(16, 1024): 16, (20, 1280): 20, (24, 1536): 24, (30, 1920): 30}
IN_CHECKPOINT = "transformer."  # before the prior's names, in a file that holds its first stage too
IGNORED = r"freqs_cis$"
CLASSES = "class_emb.embedding_table.weight"
NAMES = {
    r"^classes\.": "class_emb.embedding_table.",
    r"^embedding\.": "tok_emb.",
    r"^norm\.": "head_nm.rmsnorm.",
    r"^output_modulation\.linear\.": "head_nm.ada_lin.1.",
    r"^output\.": "head.",
    r"\.modulation\.linear\.": ".ada_lin.1.",
    r"\.attention\.qkv\.": ".attention.wqkv.",
    r"\.attention\.out\.": ".attention.wo.",
    r"\.feed_forward_norm\.": ".ffn_norm.",
    r"\.feed_forward\.gate_up\.": ".feed_forward.w13.",
    r"\.feed_forward\.down\.": ".feed_forward.w2.",
}


def build_ibq_gpt(weights: Weights, config: Arguments | None = None, stage1: FirstStage | None = None) -> IBQGPT:
    """weights: the checkpoint's `state_dict`, or the transformer's own; config: arguments of its `GPT`, at the top or
    in `transformer_config`, and `downsample_size`, the pixels to a code. What they leave out the shapes tell, or else
    the published models. Raises UserError."""
    weights, arguments = own_weights(weights), config or {}
    arguments = {**arguments, **(look_up(arguments, "transformer_config.params") or {})}
    refuse(arguments, {"shared_aln": False})
    needed = ["tok_emb.weight", CLASSES, "head_nm.ada_lin.1.weight", "blocks.0.feed_forward.w1.weight"]
    if missing := [name for name in needed if name not in weights]:
        raise UserError(f"the weights have no {first_few(missing)}: they are not those of IBQ's transformer")
    vocabulary, width = weights["tok_emb.weight"].shape
    layers = len(list(takewhile(lambda number: f"blocks.{number}.attention.wo.weight" in weights, count())))
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
    for name, value in told.items():
        if arguments.get(name, value) != value:
            raise UserError(
                f"the config has {name}={arguments[name]}, but the weights and the first stage are of a model with "
                f"{name}={value}; give the config of this model, or none, and --stage1 the model that it was trained "
                "with, imported with the --image_size of its images"
            )
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


def own_weights(weights: Weights) -> Weights:
    """Those of the transformer, in a checkpoint that holds its first stage too."""
    inside = {name: weight for name, weight in weights.items() if name.startswith(IN_CHECKPOINT)}
    return {name.removeprefix(IN_CHECKPOINT): weight for name, weight in inside.items()} or weights
