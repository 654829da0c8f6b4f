from __future__ import annotations

import json

import pytest
import torch

from common.errors import UserError
from common.model_io import load_pretrained
from stage1_vae.binarise import Binarised
from stage1_vae.networks import ConvolutionalConfig
from stage1_vae.objectives.terms import elbo, total_kl
from stage1_vae.vae import VAE, VAEConfig


@pytest.fixture
def model() -> VAE:
    torch.manual_seed(0)
    return VAE(VAEConfig(latents=3), (8, 6))


def binary_images(count: int) -> torch.Tensor:
    return torch.randint(0, 2, (count, 1, 8, 6), generator=torch.Generator().manual_seed(1)) * 2.0 - 1


def test_closed_kl_is_the_mean_of_what_draws_say(model: VAE):
    images = binary_images(4)
    with torch.no_grad():
        terms = model(images, draws=50_000)
    drawn = (sum(terms.log_posterior) - sum(terms.log_prior)).sum(-1)  # k b
    error = drawn.std(0) / drawn.shape[0] ** 0.5
    assert ((drawn.mean(0) - total_kl(terms)).abs() < 4 * error).all()


def test_elbo_is_the_mean_log_weight(model: VAE):
    images = binary_images(4)
    with torch.no_grad():
        terms = model(images, draws=50_000)
    error = terms.log_weights.std(0) / terms.log_weights.shape[0] ** 0.5
    assert ((terms.log_weights.mean(0) - elbo(terms)).abs() < 4 * error).all()


def test_noise_decides_the_draws(model: VAE):
    images = binary_images(2)
    noise = model.posterior(images).noise(5)
    first, again = model(images, noise=noise), model(images, noise=noise)
    assert torch.equal(first.log_weights, again.log_weights)
    posterior = model.posterior(images)
    torch.testing.assert_close(posterior.log_density(first.latents[0]), first.log_posterior[0])


def test_a_model_folder_gives_the_same_model(model: VAE, tmp_path):
    model.save_pretrained(tmp_path / "model")
    again = load_pretrained(tmp_path / "model", {"vae": VAE})
    assert again.fingerprint() == model.fingerprint()
    torch.testing.assert_close(again.encode(binary_images(2)), model.encode(binary_images(2)))


def test_a_model_knows_how_its_images_were_binarised(model: VAE, tmp_path):
    """And one that an earlier version saved does not, and is the same model as ever."""
    known = VAE(model.config, (8, 6), Binarised("once", 3))
    known.load_state_dict(model.state_dict())
    known.save_pretrained(tmp_path / "known")
    assert load_pretrained(tmp_path / "known", {"vae": VAE}).binarised == Binarised("once", 3)
    assert known.fingerprint() != model.fingerprint()  # its figures are of other images
    model.save_pretrained(tmp_path / "unknown")
    path = tmp_path / "unknown" / "config.json"
    description = json.loads(path.read_text())
    del description["arguments"]["binarised"]
    path.write_text(json.dumps(description))
    earlier = load_pretrained(tmp_path / "unknown", {"vae": VAE})
    assert earlier.binarised is None
    assert earlier.fingerprint() == model.fingerprint()


def test_images_of_another_size_are_refused(model: VAE):
    with pytest.raises(UserError, match=r"got images of shape \(2, 1, 8, 8\)"):
        model.posterior(torch.zeros(2, 1, 8, 8))


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_networks_come_back_by_their_kind(kind: str, tmp_path):
    convolutional = ConvolutionalConfig(widths=(4, 5), residual_blocks=0)
    model = VAE(VAEConfig(latents=3, **{kind: convolutional}), (8, 6))
    model.save_pretrained(tmp_path / "model")
    again = load_pretrained(tmp_path / "model", {"vae": VAE})
    assert again.config == model.config
    assert again.fingerprint() == model.fingerprint()
    torch.testing.assert_close(again.decode(torch.ones(1, 3)), model.decode(torch.ones(1, 3)))
