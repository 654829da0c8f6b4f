"""The priors of VAR (Tian et al. 2024, arXiv:2404.02905), over the codes of its tokenizer."""

from __future__ import annotations

import re
from itertools import count, takewhile

from common.errors import UserError
from common.foreign_weights import Arguments, first_few, refuse
from common.renaming import Weights, load_renamed, renamed
from stage2_prior.imports.first_stage import FirstStage
from stage2_prior.priors.var import VAR, VARConfig

# What follows from the sizes: the mask, the scale of each position, and the bias that keys do not have.
IGNORED = r"(attn_bias_for_masking|lvl_1L|blocks\.\d+\.attn\.zero_k_bias)$"
HEADS = "blocks.{}.attn.scale_mul_1H11"  # of models whose scores are cosines
HIDDEN = "blocks.{}.ffn.fc1.weight"
NAMES = {
    r"^word\.": "word_embed.",
    r"^classes\.": "class_emb.",
    r"^start$": "pos_start",
    r"^places$": "pos_1LC",
    r"^scales\.": "lvl_embed.",
    r"^shared\.linear\.": "shared_ada_lin.1.",
    r"^output\.": "head.",
    r"^output_modulation\.linear\.": "head_nm.ada_lin.1.",
    r"\.modulation\.linear\.": ".ada_lin.1.",
    r"\.modulation\.offsets$": ".ada_gss",
    r"\.attention\.qkv\.": ".attn.mat_qkv.",
    r"\.attention\.log_factor$": ".attn.scale_mul_1H11",
    r"\.attention\.out\.": ".attn.proj.",
    r"\.attention\.": ".attn.",
    r"\.feed_forward\.up\.": ".ffn.fc1.",
    r"\.feed_forward\.down\.": ".ffn.fc2.",
}


def build_var(weights: Weights, config: Arguments | None = None, stage1: FirstStage | None = None) -> VAR:
    """weights: a published file, or `trainer.var_wo_ddp` of one that training wrote; config: arguments of `VAR`, all of
    which the shapes of the weights tell but those of dropout; stage1: the tokenizer, whose code vectors it sees. Raises
    UserError."""
    arguments = config or {}
    refuse(arguments, {"norm_eps": 1e-6})
    layers = len(list(takewhile(lambda number: HIDDEN.format(number) in weights, count())))
    needed = [HIDDEN.format(0), "class_emb.weight", "pos_1LC", "head.weight"]
    if missing := [name for name in needed if name not in weights]:
        raise UserError(f"the weights have no {first_few(missing)}: they are not those of VAR's transformer")
    codes, width = weights["pos_1LC"].shape[1:]
    cosine, ratio = HEADS.format(0) in weights, len(weights[HIDDEN.format(0)]) / width
    refuse(arguments, {"attn_l2_norm": cosine, "mlp_ratio": ratio})
    predicts = f"the weights predict {codes} codes of {len(weights['head.weight'])}"
    if stage1 is None:
        raise UserError(f"{predicts}, and see them through their tokenizer: import it first, and give it as --stage1")
    spec, latents = stage1.code_spec, stage1.latents
    fits = codes == spec.codes_per_image and {len(weights["head.weight"])} == {grid.vocabulary for grid in spec.grids}
    if latents is None or not fits:
        raise UserError(
            f"{predicts}, and the first stage makes {spec.describe()}; give --stage1 the tokenizer, of multi-scale "
            "codes, that it was trained with"
        )
    prior = VAR(
        VARConfig(
            layers=layers,
            width=width,
            heads=heads_of(weights, arguments),
            cosine_attention=cosine,
            mlp_ratio=ratio,
            shared_adaln="shared_ada_lin.1.weight" in weights,
            dropout=arguments.get("drop_rate", 0.0),
            drop_path=arguments.get("drop_path_rate", layers / 240),
        ),
        spec,
        len(weights["class_emb.weight"]) - 1,
        latent_width=latents["codebook"].shape[1],
        stage1_fingerprint=stage1.fingerprint,
    )
    heads_alone = {name: weight.flatten() if "scale_mul" in name else weight for name, weight in weights.items()}
    load_renamed(prior, heads_alone, name_in_var, IGNORED)
    prior.latents.fill(latents)
    return prior.eval()


def heads_of(weights: Weights, arguments: Arguments) -> int:
    """Raises UserError where neither the weights nor the config tell."""
    cosine = weights.get(HEADS.format(0))
    if cosine is not None:
        return cosine.shape[1]
    if "num_heads" not in arguments:
        raise UserError(
            "the weights of a model without attn_l2_norm do not tell its number of heads; give num_heads in --config"
        )
    return int(arguments["num_heads"])


def name_in_var(key: str) -> str | None:
    return None if re.match(r"latents\.", key) else renamed(key, NAMES)
