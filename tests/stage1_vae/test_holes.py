"""Images with holes: what is drawn and what files say, a likelihood of seen pixels alone with its gradient, and
completions against a model whose missing pixels have a distribution in closed form."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from images.datasets import DataConfig, ImageDataset, open_images
from images.sources import ArraySource
from stage1_vae.binarise import NumberedImages
from stage1_vae.completing import complete
from stage1_vae.decoders import PixelCNNDecoderConfig
from stage1_vae.holes import HolesConfig, drawn_holes, seen_images, seen_pixels
from stage1_vae.likelihoods import (
    BernoulliConfig,
    CategoricalConfig,
    GaussianConfig,
    LogisticMixtureConfig,
    build_likelihood,
)
from stage1_vae.networks import DenseConfig
from stage1_vae.priors import GaussianMixtureConfig, VampPriorConfig
from stage1_vae.train import Stage1VAEConfig, train_vae
from stage1_vae.vae import VAE, VAEConfig
from training.config import TrainConfig

NAN = math.nan
DENSE = DenseConfig(hidden=(6,))


def vae(channels: int = 1, size: int = 4, **given: Any) -> VAE:
    torch.manual_seed(0)
    settings = {"latents": 2, "encoder": DENSE, "decoder": DENSE, "holes": True, **given}
    return VAE(VAEConfig(channels=channels, **settings), (size, size)).eval()


# ---- which pixels are missing ---------------------------------------------------------------------------------------


TOLERANCES = {"half": 0.0, "rectangle": 0.04, "pixels": 0.02, "scratches": 0.15}


@pytest.mark.parametrize(("drawn", "tolerance"), TOLERANCES.items())
def test_so_many_pixels_are_missing_by_the_numbers_of_the_images_alone(drawn: Any, tolerance: float):
    config = HolesConfig(drawn=drawn, share=0.5 if drawn == "half" else 0.3)
    holes = drawn_holes(config, range(60), 28, 28)
    assert holes.mean() == pytest.approx(config.share, abs=tolerance + 1e-9)
    assert (drawn_holes(config, [7, 3], 28, 28) == holes[[7, 3]]).all()
    assert (drawn_holes(replace(config, seed=1), range(60), 28, 28) != holes).any()
    assert len({hole.tobytes() for hole in holes}) >= 4


def folder(root: Path) -> NumberedImages:
    values = np.random.default_rng(0).integers(0, 256, (3, 6, 8), dtype=np.uint8)
    for number, picture in enumerate(values):
        Image.fromarray(picture).save(root / f"{number}.png")
    mask = np.zeros((6, 8), dtype=np.uint8)
    mask[:, :3] = 255
    Image.fromarray(mask).save(root / "1.mask.png")
    config = DataConfig(path=str(root), image_size=6, channels=1, flip=True)
    images = ImageDataset(open_images(config), config, augment_seed=0)
    return NumberedImages(images, training=True, holes=HolesConfig(files=True))


def test_masks_beside_files_are_no_images_and_follow_their_image(tmp_path: Path):
    data = folder(tmp_path)
    assert len(data) == 3
    seen_mirrored = set()
    for draw in range(12):
        batch = data.fetch([0, 1, 2], [draw, draw + 50, draw + 100])
        assert not batch["holes"][[0, 2]].any()
        columns = batch["holes"][1].all(0)  # 6x8 is cut to its middle 6x6: two of three columns are left of the mask
        assert columns.tolist() in ([True, True, False, False, False, False], [False, False, False, False, True, True])
        seen_mirrored.add(bool(columns[0]))
        images = seen_images(batch)
        assert torch.equal(images.isnan()[:, 0], batch["holes"])
    assert seen_mirrored == {True, False}


@pytest.mark.parametrize("drawn", ["half", "rectangle", "scratches", "pixels"])
@pytest.mark.parametrize("moves", [{"flip": True}, {"shift": 3}, {"crop": "random", "flip": True, "shift": 1}], ids=str)
def test_what_is_drawn_moves_with_the_image(drawn: Any, moves: dict[str, Any]):
    """Each pixel has a value of its own: one that is missing in a draw is seen in none."""
    pictures = np.arange(3 * 8 * 10).reshape(3, 8, 10).astype(np.uint8)
    config = DataConfig(path="x", image_size=8, channels=1, **moves)
    images = ImageDataset(ArraySource("x", pictures), config, augment_seed=0)
    holes = HolesConfig(drawn=drawn)
    data = NumberedImages(images, training=True, holes=holes)
    seen, missing = set(), set()
    for draw in range(30):
        batch = data.fetch([0, 1, 2], [draw, draw + 50, draw + 100])
        seen |= set(batch["images"][:, 0][~batch["holes"]].tolist())
        missing |= set(batch["images"][:, 0][batch["holes"]].tolist())
    assert not seen & missing
    still = NumberedImages(images.without_augmentation(), training=False, holes=holes).fetch([0, 1, 2], [0, 0, 0])
    assert (still["holes"].numpy() == drawn_holes(holes, range(3), 8, 8)).all()
    assert set(still["images"][:, 0][still["holes"]].tolist()) <= missing


def test_masks_that_do_not_fit_leave_nothing_or_are_damaged_are_named(tmp_path: Path):
    data = folder(tmp_path)
    mask = tmp_path / "2.mask.png"
    Image.fromarray(np.zeros((5, 8), dtype=np.uint8)).save(mask)
    with pytest.raises(UserError, match=r"2.mask.png has 8x5 pixels and its image 8x6, expected the same"):
        data.fetch([2], [0])
    Image.fromarray(np.full((6, 8), 255, dtype=np.uint8)).save(mask)
    with pytest.raises(UserError, match=r"2.mask.png leaves nothing of the part of 2.png that the model sees"):
        data.fetch([2], [0])
    mask.write_bytes(mask.read_bytes()[:-25])
    with pytest.raises(UserError, match=r"2.mask.png cannot be read: .*; save it anew as PNG"):
        data.fetch([2], [0])


def test_what_moves_out_of_sight_is_no_mistake_and_what_is_never_seen_is_one(tmp_path: Path):
    """Of a mask that leaves a column at the side, 6x8 cut to its middle 6x6 shows nothing."""
    data = folder(tmp_path)
    mask = np.full((6, 8), 255, dtype=np.uint8)
    mask[:, 0] = 0
    Image.fromarray(mask).save(tmp_path / "2.mask.png")
    config = replace(data.images.config, crop="random")
    training = ImageDataset(data.images.source, config, augment_seed=0)
    seen = [NumberedImages(training, training=True, holes=data.holes).fetch([2], [draw])["holes"] for draw in range(12)]
    assert {int((~holes).sum()) for holes in seen} == {0, 6}
    still = NumberedImages(training.without_augmentation(), training=False, holes=data.holes)
    with pytest.raises(UserError, match=r"2.mask.png leaves nothing of the part of 2.png"):
        still.fetch([2], [0])


def test_a_share_that_leaves_nothing_is_refused():
    config = DataConfig(path="x", image_size=4, channels=1)
    images = ImageDataset(ArraySource("x", np.zeros((1, 4, 4), dtype=np.uint8)), config)
    with pytest.raises(UserError, match=r"holes.drawn=rectangle, of a share of 0.99, leaves nothing of x\[0\]"):
        NumberedImages(images, training=False, holes=HolesConfig(drawn="rectangle", share=0.99)).fetch([0], [0])


# ---- the likelihood -------------------------------------------------------------------------------------------------

LIKELIHOODS = [
    BernoulliConfig(),
    GaussianConfig(variance="per_pixel"),
    GaussianConfig(variance="learned"),
    CategoricalConfig(),
    LogisticMixtureConfig(components=2),
]


@pytest.mark.parametrize("config", LIKELIHOODS, ids=lambda config: f"{config.kind}-{getattr(config, 'variance', '')}")
@pytest.mark.parametrize("channels", [1, 3])
def test_likelihoods_count_seen_pixels_alone_with_their_gradient(config: Any, channels: int):
    """Pixels are independent: that of an image cut out of another is that of the other's seen part."""
    likelihood = build_likelihood(config, channels)
    torch.manual_seed(0)
    outputs = torch.randn(2, 3, likelihood.outputs, 4, 4, requires_grad=True)
    images = (torch.rand(3, channels, 4, 4) * 255).round() / 127.5 - 1
    seen = torch.zeros(3, 1, 4, 4, dtype=torch.bool)
    seen[..., 1:3, :] = True
    masked = likelihood.log_prob(outputs, images, seen)
    part = likelihood.log_prob(outputs[..., 1:3, :], images[..., 1:3, :])
    torch.testing.assert_close(masked, part)
    (one,), (other,) = (torch.autograd.grad(value.sum(), outputs, retain_graph=True) for value in (masked, part))
    torch.testing.assert_close(one, other)
    everything = likelihood.log_prob(outputs, images, torch.ones_like(seen))
    torch.testing.assert_close(everything, likelihood.log_prob(outputs, images))


def test_terms_have_finite_gradients_and_whole_images_are_as_without_holes():
    model = vae(3)
    images = torch.rand(2, 3, 4, 4).round() * 2 - 1
    holed = images.clone()
    holed[0, :, :2] = NAN
    holed[1, 1, 3, 3] = NAN  # one channel is enough
    terms = model(holed, 3)
    (-terms.log_weights.mean()).backward()
    assert all(bool(weight.grad.isfinite().all()) for weight in model.parameters() if weight.grad is not None)
    assert seen_pixels(holed)[1, 0, 3, 3].item() is False
    whole = model.log_likelihood(terms.latents[0], images)
    torch.testing.assert_close(whole, model.decoder.log_likelihood(terms.latents[0], images))
    assert (whole < terms.log_likelihood).all()  # of a probability, more pixels are less likely


def test_priors_start_from_what_is_seen():
    """Clusters from posteriors that know which pixels are missing; pseudo-inputs, which are images, with grey there."""
    model = vae(prior=GaussianMixtureConfig(clusters=1, start_iterations=0))
    pictures = torch.rand(6, 1, 4, 4)
    pictures[:, :, :2] = NAN
    model.start(pictures)
    torch.testing.assert_close(model.prior.means[0].detach(), model.encode(pictures).mean(0).detach())
    model = vae(prior=VampPriorConfig(components=6))
    model.start(pictures)
    assert torch.equal(model.prior.pseudo_inputs.detach(), pictures.nan_to_num(0.0))


def test_models_that_cannot_have_holes_say_so():
    with pytest.raises(UserError, match=r"model.decoder.kind=pixelcnn, whose pixels go by those before them"):
        vae(decoder=PixelCNNDecoderConfig())
    with pytest.raises(UserError, match=r"variance=optimal, expected fixed, learned or per_pixel"):
        vae(likelihood=GaussianConfig(variance="optimal"))
    data = DataConfig(path="x", image_size=4, channels=1)
    with pytest.raises(UserError, match=r"images with holes for model.kind=vae, which takes whole ones"):
        Stage1VAEConfig(model=VAEConfig(), data=data, train=TrainConfig(), holes=HolesConfig(drawn="half"))
    with pytest.raises(UserError, match="this model is a vae of whole images"):
        complete(vae(holes=False), torch.zeros(1, 1, 4, 4))


# ---- completing -----------------------------------------------------------------------------------------------------


def test_completions_come_to_the_conditional_mean():
    """p(x|z) = N(W z + c, 0.2^2) of 2x2 pixels, within the range of images: the missing two given the seen two."""
    model = vae(
        size=2, likelihood=GaussianConfig(scale=0.2), encoder=DenseConfig(hidden=()), decoder=DenseConfig(hidden=())
    )
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        (layer,), (proposal,) = model.decoder.network.layers.layers, model.encoder.layers.layers
        layer.weight.copy_(0.2 * torch.randn(4, 2, generator=generator))
        layer.bias.copy_(0.2 * torch.randn(4, generator=generator))
        proposal.weight.zero_()  # q(z|x) = p(z)
        proposal.bias.zero_()
    image = torch.tensor([[[[0.5, NAN], [-0.6, NAN]]]])
    weight, mean = layer.weight.detach(), layer.bias.detach()
    covariance = weight @ weight.T + 0.04 * torch.eye(4)
    seen, missing = [0, 2], [1, 3]
    gain = covariance[missing][:, seen] @ covariance[seen][:, seen].inverse()
    expected = mean[missing] + gain @ (torch.tensor([0.5, -0.6]) - mean[seen])
    assert (expected - mean[missing]).abs().max() > 0.04  # what ignoring the seen pixels would be wrong by
    found = complete(model, image, draws=20_000, drawn=4000)
    torch.testing.assert_close(found.expected.flatten()[missing], expected, rtol=0, atol=0.006)
    torch.testing.assert_close(found.drawn.mean(0).flatten()[missing], expected, rtol=0, atol=0.012)
    spread = weight[missing] @ (weight[seen].T @ weight[seen] / 0.04 + torch.eye(2)).inverse() @ weight[missing].T
    torch.testing.assert_close(found.drawn.flatten(1)[:, missing].var(0), spread.diagonal(), rtol=0.15, atol=1e-4)
    assert found.expected.flatten()[seen].tolist() == image.flatten()[seen].tolist()


def test_images_are_completed_alike_in_whatever_company():
    model = vae()
    images = torch.rand(3, 1, 4, 4).round() * 2 - 1
    images[:, :, 2:] = NAN
    whole, alone = complete(model, images, draws=30, drawn=2), complete(model, images[2:], draws=30, drawn=2, first=2)
    torch.testing.assert_close(whole.expected[2:], alone.expected)
    torch.testing.assert_close(whole.drawn[:, 2:], alone.drawn)
    assert not bool(whole.expected.isnan().any())


def test_a_run_learns_from_halves(tmp_path: Path):
    pictures = np.random.default_rng(0).integers(0, 2, (40, 1, 8, 8)).astype(np.uint8) * 255
    np.savez(tmp_path / "x.npz", images=pictures[:, 0])
    config = Stage1VAEConfig(
        model=VAEConfig(latents=2, encoder=DENSE, decoder=DENSE, holes=True),
        data=DataConfig(path=str(tmp_path / "x.npz"), image_size=8, channels=1, validation_count=8),
        train=TrainConfig(
            steps=4, batch_size=8, validate_every=4, preview_every=4, save_every=4, tracker="none", workers=0
        ),
        binarised="threshold",
        holes=HolesConfig(drawn="half"),
    )
    result = train_vae(config, tmp_path / "run")
    assert all(math.isfinite(value) for value in result.metrics.values())
    # half of 64 pixels, black or white by chance: about a bit each, and not half of one
    assert result.metrics["bits_per_dimension"] == pytest.approx(1, abs=0.35)
    assert list((tmp_path / "run" / "previews").glob("*.png"))
