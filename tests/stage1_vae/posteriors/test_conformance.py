"""What every posterior owes its users: a table of kinds times properties.

A new kind is one row; a test fails until it has one.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import fields, replace
from typing import Any, NamedTuple, get_args

import pytest
import torch
from torch import Tensor

from stage1_vae.posteriors import (
    POSTERIORS,
    CommittedRateConfig,
    DiagonalGaussianConfig,
    FullCovarianceConfig,
    InverseAutoregressiveConfig,
    LinearFlowsConfig,
    MatrixNormalConfig,
    MatrixNormalLayer,
    Posterior,
    PosteriorConfig,
    PosteriorLayer,
    RankOneConfig,
    VonMisesFisherConfig,
    build_posterior,
)
from stage1_vae.posteriors.base import LatentShape
from stage1_vae.priors import PRIORS, StandardNormalConfig, UniformSphereConfig, VampPriorConfig
from stage1_vae.vae import VAE, VAEConfig


class Row(NamedTuple):
    config: Any
    shape: LatentShape
    changes: dict[str, Any]  # another value of each field of the config, which then is another distribution
    prior: Any = StandardNormalConfig()
    closed_kl: bool = True  # whether the KL divergence to the prior has a closed form
    normal_noise: bool = True  # whether noise is N(0, I)


SCALES = {"scale": "softplus", "smallest_scale": 0.1}
TINY_FLOW = InverseAutoregressiveConfig(steps=3, hidden=(12,), context=4)

ROWS: dict[str, Row] = {
    "diagonal": Row(DiagonalGaussianConfig(), (5,), SCALES),
    "diagonal, softplus": Row(DiagonalGaussianConfig(scale="softplus", smallest_scale=0.01), (5,), {}),
    "diagonal, of maps": Row(DiagonalGaussianConfig(), (2, 2, 3), SCALES),
    "committed rate": Row(CommittedRateConfig(), (5,), {"rate": 0.5}),
    "committed rate, of maps": Row(CommittedRateConfig(), (2, 2, 3), {}),
    "full covariance": Row(FullCovarianceConfig(), (5,), SCALES),
    "full covariance, softplus": Row(FullCovarianceConfig(scale="softplus", smallest_scale=0.01), (5,), {}),
    "full covariance of one number": Row(FullCovarianceConfig(), (1,), {}),
    "rank one": Row(RankOneConfig(), (5,), SCALES),
    "rank one, of maps": Row(RankOneConfig(), (2, 2, 3), SCALES),
    "rank one of one number": Row(RankOneConfig(), (1,), {}),
    "inverse autoregressive": Row(
        TINY_FLOW,
        (5,),
        {
            "steps": 1,
            "hidden": (12, 12),
            "activation": "tanh",
            "context": 0,
            "gate_bias": 1.0,
            **SCALES,
        },
        closed_kl=False,
    ),
    "inverse autoregressive, without a context": Row(replace(TINY_FLOW, context=0), (4,), {}, closed_kl=False),
    "inverse autoregressive of one number": Row(TINY_FLOW, (1,), {}, closed_kl=False),
    "inverse autoregressive, of maps": Row(TINY_FLOW, (2, 2, 3), {"kernel": 5}, closed_kl=False),
    "inverse autoregressive, linear": Row(replace(TINY_FLOW, hidden=()), (5,), {}, closed_kl=False),
    "planar and radial flows": Row(
        LinearFlowsConfig(flows=("planar", "radial", "planar")),
        (5,),
        {"flows": ("planar", "radial"), "activation": "elu", **SCALES},
        closed_kl=False,
    ),
    "planar flows, elu": Row(LinearFlowsConfig(flows=("planar",) * 2, activation="elu"), (3,), {}, closed_kl=False),
    "radial flows of one number": Row(LinearFlowsConfig(flows=("radial",) * 2), (1,), {}, closed_kl=False),
    "matrix-variate normal": Row(MatrixNormalConfig(height=2, width=3), (2, 2, 3), {"rank": "full"}),
    "matrix-variate normal of full rank": Row(MatrixNormalConfig(height=2, width=3, rank="full"), (2, 2, 3), {}),
    "von Mises-Fisher": Row(
        VonMisesFisherConfig(), (5,), {"concentration": 20.0}, UniformSphereConfig(), normal_noise=False
    ),
    "von Mises-Fisher on a circle": Row(
        VonMisesFisherConfig(concentration=0.5), (2,), {}, UniformSphereConfig(), normal_noise=False
    ),
}

BATCH = 3


@pytest.fixture(params=ROWS)
def row(request: pytest.FixtureRequest) -> Row:
    return ROWS[request.param]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layer_of(row: Row, config: Any = None) -> PosteriorLayer:
    torch.manual_seed(5)
    return build_posterior(config or row.config, row.shape)


def features_for(layer: PosteriorLayer, shape: LatentShape, batch: int = BATCH) -> Tensor:
    places = () if isinstance(layer, MatrixNormalLayer) else shape[1:]  # it reads one vector, of maps too
    return torch.randn(batch, layer.features, *places, generator=seeded(6))


def posterior_of(row: Row) -> Posterior:
    layer = layer_of(row)
    return layer(features_for(layer, row.shape))


def test_every_kind_has_a_row():
    assert {row.config.kind for row in ROWS.values()} == set(POSTERIORS)
    assert set(get_args(PosteriorConfig)) == {config for _, config in POSTERIORS.values()}
    assert {kind: config().kind for kind, (_, config) in POSTERIORS.items()} == {kind: kind for kind in POSTERIORS}


def test_every_field_is_changed_in_some_row():
    for kind, (_, config) in POSTERIORS.items():
        changed = {name for row in ROWS.values() if row.config.kind == kind for name in row.changes}
        shape = {"height", "width"}  # of the latents: no other distribution, but other latents
        assert changed == {field.name for field in fields(config)} - {"kind"} - shape, kind


def test_noise_is_drawn_from_the_generator(row: Row):
    posterior = posterior_of(row)
    noise = posterior.noise(4, seeded(1))
    assert noise.shape == (4, BATCH, *row.shape)
    assert noise.dtype == torch.float32
    assert torch.equal(noise, posterior.noise(4, seeded(1)))
    assert not torch.equal(noise, posterior.noise(4, seeded(2)))
    layer = layer_of(row)
    other = layer(3 * features_for(layer, row.shape))
    assert torch.equal(noise, other.noise(4, seeded(1)))  # whatever is learned


def test_draws_have_the_density_of_latents(row: Row):
    posterior = posterior_of(row)
    latents, log_density = posterior.draw(posterior.noise(4, seeded(1)))
    assert latents.shape == (4, BATCH, *row.shape)
    assert log_density.shape[:2] == (4, BATCH)
    assert log_density.ndim == 3
    torch.testing.assert_close(posterior.log_density(latents), log_density, rtol=1e-5, atol=1e-5)


def test_densities_of_draws_follow_from_those_of_noise(row: Row):
    """log q(z) = log N(noise; 0, I) - log |det dz / dnoise|, that by all the derivatives in float64."""
    if not row.normal_noise:
        pytest.skip("its noise has another density, which its own tests look at")
    layer = layer_of(row).double()
    posterior = in_float64(layer, features_for(layer, row.shape))
    noise = torch.randn(1, BATCH, *row.shape, generator=seeded(1)).double()
    jacobian = torch.autograd.functional.jacobian(lambda noise: posterior.draw(noise).latents, noise)
    _, log_density = posterior.draw(noise)
    for b in range(BATCH):
        size = noise[0, b].numel()
        own = jacobian[0, b].reshape(size, BATCH, size)
        assert not own[
            :, [other for other in range(BATCH) if other != b]
        ].any()  # images have nothing to do with others
        density = torch.distributions.Normal(0.0, 1.0).log_prob(noise[0, b]).sum() - torch.slogdet(own[:, b]).logabsdet
        torch.testing.assert_close(log_density[0, b].sum(), density, rtol=1e-10, atol=1e-10)


def in_float64(layer: PosteriorLayer, features: Tensor) -> Posterior:
    """The posterior of the same features in float64, to which layers bring no features themselves."""
    features = features.double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", Tensor.double)
        return layer(features)


def test_float32_is_near_float64(row: Row):
    layer = layer_of(row)
    features = features_for(layer, row.shape)
    exact, ours = in_float64(copy.deepcopy(layer).double(), features), layer(features)
    noise = ours.noise(4, seeded(1))
    latents, log_density = exact.draw(noise.double())
    near = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(ours.draw(noise).latents.double(), latents, **near)
    torch.testing.assert_close(ours.draw(noise).log_density.double(), log_density, **near)
    torch.testing.assert_close(ours.log_density(latents.float()).double(), exact.log_density(latents), **near)
    torch.testing.assert_close(ours.mean.double(), exact.mean, **near)


def test_gradients_are_those_of_finite_differences(row: Row):
    """Of draws and their density, and of the density of given latents, along a random direction, in float64."""
    layer = layer_of(row).double()
    features = features_for(layer, row.shape).double().requires_grad_()
    parameters = [features, *layer.parameters()]
    along = [torch.randn(part.shape, generator=seeded(8)).double() for part in parameters]
    noise = layer(features.float()).noise(2, seeded(1)).double()
    with torch.no_grad():
        given = in_float64(layer, features).draw(noise.flip(1)).latents

    def values() -> Tensor:
        posterior = in_float64(layer, features)
        latents, log_density = posterior.draw(noise)
        return torch.stack([latents.sin().sum(), log_density.square().sum(), posterior.log_density(given).sum()])

    step = 1e-6
    for place in range(3):
        gradients = torch.autograd.grad(values()[place], parameters, allow_unused=True)
        slope = sum(
            (gradient * part).sum() for gradient, part in zip(gradients, along, strict=True) if gradient is not None
        )
        with torch.no_grad():
            ends = []
            for sign in (1, -1):
                for part, direction in zip(parameters, along, strict=True):
                    part.add_(direction, alpha=sign * step)
                ends.append(values()[place])
                for part, direction in zip(parameters, along, strict=True):
                    part.sub_(direction, alpha=sign * step)
        torch.testing.assert_close(
            torch.as_tensor(slope).double(), (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-6
        )


def test_closed_kl_is_the_mean_of_what_draws_say(row: Row):
    posterior = posterior_of(row)
    prior = PRIORS[row.prior.kind][0](row.prior, row.shape)
    closed = prior.kl(posterior)
    assert (closed is not None) == row.closed_kl
    if closed is None:
        return
    with torch.no_grad():
        latents, log_density = posterior.draw(posterior.noise(20_000, seeded(1)))
        terms = log_density - prior.log_density(latents)
    assert closed.shape == terms.shape[1:]
    error = terms.std(0) / terms.shape[0] ** 0.5 + 1e-5
    assert ((terms.mean(0) - closed).abs() < 4 * error).all()  # each term of the sum
    total = terms.sum(-1)
    assert ((total.mean(0) - closed.sum(-1)).abs() < 4 * total.std(0) / total.shape[0] ** 0.5 + 1e-5).all()


def test_without_gradient_it_is_the_same_of_latents_alone(row: Row):
    layer = layer_of(row)
    features = features_for(layer, row.shape).requires_grad_()
    posterior = layer(features)
    fixed = posterior.without_gradient()
    assert type(fixed) is type(posterior)
    latents = posterior.draw(posterior.noise(2, seeded(1))).latents.detach().requires_grad_()
    torch.testing.assert_close(fixed.log_density(latents), posterior.log_density(latents))
    by_latents = torch.autograd.grad(posterior.log_density(latents).sum(), latents)[0]
    density = fixed.log_density(latents).sum()
    torch.testing.assert_close(torch.autograd.grad(density, latents)[0], by_latents)
    assert by_latents.any()
    with torch.enable_grad():
        depends = fixed.log_density(latents.detach())
    assert not depends.requires_grad


def test_the_mean_is_like_latents(row: Row):
    posterior = posterior_of(row)
    assert posterior.mean.shape == (BATCH, *row.shape)
    assert torch.isfinite(posterior.log_density(posterior.mean[None])).all()


def test_every_field_of_a_config_changes_the_distribution(row: Row):
    def said(config: Any) -> Tensor:
        layer = layer_of(row, config)
        posterior = layer(features_for(layer, row.shape))
        latents = torch.nn.functional.normalize(torch.randn(1, BATCH, *row.shape, generator=seeded(3)), dim=2)
        return posterior.log_density(latents).sum(-1)

    for name, value in row.changes.items():
        assert not torch.allclose(said(row.config), said(replace(row.config, **{name: value})), atol=1e-3), name


def test_under_autocast_it_is_the_same(row: Row):
    layer = layer_of(row)
    features = features_for(layer, row.shape)
    posterior = layer(features)
    noise = posterior.noise(4, seeded(1))
    expected = posterior.draw(noise)
    with torch.autocast("cpu", torch.bfloat16):
        again = layer(features)
        latents, log_density = again.draw(noise)
        density = again.log_density(expected.latents)
    torch.testing.assert_close(latents, expected.latents, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(log_density, expected.log_density, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(density, expected.log_density, rtol=1e-5, atol=1e-5)


def test_a_saved_model_has_the_same_posterior(row: Row):
    if len(row.shape) != 1:
        pytest.skip("dense encoders give vectors")
    torch.manual_seed(0)
    model = VAE(VAEConfig(latents=row.shape[0], posterior=row.config, prior=row.prior), (4, 4))
    arguments = json.loads(json.dumps(model.arguments()))
    again = VAE.from_arguments(**arguments)
    assert again.config == model.config
    again.load_state_dict(model.state_dict())
    images = torch.rand(2, 1, 4, 4, generator=seeded(1)) * 2 - 1
    noise = model.posterior(images).noise(3, seeded(2))
    assert torch.equal(model(images, noise=noise).log_weights, again(images, noise=noise).log_weights)
    assert torch.isfinite(model(images, noise=noise).log_weights).all()


def test_a_mixture_of_posteriors_is_a_prior(row: Row):
    if len(row.shape) != 1:
        pytest.skip("dense encoders give vectors")
    torch.manual_seed(0)
    prior = VampPriorConfig(components=4, start="random")
    model = VAE(VAEConfig(latents=row.shape[0], posterior=row.config, prior=prior), (4, 4))
    with torch.no_grad():
        latents = model.prior.sample(3, seeded(1))[:, None]
        one_by_one = [
            model.prior.components(torch.tensor([number])).log_density(latents).sum(-1, keepdim=True)
            for number in range(4)
        ]
        expected = torch.stack(one_by_one).logsumexp(0) - math.log(4)
        torch.testing.assert_close(model.prior.log_density(latents), expected, rtol=1e-4, atol=1e-4)
