"""What the imports of SEED-Voken's two transformers share: that of IBQ and that of Open-MAGVIT2."""

from __future__ import annotations

from itertools import count, takewhile

from common.errors import UserError
from common.foreign_weights import Arguments, first_few, look_up
from common.renaming import Weights

IN_CHECKPOINT = "transformer."  # before the prior's names, in a file that holds its first stage too
IGNORED = r"freqs_cis$"
CLASSES = "class_emb.embedding_table.weight"
BLOCK_NAMES = {
    r"\.attention\.qkv\.": ".attention.wqkv.",
    r"\.attention\.out\.": ".attention.wo.",
    r"\.feed_forward_norm\.": ".ffn_norm.",
    r"\.feed_forward\.gate_up\.": ".feed_forward.w13.",
    r"\.feed_forward\.down\.": ".feed_forward.w2.",
}


def own_weights(weights: Weights) -> Weights:
    """Those of the transformer, in a checkpoint that holds its first stage too."""
    inside = {name: weight for name, weight in weights.items() if name.startswith(IN_CHECKPOINT)}
    return {name.removeprefix(IN_CHECKPOINT): weight for name, weight in inside.items()} or weights


def own_arguments(config: Arguments | None) -> Arguments:
    """Those of its `GPT`, at the top or in `transformer_config`."""
    arguments = config or {}
    return {**arguments, **(look_up(arguments, "transformer_config.params") or {})}


def check_names(weights: Weights, needed: list[str], whose: str) -> None:
    """Raises UserError for weights that have not what tells the sizes."""
    if missing := [name for name in needed if name not in weights]:
        raise UserError(f"the weights have no {first_few(missing)}: they are not those of {whose} transformer")


def layers_of(weights: Weights, blocks: str) -> int:
    return len(list(takewhile(lambda number: f"{blocks}.{number}.attention.wo.weight" in weights, count())))


def check_sizes(arguments: Arguments, told: Arguments) -> None:
    """Raises UserError where the config has other sizes than the weights and the first stage tell."""
    for name, value in told.items():
        if arguments.get(name, value) != value:
            raise UserError(
                f"the config has {name}={arguments[name]}, but the weights and the first stage are of a model with "
                f"{name}={value}; give the config of this model, or none, and --stage1 the model that it was trained "
                "with, imported with the --image_size of its images"
            )
