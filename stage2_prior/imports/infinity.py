"""The priors of FoundationVision/Infinity (Han et al. 2024, arXiv:2412.04431), over the bits of its tokenizers."""

from __future__ import annotations

import math
import re
from typing import cast

import torch
from torch import Tensor

from common.errors import UserError
from common.foreign_weights import Arguments, first_few, refuse
from common.renaming import Weights, load_renamed, renamed
from stage2_prior.condition import EmbeddingSpec
from stage2_prior.imports.first_stage import FirstStage
from stage2_prior.priors.infinity import Infinity
from stage2_prior.priors.infinity_layers import InfinityConfig

TEXT_ENCODER = "google/flan-t5-xl"  # of the published models
CHUNKED = r"^block_chunks\.(\d+)\.module\.(\d+)\."
# What follows from the sizes, and the bias that keys do not have.
IGNORED = r"(lvl_1L|attn_bias_for_masking|Infinity_(in)?visible_\w+|(.*\.)?zero_k_bias)$"
NULL, LEVELS, FACTORS, HIDDEN, QUESTION = (
    "cfg_uncond",
    "lvl_embed.weight",
    "blocks.0.sa.scale_mul_1H11",
    "blocks.0.ffn.fc1.weight",
    "text_proj_for_sos.ca.mat_q",
)
NAMES = {
    r"^sentence\.null$": NULL,
    r"^word_norm\.": "text_norm.",
    r"^pool\.question$": QUESTION,
    r"^pool\.attention\.": "text_proj_for_sos.ca.",
    r"^words\.": "text_proj_for_ca.",
    r"^latent\.": "word_embed.",
    r"^start$": "pos_start",
    r"^scale_vectors\.": "lvl_embed.",
    r"^shared\.linear\.": "shared_ada_lin.1.",
    r"^output\.": "head.",
    r"^output_modulation\.linear\.": "head_nm.ada_lin.1.",
    r"\.modulation\.offsets$": ".ada_gss",
    r"\.attention\.log_factor$": ".sa.scale_mul_1H11",
    r"^(blocks\.\d+)\.attention\.": r"\1.sa.",
    r"\.reading\.norm\.": ".ca_norm.",
    r"\.reading\.q\.": ".ca.mat_q.",
    r"\.reading\.words\.": ".ca.",
    r"\.qkv\.": ".mat_qkv.",
    r"\.kv\.": ".mat_kv.",
    r"\.out\.": ".proj.",
    r"\.feed_forward\.up\.": ".ffn.fc1.",
    r"\.feed_forward\.down\.": ".ffn.fc2.",
}


def build_infinity(weights: Weights, config: Arguments | None = None, stage1: FirstStage | None = None) -> Infinity:
    """weights: a published file; config: arguments of `Infinity`, of which the shapes of the weights tell all but
    `text_maxlen`, left out as many words as the null sentence has, `drop_rate` and `drop_path_rate`; stage1: the
    tokenizer. Raises UserError."""
    arguments = config or {}
    refuse(
        arguments,
        {
            "norm_eps": 1e-6,
            "rms_norm": False,
            "cos_attn": True,
            "swiglu": False,
            "nm0": False,
            "shared_aln": True,
            "head_aln": True,
            "head_depth": 1,
            "use_bit_label": 1,
            "rope2d_each_sa_layer": 1,
            "rope2d_normalized_by_hw": 2,
            "add_lvl_embeding_only_first_block": 1,
            "apply_spatial_patchify": 0,
        },
    )
    weights = in_one_row(weights)
    needed = [NULL, LEVELS, FACTORS, HIDDEN, QUESTION, "word_embed.weight", "head.weight"]
    if missing := [name for name in needed if name not in weights]:
        raise UserError(f"the weights have no {first_few(missing)}: they are not those of Infinity's transformer")
    width, bits = weights["word_embed.weight"].shape
    predicts = f"the weights predict {bits} bits at each place"
    if stage1 is None:
        raise UserError(f"{predicts}, of scales that its tokenizer has: import this first, and give it as --stage1")
    length = int(arguments.get("text_maxlen", len(weights[NULL])))
    prior = Infinity(
        InfinityConfig(
            layers=1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks.")),
            width=width,
            heads=weights[FACTORS].shape[1],
            mlp_ratio=len(weights[HIDDEN]) / width,
            dropout=arguments.get("drop_rate", 0.0),
            drop_path=arguments.get("drop_path_rate", 0.1),
            coarse_weight=0.5,
        ),
        stage1.code_spec,
        0,
        embeddings=EmbeddingSpec(length, weights[NULL].shape[1], TEXT_ENCODER),
        stage1_fingerprint=stage1.fingerprint,
    )
    scales, ours = len(prior.scales), prior.output.out_features // 2
    if stage1.latents is not None or ours != bits or scales > len(weights[LEVELS]):
        raise UserError(
            f"{predicts} of up to {len(weights[LEVELS])} scales, and the first stage makes "
            f"{stage1.code_spec.describe()}; give --stage1 the tokenizer that it was trained with (of the 8B model, "
            "which tells four places of its tokenizer at once, none is read)"
        )
    fitting = {
        **weights,
        NULL: null_words(weights[NULL], cast("Tensor", prior.sentence.null)),
        LEVELS: weights[LEVELS][:scales],
        QUESTION: weights[QUESTION].reshape(prior.pool.question.shape),
    }
    fitting |= {name: weight.flatten() for name, weight in weights.items() if name.endswith("scale_mul_1H11")}
    load_renamed(prior, fitting, lambda key: renamed(key, NAMES), IGNORED)
    return prior.eval()


def in_one_row(weights: Weights) -> dict[str, Tensor]:
    """With the blocks, which published files have in chunks, by their numbers: `blocks.N`."""
    found = [match for name in weights if (match := re.match(CHUNKED, name))]
    each = 1 + max((int(match[2]) for match in found), default=0)  # blocks of a chunk
    number = {match[0]: int(match[1]) * each + int(match[2]) for match in found}

    def name_of(name: str) -> str:
        match = re.match(CHUNKED, name)
        return name if match is None else f"blocks.{number[match[0]]}.{name.removeprefix(match[0])}"

    return {name_of(name): weight for name, weight in weights.items()}


def null_words(given: Tensor, fresh: Tensor) -> Tensor:
    """The words of any sentence, of as many places as `fresh` has: cut, or filled up with the same words at each
    import, as no weights begin."""
    generator = torch.Generator().manual_seed(0)
    filling = torch.empty(fresh.shape)
    torch.nn.init.trunc_normal_(filling, std=1.2, generator=generator)
    filling /= math.sqrt(fresh.shape[1])
    return torch.cat([given.float(), filling[len(given) :]])[: len(fresh)]
