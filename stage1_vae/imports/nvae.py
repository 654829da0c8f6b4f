"""NVAE as its authors trained it (github.com/NVlabs/NVAE): a checkpoint.pt with the weights under `state_dict` and the
command line under `args`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from common.errors import UserError
from common.foreign_weights import Arguments, refuse
from common.renaming import Weights, load_renamed
from stage1_vae.binarise import Binarised
from stage1_vae.hierarchies.nvae import NVAE, PRIMITIVES, NVAEConfig
from stage1_vae.likelihoods import BernoulliConfig, LogisticMixtureConfig

NUMBERS = {  # our fields by the original's arguments, and what an argument is that early checkpoints have not
    "num_latent_per_group": ("latents", None),
    "num_latent_scales": ("scales", None),
    "num_groups_per_scale": ("groups", None),
    "min_groups_per_scale": ("fewest_groups", 1),
    "num_channels_enc": ("encoder_width", None),
    "num_channels_dec": ("decoder_width", None),
    "num_preprocess_blocks": ("blocks", None),
    "num_preprocess_cells": ("preprocess_cells", None),
    "num_postprocess_cells": ("postprocess_cells", None),
    "num_cell_per_cond_enc": ("encoder_cells", None),
    "num_cell_per_cond_dec": ("decoder_cells", None),
    "num_nf": ("flows", 0),
}
SWITCHES = {"ada_groups": "halve_groups", "use_se": "squeeze_excite", "res_dist": "residual_posterior"}
DIGITS = ("mnist", "omniglot")  # of 28x28 pixels, black or white by chance whenever they are seen


@dataclass(frozen=True)
class Images:
    channels: int
    side: int
    padding: int


def import_nvae(weights: Weights, arguments: Arguments | None = None) -> NVAE:
    """weights: the state dict. arguments: what the original's command line says, by the names that its `args` has.
    Raises UserError."""
    if arguments is None:
        raise UserError(
            "the file holds no args beside its weights, and these do not tell what model they are of: give the "
            "published checkpoint.pt, which has both, or the original's arguments in a file by --config"
        )
    dataset = str(arguments.get("dataset"))
    images = images_of(dataset)
    config = config_of(arguments, images)
    binarised = Binarised("anew") if dataset in DIGITS else None
    model = NVAE(config, (images.side, images.side), binarised)
    # Early checkpoints hold what a convolution's weights were when it was last called, too.
    load_renamed(model, weights, lambda name: name, ignored=r".*\.weight_normalized$")
    return model.eval()


def images_of(dataset: str) -> Images:
    """Of the original's data sets. Raises UserError."""
    if dataset in DIGITS:
        return Images(channels=1, side=28, padding=2)
    if dataset == "cifar10":
        return Images(channels=3, side=32, padding=0)
    if found := re.fullmatch(r"(?:celeba|imagenet|lsun_\w+)_(\d+)", dataset):
        return Images(channels=3, side=int(found[1]), padding=0)
    if dataset == "ffhq":
        return Images(channels=3, side=256, padding=0)
    raise UserError(
        f"the original's dataset={dataset} is not supported, expected mnist, omniglot, cifar10, ffhq, or celeba, "
        "imagenet or lsun with the side of their images behind, such as celeba_64"
    )


def config_of(arguments: Arguments, images: Images) -> NVAEConfig:
    refuse(arguments, {"num_x_bits": 8, "num_postprocess_blocks": arguments.get("num_preprocess_blocks")})
    values: dict[str, Any] = {field: number(arguments, name, least) for name, (field, least) in NUMBERS.items()}
    values |= {field: bool(arguments.get(name, False)) for name, field in SWITCHES.items()}
    cells = arguments.get("arch_instance", "res_mbconv")
    if cells not in PRIMITIVES:
        raise UserError(
            f"the original's arch_instance={cells} is not supported: expected one of {', '.join(PRIMITIVES)}"
        )
    components = number(arguments, "num_mixture_dec", 10)
    if images.channels == 3 and components == 1:
        raise UserError(
            "the original's num_mixture_dec=1 is not supported, expected 2 or more: its one component is a Gaussian "
            "density, which is not of 8-bit images"
        )
    likelihood = BernoulliConfig() if images.channels == 1 else LogisticMixtureConfig(components=components)
    return NVAEConfig(channels=images.channels, padding=images.padding, cells=cells, likelihood=likelihood, **values)


def number(arguments: Arguments, name: str, missing: int | None) -> int:
    """A whole number among the arguments. Raises UserError; where it has none, unless `missing` says what it is."""
    value = arguments.get(name, missing)
    if type(value) is not int:
        raise UserError(
            f"the original's arguments have {name}={value}, expected a whole number: give all that the checkpoint has "
            "under args, by --config"
        )
    return value
