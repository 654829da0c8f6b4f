from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from common.errors import UserError
from common.model_io import load_pretrained
from stage1_vae.binarise import Binarised
from stage1_vae.labels.m1m2 import M1M2, M1M2Config
from stage1_vae.networks import DenseConfig
from stage1_vae.objectives.terms import elbo
from stage1_vae.posteriors import FullCovarianceConfig
from stage1_vae.vae import VAE, VAEConfig

K, D, D1 = 3, 2, 4
NETWORK = DenseConfig(hidden=(6,), activation="tanh")
BINARISED = Binarised("once", 0)


def first_vae(**changes: object) -> VAE:
    torch.manual_seed(0)
    config = VAEConfig(**{"latents": D1, "encoder": NETWORK, "decoder": NETWORK} | changes)
    model = VAE(config, (4, 4), BINARISED)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3)
    return model


CONFIG = M1M2Config(m1="vae", classes=K, latents=D, classifier=NETWORK, encoder=NETWORK, decoder=NETWORK)


def small(m1: VAE | None = None) -> M1M2:
    return M1M2(CONFIG, (4, 4), BINARISED, ("ant", "bee", "cat"), first_vae() if m1 is None else m1)


def pictures(count: int = 5) -> Tensor:
    return torch.bernoulli(torch.full((count, 1, 4, 4), 0.5), generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_bounds_are_those_of_the_three_layers():
    """Against a loop over images, classes and draws by torch's distributions."""
    model, images, labels = small(), pictures(), torch.tensor([-1, 2, 1, -1, 0])
    noise = torch.randn(2, 5, D + D1, generator=torch.Generator().manual_seed(2))
    expected = []
    for image, label, of_image in zip(images, labels.tolist(), noise.unbind(1), strict=True):
        bounds = []
        for z2_noise, z1_noise in (draw.split([D, D1]) for draw in of_image):
            posterior = model.m1.posterior(image[None])
            q1 = Normal(posterior.mean[0], posterior.scale[0])
            z1 = q1.loc + q1.scale * z1_noise
            outer = model.m1.decoder.log_likelihood(z1[None, None], image[None])[0, 0] - q1.log_prob(z1).sum()
            of_classes = []
            for unit in torch.eye(K):
                mean, log_variance = model.m2.encoder.layers(torch.cat([z1, unit])).chunk(2)
                q2 = Normal(mean, (log_variance / 2).exp())
                told = model.m2.decoder.network(torch.cat([unit, q2.loc + q2.scale * z2_noise])[None])
                p1, log_scale = model.m2.decoder.likelihood.parts(told)
                of_z1 = Normal((p1.flatten() + 1) / 2, log_scale.exp().flatten() / 2).log_prob(z1).sum()
                kl = kl_divergence(q2, Normal(torch.zeros(D), torch.ones(D))).sum()
                of_classes.append(outer + of_z1 - kl - math.log(K))
            q = model.m2.classifier.layers(z1).softmax(0)
            whole = (q * torch.stack(of_classes)).sum() - (q * q.log()).sum()
            bounds.append(of_classes[label] if label >= 0 else whole)
        expected.append(torch.stack(bounds).mean())
    found = elbo(model(images, noise=noise, labels=labels))
    torch.testing.assert_close(found, torch.stack(expected))
    found.sum().backward()
    assert all(weight.grad is None for weight in model.m1.parameters())
    assert all(weight.grad is not None for weight in model.m2.parameters())


def test_weights_say_how_likely_images_are():
    """Their mean over draws is p(x), which p(x|z) of draws of the model's own gives too."""
    model, images = small(), pictures(3)  # small seeds the generator
    terms = model(images, draws=20_000)
    latents = model.draw_latents(40_000)
    likelihood = model.m1.decoder.log_likelihood(model.split(latents)[1].unsqueeze(1), images)
    by_prior = likelihood.logsumexp(0) - math.log(40_000)
    torch.testing.assert_close(terms.log_weights.logsumexp(0) - math.log(20_000), by_prior, atol=0.15, rtol=0)
    assert (elbo(terms) < by_prior).all()


def test_it_stands_alone_once_it_is_saved(tmp_path: Path):
    """M1 is in its folder, as it was, and stays at rest while the rest is trained."""
    first_vae().save_pretrained(tmp_path / "vae")
    model = M1M2(replace(CONFIG, m1=str(tmp_path / "vae")), (4, 4), BINARISED)
    assert model.train().m1.training is False
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "vae").rename(tmp_path / "elsewhere")
    again = load_pretrained(tmp_path / "model", {"m1m2": M1M2})
    assert again.m1.fingerprint() == first_vae().fingerprint()
    assert again.fingerprint() == model.fingerprint()
    images, noise = pictures(), torch.randn(2, 5, D + D1)
    torch.testing.assert_close(elbo(again(images, noise=noise)), elbo(model(images, noise=noise)))
    torch.testing.assert_close(again.decode(again.encode(images)), again.m1.decode(again.m1.encode(images)))


def test_another_class_in_the_same_style_goes_through_z1():
    model = small()
    latents = model.draw_latents(4, labels=torch.tensor([0, 1, 2, 0]))
    assert torch.equal(latents[:, :K].argmax(1), torch.tensor([0, 1, 2, 0]))
    moved = model.in_class(latents, torch.tensor([2, 2, 2, 2]))
    assert torch.equal(moved[:, K : K + D], latents[:, K : K + D])
    torch.testing.assert_close(moved[:, K + D :], (model.m2.decoder.mean(moved[:, : K + D]).flatten(1) + 1) / 2)
    assert (moved[:, K + D :] != latents[:, K + D :]).all()


def test_a_first_vae_that_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r"model\.m1 is not given, expected the run or model folder of a VAE"):
        M1M2(M1M2Config(), (4, 4))
    with pytest.raises(UserError, match="has a full_covariance posterior over 4 latents, expected a diagonal one"):
        small(first_vae(posterior=FullCovarianceConfig()))
    with pytest.raises(UserError, match=r"drawn anew, seed 0, expected binarised: drawn once.* give --binarised once"):
        M1M2(CONFIG, (4, 4), Binarised("anew", 0), m1=first_vae())
    plain = first_vae()
    plain.binarised = None  # not recorded: made without `train-vae`
    assert M1M2(CONFIG, (4, 4), Binarised("none", 3), m1=plain).m1 is plain
