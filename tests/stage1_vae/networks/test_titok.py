"""TiTok's networks of a VAE: every latent is of the whole image and every pixel of all latents; a VAE of them learns,
is saved and read again; what does not fit is refused. Beside the original: ../imports/test_titok.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from common.errors import UserError
from common.model_io import load_pretrained
from stage1_vae.exact import check_can_code
from stage1_vae.labels.m2 import M2Config
from stage1_vae.likelihoods import GaussianConfig, LogisticMixtureConfig
from stage1_vae.modalities.multimodal import MultimodalConfig
from stage1_vae.networks import ConvolutionalConfig, DenseConfig
from stage1_vae.networks.titok import TiTokNetworkConfig
from stage1_vae.posteriors.matrix_normal import MatrixNormalConfig
from stage1_vae.vae import VAE, VAEConfig

NETWORK = TiTokNetworkConfig(patch=4, tokens=3, width=16, blocks=1, heads=2)


def tiny(**settings: object) -> VAE:
    torch.manual_seed(0)
    settings = {"latents": 2, "likelihood": GaussianConfig(), "encoder": NETWORK, "decoder": NETWORK, **settings}
    return VAE(VAEConfig(channels=1, **settings), (8, 12))


def pictures(b: int) -> Tensor:
    return torch.rand(b, 1, 8, 12, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def test_each_latent_tells_of_the_whole_image_and_each_pixel_comes_of_all_latents():
    model, images = tiny(), pictures(1)
    assert model.shape == (2, 1, 3)
    for row, column in ((0, 0), (7, 11)):
        other = images.clone()
        other[0, 0, row, column] += 1
        moved = (model.encode(other) - model.encode(images)).abs().amax(dim=(0, 1, 2))  # n
        assert (moved > 1e-6).all()
    latents = model.encode(images)
    for token in range(3):
        other = latents.clone()
        other[..., token] += 1
        assert ((model.decode(other) - model.decode(latents)).abs() > 1e-7).all()
    assert (model.decode(latents.flip(3)) - model.decode(latents)).abs().max() > 1e-4  # tokens have positions


def test_it_learns_eight_pictures():
    model = tiny(latents=8, likelihood=GaussianConfig(scale=0.1))
    images = torch.randint(4, (8, 1, 2, 3)).repeat_interleave(4, 2).repeat_interleave(4, 3) / 1.5 - 1
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(100):
        optimizer.zero_grad()
        (-model(images).log_weights.mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 100.0)
        optimizer.step()
    with torch.no_grad():
        error = (model.decode(model.encode(images)) - images).square().mean() / images.var()
    assert error < 0.5  # pictures in their mean colour have 1, a fresh model more


def test_it_comes_back_from_its_folder(tmp_path: Path):
    model = tiny()
    model.save_pretrained(tmp_path / "model")
    again = load_pretrained(tmp_path / "model", {"vae": VAE})
    assert (again.config, again.fingerprint()) == (model.config, model.fingerprint())
    latents = torch.ones(1, 2, 1, 3)
    torch.testing.assert_close(again.decode(latents), model.decode(latents))


@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_other_networks_stand_beside_one_half(half: str):
    """Its decoder reads a row of tokens alone; of its encoder's latents a dense decoder makes images too."""
    if half == "encoder":
        assert tiny(decoder=DenseConfig(hidden=(5,))).decode(torch.ones(1, 2, 1, 3)).shape == (1, 1, 8, 12)
        return
    with pytest.raises(UserError, match=r"reads a row of as many latents, and the encoder's have the shape \(2,\)"):
        tiny(encoder=DenseConfig(hidden=(5,)))
    with pytest.raises(UserError, match=r"decoder.tokens=3 reads .* the shape \(2, 4, 6\): give encoder.kind=titok"):
        tiny(encoder=ConvolutionalConfig(widths=(4, 4), map=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": 0}, "tokens=0, expected at least 1"),
        ({"patch": 0}, "patch=0, expected at least 1"),
        ({"blocks": 0}, "blocks=0, expected at least 1"),
        ({"heads": 0}, "heads=0, expected at least 1"),
        ({"width": 12}, "width=12, expected a multiple of heads=8"),
    ],
)
def test_a_bad_value_is_refused_when_the_config_is_built(settings, message):
    with pytest.raises(UserError, match=message):
        TiTokNetworkConfig(**settings)


def test_images_of_broken_patches_are_refused():
    network = TiTokNetworkConfig(patch=5, tokens=3, width=16, blocks=1, heads=2)
    with pytest.raises(UserError, match="images of 8x12 pixels are no whole patches of patch=5"):
        tiny(encoder=network, decoder=network)


def test_what_wants_one_vector_or_exact_arithmetic_refuses_it():
    with pytest.raises(UserError, match=r"with model.posterior.kind=matrix_normal, expected False"):
        VAEConfig(encoder=NETWORK, posterior=MatrixNormalConfig())
    with pytest.raises(UserError, match="the style of an image is one vector"):
        M2Config(encoder=NETWORK)
    with pytest.raises(UserError, match="networks without a map: latents are one vector"):
        MultimodalConfig(encoder=NETWORK)
    with pytest.raises(UserError, match="the encoder of this model is a vision transformer, expected dense or convol"):
        check_can_code(tiny(likelihood=LogisticMixtureConfig(components=2)))
