"""The tokenizers IBQ of SEED-Voken (Shi et al. 2024, arXiv:2412.02692): taming's networks around codes of the largest
inner product."""

from __future__ import annotations

from common.foreign_weights import Arguments
from common.renaming import Weights
from stage1_vq.autoencoders.vqgan import VQGAN
from stage1_vq.imports.taming import build, first_stage
from stage1_vq.imports.vqgan import codebook_sizes
from stage1_vq.quantizers import IBQConfig

CODEBOOK = "quantize.embedding.weight"
AVERAGES = "model_ema."  # before the names of averages, which have lost their dots


def import_ibq(weights: Weights, config: Arguments | None = None) -> VQGAN:
    """weights: the file's `state_dict`; config: arguments of `IBQ`, and `norm_num_groups`. Where the file holds
    averages of the weights they are taken, as its project does for evaluation and for its priors, unless the config
    says `use_ema: false`. The first stage in a checkpoint of a prior will do, with the prior's config. Raises
    UserError."""
    weights, arguments = first_stage(weights, config or {})
    if arguments.get("use_ema", True):
        weights = averaged(weights)
    k, d = codebook_sizes(weights, CODEBOOK)
    sample_weight = arguments.get("sample_minimization_weight", 1.0)
    quantizer = IBQConfig(
        codebook_size=k,
        dim=d,
        commitment_weight=arguments.get("beta", 0.25),
        entropy_weight=arguments.get("entropy_loss_weight", 0.05) * sample_weight,
        diversity=arguments.get("batch_maximization_weight", 1.0) / sample_weight if sample_weight else 0.0,
        temperature=arguments.get("entropy_temperature", 0.01),
    )
    return build(weights, arguments, quantizer, {"quantizer.codebook": CODEBOOK})


def averaged(weights: Weights) -> Weights:
    """The averages in the place of the weights that they are of; others as they are."""
    return {name: weights.get(f"{AVERAGES}{name.replace('.', '')}", tensor) for name, tensor in weights.items()}
