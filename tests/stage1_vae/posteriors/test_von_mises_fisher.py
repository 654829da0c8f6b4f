"""The von Mises-Fisher posterior against high-precision Bessel functions, exact moments and a published one."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError
from stage1_vae.posteriors import DiagonalGaussianConfig, VonMisesFisher, VonMisesFisherConfig, build_posterior
from stage1_vae.posteriors.bessel import log_bessel_and_ratio
from stage1_vae.posteriors.von_mises_fisher import (
    draw_noise,
    envelope,
    kl_to_uniform,
    log_acceptance,
    log_area,
    log_normaliser,
    log_peak,
    mean_length,
    reflect,
    unit_vectors,
)
from stage1_vae.priors import PRIORS, StandardNormalConfig, UniformSphereConfig
from stage1_vae.vae import VAEConfig
from tests.golden import golden_vae

# mpmath 1.3.0 with 80 digits: d, kappa, log C, I_(d/2) / I_(d/2-1), KL to the uniform, its derivative in kappa
EXACT = [
    (2, 0.0, -1.8378770664093456, 0.0, 0.0, 0.0),
    (2, 0.01, -1.8379020662530972, 0.004999937501041649, 2.49995312586804e-05, 0.004999812505208208),
    (2, 1.0, -2.073791424916524, 0.4463899658965345, 0.21047560738935586, 0.35434603245035623),
    (2, 10.0, -9.780849149528041, 0.9485998259548459, 1.5430261764297641, 0.05298387602951359),
    (2, 500.0, -497.81188473451607, 0.9989994989968619, 3.52574183032427, 0.0010010030125654052),
    (2, 10000.0, -9996.313780847842, 0.999949998749875, 5.024083717317503, 5.0002500375078143e-05),
    (3, 0.5, -2.572349101582209, 0.16395341373865285, 0.04065185225640831, 0.15865281158441535),
    (3, 30.0, -28.43667968474719, 0.9666666666666667, 3.094344562222101, 0.03333333333333333),
    (3, 2000.0, -1994.2369746068673, 0.9995, 7.294049640102028, 0.0005),
    (5, 0.5, -3.2952003944709576, 0.09929355660768976, 0.024735408543414068, 0.0978961683773387),
    (5, 30.0, -26.839457817818698, 0.9344827586206896, 4.465313965512517, 0.06432818073721759),
    (5, 2000.0, -1988.4734490886929, 0.9990002501250625, 12.797340186142746, 0.0009994996247498437),
    (16, 0.0, -1.3258249062897325, 0.0, 0.0, 0.0),
    (16, 0.01, -1.32582803128919, 0.0006249997829862468, 3.124998372396964e-06, 0.0006249993489590115),
    (16, 1.0, -1.3570208776502837, 0.062284332675995445, 0.031088361315444228, 0.061855671763174254),
    (16, 10.0, -4.057299047268216, 0.4876216679793914, 2.1447425388154295, 0.307926069479091),
    (16, 500.0, -467.1257192090304, 0.9850976907964045, 26.74895109546157, 0.014804431849632323),
    (16, 10000.0, -9944.70408758646, 0.9992502437743489, 49.12417506331853, 0.0007495124269792588),
    (64, 0.5, 40.76576695836858, 0.007812037665568766, 0.0019529516268013034, 0.007811113102923619),
    (64, 30.0, 34.33372513422713, 0.3966586273896132, 5.465763930340968, 0.29036447397600695),
    (64, 2000.0, -1818.2244573537746, 0.9843701466171224, 109.74811585489573, 0.015509661091071299),
    (128, 0.5, 127.05247996919579, 0.003906191314086428, 0.0009765404928547705, 0.003906073945732495),
    (128, 30.0, 123.62675053500126, 0.22289371378471023, 3.260105424182603, 0.202050119999592),
    (128, 2000.0, -1633.0555340001536, 0.9687462187433049, 177.38344696209634, 0.0307575606977653),
    (256, 0.5, 344.3343873736889, 0.0019531176072313764, 0.0004882784777140801, 0.001953102821805197),
    (256, 30.0, 342.58882889209025, 0.11563243536004003, 1.7229262988766394, 0.11260317997097656),
    (256, 2000.0, -1261.1824215960153, 0.9382650702683196, 271.012843286609, 0.05972291034915059),
    (512, 0.0, 867.9681031603942, 0.0, 0.0, 0.0),
    (512, 0.01, 867.968103062738, 1.953124999257841e-05, 9.765624994433808e-08, 1.953124997773523e-05),
    (512, 1.0, 867.9671265997497, 0.0019531175784661718, 0.0009765569338543108, 0.00195310273551088),
    (512, 10.0, 867.870465455012, 0.019523834023025134, 0.09760063484801391, 0.019509013284569634),
    (512, 500.0, 682.0267821846679, 0.6117481827407514, 119.93277039464934, 0.27875907617020546),
    (512, 10000.0, -8113.0844015437815, 0.9747751034105684, 766.6985294015082, 0.024899866356875758),
]


@pytest.mark.parametrize(("dimension", "kappa", "log_c", "length", "kl", "slope"), EXACT)
def test_normaliser_length_and_kl(dimension: int, kappa: float, log_c: float, length: float, kl: float, slope: float):
    concentration = torch.tensor(kappa, dtype=torch.float64, requires_grad=True)
    ours = kl_to_uniform(dimension, concentration)
    assert log_normaliser(dimension, concentration).item() == pytest.approx(log_c, rel=1e-13)
    assert mean_length(dimension, concentration).item() == pytest.approx(length, rel=1e-12)
    assert ours.item() == pytest.approx(kl, rel=1e-9, abs=1e-11)
    by_kappa = torch.autograd.grad(ours, concentration, retain_graph=True)[0]
    assert by_kappa.item() == pytest.approx(slope, rel=1e-8, abs=1e-15)
    by_kappa = torch.autograd.grad(log_normaliser(dimension, concentration), concentration)[0]
    assert by_kappa.item() == pytest.approx(-length, rel=1e-12)


def test_normaliser_is_finite_wherever_numbers_are():
    for dimension in (2, 3, 512, 100_000):
        values = log_peak(dimension, torch.tensor([0.0, 1e-300, 1e-8, 1e9, 1e15]))
        assert torch.isfinite(values).all()
    assert log_normaliser(512, torch.tensor(0.0)).item() == pytest.approx(-log_area(512), rel=1e-14)


@pytest.mark.parametrize("dimension", [2, 3, 4])
def test_density_is_one_over_the_sphere(dimension: int):
    """By the cosine t, whose share of the area is (1 - t^2)^((d - 3) / 2)."""
    angles = (torch.arange(20_000, dtype=torch.float64) + 0.5) * math.pi / 20_000
    kappa = torch.tensor(3.0, dtype=torch.float64)
    density = (log_normaliser(dimension, kappa) + kappa * angles.cos()).exp()
    ring = math.exp(log_area(dimension - 1)) if dimension > 2 else 2.0
    total = (density * ring * angles.sin() ** (dimension - 2)).sum() * math.pi / 20_000
    assert total.item() == pytest.approx(1, rel=1e-7)


@pytest.mark.parametrize(
    ("dimension", "kappa"),
    [(2, 0.0), (2, 0.7), (2, 1e4), (3, 5.0), (16, 1.0), (16, 1e4), (64, 100.0), (512, 1.0), (512, 1e4)],
)
def test_draws_have_the_right_cosines(dimension: int, kappa: float):
    """Their first two moments within four standard errors, and the distribution itself (Kolmogorov-Smirnov, 1e-4)."""
    count = 20_000
    noise = draw_noise(dimension, torch.full((count,), kappa), torch.Generator().manual_seed(dimension))
    torch.testing.assert_close(noise.norm(dim=-1), torch.ones(count, dtype=torch.float64))
    cosine = noise[:, 0]
    concentration = torch.tensor(kappa, dtype=torch.float64)
    length = mean_length(dimension, concentration)
    ratio = log_bessel_and_ratio(dimension / 2 - 1, concentration)[1]
    for moment, expected in ((cosine, length), (cosine.square(), 1 - (dimension - 1) * ratio)):
        assert (moment.mean() - expected).abs() < 4 * moment.std() / count**0.5
    angles = torch.linspace(0, math.pi, 2_000_001, dtype=torch.float64)[1:-1]
    log_density = kappa * (angles.cos() - 1) + (dimension - 2) * angles.sin().log()
    mass = (log_density - log_density.max()).exp().cumsum(0)
    place = torch.searchsorted(angles, cosine.clamp(-1, 1).acos().sort().values).clamp(max=len(angles) - 1)
    ranks = torch.arange(1, count + 1, dtype=torch.float64) / count
    assert (mass[place] / mass[-1] - ranks).abs().max() < 2.3 / count**0.5


def test_tangents_are_uniform():
    noise = draw_noise(4, torch.full((20_000,), 3.0), torch.Generator().manual_seed(0))
    tangent = F.normalize(noise[:, 1:], dim=-1)
    assert tangent.mean(0).abs().max() < 4 / (3 * 20_000) ** 0.5
    covariance = tangent.T @ tangent / 20_000
    assert (covariance - torch.eye(3) / 3).abs().max() < 4 * 0.3 / 20_000**0.5


@pytest.mark.parametrize("kappa", [0.5, 30.0, 1e4])
def test_acceptance_is_the_ratio_of_densities(kappa: float):
    """Of proposals, whose cosine has a density by the change of variables from their Beta variate."""
    dimension = 6
    concentration = torch.tensor(kappa, dtype=torch.float64)
    b = envelope(dimension, concentration)
    share = torch.linspace(0.01, 0.99, 99, dtype=torch.float64, requires_grad=True)
    cosine = unit_vectors(share[:, None], b, torch.ones(99, dimension - 1, dtype=torch.float64))[:, 0]
    slope = torch.autograd.grad(cosine.sum(), share)[0].abs()
    cosine, share = cosine.detach(), share.detach()
    wanted = kappa * cosine + (dimension - 3) / 2 * (1 - cosine.square()).log()
    proposed = (dimension - 3) / 2 * (share * (1 - share)).log() - slope.log()
    differences = log_acceptance(dimension, concentration, b, share) - (wanted - proposed)
    torch.testing.assert_close(differences, differences[:1].expand(99), rtol=1e-9, atol=1e-6)
    finely = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    assert log_acceptance(dimension, concentration, b, finely).max().item() == pytest.approx(0, abs=1e-4)


def mean_directions(dimension: int) -> Tensor:
    """The pole, its opposite, near both, where the first number is 0 of either sign, and any."""
    first = torch.eye(dimension, dtype=torch.float64)[0]
    second = torch.eye(dimension, dtype=torch.float64)[1]
    rows = [first, -first, first + 1e-9 * second, -first - 1e-9 * second, second, second - 1e-12 * first]
    rows += list(torch.randn(6, dimension, generator=torch.Generator().manual_seed(1)).double())
    return F.normalize(torch.stack(rows), dim=-1)


@pytest.mark.parametrize("dimension", [2, 3, 8])
def test_draws_are_turned_to_the_mean_direction(dimension: int):
    mean = mean_directions(dimension)
    posterior = VonMisesFisher(mean, 10.0)
    noise = draw_noise(dimension, torch.full((5, len(mean)), 10.0), torch.Generator().manual_seed(0))
    latents, log_density = posterior.draw(noise)
    torch.testing.assert_close((latents * mean).sum(-1), noise[..., 0], rtol=0, atol=1e-12)
    torch.testing.assert_close(latents.norm(dim=-1), torch.ones(5, len(mean), dtype=torch.float64))
    for row in range(len(mean)):  # an isometry: no density is lost
        torch.testing.assert_close(latents[:, row] @ latents[:, row].T, noise[:, row] @ noise[:, row].T)
    expected = 10 * (latents * mean).sum(-1, keepdim=True) + log_normaliser(dimension, torch.tensor(10.0))
    torch.testing.assert_close(log_density, expected)
    torch.testing.assert_close(posterior.log_density(latents), expected)
    mean = mean.clone().requires_grad_()
    VonMisesFisher(mean, 10.0).draw(noise).latents.sin().sum().backward()
    assert torch.isfinite(mean.grad).all()


def test_the_gradient_with_respect_to_the_mean_is_exact():
    """E[exp(a^T z)] is a ratio of normalisers, so that its derivative in the mean direction is known."""
    dimension, kappa, count = 4, 6.0, 100_000
    a = torch.tensor([0.5, -1.0, 0.3, 0.8], dtype=torch.float64)
    noise = draw_noise(dimension, torch.full((count,), kappa), torch.Generator().manual_seed(2))
    for start in ([0.3, 0.2, -0.5, 0.7], [-0.9, 0.1, 0.4, 0.2], [1.0, 0.0, 0.0, 0.0], [-1.0, 0.0, 0.0, 0.0]):
        features = torch.tensor([start], dtype=torch.float64, requires_grad=True)
        mean = F.normalize(features, dim=-1)
        log_c = log_normaliser(dimension, torch.tensor(kappa)) - log_normaliser(dimension, (kappa * mean[0] + a).norm())
        expected = torch.autograd.grad(log_c.exp(), features)[0][0]
        rows = features.detach().expand(count, -1).clone().requires_grad_()
        latents = VonMisesFisher(F.normalize(rows, dim=-1), kappa).draw(noise[None]).latents[0]
        gradients = torch.autograd.grad((latents @ a).exp().sum(), rows)[0]
        error = gradients.std(0) / count**0.5
        assert ((gradients.mean(0) - expected).abs() < 4 * error + 1e-12).all()


def test_features_of_no_length_have_a_direction():
    layer = build_posterior(VonMisesFisherConfig(), (3,))
    features = torch.zeros(2, 3, requires_grad=True)
    posterior = layer(features)
    assert posterior.mean.tolist() == [[1, 0, 0]] * 2
    posterior.draw(posterior.noise(2)).latents.sum().backward()
    assert torch.isfinite(features.grad).all()


def test_float32_keeps_densities_at_high_concentrations():
    mean = F.normalize(torch.randn(4, 512, generator=torch.Generator().manual_seed(0)), dim=-1)
    posterior = VonMisesFisher(mean, 1e4)
    noise = posterior.noise(3, torch.Generator().manual_seed(1))
    exact = VonMisesFisher(F.normalize(mean.double(), dim=-1), 1e4)
    latents, log_density = posterior.draw(noise)
    expected = exact.draw(F.normalize(noise.double(), dim=-1)).log_density
    torch.testing.assert_close(log_density.double(), expected, rtol=1e-6, atol=1e-3)
    torch.testing.assert_close(posterior.log_density(latents).double(), expected, rtol=1e-6, atol=2e-3)


def test_the_prior_is_uniform():
    prior = PRIORS["uniform_sphere"][0](UniformSphereConfig(), (3,))
    latents = prior.sample(20_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(latents.norm(dim=-1), torch.ones(20_000))
    assert latents.mean(0).abs().max() < 4 / (3 * 20_000) ** 0.5
    torch.testing.assert_close(prior.log_density(latents[:, None]), torch.full((20_000, 1, 1), -math.log(4 * math.pi)))


def test_wrong_uses_are_refused():
    with pytest.raises(UserError, match=r"concentration=-1, expected 0 or more"):
        VonMisesFisherConfig(concentration=-1)
    with pytest.raises(UserError, match=r"for one latent, expected at least 2"):
        build_posterior(VonMisesFisherConfig(), (1,))
    with pytest.raises(UserError, match=r"latents of the shape \(2, 3, 4\)"):
        build_posterior(VonMisesFisherConfig(), (2, 3, 4))
    with pytest.raises(UserError, match=r"prior.kind=uniform_sphere for latents of the shape \(1,\)"):
        PRIORS["uniform_sphere"][0](UniformSphereConfig(), (1,))
    for posterior, prior in (
        (VonMisesFisherConfig(), StandardNormalConfig()),
        (DiagonalGaussianConfig(), UniformSphereConfig()),
    ):
        with pytest.raises(UserError, match=rf"kind={posterior.kind} with model.prior.kind={prior.kind}"):
            VAEConfig(posterior=posterior, prior=prior)


@pytest.mark.parametrize("dimension", [2, 3, 5, 16, 64])
def test_equals_the_published_values(dimension: int):
    """Theirs of float64 (`exact`), and those of float32 where they have any."""
    reference = golden_vae("pythae_vmf")
    kappa = reference.inputs["kappa"].requires_grad_()
    kl = kl_to_uniform(dimension, kappa)
    grad = torch.autograd.grad(kl.sum(), kappa)[0]
    name = f"m{dimension}"
    reference.check(f"{name}/exact/kl", kl[:, 0])
    reference.check(f"{name}/exact/grad_kl", grad)
    reference.check(f"{name}/exact/log_normaliser", log_normaliser(dimension, kappa))
    reference.check(f"{name}/log_normaliser", log_normaliser(dimension, kappa))
    reference.check(f"{name}/log_area", torch.tensor([log_area(dimension)]))
    if dimension < 20:
        log_bessel, ratio = log_bessel_and_ratio(dimension / 2 - 1, kappa)
        lower = log_bessel.exp() * kappa.double() ** (dimension / 2 - 1)
        reference.check(f"{name}/ive_lo", lower)
        reference.check(f"{name}/ive_hi", lower * ratio * kappa)
        reference.check(f"{name}/kl", kl[:, 0])
        reference.check(f"{name}/grad_kl", grad)


@pytest.mark.parametrize("dimension", [2, 3, 5, 16, 64])
def test_equals_the_published_draws(dimension: int):
    reference = golden_vae("pythae_vmf")
    kappa, loc = reference.inputs["kappa"], reference.inputs[f"m{dimension}.loc"]
    noise = published_noise(reference.inputs, f"m{dimension}.", kappa)
    latents = published_reflection(noise, loc)
    reference.check(f"m{dimension}/z", latents)
    log_density = log_normaliser(dimension, kappa) + kappa * (latents * loc).sum(-1, keepdim=True)
    reference.check(f"m{dimension}/log_q", log_density)


def published_noise(inputs: dict[str, Tensor], prefix: str, kappa: Tensor) -> Tensor:
    """Each row's first accepted proposal."""
    tangent = inputs[f"{prefix}eps0"]
    dimension = tangent.shape[-1] + 1
    b = envelope(dimension, kappa)
    share = torch.full_like(kappa, -1)
    for round_ in range(sum(key.startswith(f"{prefix}beta") for key in inputs)):
        proposed, uniform = inputs[f"{prefix}beta{round_}"], inputs[f"{prefix}u{round_}"]
        accepted = log_acceptance(dimension, kappa, b, proposed) > uniform.log()
        share = torch.where((share < 0) & accepted, proposed, share)
    assert (share >= 0).all()
    return unit_vectors(share, b, tangent)


def published_reflection(noise: Tensor, loc: Tensor) -> Tensor:
    """Theirs is always at the bisector of the mean direction and (1, 0, ..., 0), and nothing where they are one."""
    normal = torch.eye(loc.shape[-1])[0] - loc
    turned = reflect(noise, torch.where(normal.any(-1, keepdim=True), normal, 1.0))
    return torch.where(normal.any(-1, keepdim=True), turned, noise)
