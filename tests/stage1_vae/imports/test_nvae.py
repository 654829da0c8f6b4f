"""From a file of the published implementation, by the command, to a model folder."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from pipelines.commands.import_weights import ImportConfig, import_weights
from pipelines.latents.models import load_vae
from stage1_vae.binarise import Binarised
from stage1_vae.hierarchies.nvae import NVAE, NVAEConfig
from stage1_vae.imports.nvae import import_nvae
from stage1_vae.likelihoods import BernoulliConfig, LogisticMixtureConfig
from tests.golden import real_shapes_vae

ARGUMENTS: dict[str, Any] = {
    "dataset": "mnist", "num_latent_per_group": 1, "num_latent_scales": 2, "num_groups_per_scale": 2,
    "num_channels_enc": 2, "num_channels_dec": 4, "num_preprocess_blocks": 1, "num_postprocess_blocks": 1,
    "num_preprocess_cells": 1, "num_postprocess_cells": 2, "num_cell_per_cond_enc": 2, "num_cell_per_cond_dec": 1,
    "num_nf": 1, "ada_groups": True, "use_se": True, "res_dist": True, "num_mixture_dec": 10, "num_x_bits": 8,
    "min_groups_per_scale": 1, "arch_instance": "res_mbconv",
    "learning_rate": 0.01, "save": "/runs/1", "cells": [1, {"not": "plain"}],  # nothing to a model
}  # fmt: skip
CONFIG = NVAEConfig(
    channels=1, padding=2, latents=1, scales=2, groups=2, encoder_width=2, decoder_width=4, blocks=1,
    preprocess_cells=1, postprocess_cells=2, encoder_cells=2, decoder_cells=1, flows=1, likelihood=BernoulliConfig(),
)  # fmt: skip


def published() -> dict[str, Tensor]:
    torch.manual_seed(0)
    weights = dict(NVAE(CONFIG, (28, 28)).state_dict())
    weights["dec_tower.1._ops.0.conv.2.conv.0.weight_normalized"] = torch.zeros(3)
    return weights


def files(folder: Path, **changes: Any) -> ImportConfig:
    """As the project's training saves."""
    content = {"epoch": 1, "state_dict": published(), "arch_instance": {"normal_enc": ["res_bnswish"] * 2}, **changes}
    torch.save(content, folder / "checkpoint.pt")
    return ImportConfig(kind="nvae", weights=str(folder / "checkpoint.pt"), out=str(folder / "model"))


def test_the_command_makes_a_model_folder_of_a_checkpoint_alone(tmp_path: Path):
    line = import_weights(files(tmp_path, args=Namespace(**ARGUMENTS)))
    assert line.startswith("576 latents in 3 groups (28x28x1 images): the nvae model is in ")
    model = load_vae(tmp_path / "model")
    assert (model.config, model.image_size, model.binarised) == (CONFIG, (28, 28), Binarised("anew"))
    weights = published()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_arguments_may_be_given_beside_weights_alone(tmp_path: Path):
    config = files(tmp_path)
    with pytest.raises(UserError, match="holds no args beside its weights"):
        import_weights(config)
    (tmp_path / "args.json").write_text(json.dumps(ARGUMENTS))
    torch.save(published(), tmp_path / "alone.pt")
    import_weights(
        ImportConfig(
            kind="nvae",
            weights=str(tmp_path / "alone.pt"),
            config=str(tmp_path / "args.json"),
            out=str(tmp_path / "model"),
        )
    )
    assert load_vae(tmp_path / "model").config == CONFIG


def test_what_early_checkpoints_do_not_say_is_as_it_was_then(tmp_path: Path):
    arguments = {name: value for name, value in ARGUMENTS.items() if name not in ("num_mixture_dec", "ada_groups")}
    arguments |= {"dataset": "cifar10", "num_nf": 0}
    config = NVAEConfig(
        latents=1, scales=2, groups=2, halve_groups=False, encoder_width=2, decoder_width=4, blocks=1,
        preprocess_cells=1, postprocess_cells=2, encoder_cells=2, decoder_cells=1,
        likelihood=LogisticMixtureConfig(components=10),
    )  # fmt: skip
    assert import_nvae(NVAE(config, (32, 32)).state_dict(), arguments).config == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_x_bits": 5}, "num_x_bits=5 is not supported: expected 8"),
        ({"dataset": "svhn"}, "dataset=svhn is not supported"),
        ({"dataset": "celeba_64", "num_mixture_dec": 1}, "num_mixture_dec=1 is not supported"),
        ({"arch_instance": "res_elu"}, "arch_instance=res_elu is not supported"),
        ({"num_postprocess_blocks": 2}, "num_postprocess_blocks=2 is not supported: expected 1"),
        ({"num_nf": "one"}, "num_nf=one, expected a whole number"),
        ({"num_channels_enc": None}, "num_channels_enc=None, expected a whole number"),
        ({"num_channels_enc": 4}, "the weights are not those of this model"),
        ({"num_groups_per_scale": 1, "num_latent_scales": 1}, "at least 2 in all"),
    ],
)
def test_other_models_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        import_nvae(published(), {**ARGUMENTS, **changes})


class Evil:
    def __reduce__(self) -> Any:
        return print, ("code from the file ran",)


def test_no_code_of_a_checkpoint_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(UserError, match="would run code from the file"):
        import_weights(files(tmp_path, args=Namespace(**ARGUMENTS, evil=Evil())))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["mnist", "celeba_64"])
def test_real_checkpoints_fit(name: str):
    """Names and shapes of published models of full size, whose commands the project's README has."""
    shared = {"num_cell_per_cond_enc": 2, "num_cell_per_cond_dec": 2, "num_postprocess_blocks": 0}
    shared |= {"num_latent_per_group": 20}
    arguments = {
        "mnist": {
            "num_latent_scales": 2, "num_groups_per_scale": 10, "num_channels_enc": 32, "num_channels_dec": 32,
            "num_preprocess_cells": 3, "num_postprocess_cells": 3, "num_preprocess_blocks": 2, "num_nf": 0,
            "num_postprocess_blocks": 2,
        },
        "celeba_64": {
            "num_latent_scales": 3, "num_groups_per_scale": 20, "num_channels_enc": 64, "num_channels_dec": 64,
            "num_preprocess_cells": 2, "num_postprocess_cells": 2, "num_preprocess_blocks": 1, "num_nf": 1,
            "num_postprocess_blocks": 1,
        },
    }[name]  # fmt: skip
    shapes = real_shapes_vae(f"nvae_{name}")
    with torch.device("meta"):
        weights = {key: torch.empty([] if shape == ["int64"] else shape) for key, shape in shapes.items()}
        model = import_nvae(weights, {**ARGUMENTS, **shared, **arguments, "dataset": name})
    assert len(model.group_shapes) == {"mnist": 15, "celeba_64": 35}[name]
