"""Published NVAE weights and settings as ours, for the golden files."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stage1_vae.hierarchies.nvae import NVAE, NVAEConfig
from stage1_vae.likelihoods import BernoulliConfig, GaussianConfig, LogisticMixtureConfig
from tests.golden import GoldenVAE


def config_of(arguments: dict[str, Any]) -> NVAEConfig:
    grey = arguments["dataset"] == "mnist"
    mixtures = arguments["num_mixture_dec"]
    colour = LogisticMixtureConfig(components=mixtures) if mixtures > 1 else GaussianConfig(variance="per_pixel")
    return NVAEConfig(
        channels=1 if grey else 3,
        padding=2 if grey else 0,
        latents=arguments["num_latent_per_group"],
        scales=arguments["num_latent_scales"],
        groups=arguments["num_groups_per_scale"],
        halve_groups=arguments["ada_groups"],
        fewest_groups=arguments["min_groups_per_scale"],
        encoder_width=arguments["num_channels_enc"],
        decoder_width=arguments["num_channels_dec"],
        blocks=arguments["num_preprocess_blocks"],
        preprocess_cells=arguments["num_preprocess_cells"],
        postprocess_cells=arguments["num_postprocess_cells"],
        encoder_cells=arguments["num_cell_per_cond_enc"],
        decoder_cells=arguments["num_cell_per_cond_dec"],
        cells=arguments["arch_instance"],
        squeeze_excite=arguments["use_se"],
        residual_posterior=arguments["res_dist"],
        flows=arguments["num_nf"],
        likelihood=BernoulliConfig() if grey else colour,
    )


def model_of(golden: GoldenVAE) -> NVAE:
    config = config_of(golden.config)
    side = golden.config["input_size"] - 2 * config.padding
    model = NVAE(config, (side, side))
    model.load_state_dict(own(golden.weights))
    return model


def own(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if not name.endswith("weight_normalized")}


def noise_of(golden: GoldenVAE, prefix: str, model: NVAE) -> Tensor:
    """All groups' noise of a prefix, k b N with one draw."""
    groups = [golden.inputs[f"{prefix}/eps{place}"] for place in range(len(model.group_shapes))]
    return torch.cat([group.flatten(1) for group in groups], dim=1).unsqueeze(0)
