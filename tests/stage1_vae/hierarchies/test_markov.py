"""Markov hierarchies whose log-likelihood is known, and what sets the two ways of inference apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from common.errors import UserError
from stage1_vae.evaluation import judge
from stage1_vae.hierarchies.deep_latent_gaussian import DeepLatentGaussian, DeepLatentGaussianConfig
from stage1_vae.hierarchies.dense import GaussianLayer
from stage1_vae.hierarchies.markov import MarkovConfig, MarkovHierarchy
from stage1_vae.likelihoods import Likelihood

SIZE, SCALE, LATENTS = (2, 3), 1.0, (4, 3, 2)


class Normal(Likelihood):
    """N(outputs, SCALE^2 I)."""

    discrete, outputs = False, 1

    def log_prob(self, outputs: Tensor, images: Tensor) -> Tensor:
        return torch.distributions.Normal(outputs, SCALE).log_prob(images).sum(dim=(-3, -2, -1))


def linear(layers: int, inference: str) -> MarkovHierarchy:
    """Hidden layers let through what they are given; scales of the priors are constants."""
    torch.manual_seed(3)
    config = MarkovConfig(latents=LATENTS[:layers], hidden=LATENTS[:layers], inference=inference)
    model = MarkovHierarchy(config, SIZE)
    model.likelihood = Normal(None, 1)
    model.down = nn.ModuleList(nn.Identity() for _ in range(layers))
    for prior in model.priors:
        prior.linear.weight.data *= 1.2
        prior.linear.weight.data[prior.linear.out_features // 2 :] = 0
    for recognition in model.recognition:  # as wide as what they stand for, or wider
        recognition.linear.weight.data *= 0.3
        recognition.linear.bias.data[recognition.linear.out_features // 2 :] += 0.5
    return model.eval()


def exact(model: MarkovHierarchy) -> torch.distributions.MultivariateNormal:
    """p(x): z_L ~ N(0, I), z_l ~ N(A z_{l+1} + a, S), x ~ N(B z_1 + b, SCALE^2 I), marginalised from the top down."""
    mean = torch.zeros(model.config.latents[-1]).double()
    covariance = torch.eye(len(mean)).double()
    steps = [parted(prior) for prior in reversed(model.priors)]
    noise = SCALE**2 * torch.eye(6).double()
    for weight, bias, own in [*steps, (model.output.weight.double(), model.output.bias.double(), noise)]:
        mean, covariance = weight @ mean + bias, weight @ covariance @ weight.T + own
    return torch.distributions.MultivariateNormal(mean, covariance)


def parted(prior: GaussianLayer) -> tuple[Tensor, Tensor, Tensor]:
    """Weight and bias of the mean, and the covariance."""
    weight, _ = prior.linear.weight.double().chunk(2)
    bias, log_variance = prior.linear.bias.double().chunk(2)
    return weight, bias, torch.diag(log_variance.exp())


@pytest.mark.parametrize("inference", ["bottom_up", "top_down"])
@pytest.mark.parametrize("layers", [1, 2, 3])
@torch.no_grad()
def test_importance_sampling_finds_the_exact_log_likelihood_of_a_linear_hierarchy(inference: str, layers: int):
    model = linear(layers, inference)
    images = exact(model).sample((3,)).float().view(3, 1, *SIZE)
    figures = judge(model, images, range(3), draws=20_000, bounds=(1,))
    apart = figures.log_p - exact(model).log_prob(images.flatten(1).double())
    assert figures.log_p_error.max() < 0.15
    assert (apart.abs() < 4 * figures.log_p_error).all()
    assert (figures.elbo < figures.log_p).all()


def test_the_two_ways_of_inference_have_one_generative_model():
    """The same seed of latents gives the same images where the generator's weights are the same."""
    up, down = (MarkovHierarchy(MarkovConfig(inference=way), (4, 4)) for way in ("bottom_up", "top_down"))
    weights = up.state_dict()
    down.load_state_dict(
        {name: tensor for name, tensor in weights.items() if name.split(".")[0] in ("down", "priors", "output")},
        strict=False,
    )
    drawn = [model.sample(3, torch.Generator().manual_seed(1)) for model in (up, down)]
    assert torch.equal(*drawn)


def test_a_chain_of_draws_hides_the_image_from_the_layers_above():
    """Of bottom-up inference the second layer sees the first one's draw alone: of the same draw, whatever the image, it
    is the same. The ladder's sees the image."""
    images, noise = torch.rand(2, 1, 4, 4) * 2 - 1, torch.randn(1, 2, 70)
    for way, same in (("bottom_up", True), ("top_down", False)):
        model = MarkovHierarchy(MarkovConfig(inference=way), (4, 4)).eval()
        with torch.no_grad():
            first = model(images, noise=noise).latents[1][0]  # z_1, next to the image
            features = model.features(images)
            means = features[0]  # of z_1
            moved = noise.clone()
            scale = features[1].exp()
            if way == "bottom_up":  # noise by which the second image's z_1 is that of the first
                moved[0, 1, 20:] = (first[0] - means[1]) / scale[1]
                moved[0, 1, :20] = moved[0, 0, :20]
            groups = model(images, noise=moved).latents[0][0]  # z_2
        assert torch.allclose(groups[0], groups[1], atol=1e-5) == same


def test_products_are_as_narrow_as_the_prior_at_most_and_rank_one_posteriors_are_correlated():
    torch.manual_seed(0)
    images = torch.rand(2, 1, 4, 4) * 2 - 1
    narrow, rank_one = (
        DeepLatentGaussian(DeepLatentGaussianConfig(posterior=kind), (4, 4)).eval() for kind in ("product", "rank_one")
    )
    with torch.no_grad():
        (described, *_) = narrow.features(images)
        mean, raw = described.chunk(2, dim=1)
        vague = narrow.posterior(torch.cat([mean, raw + 40], dim=1))
        sure = narrow.posterior(torch.cat([mean, raw - 40], dim=1))
        assert (narrow.posterior(described).scale < 1).all()
        torch.testing.assert_close(vague.mean, torch.zeros_like(mean))
        torch.testing.assert_close(vague.scale, torch.ones_like(mean))
        torch.testing.assert_close(sure.mean, mean)
        described = rank_one.features(images[:1])[-1]  # of the top layer, 20 latents
        described[:, 40:] = 1.0  # u
        latents = rank_one.posterior(described).draw(torch.randn(20_000, 1, 20)).latents[:, 0]
    assert (torch.corrcoef(latents.T) - torch.eye(20)).min() < -0.04  # precisions add u u^T: about -1/21


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": (4, 3), "hidden": (4,)}, "expected as many numbers in both"),
        ({"latents": (), "hidden": ()}, r"model.latents=\(\), expected"),
        ({"latents": (4, 0), "hidden": (4, 4)}, r"model.latents=\(4, 0\), expected"),
        ({"hidden_layers": 0}, "model.hidden_layers=0, expected at least 1"),
        ({"channels": 0}, "model.channels=0, expected at least 1"),
    ],
)
@pytest.mark.parametrize("config", [MarkovConfig, DeepLatentGaussianConfig])
def test_layers_that_cannot_be_are_refused(config: type, changes: dict[str, object], message: str):
    with pytest.raises(UserError, match=message):
        config(**changes)


def test_ways_that_there_are_not_are_refused():
    for config, changes in (
        (MarkovConfig, {"inference": "sideways"}),
        (MarkovConfig, {"variance": "relu"}),
        (DeepLatentGaussianConfig, {"posterior": "full"}),
    ):
        with pytest.raises(UserError, match="expected "):
            config(**changes)
