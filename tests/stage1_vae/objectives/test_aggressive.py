from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from common.errors import UserError
from images.datasets import DataConfig
from stage1_vae.networks.dense import DenseConfig
from stage1_vae.objectives import AggressiveConfig, ELBOConfig
from stage1_vae.objectives.aggressive import Aggressive, mutual_information
from stage1_vae.objectives.terms import Terms
from stage1_vae.posteriors import DiagonalGaussian
from stage1_vae.train import Stage1VAEConfig, train_vae
from stage1_vae.vae import VAE, VAEConfig
from tests.stage1_vae.objectives.reference import facts, objective
from training.config import TrainConfig


@pytest.fixture
def model() -> VAE:
    torch.manual_seed(0)
    small = DenseConfig(hidden=(7,))
    return VAE(VAEConfig(latents=2, encoder=small, decoder=small), (3, 3))


def aggressive(model: VAE, **settings: object) -> Aggressive:
    return objective("aggressive", facts(generator=tuple(model.generator_parameters())), **settings)


def binary_images(count: int = 6) -> Tensor:
    return torch.randint(0, 2, (count, 1, 3, 3), generator=torch.Generator().manual_seed(1)) * 2.0 - 1


def test_inference_steps_come_before_each_of_the_generator(model: VAE):
    one = aggressive(model, inference_steps=2)
    names = {id(weight): name.partition(".")[0] for name, weight in model.named_parameters()}
    resting = [{names[id(weight)] for weight in one.loss(model, binary_images(), step).resting} for step in range(6)]
    assert resting == [{"decoder"}, {"decoder"}, {"encoder"}] * 2
    assert one.loss(model, binary_images(), 0).metrics["aggressive"] == 1
    one.judge({"mutual_information": 1.0, "negative_elbo": 5.0}, 0, 4)
    one.judge({"mutual_information": 0.5, "negative_elbo": 4.0}, 0, 8)
    output = one.loss(model, binary_images(), 6)
    assert output.resting == ()
    assert output.metrics["aggressive"] == 0


def test_the_loss_is_that_of_its_bound(model: VAE):
    noise = torch.randn(1, 6, 2)
    found = aggressive(model, bound=ELBOConfig(beta=3.0)).loss(model, binary_images(), 0, noise)
    expected = objective("elbo", beta=3.0).loss(model, binary_images(), 0, noise)
    torch.testing.assert_close(found.loss, expected.loss)


@pytest.mark.parametrize(("patience", "ends"), [(1, 2), (2, 5), (9, None)])
def test_it_ends_when_the_information_stops_growing(model: VAE, patience: int, ends: int | None):
    one = aggressive(model, patience=patience)
    lasts, kept = [], []
    seen = [(1.0, 9.0), (2.0, 8.0), (1.9, 8.5), (2.1, 7.0), (2.0, 7.1), (1.0, 6.0)]
    for number, (information, bound) in enumerate(seen):
        kept.append(one.judge({"mutual_information": information, "negative_elbo": bound}, 0, number).keep)
        lasts.append(one.lasts)
        state = one.state()
        one = aggressive(model, patience=patience)  # a kill and a start anew change nothing
        one.load_state(state)
    assert kept == [True, True, False, True, False, True]
    assert lasts == [ends is None or number < ends for number in range(6)]
    fresh = aggressive(model)
    again = aggressive(model)
    again.load_state(fresh.state())
    assert again.state() == fresh.state()


def test_mutual_information_of_posteriors_apart_is_the_log_of_their_number_and_of_equal_ones_nothing():
    def terms(mean: Tensor) -> Terms:
        posterior = DiagonalGaussian(mean, torch.zeros_like(mean))
        latents, log_posterior = posterior.draw(torch.randn(1, *mean.shape))
        return Terms((latents,), torch.zeros(1, len(mean)), (log_posterior,), (log_posterior,), (None,), (posterior,))

    torch.manual_seed(0)
    apart = torch.arange(8.0).unsqueeze(1) * 100
    torch.testing.assert_close(mutual_information(terms(apart)), torch.full((8,), math.log(8)))
    torch.testing.assert_close(mutual_information(terms(torch.zeros(8, 1))), torch.zeros(8))
    # of many: the entropies of a Gaussian of variance 1 + 4 and of its noise
    many = mutual_information(terms(2 * torch.randn(3000, 1)))
    error = many.std() / math.sqrt(len(many))
    assert abs(many.mean() - 0.5 * math.log(5)) < 4 * error


def test_a_training_passes_from_one_phase_to_the_other_and_continues_bit_for_bit(tmp_path: Path):
    chance = np.random.default_rng(0)
    pixels = chance.integers(0, 80, (60, 8, 8, 1), dtype=np.uint8)
    pixels[::2, :, :4] += 150
    np.savez(tmp_path / "images.npz", images=pixels)
    small = DenseConfig(hidden=(16,))

    def train(run: Path) -> None:
        settings = {"batch_size": 12, "learning_rate": 3e-3, "workers": 0, "tracker": "none", "preview_every": 0}
        train_vae(
            Stage1VAEConfig(
                model=VAEConfig(latents=2, encoder=small, decoder=small),
                data=DataConfig(path=str(tmp_path / "images.npz"), image_size=8, channels=1, validation_count=12),
                train=TrainConfig(steps=18, save_every=3, validate_every=3, keep_newest=9, **settings),
                objective=AggressiveConfig(inference_steps=2),
                binarised="once",
            ),
            run,
        )

    def state(run: Path, step: int) -> dict[str, Any]:
        return json.loads((run / "checkpoints" / f"step_{step:08d}" / "state.json").read_text())["guard"]

    train(tmp_path / "whole")
    lasts = [state(tmp_path / "whole", step)["lasts"] for step in range(3, 19, 3)]
    assert lasts[0]
    assert not lasts[-1]
    for step in (3, 12):  # in the one phase, and in the other
        cut = tmp_path / f"cut{step}"
        shutil.copytree(tmp_path / "whole", cut)
        for path in (cut / "checkpoints").iterdir():
            if int(path.name.removeprefix("step_")) > step:
                shutil.rmtree(path)
        shutil.rmtree(cut / "model")
        train(cut)
        for name in ("model", "optimizer"):
            path = Path("checkpoints") / "step_00000018" / f"{name}.safetensors"
            assert (tmp_path / "whole" / path).read_bytes() == (cut / path).read_bytes()
        assert state(cut, 18) == state(tmp_path / "whole", 18)


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="inference_steps=0, expected at least 1"):
        AggressiveConfig(inference_steps=0)
    with pytest.raises(UserError, match="patience=0, expected at least 1"):
        AggressiveConfig(patience=0)
