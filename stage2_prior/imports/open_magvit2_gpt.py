"""The priors of Open-MAGVIT2 in SEED-Voken (Luo et al. 2024, arXiv:2409.04410), over the factors of its
tokenizers' codes."""

from __future__ import annotations

from codes.spec import CodeSpec, Grid
from common.errors import UserError
from common.foreign_weights import Arguments, refuse
from common.renaming import Weights, load_renamed, renamed
from stage2_prior.imports.first_stage import FirstStage, heads_of
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
from stage2_prior.priors.open_magvit2_gpt import OpenMAGVIT2GPT, OpenMAGVIT2GPTConfig

# Heads of the published models, by layers and width: B, L, XL.
HEADS = {(24, 1024): 16, (36, 1280): 20, (48, 1536): 24}
NAMES = {
    r"^classes\.": "class_emb.embedding_table.",
    r"^code_embeddings\.0\.": "pre_emb.",
    r"^code_embeddings\.1\.": "post_emb.",
    r"^blocks\.": "spatial_blocks.",
    r"^factor_blocks\.": "factorized_blocks.",
    r"^outputs\.": "head.",
    **BLOCK_NAMES,
}


def build_open_magvit2_gpt(
    weights: Weights, config: Arguments | None = None, stage1: FirstStage | None = None
) -> OpenMAGVIT2GPT:
    """weights: the checkpoint's `state_dict`, or the transformer's own; config: arguments of its `GPT`, at the top or
    in `transformer_config`, and `downsample_size`, the pixels to a code. What they leave out the shapes tell, or else
    the published models. Raises UserError."""
    weights, arguments = own_weights(weights), own_arguments(config)
    refuse(arguments, {"token_factorization": True})
    needed = ["pre_emb.weight", "post_emb.weight", CLASSES]
    needed += [f"{blocks}.0.feed_forward.w1.weight" for blocks in ("spatial_blocks", "factorized_blocks")]
    check_names(weights, needed, "Open-MAGVIT2's")
    width = weights[CLASSES].shape[1]
    sizes = [len(weights[name]) for name in ("pre_emb.weight", "post_emb.weight")]
    layers, factor_layers = (layers_of(weights, blocks) for blocks in ("spatial_blocks", "factorized_blocks"))
    stage1 = stage1 or factorized(published_stage(sizes[0] * sizes[1], arguments), sizes)
    grids = stage1.code_spec.grids
    if [grid.vocabulary for grid in grids] != sizes:
        raise UserError(
            f"the first stage makes {stage1.code_spec.describe()}, the prior knows two grids, of {sizes[0]} and "
            f"{sizes[1]}; give --stage1 the model that it was trained with, imported with the config of this prior, or "
            "one that says token_factorization: true and factorized_bits"
        )
    check_sizes(
        arguments,
        {
            "dim": width,
            "cond_dim": width,
            "spatial_n_layer": layers,
            "factorized_n_layer": factor_layers,
            "factorized_bits": [size.bit_length() - 1 for size in sizes],
            "class_num": len(weights[CLASSES]) - 1,
            "block_size": grids[0].size,
        },
    )
    prior = OpenMAGVIT2GPT(
        OpenMAGVIT2GPTConfig(
            layers=layers,
            factor_layers=factor_layers,
            width=width,
            heads=heads_of(arguments, layers, width, HEADS),
            hidden_width=len(weights["spatial_blocks.0.feed_forward.w1.weight"]),
        ),
        stage1.code_spec,
        len(weights[CLASSES]) - 1,
        stage1_fingerprint=stage1.fingerprint,
    )
    load_renamed(prior, with_gate_up(weights), lambda key: renamed(key, NAMES), IGNORED)
    return prior.eval()


def factorized(stage1: FirstStage, sizes: list[int]) -> FirstStage:
    """With the codes of its one grid as their factors, as LFQ names them."""
    spec, grid = stage1.code_spec, stage1.only_grid()
    grids = tuple(Grid(f"factor{i}", grid.height, grid.width, size) for i, size in enumerate(sizes))
    return FirstStage(CodeSpec(grids, spec.image_height, spec.image_width, spec.image_channels))
