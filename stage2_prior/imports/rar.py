"""The priors of RAR (Yu et al. 2024, arXiv:2411.00776), over the codes of MaskGIT-VQGAN."""

from __future__ import annotations

from itertools import count, takewhile

from common.errors import UserError
from common.foreign_weights import Arguments, first_few, given
from common.renaming import Weights, load_renamed, renamed
from stage2_prior.imports.first_stage import FirstStage, check_vocabulary, published, side_of_square
from stage2_prior.priors.rar import BEFORE, RAR, RARConfig

# Rows that the published tables of positions and of steps have beyond those of the codes, and nothing reads.
SPARE_POSITIONS, SPARE_STEPS = 1024, 100
IGNORED = r"attn_mask$"
CONDITIONED = "embeddings.weight"  # codes, a mask that nothing uses, classes, no class
NAMES = {
    r"^start$": "cls_token",
    r"^places$": "pos_embed",
    r"^targets$": "target_aware_pos_embed",
    r"^progress$": "timesteps_embeddings",
    r"^output_modulation\.": "adaln_before_head.adaLN_modulation.1.",
    r"^output\.": "lm_head.",
    r"\.modulation\.": ".adaLN_modulation.1.",
    r"\.attention_norm\.": ".norm1.",
    r"\.feed_forward_norm\.": ".norm2.",
    r"\.attention\.query_norm\.": ".attn.q_norm.",
    r"\.attention\.key_norm\.": ".attn.k_norm.",
    r"\.attention\.out\.": ".attn.proj.",
    r"\.attention\.": ".attn.",
    r"\.feed_forward\.up\.": ".mlp.fc1.",
    r"\.feed_forward\.down\.": ".mlp.fc2.",
}


def build_rar(weights: Weights, config: Arguments | None = None, stage1: FirstStage | None = None) -> RAR:
    """weights: the published state dict; config: of the original's file, `model.generator` or its fields. The shapes of
    the weights tell all but dropout and the heads' number, which is their width's. Raises UserError."""
    arguments = generator_of(config or {})
    needed = ["pos_embed", "lm_head.weight", "timesteps_embeddings", CONDITIONED, "blocks.0.attn.q_norm.weight"]
    if missing := [name for name in needed if name not in weights]:
        raise UserError(f"the weights have no {first_few(missing)}: they are not those of RAR's transformer")
    vocabulary, width = weights["lm_head.weight"].shape
    size = arguments.get("image_seq_len") or weights["pos_embed"].shape[1] - SPARE_POSITIONS
    if stage1 is None:
        side = side_of_square([size])
        if side is None:
            raise UserError(
                f"the weights have positions of {size} codes, expected a square number; give --stage1 the model that "
                "it was trained with, or image_seq_len in --config"
            )
        stage1 = published(vocabulary, (side, side))
    grid = stage1.only_grid()
    check_vocabulary(grid, vocabulary)
    if grid.size != size or grid.vocabulary != vocabulary:
        raise UserError(
            f"the weights predict {size} codes of {vocabulary}, and the first stage makes "
            f"{stage1.code_spec.describe()}; give --stage1 the model that it was trained with, imported with the "
            "--image_size of its images"
        )
    prior = RAR(
        RARConfig(
            layers=len(list(takewhile(lambda number: f"blocks.{number}.attn.proj.weight" in weights, count()))),
            width=width,
            heads=width // len(weights["blocks.0.attn.q_norm.weight"]),
            hidden_width=len(weights["blocks.0.mlp.fc1.weight"]),
            **given(arguments, {"dropout": "dropout", "attention_dropout": "attn_drop"}),
        ),
        stage1.code_spec,
        len(weights[CONDITIONED]) - vocabulary - 2,
        stage1_fingerprint=stage1.fingerprint,
    )
    load_renamed(prior, with_own_tables(weights, size, vocabulary), lambda key: renamed(key, NAMES), IGNORED)
    return prior.eval()


def generator_of(config: Arguments) -> Arguments:
    """The fields of the transformer in a config of the original, wherever they stand in it."""
    for name in ("model", "generator"):
        config = config.get(name) or config
    return config


def with_own_tables(weights: Weights, size: int, vocabulary: int) -> Weights:
    """The rows of each table that a prior of `size` codes reads; codes and classes apart."""
    embeddings, positions = weights[CONDITIONED], weights["pos_embed"][0]
    own = {
        "embedding.weight": embeddings[:vocabulary],
        "classes.weight": embeddings[vocabulary + 1 :],
        "pos_embed": positions[: BEFORE + size],
        "target_aware_pos_embed": weights["target_aware_pos_embed"][0, BEFORE : BEFORE + size],
        "timesteps_embeddings": weights["timesteps_embeddings"][0, : 1 + size],
    }
    return {**{name: weight for name, weight in weights.items() if name != CONDITIONED}, **own}
